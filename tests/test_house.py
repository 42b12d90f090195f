"""House rules that no linter knows: imports go down, functions are short, every command answers --help."""

import ast
import re
import runpy
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from support.files import ROOT

# From the ground up. A file may import from its own layer and from those below it.
LAYERS = (
    {"support"},
    {"optimizer", "pcgrad"},
    {"kernels"},  # below config: mathematics on memory knows no tasks
    {"config"},
    {"evaluation", "base_bert", "tokenizer"},
    {"datasets", "bert", "heads"},
    {"training"},
    {"reporting"},
    {"prepare_submit", "results_table"},
    {"multitask_classifier"},
    {"benchmarks"},
)
FLOOR = {name: floor for floor, names in enumerate(LAYERS) for name in names} | {"data": -1}
PACKAGES = ("benchmarks", "data", "kernels", "reporting", "support", "training")
TOP_LEVEL = {name for names in LAYERS for name in names} - set(PACKAGES)
MAX_LINES = 80  # of a function, docstring included


def python_files(*folders: str) -> list[Path]:
    """The project's files, relative to it; a data folder may be a link to a disk full of other things."""
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path.relative_to(ROOT) for path in [*sorted(ROOT.glob("*.py")), *found]]


def read_tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts)


CODE = {module_name(path): path for path in python_files(*PACKAGES) if path.name != "__init__.py"}
COMMANDS = [name for name, path in CODE.items() if "__main__" in (ROOT / path).read_text(encoding="utf-8")]


class Imports(ast.NodeVisitor):
    """Our own modules that a file imports, also inside functions, but not those it needs for types only."""

    def __init__(self):
        self.found = set()

    def visit_If(self, node):
        if "TYPE_CHECKING" not in ast.unparse(node.test):
            self.generic_visit(node)

    def visit_Import(self, node):
        self.found |= {alias.name for alias in node.names} & set(CODE)

    def visit_ImportFrom(self, node):
        assert not node.level, "a relative import"
        self.found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)} & set(CODE)


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    found = {}
    for name, path in CODE.items():
        visitor = Imports()
        visitor.visit(read_tree(path))
        found[name] = visitor.found
    return found


def test_no_import_goes_up(imports):
    floor = {name: FLOOR.get(name.split(".")[0]) for name in CODE}
    assert None not in floor.values(), "a file without a layer"
    assert not [
        f"{name} imports {other}" for name in CODE for other in imports[name] if floor[other] > floor[name]
    ]


def test_no_circle(imports):
    TopologicalSorter(imports).prepare()  # its CycleError names the circle


def test_only_benchmarks_import_a_command(imports):
    assert not [
        f"{name} imports {other}"
        for name in CODE
        for other in imports[name] & (TOP_LEVEL & set(COMMANDS))
        if not name.startswith("benchmarks.")
    ]


def test_the_top_level_holds_what_it_should():
    assert {path.stem for path in ROOT.glob("*.py")} == TOP_LEVEL


def test_every_file_says_what_it_holds():
    files = python_files(*PACKAGES, "tests")
    assert not [
        str(path) for path in files if path.name != "__init__.py" and not ast.get_docstring(read_tree(path))
    ]


def test_functions_are_short():
    too_long = {
        f"{path}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for path in python_files(*PACKAGES, "tests")
        for node in ast.walk(read_tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno >= MAX_LINES
    }
    assert not too_long


# --- commands -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("name", [*COMMANDS, "tests.campaign.faults"])
def test_help(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ")


def test_help_imports_no_model():
    code = """
import runpy, sys
sys.argv = ["multitask_classifier.py", "--help"]
try:
    runpy.run_path("multitask_classifier.py", run_name="__main__")
except SystemExit:
    print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "training.flags" in loaded and "--lr" in done.stdout
    assert not {"bert", "base_bert", "tokenizer", "training.checkpoint", "training.run_folder"} & loaded


def test_readme_lists_every_command():
    rows = re.findall(r"^\|.*`python .*\|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    if not rows:
        pytest.skip("the README has no table of commands yet")
    listed = "\n".join(rows)
    assert not [name for name in COMMANDS if f"-m {name}" not in listed and f"python {name}.py" not in listed]

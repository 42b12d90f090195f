"""House rules that no linter knows: imports go down, functions are short, every command answers --help."""

import ast
import re
import runpy
import signal
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from support.files import ROOT
from tests.tiny import fresh_modules

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


TEXTS = {path: (ROOT / path).read_text(encoding="utf-8") for path in python_files(*PACKAGES, "tests")}
CODE = {
    ".".join(path.with_suffix("").parts): path
    for path in TEXTS
    if path.parts[0] != "tests" and path.name != "__init__.py"
}
COMMANDS = [name for name, path in CODE.items() if "__main__" in TEXTS[path]]


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
def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(text) for path, text in TEXTS.items()}


@pytest.fixture(scope="module")
def imports(trees) -> dict[str, set[str]]:
    visitors = {name: Imports() for name in CODE}
    for name, visitor in visitors.items():
        visitor.visit(trees[CODE[name]])
    return {name: visitor.found for name, visitor in visitors.items()}


def test_imports_go_down_and_only_benchmarks_import_a_command(imports):
    floor = {name: FLOOR.get(name.split(".")[0]) for name in CODE}
    assert None not in floor.values(), "a file without a layer"
    pairs = [(name, other) for name in CODE for other in imports[name]]
    assert not [f"{name} imports {other}" for name, other in pairs if floor[other] > floor[name]]
    TopologicalSorter(imports).prepare()  # its CycleError names the circle
    commands = TOP_LEVEL & set(COMMANDS)
    assert {name.split(".")[0] for name, other in pairs if other in commands} <= {"benchmarks"}
    assert {path.stem for path in ROOT.glob("*.py")} == TOP_LEVEL


def test_files_say_what_they_hold_and_functions_are_short(trees):
    assert not [
        str(path) for path in trees if path.name != "__init__.py" and not ast.get_docstring(trees[path])
    ]
    assert not {
        f"{path}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno >= MAX_LINES
    }


# --- commands -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("name", [*COMMANDS, "tests.campaign.faults"])
def test_help(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    assert end.value.code == 0
    typed = f"-m {name}" if "." in name else f"{name}.py"
    assert capsys.readouterr().out.startswith(f"usage: python {typed} ")


def test_help_imports_no_model(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["multitask_classifier.py", "--help"])
    with fresh_modules():
        with pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / "multitask_classifier.py"), run_name="__main__")
        loaded = set(sys.modules)
    assert "training.flags" in loaded and "--lr" in capsys.readouterr().out
    assert not {"bert", "base_bert", "tokenizer", "training.checkpoint", "training.run_folder"} & loaded


def test_ctrl_c_during_the_imports_ends_every_command_without_a_traceback():
    code = """
import builtins, runpy, signal, sys
real = builtins.__import__
def stop(name, *rest, **options):
    if name in ("numpy", "torch"):
        signal.raise_signal(signal.SIGINT)
    return real(name, *rest, **options)
builtins.__import__ = stop
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""
    for name in COMMANDS:
        done = subprocess.run([sys.executable, "-c", code, name], cwd=ROOT, capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (-signal.SIGINT, b""), name


def test_readme_lists_every_command():
    rows = re.findall(r"^\|.*`python .*\|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    listed = "\n".join(rows)
    assert not [name for name in COMMANDS if f"-m {name}" not in listed and f"python {name}.py" not in listed]

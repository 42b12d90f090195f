"""Each fault of the prediction files is found; the zip holds them, all of the code and nothing else."""

import importlib
import json
import os
import re
import shutil
import socket
import sys
import zipfile
from pathlib import Path

import pytest

from config import DEFAULT_TASKS, TASKS
from datasets import read_rows
from evaluation import format_predictions
from reporting.submission import main
from support.files import ROOT
from tests.tiny import fresh_modules

PREDICTIONS = {
    f"predictions/{task}-{split}-output.csv" for task in DEFAULT_TASKS for split in ("dev", "test")
}


def write_predictions(place, style, ending):
    """Good predictions of all tasks, alternately 0 and 1."""
    folder = place / "run" / "predictions"
    folder.mkdir(parents=True, exist_ok=True)
    for task in DEFAULT_TASKS:
        for split in ("dev", "test"):
            spec = TASKS[task]
            ids = read_rows(place / "data" / spec.files[split], spec, split).ids
            text = format_predictions(spec, ids, [number % 2 for number in range(len(ids))], style)
            (folder / f"{task}-{split}-{ending}.csv").write_text(text)
    return folder


@pytest.fixture
def place(tmp_path, data_dir):
    """Data, and a run folder with six good prediction files."""
    shutil.copytree(data_dir, tmp_path / "data")
    (write_predictions(tmp_path, "starter", "output") / "notes.txt").write_text("not to be handed in")
    return tmp_path


def run(place, *flags, folder="run"):
    paths = ["--data_dir", str(place / "data"), "--output", str(place / "x.zip")]
    return main([str(place / folder), *paths, *flags])


def names_in_zip(place):
    names = zipfile.ZipFile(place / "x.zip").namelist()
    assert len(set(names)) == len(names)
    return {name for name in names if name.startswith("predictions/")}, {n for n in names if n[:5] != "predi"}


# --- what is handed in ------------------------------------------------------------------------------------


def test_good_folder_becomes_a_zip(place, capsys):
    assert run(place) == 0
    predictions, code = names_in_zip(place)
    assert predictions == PREDICTIONS
    assert "6 prediction files are complete and legal" in capsys.readouterr().out
    for folder in ("kernels", "support", "training", "reporting", "benchmarks"):
        expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.py")}
        assert len(expected) > 1 and expected <= code, folder
    assert {path.name for path in ROOT.glob("*.py")} <= code
    assert "reporting/templates/report.html.jinja" in code
    assert all(re.fullmatch(r"[\w/]+\.py|reporting/templates/[\w.]+\.jinja", name) for name in code)


def test_code_in_the_zip_runs_on_its_own(place, monkeypatch, capsys):
    """Whatever a command imports is there: the page of a table and the flags of training.

    The zip itself was made from another folder, under its own name.
    """
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    assert main(["../run", "--data_dir", "../data"]) == 0
    with zipfile.ZipFile("cs224n_default_final_project_submission.zip") as archive:
        archive.extractall(place / "handed in")
    elsewhere = [folder for folder in sys.path if Path(folder or ".").resolve() != ROOT]
    monkeypatch.setattr(sys, "path", [str(place / "handed in"), *elsewhere])
    with fresh_modules():
        imported = [importlib.import_module(name) for name in ("results_table", "multitask_classifier")]
        imported.append(importlib.import_module("reporting.pages"))
        imported[-1].MARKDOWN.get_template("table.md.jinja")
        with pytest.raises(SystemExit):
            imported[1].main(["--help"])
    assert all(module.__file__.startswith(str(place / "handed in")) for module in imported)
    assert "--para_head" in capsys.readouterr().out


@pytest.mark.parametrize("folder", ["run", "run/predictions"])
def test_minilm_is_forbidden_also_at_second_hand(place, folder, capsys, monkeypatch):
    monkeypatch.chdir(place)

    def said(pretrained):
        args = {"args": {"pretrained": pretrained}, "commands": [], "data": {}}
        (place / "run" / "args.json").write_text(json.dumps(args))
        assert main([folder, "--data_dir", "data", "--check_only"]) == 0
        return "forbids MiniLM" in capsys.readouterr().out

    assert said("minilm") and not said("bert-base-uncased") and not said("further")
    (place / "further").mkdir()
    args = {"args": {"pretrained": "minilm"}, "commands": [], "data": {}}
    (place / "further" / "args.json").write_text(json.dumps(args))
    assert said("further")  # an encoder that was trained further
    (place / "further" / "args.json").write_text("{")
    assert not said("further") and not said("run")  # nothing is known; a run that names itself


def test_handout_style_and_check_only(place):
    for path in (place / "run" / "predictions").glob("*-output.csv"):
        path.unlink()
    write_predictions(place, "handout", "out")
    assert run(place, "--check_only") == 0
    assert not (place / "x.zip").exists()


def test_names_in_the_zip_do_not_depend_on_folders(place):
    (place / "run").rename(place / "..run\n")
    assert run(place, folder="data/../..run\n") == 0
    assert names_in_zip(place)[0] == PREDICTIONS


def test_links_are_not_written_through_and_an_earlier_zip_is_replaced(place):
    (place / "elsewhere").write_text("as it was")
    (place / f".x.zip.{socket.gethostname()}.{os.getpid()}.unfinished").symlink_to("elsewhere")
    for path in (place / "run" / "predictions").iterdir():
        os.utime(path, (0, 0))  # from before 1980, which zip files cannot say
    assert run(place) == 0
    assert (place / "elsewhere").read_text() == "as it was"
    assert not (place / "x.zip").is_symlink() and zipfile.is_zipfile(place / "x.zip")
    # An earlier submission is replaced.
    first = (place / "x.zip").read_bytes()
    path = place / "run" / "predictions" / "sst-dev-output.csv"
    path.write_text(path.read_text().replace(", 1 ", ", 2 "))
    assert run(place) == 0
    assert (place / "x.zip").read_bytes() != first


def test_nothing_else_is_replaced(place, one_line):
    with zipfile.ZipFile(place / "mine.zip", "w") as archive:
        archive.writestr("minbert-main/multitask_classifier.py", "years of work")
    (place / "link.zip").symlink_to("data/sts-train.csv")
    for name in ("data/sts-train.csv", "run/predictions/sst-dev-output.csv", "mine.zip", "link.zip"):
        path = place / name
        before = path.read_bytes()
        assert run(place, "--output", str(path)) == 2
        assert f"--output {path}: exists and is no submission" in one_line() and path.read_bytes() == before
        assert run(place, "--output", str(path), "--check_only") == 0
    assert run(place, "--output", str(place / "data" / "ids-sst-dev.csv" / "x.zip")) == 2
    assert "ids-sst-dev.csv" in one_line()


# --- what is refused --------------------------------------------------------------------------------------


def change_line(number, new):
    def change(path):
        lines = path.read_text().splitlines(keepends=True)
        lines[number : number + 1] = [new] if new else []
        path.write_text("".join(lines))

    return change


def add(line):
    return lambda path: path.write_text(path.read_text() + (line or path.read_text().split("\n")[1]) + "\n")


def replace_by(make):
    return lambda path: (path.unlink(), make(path))


NEITHER = "neither sst-test-output.csv nor sst-test-out.csv"
FAULTS = [
    (lambda path: path.unlink(), NEITHER),
    (lambda path: path.with_name("sst-test-out.csv").write_text("x"), "both"),
    (lambda path: path.write_text(""), ":1: header"),
    (change_line(0, "id,sentiment\n"), ":1: header"),
    (change_line(3, ""), "have no prediction"),
    (add("abc , 1 "), "not in the data"),
    (add(""), ":11: id"),  # a row twice
    (change_line(2, "abc , 5 \n"), ":3: value is 5"),
    (replace_by(os.mkfifo), NEITHER),
    (replace_by(os.mkdir), NEITHER),
    (replace_by(lambda path: path.symlink_to("/dev/zero")), NEITHER),
    (replace_by(lambda path: path.symlink_to("notes.txt")), "header is 'not to be handed in'"),
]


@pytest.mark.parametrize(("change", "message"), FAULTS)
def test_each_fault_is_one_line_and_no_zip(place, change, message, one_line):
    change(place / "run" / "predictions" / "sst-test-output.csv")
    assert run(place) == 2
    error = one_line()
    assert "sst-test" in error and message in error and not (place / "x.zip").exists()


def test_all_faults_are_listed(place, capsys):
    for name in ("sst-dev-output.csv", "sts-test-output.csv"):
        (place / "run" / "predictions" / name).unlink()
    assert run(place) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_collapse_is_a_warning(place, capsys):
    path = place / "run" / "predictions" / "para-test-output.csv"
    path.write_text(path.read_text().replace(" 1.0 ", " 0.0 "))
    assert run(place) == 0
    assert "collapsed" in capsys.readouterr().out

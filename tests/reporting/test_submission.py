"""The checker finds each fault, and the zip holds the needed files and nothing else."""

import os
import re
import zipfile

import pytest

from config import DEFAULT_TASKS, TASKS
from datasets import read_rows
from evaluation import format_predictions
from prepare_submit import main
from tests.tiny import make_data


@pytest.fixture
def place(tmp_path):
    """Data, and a run folder with six good prediction files."""
    make_data(tmp_path / "data")
    folder = tmp_path / "run" / "predictions"
    folder.mkdir(parents=True)
    for task in DEFAULT_TASKS:
        for split in ("dev", "test"):
            spec = TASKS[task]
            ids = read_rows(tmp_path / "data" / spec.files[split], spec, split).ids
            predictions = [number % 2 for number in range(len(ids))]
            (folder / f"{task}-{split}-output.csv").write_text(
                format_predictions(spec, ids, predictions, "starter")
            )
    (folder / "notes.txt").write_text("not to be handed in")
    return tmp_path


def run(place, *flags):
    return main(
        [str(place / "run"), "--data_dir", str(place / "data"), "--output", str(place / "x.zip"), *flags]
    )


def test_good_folder_becomes_a_zip(place, capsys):
    assert run(place) == 0
    names = zipfile.ZipFile(place / "x.zip").namelist()
    predictions = {
        f"predictions/{task}-{split}-output.csv" for task in DEFAULT_TASKS for split in ("dev", "test")
    }
    assert {name for name in names if "/" in name} == predictions
    assert {"multitask_classifier.py", "bert.py"} <= set(names)
    assert all(name.endswith(".py") for name in names if "/" not in name)
    assert "6 prediction files are complete and legal" in capsys.readouterr().out


def test_handout_style_and_check_only(place):
    folder = place / "run" / "predictions"
    for path in folder.glob("*-output.csv"):
        task, split = path.name.split("-")[:2]
        spec = TASKS[task]
        ids = read_rows(place / "data" / spec.files[split], spec, split).ids
        path.unlink()
        text = format_predictions(spec, ids, [number % 2 for number in range(len(ids))], "handout")
        (folder / f"{task}-{split}-out.csv").write_text(text)
    assert run(place, "--check_only") == 0
    assert not (place / "x.zip").exists()


def change_line(number, new):
    def change(path):
        lines = path.read_text().splitlines(keepends=True)
        lines[number : number + 1] = [new] if new else []
        path.write_text("".join(lines))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "neither"),
        (lambda path: path.with_name("sst-test-out.csv").write_text("x"), "both"),
        (lambda path: path.write_text(""), ":1: header"),
        (change_line(0, "id,sentiment\n"), ":1: header"),
        (change_line(3, ""), "have no prediction"),
        (change_line(3, "abc , 1 \n"), "have no prediction"),
        (lambda path: path.write_text(path.read_text() + "abc , 1 \n"), "not in the data"),
        (
            lambda path: path.write_text(path.read_text() + path.read_text().split("\n")[1] + "\n"),
            "second time",
        ),
        (change_line(2, "abc , 5 \n"), ":3: value is 5"),
        (change_line(2, "abc , 1.5 \n"), ":3: value is 1.5"),
        (change_line(2, "abc , nan \n"), ":3: value is nan"),
        (change_line(2, "abc\n"), ":3: row is"),
    ],
)
def test_each_fault_is_one_line_and_no_zip(place, change, message, capsys):
    change(place / "run" / "predictions" / "sst-test-output.csv")
    assert run(place) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "sst-test" in error and message in error
    assert not (place / "x.zip").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (os.mkfifo, "neither sst-test-output.csv nor sst-test-out.csv"),
        (os.mkdir, "neither sst-test-output.csv nor sst-test-out.csv"),
        (lambda path: path.symlink_to("/dev/zero"), "neither sst-test-output.csv nor sst-test-out.csv"),
        (lambda path: path.symlink_to("../../secret"), "header is 'not a prediction'"),
    ],
)
def test_what_is_no_prediction_file_is_not_handed_in(place, make, message, capsys):
    (place / "secret").write_text("not a prediction")
    path = place / "run" / "predictions" / "sst-test-output.csv"
    path.unlink()
    make(path)
    assert run(place) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    assert not (place / "x.zip").exists()


def test_links_are_not_written_through(place):
    (place / "elsewhere").write_text("as it was")
    for name in ("x.zip", "x.zip.tmp"):
        (place / name).symlink_to("elsewhere")
    assert run(place) == 0
    assert (place / "elsewhere").read_text() == "as it was"
    assert not (place / "x.zip").is_symlink() and zipfile.is_zipfile(place / "x.zip")


def test_names_in_the_zip_do_not_depend_on_folders(place):
    (place / "run").rename(place / "..run\n")
    flags = ["--data_dir", str(place / "data"), "--output", str(place / "x.zip")]
    assert main([str(place / "data" / ".." / "..run\n"), *flags]) == 0
    names = zipfile.ZipFile(place / "x.zip").namelist()
    assert all(
        re.fullmatch(r"\w+\.py|predictions/(sst|para|sts)-(dev|test)-output\.csv", name) for name in names
    )
    assert len(set(names)) == len(names)


def test_files_from_before_1980(place):
    for path in (place / "run" / "predictions").iterdir():
        os.utime(path, (0, 0))
    assert run(place) == 0


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


def test_output_that_cannot_be_written(place, capsys):
    assert run(place, "--output", str(place / "data" / "ids-sst-dev.csv" / "x.zip")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "ids-sst-dev.csv" in error

"""The class's Part 1: two single-task runs, their file names, and the zip of both parts."""

import signal
import sys
import threading
import time

import pytest

import multitask_classifier
from evaluation import part1_name
from reporting import part1
from reporting.submission import main as submit
from tests.tiny import make_data, make_encoder

MODES = ("last-linear-layer", "full-model")
FILES = {
    f"{mode}-{task}-{split}-out.csv"
    for mode in MODES
    for task in ("sst", "cfimdb")
    for split in ("dev", "test")
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with an encoder and data, in which commands run in this process, without plots."""
    make_encoder(tmp_path / "encoder")
    make_data(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(multitask_classifier, "plot_run", lambda folder: None)
    monkeypatch.setattr(part1, "run_to_end", lambda command: multitask_classifier.main(command[2:]))
    return tmp_path


def train(*flags):
    shared = "--pretrained encoder --max_steps 2 --batch_size 4 --eval_every 2 --precision fp32 --device cpu"
    return part1.main([*shared.split(), *flags])


def test_file_names_are_the_courses():
    assert part1_name("full-model", "cfimdb", "test") == "full-model-cfimdb-test-out.csv"


@pytest.mark.slow
def test_both_modes_and_the_zip_of_both_parts(place, capsys):
    assert train() == 0 and train("--option", "finetune") == 0
    assert {path.name for path in (place / "predictions").iterdir()} == FILES
    assert (place / "predictions" / "full-model-sst-dev-out.csv").read_text().startswith("id \t Predicted_")
    assert {path.name for path in (place / "runs").iterdir()} == {
        f"{mode}-{task}" for mode in MODES for task in ("sst", "cfimdb")
    }
    # Again: nothing is trained, the files are written anew; other flags than the run's are refused.
    (place / "predictions" / "full-model-sst-dev-out.csv").unlink()
    capsys.readouterr()
    assert train("--fine-tune-mode", "full-model") == 0
    assert "step 2/2" not in capsys.readouterr().out
    assert {path.name for path in (place / "predictions").iterdir()} == FILES
    with pytest.raises(SystemExit) as end:
        train("--lr", "0.5")
    assert end.value.code == 2 and "--lr 0.5 (the run has" in capsys.readouterr().err

    flags = "--tasks sst,para,sts --output_dir run --pretrained encoder --max_steps 2 --batch_size 4"
    assert multitask_classifier.main([*flags.split(), "--device", "cpu", "--precision", "fp32"]) == 0
    assert submit(["run", "--part1", "predictions", "--output", "x.zip"]) == 0
    said = capsys.readouterr().out
    assert "14 prediction files are complete and legal" in said and "MiniLM" not in said
    (place / "predictions" / "full-model-sst-dev-out.csv").unlink()
    assert submit(["run", "--part1", "predictions", "--output", "x.zip"]) == 2
    assert "full-model-sst-dev-out.csv: no such file" in capsys.readouterr().err


def test_the_first_error_ends_the_command(place, capsys):
    with pytest.raises(SystemExit) as end:
        train("--lr", "no")
    assert end.value.code == 2 and not (place / "predictions").exists()


SLEEPER = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *arguments: sys.exit(7))
pathlib.Path(sys.argv[1]).touch()
time.sleep(100)
"""


def test_kill_reaches_the_command_that_runs(tmp_path):
    def kill_us():
        while not (tmp_path / "ready").exists():
            time.sleep(0.05)
        signal.raise_signal(signal.SIGTERM)

    threading.Thread(target=kill_us, daemon=True).start()
    assert part1.run_to_end([sys.executable, "-c", SLEEPER, str(tmp_path / "ready")]) == 7
    assert part1.run_to_end([sys.executable, "-c", "raise SystemExit(3)"]) == 3

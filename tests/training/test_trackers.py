"""What reaches a tracker of runs, held against the run's own log; the packages are stand-ins."""

import json
import sys
from types import ModuleType

import numpy as np
import pytest

import multitask_classifier
from multitask_classifier import main
from support.errors import UserError
from tests.tiny import make_data, make_encoder
from training import trackers
from training.trackers import TRACKERS, Trackers, check_trackers, flatten

LINE = {
    "step": 20,
    "lr": 1e-4,
    "loss": {"sst": 1.5},
    "layer_conflict": {"layer.0": {"sst-para": 0.5}},
    "dev": {"tasks": {"sst": {"accuracy": 0.25}}, "mean": 0.25},
    "select_by": "mean",
    "warnings": ["sst is no better"],
}
NUMBERS = {
    "lr": 1e-4,
    "loss/sst": 1.5,
    "layer_conflict/layer.0/sst-para": 0.5,
    "dev/sst/accuracy": 0.25,
    "dev/mean": 0.25,
}


class Writer:
    """Stands in for `SummaryWriter` and for a run of trackio: notes what it is given."""

    def __init__(self, *args, **options):
        self.opened, self.numbers, self.pictures, self.closed = (args, options), {}, {}, False
        Writer.last = self

    def add_scalar(self, name, value, step):
        self.numbers[name, step] = value

    def add_image(self, name, pixels, step, dataformats):
        self.pictures[name, step] = pixels
        assert dataformats == "HWC"

    def add_text(self, name, text):
        self.text = text

    def log(self, values, step):
        for name, value in values.items():
            (self.pictures if isinstance(value, np.ndarray) else self.numbers)[name, step] = value

    def flush(self):
        pass

    def close(self):
        self.closed = True

    finish = close


@pytest.fixture(autouse=True)
def packages(monkeypatch):
    """Both packages, as far as we use them."""
    tensorboard, trackio = ModuleType("torch.utils.tensorboard"), ModuleType("trackio")
    tensorboard.SummaryWriter, trackio.init, trackio.Image = Writer, Writer, lambda pixels: pixels
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    monkeypatch.setitem(sys.modules, "trackio", trackio)


def test_flatten():
    assert flatten({name: value for name, value in LINE.items() if name != "step"}) == NUMBERS


@pytest.mark.parametrize("name", TRACKERS)
def test_tracker_gets_numbers_and_pictures(name, tmp_path):
    picture = np.zeros((2, 3, 3), np.uint8)
    opened = Trackers([name], tmp_path / "run", {"lr": 0.1, "tasks": ("sst",)}, step=10)
    opened.log(LINE, {"predictions/sst": picture})
    opened.close()
    assert Writer.last.numbers == {(name, 20): value for name, value in NUMBERS.items()}
    assert Writer.last.pictures == {("predictions/sst", 20): picture} and Writer.last.closed


def test_a_resumed_run_goes_on_in_the_same_place(tmp_path):
    Trackers(["tensorboard"], tmp_path, {}, step=10)
    assert Writer.last.opened == ((str(tmp_path / "tensorboard"),), {"purge_step": 11})
    Trackers(["tensorboard"], tmp_path, {"lr": 0.1})
    assert Writer.last.opened[1] == {"purge_step": None} and Writer.last.text == "    lr = 0.1"
    for step, resume in ((10, "allow"), (0, "never")):
        Trackers(["trackio"], tmp_path, {}, step=step)
        assert Writer.last.opened[1]["resume"] == resume


def test_missing_package_is_an_error_and_a_failing_one_a_warning(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    check_trackers([])
    with pytest.raises(UserError, match="--report_to trackio: the package trackio is not installed"):
        check_trackers(["trackio"])
    monkeypatch.setattr(Writer, "log", lambda *args, **options: 1 / 0)
    opened = Trackers(["tensorboard", "trackio"], tmp_path)
    for _ in range(2):
        opened.log(LINE)
    assert (
        capsys.readouterr().out == "warning: --report_to trackio: left out from here on (division by zero)\n"
    )
    assert list(opened.trackers) == ["tensorboard"]


@pytest.mark.slow
def test_run_reports_what_it_logs(monkeypatch, tmp_path):
    make_encoder(tmp_path / "encoder")
    make_data(tmp_path / "data")
    monkeypatch.setattr(multitask_classifier, "plot_run", lambda folder: None)
    monkeypatch.setattr(trackers, "find_spec", lambda name: True)
    places = f"--pretrained {tmp_path}/encoder --data_dir {tmp_path}/data --output_dir {tmp_path}/run"
    flags = "--max_steps 2 --eval_every 2 --log_every 1 --batch_size 4 --device cpu --report_to tensorboard"
    assert main(f"{places} {flags}".split()) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    expected = {(name, line["step"]): value for line in lines for name, value in flatten(line).items()}
    assert Writer.last.numbers == {key: value for key, value in expected.items() if key[0] != "step"}
    assert list(Writer.last.pictures) == [(f"predictions/{task}", 2) for task in ("sst", "para", "sts")]
    assert all(pixels.ndim == 3 and pixels.std() > 5 for pixels in Writer.last.pictures.values())
    assert Writer.last.closed

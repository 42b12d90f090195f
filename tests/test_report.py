"""The picture of a run is drawn from its log."""

import json

import pytest
from matplotlib import image

from report import main, plot_run

LINE = {"lr": 1e-5, "head_lr": 1e-3, "loss": {"sst": 1.5, "sts": 2.0}, "cosine": {"sst-sts": -0.1}}
SCORES = {"tasks": {"sst": {"accuracy": 0.4}, "sts": {"pearson": 0.7}}, "mean": 0.55, "mean_2024": 0.6}


def write_log(folder, *lines):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_plot_run(tmp_path):
    lines = [LINE | {"step": step} for step in (1, 2)] + [{"step": 2, "dev": SCORES}]
    write_log(tmp_path, *lines)
    picture = image.imread(plot_run(tmp_path))
    assert picture.shape[0] > 300 and picture.shape[1] > 500
    assert picture[..., :3].std() > 0.05  # not blank


def test_tasks_that_are_absent_in_some_lines(tmp_path):
    write_log(tmp_path, LINE | {"step": 1}, LINE | {"step": 2, "loss": {"sst": 1.0}, "cosine": {}})
    assert plot_run(tmp_path) == tmp_path / "curves.png"


def test_nothing_logged(tmp_path):
    write_log(tmp_path)
    assert plot_run(tmp_path) is None


@pytest.mark.parametrize(("text", "message"), [(None, "no such file"), ("{", "metrics.jsonl:1")])
def test_bad_folder_ends_in_one_line(tmp_path, text, message, capsys):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error

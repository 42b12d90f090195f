"""What a run wrote is read as written; anything else is refused in one line that says what is wrong."""

import copy

import pytest

from config import DEFAULT_TASKS
from evaluation import OVERALLS
from reporting.read_run import Facts, LogLine, Scores, Summary, check, read_facts, read_metrics, read_scores
from support.errors import UserError
from tests.fake_runs import all_tasks, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory, data_dir):
    return make_run(tmp_path_factory.mktemp("run_files") / "run", data_dir, all_tasks(1, 2, 3))


def places(value, path=()):
    """The paths of all values inside, inner ones too."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield (*path, key)
        yield from places(inner, (*path, key))


def changed(value, path, new):
    """A copy with another value at a path; without it where `new` is `...`."""
    whole = inner = copy.deepcopy(value)
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    if new is ...:
        del inner[path[-1]]
    return whole


def test_what_a_run_writes_is_read(run):
    assert [line["step"] for line in read_metrics(run)] == [0, 10, 10, 20, 20]
    assert list(read_scores(run)["dev"]["tasks"]) == list(DEFAULT_TASKS)
    assert read_facts(run)["args"]["precision"] == "fp32"
    assert set(Summary.__annotations__) == {"tasks", *OVERALLS}


def test_every_value_of_log_and_scores_is_checked(run):
    values = [(line, LogLine) for line in read_metrics(run) if "noise" not in line]
    values += [(read_scores(run), Scores)]
    for value, kind in values:
        for path in places(value):
            for new in (None, "text", True, 10**400, [1], {"x": 1}, {"sst": None}):
                with pytest.raises(UserError):
                    check(changed(value, path, new), kind)
    check({"step": 1, "new_in_another_version": [None]}, LogLine)


def test_settings_that_are_read_are_checked(run):
    paths = "args, data, versions, args pretrained, args prediction_style, args extra_data, data dev"
    for path in paths.split(", "):
        for new in (..., None, [1]):
            with pytest.raises(UserError):
                check(changed(read_facts(run), path.split(), new), Facts)


BAD_LINES = {
    '{"step": 1}\n{"step": "2"}': r"metrics\.jsonl:2: .*step is '2'; expected a whole number",
    '{"loss": {"sst": 1}}': r"jsonl:1: .*lacks step",
    '{"step": 1, "cosine": {"sst": 0.5}}': "'sst', which is not known",
    '{"step": 1, "layer_cosine": {"layer.0": {"sst-para": "x"}}}': "sst-para is 'x'; expected a number",
    '{"step": 1, "dev": {"tasks": {"sts": {"spearman": 1}}, "mean": 1, "mean_2024": 1}}': "sts lacks pearson",
    '{"step": 1, "noise": {"sst": [0.5, "x"]}}': "'x'",
    '{"step": 1, "dev": {"tasks": {}, "mean": 1, "mean_2024": 1}}': "lacks score",
    "[" * 100_000: "not a line",
    "7": "it is '7'; expected names and values",
    "\ufffd": "not a line",
}


def test_bad_line_is_named(tmp_path):
    for text, message in BAD_LINES.items():
        (tmp_path / "metrics.jsonl").write_text(text + "\n", encoding="utf-8")
        with pytest.raises(UserError, match=message) as caught:
            read_metrics(tmp_path)
        assert len(str(caught.value)) < 400 + len(str(tmp_path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("end", ['{"step": 2, "lo', '{"step": 2, "dev": ', '{"step": 2, "dev": 1'])
def test_last_line_that_was_cut_off_is_left_out(tmp_path, end):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + end)
    assert read_metrics(tmp_path) == [{"step": 1}]

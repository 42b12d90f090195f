"""What a run wrote is read as written; anything of another form is refused in one line that says what."""

import copy
import json

import pytest

from config import DEFAULT_TASKS
from reporting.read_run import FACTS, LINE, SCORES, find_misfit, read_facts, read_metrics, read_scores
from support.errors import UserError
from tests.fake_runs import all_tasks, make_run
from tests.tiny import make_data


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run_files")
    return make_run(folder / "run", make_data(folder / "data"), all_tasks(1, 2, 3))


@pytest.fixture
def values(run):
    """The form of each file and what a run wrote in it."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores, facts = (json.loads((run / name).read_text()) for name in ("scores.json", "args.json"))
    return [(LINE, line) for line in lines] + [(SCORES, scores), (FACTS, facts)]


def places(value, path=()):
    """The paths of all values inside, inner ones too."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield (*path, key)
        yield from places(inner, (*path, key))


def put(value, path, new):
    changed = copy.deepcopy(value)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return changed


def test_what_a_run_writes_fits(run, values):
    assert all(find_misfit(value, form) is None for form, value in values)
    assert len(read_metrics(run)) == 4
    assert list(read_scores(run)["dev"]["tasks"]) == list(DEFAULT_TASKS)
    assert read_facts(run)["args"]["precision"] == "fp32"


@pytest.mark.parametrize("new", [None, "text", True, [1], {"x": 1}, {"sst": None}])
def test_every_value_is_looked_at(values, new):
    """Whatever is put in place of any number or table of a log line or of the scores is noticed."""
    for form, value in values:
        for path in places(value) if form is not FACTS else ():
            assert find_misfit(put(value, path, new), form), (path, new)


def test_needed_keys(values):
    for form, value in values:
        for name in form.needed:
            lacking = {key: inner for key, inner in value.items() if key != name}
            assert find_misfit(lacking, form) == f"it lacks {name}"
    assert find_misfit({"step": 1, "new_in_another_version": [None]}, LINE) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"step": 1}\n{"step": "2"}\n', r"metrics\.jsonl:2: .*step is '2'; expected a whole number"),
        ('{"loss": {"sst": 1}}\n', r"jsonl:1: .*lacks step"),
        ('{"step": 1, "cosine": {"sst": 0.5}}\n', "'sst', which is not known"),
        (
            '{"step": 1, "layer_cosine": {"layer.0": {"sst-para": "x"}}}\n',
            "sst-para is 'x'; expected a number",
        ),
        ("[" * 100_000 + "\n", "not JSON"),
        ("7\n", "it is '7'; expected names and values"),
        ("\ufffd\n", "not JSON"),
    ],
)
def test_bad_line_is_named(tmp_path, text, message):
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_metrics(tmp_path)


def test_cut_off_line_at_the_end_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1}]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "dev": ')
    assert read_metrics(tmp_path) == [{"step": 1}]

"""Finished runs are read as written, or refused; statistics of rows by hand and against `significance`."""

import json

import numpy as np
import pytest

from config import DEFAULT_TASKS, TASKS
from reporting.significance import Interval, mean_and_sd, resampled_means, to_interval
from reporting.table_statistics import DevData, Table, read_finished_run
from support.errors import UserError
from tests.fake_runs import all_tasks, make_predictions, make_run, make_table
from tests.tiny import make_data


@pytest.fixture
def dev_data(data_dir):
    return DevData(str(data_dir))


# --- reading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["starter", "handout"])
def test_a_run_is_read_in_the_order_of_the_dev_files(tmp_path, data_dir, dev_data, style):
    run = read_finished_run(make_run(tmp_path / "run", data_dir, all_tasks(3, 2, 4), style=style), dev_data)
    for task, num_wrong in all_tasks(3, 2, 4).items():
        assert dev_data[task] is dev_data[task]  # read once
        assert run.predictions[task].tolist() == make_predictions(task, dev_data[task], num_wrong).tolist()
    r = np.corrcoef(run.predictions["sts"], dev_data["sts"].labels)[0, 1]
    expected = {"sst": 8 / 11, "para": 9 / 11, "sts": r}
    expected |= {"mean": (17 / 11 + r) / 3, "mean_2024": (17 / 11 + (r + 1) / 2) / 3}
    assert run.scores == pytest.approx(expected, abs=1e-9)
    assert [line["step"] for line in run.metrics] == [0, 10, 10, 20, 20]
    assert run.facts["versions"] == {"torch": "2.13.0"} and run.folder == tmp_path / "run"
    # A run of one task has no overall.
    run = read_finished_run(make_run(tmp_path / "one", data_dir, {"sst": 1}, style=style), dev_data)
    assert run.scores == {"sst": pytest.approx(10 / 11)} and list(run.predictions) == ["sst"]


def edit(name, change):
    """Change a JSON file of a run."""

    def apply(run):
        content = json.loads((run / name).read_text())
        change(content)
        (run / name).write_text(json.dumps(content))

    return apply


def edit_lines(change):
    """Change the lines of the sentiment predictions, except the header."""

    def apply(run):
        path = run / "predictions" / "sst-dev-output.csv"
        header, *lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join([header, *change(lines)]))

    return apply


def other_class(lines):
    row_id, value = lines[-1].split(" , ")
    return [*lines[:-1], f"{row_id} , {(int(value) + 1) % 5} \n"]


def score(task, name, value):
    return edit("scores.json", lambda scores: scores["dev"]["tasks"][task].update({name: value}))


def without(name):
    return lambda run: (run / name).unlink()


IDS = r"sst-dev-output\.csv: its ids are not those of"
# What is done to a run, what the error says; test_read_run.py has the values inside each file.
DAMAGE = {
    "one prediction changed": (edit_lines(other_class), r"sst-dev-output\.csv: gives sst 0\.818182 on .*sst"),
    "one left out": (edit_lines(lambda lines: lines[1:]), IDS),
    "another order": (edit_lines(lambda lines: lines[::-1]), IDS),
    "no predictions": (without("predictions/para-dev-output.csv"), r"para-dev-output\.csv: no such file"),
    "another score": (score("sts", "pearson", 0.5), r"output\.csv: gives sts .* scores\.json says 0\.500000"),
    "score nan": (score("sst", "accuracy", float("nan")), r"output\.csv: gives sst .* scores\.json says nan"),
    "no scores": (without("scores.json"), r"run.scores\.json: cannot be read"),
    "no log": (without("metrics.jsonl"), r"run.metrics\.jsonl: cannot be read"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_does_not_belong_together_is_refused_in_one_line(tmp_path, data_dir, dev_data, case):
    damage, message = DAMAGE[case]
    run = make_run(tmp_path / "run", data_dir, all_tasks(1, 2, 3))
    # An overall is computed from the scores: it is not read, so it cannot disagree.
    edit("scores.json", lambda scores: scores["dev"].update(mean=0.1, mean_2024=0.2))(run)
    assert read_finished_run(run, dev_data).scores["mean"] > 0.1
    damage(run)
    with pytest.raises(UserError, match=message) as caught:
        read_finished_run(run, dev_data)
    assert "\n" not in str(caught.value)


def test_other_dev_data_are_refused(tmp_path, data_dir, dev_data):
    run = make_run(tmp_path / "run", data_dir, all_tasks())
    other = make_data(tmp_path / "other", start=5)
    with pytest.raises(UserError, match=r"sst-dev-output\.csv: its ids are not those of .*other.*--data_dir"):
        read_finished_run(run, DevData(str(other)))
    labels = dev_data["sts"].labels
    labels[0] = 5 - labels[0]  # under the same id
    with pytest.raises(UserError, match=r"sts-dev-output\.csv: gives sts .* scores\.json says 1\.000000"):
        read_finished_run(run, dev_data)


# --- a table's rows ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table(tmp_path_factory, data_dir):
    """Rows with different seeds, in different orders, and one without two of the tasks."""
    rows = {
        "minbert": {0: {"sst": 0}, 1: {"sst": 1}},
        "baseline": {2: all_tasks(6, 5, 7), 0: all_tasks(4, 3, 2), 5: all_tasks(10, 10, 10)},
        "diff": {0: all_tasks(1, 2, 1), 1: all_tasks(2, 2, 3), 2: all_tasks(3, 1, 2)},
    }
    return make_table(tmp_path_factory.mktemp("runs"), data_dir, rows)


def resamples_of(table, row, seeds):
    predictions = {
        task: np.stack([table.runs[row][seed].predictions[task] for seed in seeds]) for task in DEFAULT_TASKS
    }
    labels = {task: table.dev_data[task].labels for task in DEFAULT_TASKS}
    return resampled_means(predictions, labels, TASKS, 40)


def test_intervals_are_those_of_significance(table, monkeypatch):
    assert table.values("diff", "sst") == pytest.approx([10 / 11, 9 / 11, 8 / 11])
    assert table.values("baseline", "para") == pytest.approx([6 / 11, 8 / 11, 1 / 11])  # as the runs stand
    expected = resamples_of(table, "diff", (0, 1, 2))
    assert set(expected) == {*DEFAULT_TASKS, "mean", "mean_2024"}
    for score, resamples in expected.items():
        assert table.interval("diff", score) == to_interval(resamples)
        estimate = table.interval("baseline", score).estimate
        assert estimate == pytest.approx(mean_and_sd(table.values("baseline", score))[0])
    found = table.interval("diff", "sst")
    assert found.estimate == pytest.approx(9 / 11) and found.low < found.estimate < found.high
    monkeypatch.setattr("reporting.table_statistics.resampled_means", None)  # drawn once
    assert table.interval("diff", "para") is not None


def test_difference_is_that_of_significance_over_the_shared_seeds(table):
    assert table.shared_seeds(("diff", "baseline")) == (0, 2)
    diff, baseline = (resamples_of(table, row, (0, 2)) for row in ("diff", "baseline"))
    for score in diff:
        expected = to_interval(diff[score] - baseline[score])
        assert table.combine(((1.0, "diff", score), (-1.0, "baseline", score))) == expected


def test_combination_by_hand(table):
    """Seeds 0 and 2: of 11, diff has 10 and 8 right in sst, 9 and 10 in para, baseline 7 and 5, 8 and 6."""
    signs = ((0.5, "diff"), (-0.5, "baseline"))
    terms = [(sign, row, task) for sign, row in signs for task in ("sst", "para")]
    assert table.combine(terms).estimate == pytest.approx((9 + 9.5 - 6 - 7) / 2 / 11)
    terms = [(2.0, "diff", "sst"), (-3.0, "baseline", "para")]
    assert table.combine(terms).estimate == pytest.approx((2 * 9 - 3 * 7) / 11)
    assert table.combine([(1.0, "diff", "sst"), (-1.0, "diff", "sst")]) == Interval(0, 0, 0)
    # The order of seeds, rows and terms does not matter.
    runs = {row: dict(reversed(seeds.items())) for row, seeds in reversed(table.runs.items())}
    turned = Table(runs, table.dev_data, table.num_resamples)
    terms = [(1.0, "diff", "mean"), (-1.0, "baseline", "mean")]
    found, expected = turned.combine(terms[::-1]), table.combine(terms)
    for name in ("estimate", "low", "high"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), abs=1e-12)
    assert turned.interval("diff", "sst") == table.interval("diff", "sst")
    assert turned.best_run == table.best_run


def test_seeds_and_tasks_that_rows_do_not_share(table):
    """Seed 0 is the only one that minbert, which has sentiment alone, and baseline share: 11 and 7 of 11."""
    runs = {"baseline": {5: table.runs["baseline"][5]}, "diff": table.runs["diff"]}
    apart = Table(runs, table.dev_data, 40)
    assert apart.shared_seeds(("baseline", "diff")) == ()
    assert apart.combine([(1.0, "diff", "sst"), (-1.0, "baseline", "sst")]) is None
    assert apart.interval("diff", "sst") is not None
    # Sorted: in a set, 8 comes before 1.
    runs = {"diff": {1: None, 8: None, 3: None}, "baseline": {8: None, 1: None}}
    assert Table(runs, None).shared_seeds(("diff", "baseline")) == (1, 8)

    assert table.interval("minbert", "sst").estimate == pytest.approx(10.5 / 11)
    difference = table.combine([(1.0, "minbert", "sst"), (-1.0, "baseline", "sst")])
    assert difference.estimate == pytest.approx(4 / 11)
    absent = [("minbert", score) for score in ("para", "sts", "mean", "mean_2024")]
    for row, score in [*absent, ("cosine", "sst")]:  # no run of the last
        assert table.values(row, score) == [] and table.interval(row, score) is None
        assert table.combine([(1.0, "diff", score), (-1.0, row, score)]) is None
    assert table.shared_seeds(("cosine", "diff")) == ()


# --- the best run -----------------------------------------------------------------------------------------


def test_best_run_is_the_best_seed_of_the_row_that_is_best_on_average(tmp_path, data_dir):
    """The best single run is one of cosine, whose other seed is bad; minbert has no overall."""
    rows = {
        "minbert": {0: {"sst": 0}},
        "cosine": {0: all_tasks(0, 0, 0), 1: all_tasks(9, 9, 0)},
        "diff": {0: all_tasks(3, 3, 0), 4: all_tasks(1, 1, 0), 7: all_tasks(2, 2, 0)},
    }
    assert make_table(tmp_path / "a", data_dir, rows).best_run == ("diff", 4)
    assert make_table(tmp_path / "b", data_dir, {"minbert": rows["minbert"]}).best_run is None

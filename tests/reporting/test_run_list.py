"""The list of runs: which are there, best first, their scores, and the flags that tell them apart."""

import json
import shutil

import pytest

from reporting.report import main
from reporting.run_list import format_value, list_runs, read_listed
from tests.fake_runs import all_tasks, make_run
from tests.reporting.read_pages import HtmlPage
from training.flags import get_args


@pytest.fixture(scope="module")
def made(tmp_path_factory, data_dir):
    """Three runs: two finished, one stopped at step 10 of 30; and a folder that is none."""
    place = tmp_path_factory.mktemp("several") / "my runs"
    for name, num_wrong, flags in (
        ("worse & <b>", 3, ["--seed", "1"]),
        ("better", 1, ["--seed", "2", "--surgery_tasks", "sst,sts"]),
        ("stopped", 2, ["--seed", "1"]),
    ):
        folder = make_run(place / name, data_dir, all_tasks(num_wrong))
        args = vars(get_args(["--output_dir", str(folder), *flags]))
        args |= {"lr": 1e-4, "head_lr": 1e-3, "warmup_steps": 2, "max_steps": 30}
        stored = json.loads((folder / "args.json").read_text()) | {"args": args}
        (folder / "args.json").write_text(json.dumps(stored))
    (place / "stopped" / "scores.json").unlink()
    (place / "other").mkdir()
    (place / "other" / "args.json").write_text("{}")
    (place / "better" / "report.html").write_text("its page")
    return place


@pytest.fixture
def place(made, tmp_path):
    return shutil.copytree(made, tmp_path / made.name)


def test_rows_and_columns(place):
    table, shared = list_runs(place)
    scores = ["mean", "mean_2024", "sst accuracy", "para accuracy", "sts pearson"]
    flags = ["--seed", "--surgery_tasks"]
    assert table.header == ["run", *scores, "best step", "steps", "minutes", *flags, "remark"]
    assert [row[0] for row in table.rows] == ["better", "stopped", "worse & <b>", "other"]
    better, stopped, _, other = (dict(zip(table.header, row, strict=True)) for row in table.rows)
    assert better["sst accuracy"] == f"{10 / 11:.4f}" and better["minutes"] == "0.1"
    assert better["mean"] == f"{(10 / 11 + 2) / 3:.4f}"
    assert (better["--seed"], better["--surgery_tasks"], better["remark"]) == ("2", "sst,sts", "")
    assert stopped["remark"] == "not finished: step 20 of 30; scores of its evaluations so far"
    assert stopped["best step"] == "10" and stopped["--surgery_tasks"] == ""
    assert "other/args.json" in other["remark"] and set(list(other.values())[1:-1]) == {""}
    assert "--lr 0.0001" in shared and not any(flag.startswith(("--output_dir", "--seed")) for flag in shared)


def test_scores_of_part_of_dev_are_called_so(place):
    path = place / "better" / "scores.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"final_eval": "part"}))
    assert read_listed(place / "better")["remark"] == "scores of part of dev"
    path.unlink()
    metrics = place / "better" / "metrics.jsonl"
    stored = json.loads((place / "better" / "args.json").read_text())
    stored["args"]["max_steps"] = 20  # all steps are done, but --final_eval was none
    (place / "better" / "args.json").write_text(json.dumps(stored))
    remark = "no final evaluation; scores of its evaluations so far"
    assert read_listed(place / "better")["remark"] == remark
    metrics.unlink()
    listed = read_listed(place / "better")
    assert listed["score"] is None and listed["remark"] == "not finished: step 0 of 20"


def test_a_score_that_is_no_number_comes_last_and_names_are_of_one_line(place):
    path = place / "better" / "scores.json"
    scores = json.loads(path.read_text())
    scores["dev"]["mean"] = float("nan")
    path.write_text(json.dumps(scores))
    (place / "worse & <b>").rename(place / "worse\n1")
    names = [row[0] for row in list_runs(place)[0].rows]
    assert names == ["stopped", "worse\\n1", "better", "other"]


def test_flags_are_short():
    assert format_value({"sst": 1.0, "sts": 0.5}) == "sst=1, sts=0.5"
    assert format_value({"nli": {"kind": "binary", "files": {"dev": "dev.csv"}}}) == "nli"  # --task_file


def test_page_is_one_file_and_replaces_only_itself(place, capsys):
    for _ in range(2):
        assert main([str(place)]) == 0
        assert capsys.readouterr().out == f"{place / 'runs.html'}\n"
    text = (place / "runs.html").read_text(encoding="utf-8")
    page = HtmlPage(text)
    table, _ = list_runs(place)
    assert page.rows == [table.header, *table.rows]
    assert page.links == ["better/report.html"] and page.tags.count("button") == len(table.header)
    assert "prefers-color-scheme: dark" in text and "<title>Runs in my runs</title>" in text
    (place / "runs.html").write_text("my notes")
    assert main([str(place)]) == 2
    assert "exists and is no list of runs" in capsys.readouterr().err


def test_folder_without_runs_is_an_error(tmp_path, capsys):
    (tmp_path / "last").mkdir()  # a run whose own args.json is lost
    for name in ("args.json", "SHA256SUMS"):
        (tmp_path / "last" / name).touch()
    assert main([str(tmp_path)]) == 2
    assert "no run there" in capsys.readouterr().err

"""What the files of a results table say is what was measured, whatever stands in titles, paths and commands."""

import csv
import io
import re
import shlex
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib import image

from config import DEFAULT_TASKS, OFFLINE_ENCODER
from reporting.poster import CLAIMS, ROWS
from reporting.significance import Interval, mean_and_sd
from reporting.table_pages import (
    CONTAMINATED,
    PICTURES,
    SCORES,
    claims_block,
    claims_text,
    compare_text,
    differences_block,
    draw_figures,
    judge,
    make_page,
    rows_csv,
    runs_csv,
    scores_block,
    show_interval,
    show_mean,
    table_tex,
    write_results,
)
from reporting.table_statistics import Table
from tests.fake_runs import SCRIPT, all_tasks, make_table
from tests.tiny import make_data

COMMAND = ["python", "results_table.py", "--data_dir", "data", "--seeds", "0", "1"]
NASTY = "a | b_c & 50 % `x` <b> {y} #2 $1 ~z ^ \\ **c** [e](f)"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(scope="module")
def table(tmp_path_factory, data_dir):
    rows = {
        "minbert": {0: {"sst": 0}},
        "baseline": {0: all_tasks(6, 5, 7), 1: all_tasks(4, 3, 11)},
        "diff": {0: all_tasks(1, 2, 0), 1: all_tasks(2, 4, 0)},
        "surgery_diff": {3: all_tasks(2, 2, 0)},
    }
    return make_table(tmp_path_factory.mktemp("runs"), data_dir, rows)


@pytest.fixture(scope="module")
def one_run(tmp_path_factory, data_dir):
    return make_table(tmp_path_factory.mktemp("run"), data_dir, {"diff": {0: all_tasks(1, 2, 0)}})


def cells(block):
    """Header and lines of a block's Markdown table, which must all have as many cells."""
    lines = block.markdown().splitlines()
    assert all(re.fullmatch(r"\|.*(?<!\\)\|", line) for line in lines)
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert {len(row) for row in rows} == {len(rows[0])}
    assert set(rows[1]) == {"---"}
    return rows[0], rows[2:]


# --- Markdown -----------------------------------------------------------------------------------------------


def test_numbers_as_text():
    """0.25 and 0.75: deviations of 0.25 from 0.5, sd = sqrt(2 * 0.0625 / 1) = 0.3536."""
    assert show_mean([]) == "-"
    assert show_mean([0.12349]) == "0.123"
    assert show_mean([0.25, 0.75]) == "0.500 ± 0.354"
    assert show_interval(None) == "-"
    assert show_interval(Interval(0.0126, -0.00449, 0.03)) == "+1.3 (-0.4 to +3.0)"


def test_cells_of_the_scores(table):
    header, rows = cells(scores_block(table))
    assert header[:6] == ["technique", "overall", "overall 2024", "sentiment", "paraphrase", "similarity"]
    assert header[6:] == [
        "seeds",
        "minutes a run",
        *(f"poster {name}" for name in ["overall", "sent.", "para.", "sim."]),
    ]
    found = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert list(found) == [*(ROWS[row].title for row in table.runs), "Test set (labels held out)"]
    # Seeds 0 and 1 of diff: 10 and 9 of 11, 9 and 7 of 11, r = 1; sd is the difference over sqrt(2).
    diff = found["Diff"]
    assert diff["sentiment"] == "0.864 ± 0.064"
    assert diff["paraphrase"] == "0.727 ± 0.129"
    assert diff["similarity"] == "1.000 ± 0.000"
    assert diff["overall"] == diff["overall 2024"] == "0.864 ± 0.064"  # 30 and 27 of 33
    assert diff["seeds"] == "2" and diff["minutes a run"] == "0.1"  # 8 s
    assert [diff[f"poster {name}"] for name in ("overall", "sent.", "para.", "sim.")] == (
        ["0.615", "0.520", "0.795", "0.529"]
    )
    alone = found["minBERT (sentiment alone)"]
    assert alone["sentiment"] == "1.000" and alone["seeds"] == "1"  # no spread of one seed
    assert alone["overall"] == alone["paraphrase"] == alone["similarity"] == "-"
    assert alone["poster sent."] == "0.528" and alone["poster overall"] == alone["poster sim."] == "-"
    assert rows[-1][1:] == ["-"] * 7 + ["0.640", "0.510", "0.775", "0.634"]


def test_overall_2024_maps_similarity(table):
    """r of baseline's seed 1 is -1, all rows being reflected: 15 of 22 accuracies and r, or (r + 1) / 2 = 0."""
    run = table.runs["baseline"][1]
    assert run.scores["sts"] == pytest.approx(-1)
    assert run.scores["mean"] == pytest.approx((15 / 11 - 1) / 3)
    assert run.scores["mean_2024"] == pytest.approx(15 / 11 / 3)


def test_differences_are_those_of_the_shared_seeds(table):
    header, rows = cells(differences_block(table))
    assert header[1:] == [*SCORES.values(), "seeds"]
    found = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert [row[-1] for row in rows] == ["0", "0 1", "-"]
    assert list(found) == [
        "minBERT (sentiment alone) - Baseline",
        "Diff - Baseline",
        "Gradient surgery + diff - Diff",
    ]
    # Sentiment: 19 - 12 of 22 right; seed 0 alone 11 - 5 of 11; surgery has a seed that diff has not.
    assert found["Diff - Baseline"]["sentiment"].startswith("+31.8 (")
    assert found["minBERT (sentiment alone) - Baseline"]["sentiment"].startswith("+54.5 (")
    assert found["minBERT (sentiment alone) - Baseline"]["overall"] == "-"
    assert set(rows[-1][1:]) == {"-"}


def test_comparison_on_the_terminal(table):
    lines = compare_text(table, "diff", "baseline").splitlines()
    assert lines[0] == "Diff - Baseline, in points, seeds 0 1"
    assert [line.split("  ")[1] for line in lines[1:]] == list(SCORES.values())
    assert re.fullmatch(r"  sentiment     \+31\.8 \(.*\)  (above|could be) 0", lines[3])
    assert compare_text(table, "surgery_diff", "diff").endswith("seeds -")
    assert len(compare_text(table, "minbert", "baseline").splitlines()) == 2  # sentiment alone


# --- claims -------------------------------------------------------------------------------------------------

# claim, its interval, the verdict. Claimed: 1 +10.3 points, 2b -1.3, 4 within 5 below, 5a less than 5.
JUDGED = {
    "as claimed": ("1", (0.02, 0.10), "confirmed"),
    "on the claimed side, though small": ("1", (0.001, 0.01), "confirmed"),
    "on the other side": ("1", (-0.03, -0.01), "refuted"),
    "of either sign, and surely less than a quarter": ("1", (-0.01, 0.025), "refuted"),
    "of either sign, perhaps more than a quarter": ("1", (-0.01, 0.027), "undecided"),
    "of either sign, perhaps as large as claimed": ("1", (-0.20, 0.20), "undecided"),
    "negative claim, as claimed": ("2b", (-0.02, -0.005), "confirmed"),
    "negative claim, on the other side": ("2b", (0.001, 0.02), "refuted"),
    "negative claim, surely less than a quarter": ("2b", (-0.003, 0.02), "refuted"),
    "negative claim, perhaps more than a quarter": ("2b", (-0.004, 0.02), "undecided"),
    "margin below, kept": ("4", (-0.049, -0.01), "confirmed"),
    "margin below, kept by far": ("4", (0.01, 0.03), "confirmed"),
    "margin below, not kept": ("4", (-0.09, -0.051), "refuted"),
    "margin below, inside the interval": ("4", (-0.09, -0.049), "undecided"),
    "margin above, kept": ("5a", (-0.01, 0.049), "confirmed"),
    "margin above, not kept": ("5a", (0.051, 0.09), "refuted"),
    "margin above, inside the interval": ("5a", (0.049, 0.09), "undecided"),
    "nothing measured": ("1", None, "not measured"),
}


@pytest.mark.parametrize("case", JUDGED)
def test_verdict(case):
    number, limits, word = JUDGED[case]
    claim = next(claim for claim in CLAIMS if claim.number == number)
    interval = limits and Interval(sum(limits) / 2, *limits)
    asked = []
    stub = SimpleNamespace(
        combine=lambda terms: asked.append(terms) or interval, shared_seeds=lambda rows: (0, 1)
    )
    assert judge(claim, stub) == (interval, word)
    assert asked == [claim.terms]


def test_claims_table(table):
    header, rows = cells(claims_block(table))
    assert [row[0] for row in rows] == [claim.number for claim in CLAIMS]
    assert [row[2] for row in rows] == (
        ["+10.3", "+12.6", "-1.3", "-6.9", "-3.3", "-1.0", "-2.8", "+4.0", "-30.1", "-1.0"]
    )
    found = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    expected = table.combine(CLAIMS[0].terms)
    assert found["1"]["measured (95 % interval)"] == show_interval(expected)
    assert found["1"]["verdict"] == "confirmed" and expected.low > 0.104
    assert found["1"]["claimed size in it"] == "no"
    for number in ("2a", "3a", "5a", "6"):  # no seed in common, or a row that was not run
        assert found[number]["measured (95 % interval)"] == found[number]["claimed size in it"] == "-"
        assert found[number]["verdict"] == "not measured"


def test_claimed_size_in_interval():
    around = SimpleNamespace(combine=lambda terms: Interval(0.0, -0.2, 0.2), shared_seeds=lambda rows: (0, 1))
    rows = {row[0]: row[-2] for row in cells(claims_block(around))[1]}
    assert rows.pop("5b") == "no" and set(rows.values()) == {"yes"}
    for end in (-0.5, 0.5):
        beyond = SimpleNamespace(
            combine=lambda terms, end=end: Interval(end, end - 0.1, end + 0.1),
            shared_seeds=lambda rows: (0, 1),
        )
        assert {row[-2] for row in cells(claims_block(beyond))[1]} == {"no"}


def test_claims_on_the_terminal(table):
    lines = claims_text(table).splitlines()
    assert len(lines) == len(CLAIMS)
    assert lines[0].startswith("claim 1  confirmed    claimed +10.3, measured +")
    assert lines[1] == "claim 2a not measured claimed +12.6, measured -: surgery raises similarity"


# --- CSV and LaTeX ------------------------------------------------------------------------------------------


def test_csv_of_the_rows_has_all_digits(table):
    lines = list(csv.DictReader(io.StringIO(rows_csv(table))))
    assert [line["row"] for line in lines] == list(table.runs)
    for line in lines:
        row = line["row"]
        assert line["title"] == ROWS[row].title and line["group"] == "poster" and None not in line
        assert line["seeds"].split() == [str(seed) for seed in table.runs[row]]
        for score in SCORES:
            values, interval = table.values(row, score), table.interval(row, score)
            names = [f"{score}_{what}" for what in ("mean", "sd", "low", "high")]
            if not values:
                assert {line[name] for name in names} == {""}
                continue
            mean, sd = mean_and_sd(values)
            found = [float(line[name]) if line[name] else None for name in names]
            assert found == [mean, sd if len(values) > 1 else None, interval.low, interval.high]
    diff = lines[2]
    assert float(diff["sst_mean"]) == np.mean([10 / 11, 9 / 11])
    assert float(diff["mean_poster"]) == (0.520 + 0.795 + 0.529) / 3
    assert float(diff["mean_2024_poster"]) == pytest.approx((0.520 + 0.795 + 1.529 / 2) / 3)
    assert lines[0]["sst_poster"] == "0.528" and lines[0]["para_poster"] == ""


def test_csv_of_the_runs(table):
    lines = list(csv.DictReader(io.StringIO(runs_csv(table))))
    pairs = [(row, str(seed)) for row, seeds in table.runs.items() for seed in seeds]
    assert [(line["row"], line["seed"]) for line in lines] == pairs
    for line in lines:
        scores = table.runs[line["row"]][int(line["seed"])].scores
        assert {score: float(line[score]) for score in SCORES if line[score]} == scores
        assert line["training_seconds"] == "8"


def tex_cells(tex):
    lines = tex.splitlines()
    num_columns = len(re.fullmatch(r"\\begin\{tabular\}\{(\w+)\}", lines[0])[1])
    body = [line for line in lines[1:-1] if line not in (r"\toprule", r"\midrule", r"\bottomrule")]
    assert lines[-1] == r"\end{tabular}" and all(line.endswith(r" \\") for line in body)
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)&", line[:-3])] for line in body]
    assert {len(row) for row in rows} == {num_columns}
    return rows


def test_latex(table):
    rows = tex_cells(table_tex(table))
    assert rows[0] == ["technique", "overall", "sentiment", "paraphrase", "similarity"]
    assert rows[1] == ["minBERT (sentiment alone)", "--", "1.000", "--", "--"]
    assert rows[3][1:3] == [r"0.864 $\pm$ 0.064"] * 2
    assert [row[0] for row in rows[1:]] == [ROWS[row].title for row in table.runs]


def test_latex_of_a_negative_number(tmp_path, data_dir):
    """All similarities reflected, r = -1: a minus sign, not a dash."""
    table = make_table(tmp_path, data_dir, {"diff": {0: all_tasks(0, 0, 11)}})
    assert tex_cells(table_tex(table))[1][1:] == ["0.333", "1.000", "1.000", "$-$1.000"]


# --- odd characters -----------------------------------------------------------------------------------------


def test_odd_titles_break_nothing(table, monkeypatch):
    for row in ("diff", "baseline"):
        monkeypatch.setitem(ROWS, row, replace(ROWS[row], title=NASTY))
    escaped = r"a \| b_c \& 50 % \`x\` \<b\> {y} \#2 \$1 \~z ^ \\ \*\*c\*\* \[e\](f)"
    assert [row[0] for row in cells(scores_block(table))[1]][1:3] == [escaped, escaped]
    assert [row[0] for row in cells(differences_block(table))[1]] == [
        f"minBERT (sentiment alone) - {escaped}",
        f"{escaped} - {escaped}",
        f"Gradient surgery + diff - {escaped}",
    ]
    title = tex_cells(table_tex(table))[3][0]
    assert title == (
        r"a | b\_c \& 50 \% `x` <b> \{y\} \#2 \$1 \textasciitilde{}z \textasciicircum{} \textbackslash{} **c** [e](f)"
    )
    assert [line["title"] for line in csv.DictReader(io.StringIO(rows_csv(table)))][2] == NASTY


def test_odd_paths_break_nothing(tmp_path, data_dir):
    path = "my `data` | \n```\n# <b> 'd'"
    table = make_table(tmp_path, data_dir, {"diff": {0: all_tasks()}}, pretrained="enc|`o`\n# der")
    text = make_page(table, ["python", "results_table.py", "--data_dir", path], None, [])
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings == [
        "# The poster's table, measured",
        "## Its claims",
        "## What each change changes",
        "## How it was made",
        "## Pictures",
    ]
    code = [line[4:] for line in text.splitlines() if line.startswith("    ")]
    assert shlex.split("\n".join(code)) == (
        ["python", "results_table.py", "--data_dir", path]
        + ["python", "multitask_classifier.py", "--output_dir", "runs/diff-seed0"]
    )
    assert r"Encoder: enc\|\`o\` \# der." in text
    assert r"| machine | processor a \| b, cores 2 |" in text
    assert "```" not in text.replace("\n".join("    " + line for line in code), "")


# --- the page -----------------------------------------------------------------------------------------------


def test_encoder_is_that_of_the_rows_without_further_pretraining(tmp_path, data_dir, table):
    start = {"pretrained": OFFLINE_ENCODER}
    first = make_table(tmp_path / "a", data_dir, {"diff": {0: all_tasks()}}, **start)
    own = make_table(
        tmp_path / "b",
        data_dir,
        {"further_pretraining": {seed: all_tasks() for seed in (0, 1)}},
        pretrained="runs/x",
    )
    both = Table({**own.runs, **first.runs}, first.dev_data, 10)
    text = make_page(both, COMMAND, None, [])
    assert f"Encoder: {OFFLINE_ENCODER}. {CONTAMINATED}" in text
    assert CONTAMINATED not in make_page(table, COMMAND, None, [])


def test_how_it_was_made(table):
    text = make_page(table, COMMAND, None, [])
    assert "| runs | 6, 0.0 hours of training steps in all |" in text
    assert "| precision | fp32 |" in text and "| versions | torch 2.13.0 |" in text
    assert "no run has predicted it yet" in text
    assert "    python multitask_classifier.py --output_dir runs/surgery_diff-seed3\n" in text
    assert "--resume" not in text  # the first command started the run


# --- all files ----------------------------------------------------------------------------------------------


def check_picture(path):
    """It opens, and something is drawn on it: more than a few pixels are not white."""
    pixels = image.imread(path, format="png")[..., :3]
    assert pixels.shape[0] > 100 and pixels.shape[1] > 100
    assert (pixels.min(axis=-1) < 0.5).mean() > 1e-3


def test_all_files_of_one_row_with_one_seed(tmp_path, one_run, data_dir):
    test_folder = tmp_path / "best"
    (test_folder / "predictions").mkdir(parents=True)
    for task in DEFAULT_TASKS:
        path = test_folder / "predictions" / f"{task}-test-output.csv"
        path.write_text(f"{task} of ä\n", encoding="utf-8")
    results = tmp_path / "new" / "results"
    written = write_results(one_run, results, COMMAND, test_folder)
    predictions = [f"predictions/{task}-test-output.csv" for task in DEFAULT_TASKS]
    names = ["table.md", "table.csv", "runs.csv", "table.tex", *PICTURES, *predictions]
    assert written == [results / name for name in names]
    assert sorted(path for path in results.rglob("*") if path.is_file()) == sorted(written)
    for name in PICTURES:
        check_picture(results / name)
    for task, name in zip(DEFAULT_TASKS, predictions, strict=True):
        assert (results / name).read_bytes() == f"{task} of ä\n".encode()
    text = (results / "table.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\(([\w.]+)\)", text) == list(PICTURES)
    assert "the best seed of the best row on dev (diff, seed 0) are in predictions/" in text
    assert "| Diff | 0.909 | 0.909 | 0.909 | 0.818 | 1.000 | 1 | 0.1 |" in text
    # Runs, data and results lie in absolute folders; commands were given relative ones.
    for path in written:
        content = path.read_bytes()
        for place in (tmp_path, data_dir, one_run.runs["diff"][0].folder, SCRIPT.rpartition("/")[0]):
            assert str(place).encode() not in content, path


def test_no_predictions_of_the_test_set(tmp_path, one_run, monkeypatch):
    monkeypatch.setattr("reporting.table_pages.draw_figures", lambda table: {})
    written = write_results(one_run, tmp_path, COMMAND, None)
    assert [path.name for path in written] == ["table.md", "table.csv", "runs.csv", "table.tex"]
    assert sorted(tmp_path.iterdir()) == sorted(written)
    assert "no run has predicted it yet" in (tmp_path / "table.md").read_text(encoding="utf-8")


def test_statistics_of_one_row_with_one_seed(one_run):
    assert cells(differences_block(one_run))[1] == []
    assert {row[4] for row in cells(claims_block(one_run))[1]} == {"not measured"}
    (line,) = csv.DictReader(io.StringIO(rows_csv(one_run)))
    assert line["sst_sd"] == "" and float(line["sst_low"]) <= 10 / 11 <= float(line["sst_high"])


def test_pictures_show_the_rows_and_the_best_run(table):
    drawn = draw_figures(table)
    assert list(drawn) == list(PICTURES)
    titles = [ROWS[row].title for row in table.runs]
    shown = drawn["scores.png"].axes[0].get_yticklabels()
    assert [label.get_text().replace("\n", " ") for label in shown] == titles
    # Surgery's only run: 9 of 11 classes are right, similarity is; the rows that have conflicts are named.
    assert drawn["confusion.png"].axes[0].get_title() == "accuracy 0.818, 11 examples"
    assert drawn["similarity.png"].axes[0].get_title().startswith("Pearson r 1.000")
    shown = [axis.get_title() for axis in drawn["conflict.png"].axes if axis.get_title()]
    assert shown == ["Diff", "Gradient surgery + diff"]


def test_pictures_that_there_is_nothing_for(tmp_path, data_dir):
    """A table of sentiment alone has no conflict, and no run with an overall to show more of."""
    table = make_table(tmp_path / "a", data_dir, {"minbert": {0: {"sst": 2}}})
    assert list(draw_figures(table)) == ["scores.png", "learning_curves.png"]
    # Two tasks have an overall of their own; what is not there is not drawn.
    table = make_table(tmp_path / "b", data_dir, {"baseline": {0: {"para": 2, "sts": 1}}})
    assert list(draw_figures(table)) == ["scores.png", "learning_curves.png", "similarity.png"]


def test_one_shared_seed_is_no_verdict(one_run, table):
    claim = next(claim for claim in CLAIMS if claim.number == "1")
    both = Table({**one_run.runs, "baseline": {0: table.runs["baseline"][0]}}, one_run.dev_data, 50)
    interval, word = judge(claim, both)
    assert interval is not None and word == "one seed only"


def test_files_of_an_earlier_table_go(tmp_path, one_run, monkeypatch):
    monkeypatch.setattr("reporting.table_pages.draw_figures", lambda table: {})
    (tmp_path / "predictions").mkdir()
    for name in ("scores.png", "predictions/sst-test-output.csv", "mine.png"):
        (tmp_path / name).write_text("old")
    write_results(one_run, tmp_path, COMMAND, None)
    assert (tmp_path / "mine.png").exists()
    assert not (tmp_path / "scores.png").exists() and not list((tmp_path / "predictions").iterdir())

"""What the files of a results table say is what was measured, whatever is in titles, paths and commands."""

import csv
import io
import re
import shlex
from dataclasses import replace
from types import SimpleNamespace

import pytest
from matplotlib import image

from config import OFFLINE_ENCODER
from reporting import pages, table_pages
from reporting.poster import CLAIMS, ROWS, SCORES, TableRow, regime_rows
from reporting.significance import Interval, mean_and_sd
from reporting.table_pages import HEADINGS, PICTURES, TEST_FILES, format_interval
from reporting.table_statistics import Table
from support.errors import UserError
from tests.fake_runs import SCRIPT, all_tasks, make_table
from tests.reporting.read_pages import HtmlPage, markdown_rows

COMMAND = ["results_table.py", "--data_dir", "data", "--seeds", "0", "1"]
ODD = "a | b_c & 50 % `x` <b> {y} #2 $1 ~z ^ \\ **c** [e](f)"


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


def cells(shown: pages.Table) -> dict[str, dict[str, str]]:
    """First cell -> header -> cell."""
    return {row[0]: dict(zip(shown.header, row, strict=True)) for row in shown.rows}


# --- what the cells say -----------------------------------------------------------------------------------


def test_numbers_as_text():
    """0.25 and 0.75: deviations of 0.25 from 0.5, sd = sqrt(2 * 0.0625 / 1) = 0.3536."""
    found = [table_pages.format_mean(values) for values in ([], [0.12349], [0.25, 0.75])]
    assert found == ["-", "0.123", "0.500 ± 0.354"]
    assert format_interval(None) == "-"
    assert format_interval(Interval(0.0126, -0.00449, 0.03)) == "+1.3 (-0.4 to +3.0)"


def test_scores(table):
    found = cells(table_pages.scores_table(table))
    assert list(found) == [*(ROWS[row].title for row in table.runs), "Test set (labels held out)"]
    # Seeds 0 and 1 of diff: 10 and 9 of 11, 9 and 7 of 11, r = 1; sd is the difference over sqrt(2). Overalls
    # are 30 and 27 of 33. Training took 8 s.
    measured = [*["0.864 ± 0.064"] * 3, "0.727 ± 0.129", "1.000 ± 0.000", "2", "0.1"]
    poster = ["0.615", "0.520", "0.795", "0.529"]
    assert list(found["Diff"].values()) == ["Diff", *measured, *poster]
    alone = ["-", "-", "1.000", "-", "-", "1", "0.1", "-", "0.528", "-", "-"]  # one seed has no spread
    assert list(found["minBERT (sentiment alone)"].values())[1:] == alone
    last = list(found["Test set (labels held out)"].values())
    assert last[1:] == ["-"] * 7 + ["0.640", "0.510", "0.775", "0.634"]


def test_differences_are_those_of_the_shared_seeds(table):
    found = cells(table_pages.differences_table(table))
    assert [row["seeds"] for row in found.values()] == ["0", "0 1", "-"]
    alone, diff, surgery = found.values()
    # Sentiment: 19 - 12 of 22 right; seed 0 alone 11 - 5 of 11; surgery has a seed that diff has not.
    assert diff["sentiment"].startswith("+31.8 (") and alone["sentiment"].startswith("+54.5 (")
    assert alone["overall"] == "-" and {surgery[name] for name in SCORES.values()} == {"-"}
    assert list(found)[1:] == ["Diff - Baseline", "Gradient surgery + diff - Diff"]
    lines = table_pages.format_comparison(table, "diff", "baseline").splitlines()
    assert lines[0] == "Diff - Baseline, in points, seeds 0 1"
    assert [line.split("  ")[1] for line in lines[1:]] == list(SCORES.values())
    assert re.fullmatch(r"  sentiment     \+31\.8 \(.*\)  (above|could be) 0", lines[3])
    assert table_pages.format_comparison(table, "surgery_diff", "diff").endswith("seeds -")
    assert (
        len(table_pages.format_comparison(table, "minbert", "baseline").splitlines()) == 2
    )  # sentiment alone


# --- what rows did to the gradients -------------------------------------------------------------------------


def test_methods_and_noise(table):
    found = cells(table_pages.methods_table(table))["Diff"]
    assert (found["ms a step"], found["more than the first row's"]) == ("400", "+0")  # 8 s for 20 steps
    assert found["steps against a task: by the plain sum"] == "sst 12 %, para 25 %, sts 75 %"
    assert found["by the method"] == "sst 0 %, para 25 %, sts 50 %"
    assert found["mean weight of a task's gradient"] == "sst 1.12, para 1.00, sts 1.25"
    assert found["mean factor of its loss"] == "-"
    noise = cells(table_pages.noise_table(table))
    assert list(noise) == ["Baseline", "Diff", "Gradient surgery + diff"]  # not the row with one task
    # The jackknife of one probe: 3 times the variance 0.00125; of those of two seeds, half of it.
    assert noise["Gradient surgery + diff"]["signal of sst"] == "25.0 % (13.0 to 37.0)"
    assert noise["Diff"]["signal of sst"] == "25.0 % (16.5 to 33.5)"
    # 0.05 / sqrt(0.25 x), x of 0.2 and 0.3 for 0.25: 0.224 and 0.183 for 0.2. And 0.2 more and less than 0.1.
    assert noise["Gradient surgery + diff"]["cosine of sst and para"] == "-0.20 (-0.25 to -0.15)"
    assert noise["Gradient surgery + diff"]["cosine of para and sts"] == "+0.10 (-0.38 to +0.58)"


def test_who_wins_is_said_by_the_intervals():
    found = {
        "a": Interval(0.02, 0.01, 0.03),
        "b": Interval(0.01, -0.01, 0.03),
        "c": Interval(-0.1, -0.2, -0.01),
    }
    specs = {name: TableRow(name.upper(), "") for name in ("sum", *found)}

    def sentence(*names, seeds=(0, 1)):
        return table_pages.who_wins(
            SimpleNamespace(
                runs=dict.fromkeys(("sum", *names)),
                specs=specs,
                shared_seeds=lambda rows: seeds,
                combine=lambda terms: found[terms[0][1]],
            )
        )

    assert sentence("b").startswith("Nothing is told apart from SUM: all 1 intervals")
    text = sentence("a", "b", "c")
    assert "Ahead of SUM in the overall: A +2.0 (+1.0 to +3.0). Behind it: C -10.0 (-20.0 to -1.0)." in text
    assert "The other 1 of 3 are not told apart from it. Of 3 such intervals, 0.1 would" in text
    assert sentence("a", seeds=(0,)).startswith("No row can be told apart")


def test_claims_in_other_regimes(tmp_path, data_dir):
    rows = {
        "baseline": {0: all_tasks(6, 5, 7), 1: all_tasks(6, 5, 7)},
        "diff": {n: all_tasks() for n in (0, 1)},
    }
    of_regime = {f"course.{row}": seeds for row, seeds in rows.items()}
    specs = ROWS | regime_rows("1e-4")
    table = replace(make_table(tmp_path, data_dir, rows | of_regime), specs=specs)
    found = cells(table_pages.regimes_table(table))
    assert list(found) == ["1", "2a", "2b", "3a", "4"]  # the others are about rows that regimes do not have
    assert found["1"]["tuned (above)"] == found["1"]["as in the course"]
    assert (
        found["1"]["tuned (above)"].startswith("confirmed: +")
        and found["3a"]["as in the course"] == "not measured"
    )
    assert "as in the course:\nclaim 1" in table_pages.format_claims(table)
    alone = replace(table, runs={row: table.runs[row] for row in of_regime})
    content = table_pages.page_content(alone, COMMAND, None, [])
    assert content["claims"] is None and content["regimes"].header[3:] == ["as in the course"]
    assert content["scores"].rows[0][-4:] == [
        "0.511",
        "0.479",
        "0.781",
        "0.274",
    ]  # the poster's, all the same
    only = replace(table, runs={"diff": table.runs["diff"]})
    assert table_pages.regimes_table(only) is None


# --- claims -----------------------------------------------------------------------------------------------

# Verdict: claims and their intervals. Claimed: 1 +10.3 points, 2b -1.3, 4 within 5 below, 5a less than 5.
JUDGED = {
    # On the claimed side, however small; within the margin, or beyond it on the good side.
    "confirmed": "1 0.02 0.10, 1 0.001 0.01, 2b -0.02 -0.005, 4 -0.049 -0.01, 4 0.01 0.03, 5a -0.01 0.049",
    # On the other side; of either sign, and certainly less than a quarter of the claim; outside the margin.
    "refuted": "1 -0.03 -0.01, 2b 0.001 0.02, 1 -0.01 0.025, 2b -0.003 0.02, 4 -0.09 -0.051, 5a 0.051 0.09",
    # Of either sign, and perhaps more than a quarter; the margin is inside.
    "undecided": "1 -0.01 0.027, 1 -0.20 0.20, 2b -0.004 0.02, 4 -0.09 -0.049, 5a 0.049 0.09",
}


def measured(interval, seeds=(0, 1)):
    """A table in which every sum of terms has this interval."""
    return SimpleNamespace(combine=lambda terms: interval, shared_seeds=lambda rows: seeds)


@pytest.mark.parametrize("word", JUDGED)
def test_verdict(word):
    for number, *limits in (case.split() for case in JUDGED[word].split(", ")):
        claim = next(claim for claim in CLAIMS if claim.number == number)
        interval = Interval(0.0, *map(float, limits))
        assert table_pages.judge(claim, measured(interval)) == (interval, word), (number, limits)
        assert table_pages.judge(claim, measured(interval, seeds=(0,))) == (interval, "one seed only")
        assert table_pages.judge(claim, measured(None)) == (None, "not measured")


def test_claims(table):
    found = cells(table_pages.claims_table(table))
    sizes = ["+10.3", "+12.6", "-1.3", "-6.9", "-3.3", "-1.0", "-2.8", "+4.0", "-30.1", "-1.0"]
    assert [row["claimed"] for row in found.values()] == sizes
    expected = table.combine(CLAIMS[0].terms)
    assert found["1"]["measured (95 % interval)"] == format_interval(expected) and expected.low > 0.104
    assert found["1"]["verdict"] == "confirmed" and found["1"]["claimed size in it"] == "no"
    for number in ("2a", "3a", "5a", "6"):  # no seed in common, or a row that was not run
        assert list(found[number].values())[3:6] == ["-", "not measured", "-"]
    lines = table_pages.format_claims(table).splitlines()
    assert len(lines) == len(CLAIMS)
    assert lines[0].startswith("claim 1  confirmed    claimed +10.3, measured +")
    assert lines[1] == "claim 2a not measured claimed +12.6, measured -: surgery raises similarity"

    found = cells(table_pages.claims_table(measured(Interval(0, -0.2, 0.2))))
    assert {number for number, row in found.items() if row["claimed size in it"] == "no"} == {"5b"}  # -30.1


# --- CSV and LaTeX ----------------------------------------------------------------------------------------


def test_csv_files_have_all_digits(table):
    """Text of a float is exact; sums get 1e-12, since from Python 3.12 on `sum` rounds floats only once."""
    lines = list(csv.DictReader(io.StringIO(table_pages.rows_csv(table))))
    assert [line["row"] for line in lines] == list(table.runs)
    for line in lines:
        row = line["row"]
        assert line["title"] == ROWS[row].title and line["group"] == "poster" and None not in line
        assert line["seeds"].split() == [str(seed) for seed in table.runs[row]]
        for score in SCORES:
            values, interval = table.values(row, score), table.interval(row, score)
            found = [line[f"{score}_{what}"] for what in ("mean", "sd", "low", "high")]
            expected = [*mean_and_sd(values), interval.low, interval.high] if values else [""] * 4
            if len(values) == 1:
                expected[1] = ""
            assert found == [str(number) for number in expected]
    means = [float(lines[2][name]) for name in ("sst_mean", "mean_poster", "mean_2024_poster")]
    expected = [19 / 22, (0.520 + 0.795 + 0.529) / 3, (0.520 + 0.795 + 1.529 / 2) / 3]
    assert means == pytest.approx(expected, abs=1e-12)
    assert lines[0]["sst_poster"] == "0.528" and lines[0]["para_poster"] == ""

    lines = list(csv.DictReader(io.StringIO(table_pages.runs_csv(table))))
    runs = [(row, str(seed), run) for row, seeds in table.runs.items() for seed, run in seeds.items()]
    for line, (row, seed, run) in zip(lines, runs, strict=True):
        assert (line["row"], line["seed"], line["training_seconds"]) == (row, seed, "8")
        assert {score: float(line[score]) for score in SCORES if line[score]} == run.scores


def tex_rows(table):
    lines = table_pages.table_tex(table).splitlines()
    body = [line for line in lines[1:-1] if line not in (r"\toprule", r"\midrule", r"\bottomrule")]
    assert (lines[0], lines[-1]) == (r"\begin{tabular}{lcccc}", r"\end{tabular}")
    assert all(line.endswith(r" \\") for line in body)
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)&", line[:-3])] for line in body]
    assert {len(row) for row in rows} == {5}
    return rows


def test_rows_of_ones_own_are_shown_without_the_poster(tmp_path, data_dir):
    """Neither its numbers nor its claims; each row is compared with the first."""
    rows = {
        name: {seed: all_tasks(seed, 1 + n, n) for seed in (1, 2)} for n, name in enumerate(("sum", "mgda"))
    }
    found = make_table(tmp_path / "runs", data_dir, rows)
    specs = {"sum": TableRow("sum", "", group="own"), "mgda": TableRow("mgda", "", versus="sum", group="own")}
    found = Table(found.runs, found.dev_data, 40, ROWS | specs)
    page = table_pages.make_page(found, COMMAND, None, [])
    assert page.startswith(HEADINGS[1]) and "poster" not in page and "claim" not in page.lower()
    assert "mgda - sum" in page and "mgda - sum" in table_pages.format_differences(found)
    assert len(table_pages.scores_table(found).rows) == 2
    assert set(table_pages.draw_figures(found)) > {"scores.png", "conflict.png"}
    assert table_pages.rows_csv(found).splitlines()[2].startswith("mgda,mgda,own,1 2,")
    assert "(sum)" in table_pages.make_caption(found, "confusion.png")
    for line in (line for run in found.runs["mgda"].values() for line in run.metrics if "tokens" in line):
        line["tokens_per_second"] /= 2
    assert cells(table_pages.differences_table(found))["mgda - sum"]["time a step"] == "2.00 times"
    mixed = Table(found.runs | {"diff": found.runs["sum"]}, found.dev_data, 40, ROWS | specs)
    assert "## Its claims" in table_pages.make_page(mixed, COMMAND, None, [])


def test_latex(table, tmp_path, data_dir):
    rows = tex_rows(table)
    assert rows[0] == ["technique", "overall", "sentiment", "paraphrase", "similarity"]
    assert rows[1] == ["minBERT (sentiment alone)", "--", "1.000", "--", "--"]
    assert rows[3][1:3] == [r"0.864 $\pm$ 0.064"] * 2
    # All similarities reflected, r = -1: a minus sign, not a dash.
    reflected = make_table(tmp_path, data_dir, {"diff": {0: all_tasks(0, 0, 11)}})
    assert tex_rows(reflected)[1][1:] == ["0.333", "1.000", "1.000", "$-$1.000"]


# --- the page and all files -------------------------------------------------------------------------------


def test_odd_titles_and_paths_break_nothing(tmp_path, data_dir, table, monkeypatch):
    monkeypatch.setitem(ROWS, "diff", replace(ROWS["diff"], title=ODD))
    assert tex_rows(table)[3][0] == (
        r"a | b\_c \& 50 \% `x` <b> \{y\} \#2 \$1 \textasciitilde{}z \textasciicircum{}"
        r" \textbackslash{} **c** [e](f)"
    )
    assert [line["title"] for line in csv.DictReader(io.StringIO(table_pages.rows_csv(table)))][2] == ODD
    path = "my `data` | \n```\n# <b> 'd'"
    odd = make_table(tmp_path, data_dir, {"diff": {0: all_tasks()}}, pretrained="enc|`o`\n# der")
    text = table_pages.make_page(odd, ["results_table.py", "--data_dir", path], None, [])
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert len(headings) == 7 and headings[0] == "# The poster's table, measured"
    rows = markdown_rows(text)
    assert rows[1][0] == ODD and ["machine", "processor a | b, cores 2"] in rows
    code = [line[4:] for line in text.splitlines() if line.startswith("    ")]
    assert shlex.split("\n".join(code)) == (
        ["python", "results_table.py", "--data_dir", path]
        + ["python", "multitask_classifier.py", "--output_dir", "runs/diff-seed0"]
    )
    assert r"Encoder: enc\|\`o\` \# der." in text
    assert "```" not in text.replace("\n".join("    " + line for line in code), "")


def test_how_it_was_made(table, tmp_path, data_dir):
    text = table_pages.make_page(table, COMMAND, None, [])
    rows = markdown_rows(text)
    assert ["runs", "6, 0.0 hours of training steps in all"] in rows
    assert ["precision", "fp32"] in rows and ["versions", "torch 2.13.0"] in rows
    assert "no run has predicted it yet" in text
    assert "    python multitask_classifier.py --output_dir runs/surgery_diff-seed3\n" in text
    assert "--resume" not in text  # the first command started the run
    # The encoder is that of the rows without further pre-training; what it has seen before is said.
    first = make_table(tmp_path / "a", data_dir, {"diff": {0: all_tasks()}}, pretrained=OFFLINE_ENCODER)
    own = make_table(tmp_path / "b", data_dir, {"further_pretraining": {0: all_tasks()}}, pretrained="runs/x")
    both = table_pages.make_page(Table({**own.runs, **first.runs}, first.dev_data, 10), COMMAND, None, [])
    assert f"Encoder: {OFFLINE_ENCODER}.\nIt saw Quora" in both and "It saw Quora" not in text


@pytest.mark.slow
def test_all_files_of_one_row_with_one_seed(tmp_path, one_run, data_dir):
    test_folder = tmp_path / "best"
    (test_folder / "predictions").mkdir(parents=True)
    for name in TEST_FILES:
        (test_folder / name).write_text(f"{name} of ä\n", encoding="utf-8")
    results = tmp_path / "new" / "results"
    written = table_pages.write_results(one_run, results, COMMAND, test_folder)
    names = ["table.md", "table.html", "table.csv", "runs.csv", "table.tex", *PICTURES, *TEST_FILES]
    assert written == [results / name for name in names]
    assert sorted(path for path in results.rglob("*") if path.is_file()) == sorted(written)
    for name in PICTURES:  # it opens, and something is drawn on it
        pixels = image.imread(results / name, format="png")[..., :3]
        assert (pixels.min(axis=-1) < 0.5).mean() > 1e-3
    assert all((results / name).read_bytes() == f"{name} of ä\n".encode() for name in TEST_FILES)
    text = (results / "table.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\(([\w.]+)\)", text) == list(PICTURES)
    page = HtmlPage((results / "table.html").read_text(encoding="utf-8"))
    assert page.links == list(PICTURES) and not {"script", "link"} & set(page.tags)
    assert markdown_rows(text) == [[cell.strip() for cell in row] for row in page.rows]
    assert "the best seed of the best row on dev (diff, seed 0) are in predictions/" in text
    # Runs, data and results lie in absolute folders; commands were given relative ones.
    for path in written:
        content = path.read_bytes()
        for place in (tmp_path, data_dir, one_run.runs["diff"][0].folder, SCRIPT.rpartition("/")[0]):
            assert str(place).encode() not in content, path


def test_files_of_an_earlier_table_go_and_others_are_kept(tmp_path, one_run, monkeypatch):
    monkeypatch.setattr("reporting.table_pages.draw_figures", lambda table: {})
    table_pages.check_results_dir(tmp_path)
    (tmp_path / "predictions").mkdir()
    for name in ("table.md", "runs.csv", "scores.png", "predictions/sts-test-output.csv"):
        path = tmp_path / name
        for target in (None, "nowhere"):
            path.symlink_to(target) if target else path.write_text("a run's, or one's own")
            message = f"^--results_dir {tmp_path}: {name} there is no earlier table's"
            with pytest.raises(UserError, match=message):
                table_pages.check_results_dir(tmp_path)
            path.unlink()
    for name in ("scores.png", "predictions/sst-test-output.csv", "mine.png"):
        (tmp_path / name).write_text("old")
    (tmp_path / "table.md").write_text(HEADINGS[1] + "\n")
    table_pages.check_results_dir(tmp_path)
    written = table_pages.write_results(one_run, tmp_path, COMMAND, None)
    assert [path.name for path in written] == ["table.md", "table.html", "table.csv", "runs.csv", "table.tex"]
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == {*written, tmp_path / "mine.png"}


def test_captions_say_which_rows_seeds_and_examples(table, one_run):
    captions = {name: table_pages.make_caption(table, name) for name in PICTURES}
    assert captions["similarity.png"].endswith(
        " Gradient surgery + diff (surgery_diff), seed 3, 11 dev examples."
    )
    assert captions["scores.png"].endswith(" Seeds as in the table above.")
    assert table_pages.make_caption(one_run, "conflict.png").endswith(" Seeds 0.")
    assert captions["learning_curves.png"].endswith(" Evaluated on all of dev.")
    args = one_run.runs["diff"][0].facts["args"]
    args["eval_max_examples"] = 500
    assert table_pages.make_caption(one_run, "learning_curves.png").endswith(
        "on at most 500 examples of a task."
    )
    del args["eval_max_examples"]


def test_pictures_show_the_rows_and_the_best_run(table):
    drawn = table_pages.draw_figures(table)
    assert list(drawn) == list(PICTURES)
    labels = [label.get_text().replace("\n", " ") for label in drawn["scores.png"].axes[0].get_yticklabels()]
    assert labels == [ROWS[row].title for row in table.runs]
    # Surgery's only run: 9 of 11 classes are right, and all similarities are.
    assert drawn["confusion.png"].axes[0].get_title() == "accuracy 0.818, 11 examples"
    assert drawn["similarity.png"].axes[0].get_title().startswith("Pearson r 1.000")
    shown = [axis.get_title() for axis in drawn["conflict.png"].axes if axis.get_title()]
    assert shown == ["Diff", "Gradient surgery + diff"]


def test_pictures_with_nothing_to_show_are_left_out(tmp_path, data_dir):
    """Sentiment alone has no conflict, and no run with an overall to show more of; two tasks have one."""
    table = make_table(tmp_path / "a", data_dir, {"minbert": {0: {"sst": 2}}})
    assert list(table_pages.draw_figures(table)) == ["scores.png", "learning_curves.png"]
    table = make_table(tmp_path / "b", data_dir, {"baseline": {0: {"para": 2, "sts": 1}}})
    assert list(table_pages.draw_figures(table)) == ["scores.png", "learning_curves.png", "similarity.png"]

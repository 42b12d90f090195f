"""A results table as files: Markdown, CSV, LaTeX, and its figures."""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

from config import DEFAULT_TASKS, OFFLINE_ENCODER, TASKS
from evaluation import prediction_name, select_score
from reporting import figures, pages
from reporting.poster import CLAIMS, POSTER_TEST, REGIMES, ROWS, SCORES, TUNED, Claim
from reporting.report import list_values, training_seconds
from reporting.significance import Interval, mean_and_sd, verdict, with_overalls
from reporting.table_methods import format_interval, methods_table, noise_table, row_difference, who_wins
from reporting.table_statistics import Table
from support.errors import UserError
from support.files import read_head, whole_file, write_text

# Rows whose conflicts are drawn: without surgery, with it, and where tasks meet additional data.
CONFLICT_ROWS = ("diff", "surgery_diff", "surgery_diff_extra")
SMALL_SHARE = 0.25  # of a claimed effect: a smaller one is not the claimed one
TEX_ESCAPES = str.maketrans(
    {character: "\\" + character for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
)
PICTURES = {
    "scores.png": "Scores of each row with their intervals, and the poster's.",
    "learning_curves.png": "Dev scores during training: mean and range over the seeds of each row.",
    "conflict.png": "Conflict between task gradients over the run.",
    "layer_conflict.png": "Conflict between task gradients by layer.",
    "noise.png": "Signal in the gradients, and cosines freed of noise, over the run and by layer.",
    "confusion.png": "Sentiment: the best seed of the row with the best overall.",
    "similarity.png": "Similarity: the same run.",
}
# With rows of the poster's, and without.
HEADINGS = ("# The poster's table, measured", "# Rows of a table, measured")
# The pictures that show the best run's predictions of a task.
PREDICTED = {"confusion.png": "sst", "similarity.png": "sts"}
TEST_FILES = [f"predictions/{prediction_name(task, 'test', 'starter')}" for task in DEFAULT_TASKS]


def poster_scores(row: str) -> dict[str, float]:
    """The poster's numbers of a row, its overall included; empty if it has no such row."""
    regime, _, base = row.rpartition(".")
    row = base if regime in REGIMES else row
    return named_scores(ROWS[row].poster or () if row in ROWS else ())


def named_scores(numbers: Sequence[float | None]) -> dict[str, float]:
    """Numbers in the order of DEFAULT_TASKS by name, with their overalls if there are several."""
    found = {task: n for task, n in zip(DEFAULT_TASKS, numbers, strict=False) if n is not None}
    return with_overalls(found, TASKS)


def claimed_value(claim: Claim) -> float:
    """What the poster's own numbers give for a claim."""
    if claim.claimed is not None:
        return claim.claimed
    return sum(factor * poster_scores(row)[score] for factor, row, score in claim.terms)


def judge(claim: Claim, table: Table) -> tuple[Interval | None, str]:
    """A claim's measured value and the verdict."""
    interval = table.combine(claim.terms)
    if interval is None:
        return None, "not measured"
    if len(table.shared_seeds({row for _, row, _ in claim.terms})) < 2:
        return interval, "one seed only"
    word = verdict(interval, claim.direction, claim.margin)
    # An effect that may have either sign, but is certainly less than a quarter of the claimed one, is not the
    # claimed one. A claim with a margin says nothing about an effect's size, only that it stays within
    # bounds.
    least = SMALL_SHARE * claimed_value(claim)
    if word == "undecided" and not claim.margin and verdict(interval, claim.direction, least) == "refuted":
        word = "refuted"
    return interval, word


# --- numbers and tables as text ---------------------------------------------------------------------------


def format_mean(values: list[float]) -> str:
    if not values:
        return "-"
    mean, sd = mean_and_sd(values)
    return f"{mean:.3f}" if len(values) == 1 else f"{mean:.3f} ± {sd:.3f}"


def format_seeds(table: Table, rows) -> str:
    """The seeds that a comparison of rows rests on."""
    return " ".join(map(str, table.shared_seeds(rows))) or "-"


def scores_table(table: Table) -> pages.Table:
    def poster_cells(scores):
        return [f"{scores[score]:.3f}" if score in scores else "-" for score in ("mean", *DEFAULT_TASKS)]

    lines = []
    for row, runs in table.runs.items():
        minutes = sum(training_seconds(run.metrics) for run in runs.values()) / len(runs) / 60
        measured = [format_mean(table.values(row, score)) for score in SCORES]
        poster = poster_cells(poster_scores(row))
        lines.append([table.specs[row].title, *measured, str(len(runs)), f"{minutes:.1f}", *poster])
    header = ["technique", *SCORES.values(), "seeds", "minutes a run"]
    if not table.has_poster:
        return pages.Table(header, [line[: len(header)] for line in lines])
    unknown = ["-"] * (len(SCORES) + 2)
    lines.append(["Test set (labels held out)", *unknown, *poster_cells(named_scores(POSTER_TEST))])
    poster_header = [f"poster {name}" for name in ("overall", "sent.", "para.", "sim.")]
    return pages.Table([*header, *poster_header], lines)


def claims_table(table: Table) -> pages.Table:
    lines = []
    for claim in CLAIMS:
        interval, word = judge(claim, table)
        claimed = claimed_value(claim)
        inside = "-" if interval is None else "yes" if interval.low <= claimed <= interval.high else "no"
        seeds = format_seeds(table, {row for _, row, _ in claim.terms})
        measured = [format_interval(interval), word, inside, seeds]
        lines.append([claim.number, claim.text, f"{100 * claimed:+.1f}", *measured])
    header = ["", "claim", "claimed", "measured (95 % interval)", "verdict", "claimed size in it", "seeds"]
    return pages.Table(header, lines)


def regimes_of(table: Table) -> list[str]:
    """The regimes that rows of the table were trained in; the table's own first."""
    found = [name for name in REGIMES if any(table.specs[row].group == name for row in table.runs)]
    return ([TUNED] if any(row in ROWS for row in table.runs) else []) + found


def regimes_table(table: Table) -> pages.Table | None:
    """In which regime each claim holds; None if there is no other than the table's own."""
    regimes, lines = regimes_of(table), []
    if not set(regimes) & set(REGIMES):
        return None
    for claim in CLAIMS:
        if all(claim.in_regime(name) for name in regimes):
            judged = [judge(claim.in_regime(name), table) for name in regimes]
            cells = [word if i is None else f"{word}: {format_interval(i)}" for i, word in judged]
            lines.append([claim.number, claim.text, f"{100 * claimed_value(claim):+.1f}", *cells])
    titles = ["tuned (above)" if name == TUNED else REGIMES[name].title for name in regimes]
    return pages.Table(["", "claim", "claimed", *titles], lines)


def format_claims(table: Table) -> str:
    """The claims as lines for a terminal."""
    lines = []
    for regime in regimes_of(table):
        claims = [claim.in_regime(regime) for claim in CLAIMS]
        lines += ["" if regime == TUNED else f"{REGIMES[regime].title}:"]
        lines += [format_claim(claim, table) for claim in claims if claim]
    return "\n".join(filter(None, lines))


def format_claim(claim: Claim, table: Table) -> str:
    interval, word = judge(claim, table)
    sizes = f"claimed {100 * claimed_value(claim):+5.1f}, measured {format_interval(interval)}"
    return f"claim {claim.number:2s} {word:12s} {sizes}: {claim.text}"


def format_differences(table: Table) -> str:
    """Each row against the one that it is a change of, in the overall, as lines for a terminal."""
    lines = ["overall, in points (95 % interval)"]
    for row in table.runs:
        other = table.specs[row].versus
        if other in table.runs:
            interval = row_difference(table, row, other, "mean")
            lines.append(
                f"{table.specs[row].title} - {table.specs[other].title}: {format_interval(interval)}"
            )
    return "\n".join(lines)


def step_seconds(table: Table, row: str) -> float:
    """Mean time of a training step of a row's runs; 0 if it was not logged."""
    totals = [(training_seconds(run.metrics), last_step(run.metrics)) for run in table.runs[row].values()]
    return sum(seconds / max(1, steps) for seconds, steps in totals) / len(totals)


def last_step(metrics: list[dict]) -> int:
    return max((line["step"] for line in metrics if "loss" in line), default=0)


def differences_table(table: Table) -> pages.Table:
    """Each row against the one that it is a change of; for rows of one's own also in time."""
    lines = []
    for row in table.runs:
        other = table.specs[row].versus
        if other in table.runs:
            shown = [format_interval(row_difference(table, row, other, score)) for score in SCORES]
            titles = f"{table.specs[row].title} - {table.specs[other].title}"
            lines.append([titles, *shown, format_seeds(table, {row, other})])
            if not table.has_poster:
                seconds, before = step_seconds(table, row), step_seconds(table, other)
                lines[-1].append(f"{seconds / before:.2f} times" if seconds and before else "-")
    header = ["difference, points (95 % interval)", *SCORES.values(), "seeds"]
    return pages.Table(header if table.has_poster else [*header, "time a step"], lines)


def format_comparison(table: Table, a: str, b: str) -> str:
    """The difference between two rows, a line per score."""
    lines = [
        f"{table.specs[a].title} - {table.specs[b].title}, in points, seeds {format_seeds(table, (a, b))}"
    ]
    for score, name in SCORES.items():
        interval = row_difference(table, a, b, score)
        if interval is not None:
            word = "above 0" if interval.low > 0 else "below 0" if interval.high < 0 else "could be 0"
            lines.append(f"  {name:13s} {format_interval(interval)}  {word}")
    return "\n".join(lines)


# --- the files --------------------------------------------------------------------------------------------


def make_caption(table: Table, picture: str) -> str:
    """What a picture shows, of which rows and seeds, and on how many examples."""
    caption = PICTURES[picture]
    if picture in PREDICTED:
        row, seed = table.best_run
        num_examples = len(table.dev_data[PREDICTED[picture]].labels)
        return f"{caption} {table.specs[row].title} ({row}), seed {seed}, {num_examples} dev examples."
    of_gradients = picture.endswith(("conflict.png", "noise.png"))
    rows = [row for row in table.runs if not of_gradients or has_conflict_drawn(table, row)]
    seeds = {" ".join(map(str, table.runs[row])) for row in rows}
    caption += f" Seeds {seeds.pop()}." if len(seeds) == 1 else " Seeds as in the table above."
    if picture == "learning_curves.png":
        runs = [run for found in table.runs.values() for run in found.values()]
        most = {run.facts["args"].get("eval_max_examples") for run in runs}
        parts = " or ".join(
            f"at most {n} examples of a task" if n else "all of dev" for n in sorted(most, key=str)
        )
        caption += f" Evaluated on {parts}."
    return caption


def make_page(table: Table, command: list[str], test_folder: Path | None, pictures: Sequence[str]) -> str:
    """The table as a page of Markdown; arguments as for `page_content`."""
    return pages.render_markdown("table.md.jinja", **page_content(table, command, test_folder, pictures))


def page_content(table: Table, command: list[str], test_folder: Path | None, pictures: Sequence[str]) -> dict:
    """What the page of a table says.

    Args:
        command: the `sys.argv` that made it.
        test_folder: the run that has predicted the test set, if any.
        pictures: names out of PICTURES.
    """

    def distinct(facts):
        return "; ".join(sorted({list_values(found) for found in facts} - {""}))

    runs = [run for found in table.runs.values() for run in found.values()]
    hours = sum(training_seconds(run.metrics) for run in runs) / 3600
    facts = [
        ["runs", f"{len(runs)}, {hours:.1f} hours of training steps in all"],
        ["precision", ", ".join(sorted({run.facts["args"]["precision"] for run in runs}))],
        ["machine", distinct(run.facts.get("machine", {}) for run in runs)],
        ["versions", distinct(run.facts["versions"] for run in runs)],
        ["dev data, fingerprints", distinct(run.facts["data"]["dev"] for run in runs)],
    ]
    started = [next(iter(found.values())).facts["commands"][0] for found in table.runs.values()]
    # Rows with further pre-training start from a folder of their own, made from the same encoder.
    rows = [row for row in table.runs if not table.specs[row].pretrain] or list(table.runs)
    encoders = sorted({run.facts["args"]["pretrained"] for row in rows for run in table.runs[row].values()})
    test_set = "no run has predicted it yet."
    if test_folder is not None:
        row, seed = table.best_run
        best = f"the best seed of the best row on dev ({row}, seed {seed})"
        test_set = f"the predictions of {best} are in predictions/."
    return {
        "heading": HEADINGS[0 if table.has_poster else 1],
        "encoders": ", ".join(encoders),
        "saw_other_data": OFFLINE_ENCODER in encoders,
        "test_set": test_set,
        "scores": scores_table(table),
        "claims": claims_table(table) if TUNED in regimes_of(table) else None,
        "regimes": regimes_table(table),
        "differences": differences_table(table),
        "who_wins": None if table.has_poster else who_wins(table),
        "methods": methods_table(table),
        "noise": noise_table(table),
        "facts": pages.Table(["", ""], facts),
        "commands": "\n".join(map(pages.command_line, [command, *started])),
        "pictures": {name: make_caption(table, name) for name in pictures},
    }


def rows_csv(table: Table) -> str:
    """A line per row: mean, standard deviation, interval of each score, and the poster's number."""
    header = ["row", "title", "group", "seeds"]
    header += [f"{score}_{what}" for score in SCORES for what in ("mean", "sd", "low", "high", "poster")]
    lines = []
    for row, runs in table.runs.items():
        cells = [row, table.specs[row].title, table.specs[row].group, " ".join(map(str, runs))]
        for score in SCORES:
            values, interval = table.values(row, score), table.interval(row, score)
            mean, sd = mean_and_sd(values) if values else ("", "")
            cells += [mean, sd if len(values) > 1 else ""]
            cells += [interval.low, interval.high] if interval else ["", ""]
            cells.append(poster_scores(row).get(score, ""))
        lines.append(cells)
    return csv_text([header, *lines])


def runs_csv(table: Table) -> str:
    """A line per run."""
    lines = [["row", "seed", *SCORES, "training_seconds"]]
    for row, runs in table.runs.items():
        for seed, run in runs.items():
            scores = [run.scores.get(score, "") for score in SCORES]
            lines.append([row, seed, *scores, round(training_seconds(run.metrics))])
    return csv_text(lines)


def csv_text(lines: list[list]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def table_tex(table: Table) -> str:
    """A LaTeX table (needs booktabs)."""

    def cell(values):
        return format_mean(values).replace("-", "$-$").replace("±", r"$\pm$") if values else "--"

    lines = [
        r"\begin{tabular}{lcccc}",
        r"\toprule",
        r"technique & overall & sentiment & paraphrase & similarity \\",
        r"\midrule",
    ]
    for row in table.runs:
        cells = [cell(table.values(row, score)) for score in ("mean", *DEFAULT_TASKS)]
        lines.append(" & ".join([table.specs[row].title.translate(TEX_ESCAPES), *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def has_conflict_drawn(table: Table, row: str) -> bool:
    """Whether the gradients of a row are drawn: of the poster's rows some, of others the first ones."""
    if table.has_poster:
        return row.rpartition(".")[2] in CONFLICT_ROWS and table.specs[row].group != "own"
    return row in list(table.runs)[: len(CONFLICT_ROWS)]


def draw_figures(table: Table) -> dict[str, object]:
    """File name -> figure, for those that there is something to draw for."""
    rows = []
    for row in table.runs:
        found = {score: table.interval(row, score) for score in figures.PANELS}
        measured = {score: (i.estimate, i.low, i.high) for score, i in found.items() if i is not None}
        rows.append({"title": table.specs[row].title, "poster": poster_scores(row), "measured": measured})
    curves, conflicts = {}, {}
    for row, runs in table.runs.items():
        logs = [run.metrics for run in runs.values()]
        curves[table.specs[row].title] = [
            [(line["step"], dev_scores(line["dev"])) for line in metrics if "dev" in line] for metrics in logs
        ]
        if has_conflict_drawn(table, row):
            conflicts[table.specs[row].title] = logs
    drawn = {
        "scores.png": figures.plot_scores(rows),
        "learning_curves.png": figures.plot_learning_curves(curves),
        "conflict.png": figures.plot_conflict(conflicts),
        "layer_conflict.png": figures.plot_layer_conflict(conflicts),
        "noise.png": figures.plot_noise(conflicts),
    }
    predictions = table.runs[table.best_run[0]][table.best_run[1]].predictions if table.best_run else {}
    if "sst" in predictions:
        labels = table.dev_data["sst"].labels
        drawn["confusion.png"] = figures.plot_confusion(predictions["sst"], labels, TASKS["sst"].class_names)
    if "sts" in predictions:
        labels, scale = table.dev_data["sts"].labels, TASKS["sts"].label_range
        drawn["similarity.png"] = figures.plot_regression(predictions["sts"], labels, scale)
    return {name: figure for name, figure in drawn.items() if figure is not None}


def dev_scores(summary: dict) -> dict[str, float]:
    scores = {task: select_score(summary, task, TASKS) for task in summary["tasks"]}
    return scores | ({"mean": summary["mean"]} if len(scores) > 1 else {})


def check_results_dir(folder: Path) -> None:
    """Make sure that a table's files replace nothing but those of an earlier table.

    Raises:
        UserError: if one of them is there without our page beside it; a run's predictions, for example.
    """
    page = folder / "table.md"
    if page.is_file() and read_head(page).startswith(tuple(f"{text}\n".encode() for text in HEADINGS)):
        return
    for name in ("table.md", "table.html", "table.csv", "runs.csv", "table.tex", *PICTURES, *TEST_FILES):
        if os.path.lexists(folder / name):
            raise UserError(
                f"--results_dir {folder}: {name} there is no earlier table's; expected another folder"
            )


def write_results(
    table: Table, results_dir: Path, command: list[str], test_folder: Path | None
) -> list[Path]:
    """Write all files of a table, remove those of an earlier one, return the paths; see `make_page`."""
    drawn = draw_figures(table)
    content = page_content(table, command, test_folder, list(drawn))
    texts = {
        "table.md": pages.render_markdown("table.md.jinja", **content),
        "table.html": pages.render_html("table.html.jinja", **content),
        "table.csv": rows_csv(table),
        "runs.csv": runs_csv(table),
        "table.tex": table_tex(table),
    }
    predicted = TEST_FILES if test_folder else []
    texts_of_run = {name: (test_folder / name).read_text(encoding="utf-8") for name in predicted}
    for name, content in (texts | texts_of_run).items():
        write_text(results_dir / name, content)
    for name, figure in drawn.items():
        with whole_file(results_dir / name) as temporary:
            figure.savefig(temporary, format="png", dpi=110)
    written = [results_dir / name for name in (*texts, *drawn, *predicted)]
    for path in (results_dir / name for name in (*PICTURES, *TEST_FILES)):
        if path not in written:
            path.unlink(missing_ok=True)
    return written

"""A results table as files: Markdown, CSV, LaTeX, and its figures."""

import csv
import io
import shlex
from pathlib import Path

from config import DEFAULT_TASKS, OFFLINE_ENCODER, TASKS
from evaluation import OVERALLS, prediction_name, select_score
from reporting import figures
from reporting.poster import CLAIMS, POSTER_TEST, ROWS, Claim
from reporting.report import (
    CLASS_NAMES,
    Code,
    Heading,
    Paragraph,
    Picture,
    TableBlock,
    markdown_page,
    training_seconds,
)
from reporting.significance import Interval, mean_and_sd, verdict
from reporting.table_statistics import Table
from support.files import whole_file, write_text

SCORES = {
    "mean": "overall",
    "mean_2024": "overall 2024",
    "sst": "sentiment",
    "para": "paraphrase",
    "sts": "similarity",
}
# Rows whose conflicts are drawn: with surgery off and on, and where tasks meet more or other data.
CONFLICT_ROWS = ("diff", "surgery_diff", "surgery_diff_extra")

SMALL_SHARE = 0.25  # of a claimed effect; less than that is another finding
CONTAMINATED = (
    "It saw Quora and NLI pairs in its own training: its paraphrase and similarity scores are not comparable to"
    " bert-base's, which the poster used."
)
SCORES_TEXT = (
    "Dev scores, mean ± standard deviation over seeds, beside the poster's, which gives neither seeds nor spread."
    " Sentiment and paraphrase are accuracy, similarity is Pearson's r; overall is their plain mean, overall 2024 has"
    " similarity as (r + 1) / 2. A run's best checkpoint is chosen by three evaluations on a part of dev, then scored on all of"
    " it. Minutes are those of training steps, without evaluation and without further pre-training."
)
CLAIMS_TEXT = (
    "In points (hundredths): what the poster's own numbers say, what was measured, and the verdict. Confirmed: the whole 95 %"
    " interval lies on the claimed side, whatever the size. Refuted: it lies on the other side, or it holds both signs and"
    " is surely short of a quarter of the claimed size. Undecided: neither. Intervals are paired bootstraps over dev"
    " examples and seeds (significance.py), over the seeds that all rows of a claim have. With few seeds they are somewhat too"
    " narrow: in simulations where seeds differ more than examples do, three seeds cover 83 % instead of 95 %."
)
TEX_ESCAPES = str.maketrans(
    {character: "\\" + character for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
)


def poster_scores(row: str) -> dict[str, float]:
    """The poster's numbers of a row, its overall included; empty if it has no such row."""
    return with_mean(ROWS[row].poster)


def with_mean(numbers) -> dict[str, float]:
    found = {task: n for task, n in zip(DEFAULT_TASKS, numbers or (), strict=False) if n is not None}
    if len(found) < len(DEFAULT_TASKS):
        return found
    kinds = {task: (TASKS[task].kind, number) for task, number in found.items()}
    return found | {name: overall.score(kinds) for name, overall in OVERALLS.items()}


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
    # An effect that may be of either sign, but is surely less than a quarter of the claimed one, is not the claimed one.
    # A claim with a margin says nothing of an effect's size, only that it stays within bounds.
    least = SMALL_SHARE * claimed_value(claim)
    if word == "undecided" and not claim.margin and verdict(interval, claim.direction, least) == "refuted":
        word = "refuted"
    return interval, word


# --- text --------------------------------------------------------------------------------------------------------


def show_mean(values: list[float]) -> str:
    if not values:
        return "-"
    mean, sd = mean_and_sd(values)
    return f"{mean:.3f}" if len(values) == 1 else f"{mean:.3f} ± {sd:.3f}"


def show_interval(interval: Interval | None) -> str:
    """A difference in points, with its interval."""
    if interval is None:
        return "-"
    return f"{100 * interval.estimate:+.1f} ({100 * interval.low:+.1f} to {100 * interval.high:+.1f})"


def show_seeds(table: Table, rows) -> str:
    """The seeds that a comparison of rows rests on."""
    return " ".join(map(str, table.shared_seeds(rows))) or "-"


def scores_block(table: Table) -> TableBlock:
    lines = []
    for row, runs in table.runs.items():
        minutes = sum(training_seconds(run.metrics) for run in runs.values()) / len(runs) / 60
        measured = [show_mean(table.values(row, score)) for score in SCORES]
        lines.append(
            [ROWS[row].title, *measured, str(len(runs)), f"{minutes:.1f}", *poster_cells(poster_scores(row))]
        )
    unknown = ["-"] * (len(SCORES) + 2)
    lines.append(["Test set (labels held out)", *unknown, *poster_cells(with_mean(POSTER_TEST))])
    poster_header = [f"poster {name}" for name in ("overall", "sent.", "para.", "sim.")]
    return TableBlock(["technique", *SCORES.values(), "seeds", "minutes a run", *poster_header], lines)


def poster_cells(scores: dict[str, float]) -> list[str]:
    return [f"{scores[score]:.3f}" if score in scores else "-" for score in ("mean", *DEFAULT_TASKS)]


def claims_block(table: Table) -> TableBlock:
    lines = []
    for claim in CLAIMS:
        interval, word = judge(claim, table)
        claimed = claimed_value(claim)
        inside = "-" if interval is None else "yes" if interval.low <= claimed <= interval.high else "no"
        seeds = show_seeds(table, {row for _, row, _ in claim.terms})
        size = f"{100 * claimed:+.1f}"
        lines.append([claim.number, claim.text, size, show_interval(interval), word, inside, seeds])
    header = ["", "claim", "claimed", "measured (95 % interval)", "verdict", "claimed size in it", "seeds"]
    return TableBlock(header, lines)


def claims_text(table: Table) -> str:
    """The claims as lines of a terminal."""
    lines = []
    for claim in CLAIMS:
        interval, word = judge(claim, table)
        sizes = f"claimed {100 * claimed_value(claim):+5.1f}, measured {show_interval(interval)}"
        lines.append(f"claim {claim.number:2s} {word:12s} {sizes}: {claim.text}")
    return "\n".join(lines)


def differences_block(table: Table) -> TableBlock:
    """Each row against the one that it changes something of."""
    lines = []
    for row in table.runs:
        other = ROWS[row].versus
        if other in table.runs:
            seeds = show_seeds(table, {row, other})
            shown = [
                show_interval(table.combine(((1.0, row, score), (-1.0, other, score)))) for score in SCORES
            ]
            lines.append([f"{ROWS[row].title} - {ROWS[other].title}", *shown, seeds])
    return TableBlock(["difference, points (95 % interval)", *SCORES.values(), "seeds"], lines)


def compare_text(table: Table, a: str, b: str) -> str:
    """The difference of two rows, a line per score."""
    lines = [f"{ROWS[a].title} - {ROWS[b].title}, in points, seeds {show_seeds(table, (a, b))}"]
    for score, name in SCORES.items():
        interval = table.combine(((1.0, a, score), (-1.0, b, score)))
        if interval is not None:
            word = "above 0" if interval.low > 0 else "below 0" if interval.high < 0 else "could be 0"
            lines.append(f"  {name:13s} {show_interval(interval)}  {word}")
    return "\n".join(lines)


def describe_runs(table: Table, command: list[str]) -> list:
    """Where the numbers come from: time, machines, versions, data, commands."""
    runs = [run for found in table.runs.values() for run in found.values()]

    def distinct(facts):
        texts = {", ".join(f"{name} {value}" for name, value in found.items()) for found in facts}
        return "; ".join(sorted(texts - {""}))

    hours = sum(training_seconds(run.metrics) for run in runs) / 3600
    facts = [
        ["runs", f"{len(runs)}, {hours:.1f} hours of training steps in all"],
        ["precision", ", ".join(sorted({run.facts["args"]["precision"] for run in runs}))],
        ["machine", distinct(run.facts.get("machine", {}) for run in runs)],
        ["versions", distinct(run.facts["versions"] for run in runs)],
        ["dev data, fingerprints", distinct(run.facts["data"]["dev"] for run in runs)],
    ]
    started = (next(iter(found.values())).facts["commands"][0] for found in table.runs.values())
    commands = [command, *(["python", Path(argv[0]).name, *argv[1:]] for argv in started)]
    return [
        TableBlock(["", ""], facts),
        Paragraph("The table, then the first run of each row:"),
        Code("\n".join(map(shlex.join, commands))),
    ]


def make_page(table: Table, command: list[str], test_folder: Path | None, pictures: list[str]) -> str:
    """The table as a page of Markdown."""
    # Rows with further pre-training start from a folder of their own, made from the same encoder.
    rows = [row for row in table.runs if not ROWS[row].pretrain] or list(table.runs)
    encoders = sorted({run.facts["args"]["pretrained"] for row in rows for run in table.runs[row].values()})
    note = f" {CONTAMINATED}" if OFFLINE_ENCODER in encoders else ""
    test = "no run has predicted it yet."
    if test_folder is not None:
        row, seed = table.best_run
        test = f"the predictions of the best seed of the best row on dev ({row}, seed {seed}) are in predictions/."
    blocks = [
        Heading("The poster's table, measured", level=1),
        Paragraph(f"Encoder: {', '.join(encoders)}.{note}"),
        Paragraph(SCORES_TEXT),
        scores_block(table),
        Paragraph(f"Test set: {test}"),
        Heading("Its claims"),
        Paragraph(CLAIMS_TEXT),
        claims_block(table),
        Heading("What each change changes"),
        differences_block(table),
        Heading("How it was made"),
        *describe_runs(table, command),
        Heading("Pictures"),
    ]
    for name in pictures:
        blocks += [Paragraph(PICTURES[name]), Picture(name, PICTURES[name], b"")]
    return markdown_page(blocks)


def rows_csv(table: Table) -> str:
    """A line per row: mean, standard deviation, interval of each score, and the poster's number."""
    header = ["row", "title", "group", "seeds"]
    header += [f"{score}_{what}" for score in SCORES for what in ("mean", "sd", "low", "high", "poster")]
    lines = []
    for row, runs in table.runs.items():
        cells = [row, ROWS[row].title, ROWS[row].group, " ".join(map(str, runs))]
        for score in SCORES:
            values, interval = table.values(row, score), table.interval(row, score)
            mean, sd = mean_and_sd(values) if values else ("", "")
            cells += [
                mean,
                sd if len(values) > 1 else "",
                *((interval.low, interval.high) if interval else ("", "")),
            ]
            cells.append(poster_scores(row).get(score, ""))
        lines.append(cells)
    return csv_text([header, *lines])


def runs_csv(table: Table) -> str:
    """A line per run."""
    lines = [["row", "seed", *SCORES, "training_seconds"]]
    for row, runs in table.runs.items():
        for seed, run in runs.items():
            lines.append(
                [
                    row,
                    seed,
                    *(run.scores.get(score, "") for score in SCORES),
                    round(training_seconds(run.metrics)),
                ]
            )
    return csv_text(lines)


def csv_text(lines: list[list]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def table_tex(table: Table) -> str:
    """A LaTeX table (needs booktabs)."""

    def cell(values):
        return show_mean(values).replace("-", "$-$").replace("±", r"$\pm$") if values else "--"

    lines = [
        r"\begin{tabular}{lcccc}",
        r"\toprule",
        r"technique & overall & sentiment & paraphrase & similarity \\",
        r"\midrule",
    ]
    for row in table.runs:
        title = ROWS[row].title.translate(TEX_ESCAPES)
        cells = [cell(table.values(row, score)) for score in ("mean", *DEFAULT_TASKS)]
        lines.append(" & ".join([title, *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


# --- pictures ----------------------------------------------------------------------------------------------------


def draw_figures(table: Table) -> dict[str, object]:
    """File name -> figure, for those that there is something to draw of."""
    rows = [
        {
            "title": ROWS[row].title,
            "poster": poster_scores(row),
            "measured": {
                score: (interval.estimate, interval.low, interval.high)
                for score in ("mean", *DEFAULT_TASKS)
                if (interval := table.interval(row, score)) is not None
            },
        }
        for row in table.runs
    ]
    curves = {
        ROWS[row].title: [
            [(line["step"], dev_scores(line["dev"])) for line in run.metrics if "dev" in line]
            for run in runs.values()
        ]
        for row, runs in table.runs.items()
    }
    conflicts = {
        ROWS[row].title: [run.metrics for run in table.runs[row].values()]
        for row in CONFLICT_ROWS
        if row in table.runs
    }
    drawn = {
        "scores.png": figures.plot_scores(rows),
        "learning_curves.png": figures.plot_learning_curves(curves),
        "conflict.png": figures.plot_conflict(conflicts) if conflicts else None,
        "layer_conflict.png": figures.plot_layer_conflict(conflicts) if conflicts else None,
    }
    if table.best_run is not None:
        row, seed = table.best_run
        predictions, labels = table.runs[row][seed].predictions, table.dev_data
        if "sst" in predictions:
            drawn["confusion.png"] = figures.plot_confusion(
                predictions["sst"], labels["sst"].labels, CLASS_NAMES["sst"]
            )
        if "sts" in predictions:
            drawn["similarity.png"] = figures.plot_regression(
                predictions["sts"], labels["sts"].labels, TASKS["sts"].label_range
            )
    return {name: figure for name, figure in drawn.items() if figure is not None}


def dev_scores(summary: dict) -> dict[str, float]:
    scores = {task: select_score(summary, task, TASKS) for task in summary["tasks"]}
    return scores | ({"mean": summary["mean"]} if len(scores) > 1 else {})


PICTURES = {
    "scores.png": "Scores of each row with their intervals, and the poster's.",
    "learning_curves.png": "Dev scores during training, on the part of dev that the runs looked at.",
    "conflict.png": "Conflict between task gradients over the run.",
    "layer_conflict.png": "The same for each part of the encoder.",
    "confusion.png": "Sentiment: the best seed of the row with the best overall.",
    "similarity.png": "Similarity: the same run.",
}


def write_results(
    table: Table, results_dir: Path, command: list[str], test_folder: Path | None
) -> list[Path]:
    """Write all files of a table; returns their paths."""
    drawn = draw_figures(table)
    texts = {
        "table.md": make_page(table, command, test_folder, list(drawn)),
        "table.csv": rows_csv(table),
        "runs.csv": runs_csv(table),
        "table.tex": table_tex(table),
    }
    for name, content in texts.items():
        write_text(results_dir / name, content)
    for name, figure in drawn.items():
        with whole_file(results_dir / name) as temporary:
            figure.savefig(temporary, format="png", dpi=110)
    predicted = [f"predictions/{prediction_name(task, 'test', 'starter')}" for task in DEFAULT_TASKS]
    predicted = predicted if test_folder else []
    for name in predicted:
        write_text(results_dir / name, (test_folder / name).read_text(encoding="utf-8"))
    written = [results_dir / name for name in (*texts, *drawn, *predicted)]
    earlier = [
        *PICTURES,
        *(f"predictions/{prediction_name(task, 'test', 'starter')}" for task in DEFAULT_TASKS),
    ]
    for path in (results_dir / name for name in earlier):
        if path not in written:
            path.unlink(missing_ok=True)  # of another table
    return written

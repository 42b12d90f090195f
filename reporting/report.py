"""A run's page: what was run, scores, curves, conflict between tasks, mistakes; as Markdown and as one HTML file.

    python -m reporting.report runs/NAME

writes `report.md`, with its pictures in `report/` and `curves.png`, and `report.html`, which holds its pictures and
needs no other file. The page is a list of blocks; each kind of block knows how it looks in both forms.
"""

import base64
import html
import io
import re
import shlex
import sys
import textwrap
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from config import TASKS
from datasets import Rows, read_rows
from evaluation import OVERALLS, TASK_KINDS, check_predictions, read_predictions
from reporting.read_run import read_metrics, read_scores
from support.command_line import OneLineParser, run_script
from support.errors import UserError
from support.files import whole_file, write_text
from training.flags import read_run
from training.resolve import data_settings, head_name, output_settings
from training.run_folder import ARGS_FILE, read_args_file

CLASS_NAMES = {task: spec.class_names for task, spec in TASKS.items() if spec.class_names}
OVERALL_TITLES = {name: overall.title for name, overall in OVERALLS.items()}
NUM_MISTAKES = 5  # shown of each task
MAX_TEXT = 160  # characters of a sentence that is shown
SCORE_TOLERANCE = (
    1e-6  # between the scores of a run and those counted again from its files: float32, written out
)
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: auto; padding: 0 1rem 2rem; color: #222 }
table { border-collapse: collapse }
th, td { border: 1px solid #ccc; padding: 0.2rem 0.6rem; text-align: left; vertical-align: top }
th { background: #f2f2f2 }
.wide { overflow-x: auto; margin: 1rem 0 }
pre { background: #f2f2f2; padding: 0.6rem; white-space: pre-wrap; overflow-wrap: anywhere }
img { max-width: max(100%, 40rem) }
"""


# --- blocks of a page --------------------------------------------------------------------------------------------


def markdown_text(text: str) -> str:
    """Text that reads the same in Markdown, in a paragraph as in a cell of a table."""
    # An underscore inside a word is no emphasis.
    return re.sub(r"([\\`*\[\]<>|#~&$]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))


@dataclass
class Heading:
    text: str
    level: int = 2

    def markdown(self) -> str:
        return f"{'#' * self.level} {markdown_text(self.text)}"

    def html(self) -> str:
        return f"<h{self.level}>{html.escape(self.text)}</h{self.level}>"


@dataclass
class Paragraph:
    text: str

    def markdown(self) -> str:
        return markdown_text(self.text)

    def html(self) -> str:
        return f"<p>{html.escape(self.text)}</p>"


@dataclass
class Code:
    text: str

    def markdown(self) -> str:
        # A block that is indented, empty lines too, needs no fence that the text could close.
        return textwrap.indent(self.text, "    ", lambda line: True)

    def html(self) -> str:
        return f"<pre>{html.escape(self.text)}</pre>"


@dataclass
class TableBlock:
    header: Sequence[str]
    rows: Iterable[Sequence[str]]

    def markdown(self) -> str:
        rows = [self.header, *self.rows]
        lines = ["| " + " | ".join(markdown_text(cell) for cell in row) + " |" for row in rows]
        return "\n".join([lines[0], "|" + " --- |" * len(self.header), *lines[1:]])

    def html(self) -> str:
        def line(row, tag):
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

        lines = [line(self.header, "th"), *(line(row, "td") for row in self.rows)]
        return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"


@dataclass
class Picture:
    path: str  # under the run folder
    caption: str
    png: bytes

    def markdown(self) -> str:
        return f"![{markdown_text(self.caption)}]({self.path})"

    def html(self) -> str:
        source = "data:image/png;base64," + base64.b64encode(self.png).decode()
        return f'<div class="wide"><img alt="{html.escape(self.caption)}" src="{source}"></div>'


def markdown_page(blocks: list) -> str:
    return "\n\n".join(block.markdown() for block in blocks) + "\n"


def html_page(title: str, blocks: list) -> str:
    body = "\n".join(block.html() for block in blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def picture(path: str, caption: str, figure) -> list[Picture]:
    """The block of a matplotlib Figure; none where there was nothing to draw."""
    if figure is None:
        return []
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return [Picture(path, caption, buffer.getvalue())]


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


def write_picture(run_dir: Path, picture: Picture) -> Path:
    path = run_dir / picture.path
    with whole_file(path) as temporary:
        temporary.write_bytes(picture.png)
    return path


# --- what a run folder holds -------------------------------------------------------------------------------------


def read_settings(run_dir: Path) -> tuple[Namespace, dict]:
    """A run's flags and all of its `args.json`; flags that an older version did not have yet are at their defaults.

    Raises:
        UserError: if there is no run, or the file is damaged.
    """
    settings = read_run(run_dir)[0] | {"output_dir": str(run_dir)}  # the folder may have been moved since
    stored = read_args_file(run_dir)
    for name in ("versions", "machine", "data"):
        if not isinstance(stored.setdefault(name, {}), dict):
            raise UserError(f"{run_dir / ARGS_FILE}: damaged ({name} is no table of names and values)")
    for split, values in stored["data"].items():
        if not isinstance(values, dict):
            raise UserError(f"{run_dir / ARGS_FILE}: damaged (data of {split!r} are no names and values)")
    for name in ("lr", "head_lr", "max_steps", "warmup_steps"):
        if settings[name] is None:
            raise UserError(f"{run_dir / ARGS_FILE}: damaged ({name} was never resolved)")
    return Namespace(**settings), stored


@dataclass
class DevResult:
    """A task's dev rows and predictions (N,) in their order, each None if it is not there, and a remark."""

    rows: Rows | None = None
    predictions: np.ndarray | None = None
    remark: str | None = None


def read_dev(args: Namespace, task: str, scores: dict[str, float] | None) -> DevResult:
    """Read a task's dev rows and predictions again.

    Args:
        scores: those of the finished run; files that give others have been replaced since, and are left out.
    """
    spec, result = TASKS[task], DevResult()
    kind, path = TASK_KINDS[spec.kind], output_settings(args).prediction_files[task, "dev"]
    try:
        result.rows = rows = read_rows(data_settings(args).files[task, "dev"], spec, "dev")
        result.remark = check_predictions(path, spec, rows.ids)
        by_id = read_predictions(path, spec)
    except UserError as error:
        return DevResult(result.rows, None, str(error).split(";")[0])
    result.predictions = np.array([by_id[row_id] for row_id in rows.ids])
    if scores:
        name, found = kind.main_score, kind.scores(result.predictions, rows.labels)[kind.main_score]
        if not abs(found - scores[name]) <= SCORE_TOLERANCE:  # said so that nan is refused, too
            remark = f"{path} and {rows.path} give {name} {found:.4f}, the run had {scores[name]:.4f}"
            return DevResult(remark=remark)
    return result


def training_seconds(metrics: list[dict]) -> float:
    """Time spent in training steps, evaluations not counted; 0 if it was not logged."""
    seconds, before = 0.0, 0
    for line in metrics:
        if line.get("tokens_per_second"):
            seconds += (line["tokens"] - before) / line["tokens_per_second"]
            before = line["tokens"]
    return seconds


def means_of(metrics: list[dict], key: str) -> dict[str, float]:
    """Mean of each number under `key`, over the lines that have it."""
    values = {}
    for line in metrics:
        for name, value in line.get(key, {}).items():
            values.setdefault(name, []).append(value)
    return {name: sum(found) / len(found) for name, found in values.items()}


# --- the page ----------------------------------------------------------------------------------------------------


def settings_section(args: Namespace, stored: dict, metrics: list[dict]) -> list:
    """The commands, and the settings that matter, with every default resolved."""

    def named(values):
        return ", ".join(f"{name} {value}" for name, value in values.items())

    seconds = training_seconds(metrics)
    weights = {task: weight for task, weight in args.task_weights.items() if weight != 1}
    fingerprints = stored.get("data", {})
    facts = {
        "encoder": f"{args.pretrained}{' (frozen)' if args.freeze_encoder else ''}: {stored.get('encoder')}",
        "heads": named({task: head_name(args, task) for task in args.tasks}) + f"; pooling {args.pooling}",
        "gradients": f"{args.grad_method}, {args.grad_reduction}"
        + (f", only of {', '.join(args.surgery_tasks)}" if args.surgery_tasks else ""),
        "sampler": args.sampler,
        "loss weights": named(weights),
        "batch": named({task: getattr(args, f"{task}_batch_size") for task in args.tasks})
        + (f"; {args.grad_accum} of each in a step" if args.grad_accum > 1 else ""),
        "learning rate": f"encoder {args.lr:g}, heads {args.head_lr:g}; {args.schedule}, {args.warmup_steps} steps of warm-up",
        "steps": f"{metrics[-1]['step'] if metrics else 0} of {args.max_steps}",
        "training time": f"{seconds / 60:.1f} minutes, evaluations not counted" if seconds else "",
        "seed": str(args.seed),
        "computed": named({"on": args.device, "in": args.precision} | stored.get("machine", {})),
        "data": f"{args.data_dir}"
        + "".join(f"; {split} {named(values)}" for split, values in fingerprints.items()),
        "additional data": ", ".join(
            f"{name}={count}" if count else name for name, count in args.extra_data.items()
        ),
        "versions": named(stored.get("versions", {})),
    }
    commands = "\n".join(shlex.join(["python", *command]) for command in stored.get("commands", ()))
    rows = [(name, fact) for name, fact in facts.items() if fact]
    return [Heading("What was run"), Code(commands), TableBlock(("setting", "value"), rows)]


def scores_section(args: Namespace, summary: dict | None, results: dict[str, DevResult]) -> list:
    """Dev scores beside what answering blindly would get."""
    if summary is None:
        return [Heading("Dev scores"), Paragraph("Nothing was evaluated yet.")]
    rows, remarks = [], []
    for task, scores in summary["tasks"].items():
        spec, result = TASKS[task], results[task]
        kind = TASK_KINDS[spec.kind]
        for name, value in scores.items():
            row = [spec.title, name, f"{value:.4f}", "", ""]
            if name == kind.main_score and result.rows:
                floor = kind.baseline(result.rows.labels)
                row[3:] = f"{floor:.4f}", str(len(result.rows.labels))
                if value <= floor:
                    remarks.append(Paragraph(f"Warning: {task} is no better than answering blindly."))
            rows.append(row)
    rows += [[title, "", f"{summary[name]:.4f}", "", ""] for name, title in OVERALL_TITLES.items()]
    header = ("task", "score", "dev", "answering blindly", "examples")
    text = f"Of the best checkpoint by {args.select_by}, at step {summary['step']}."
    if not summary["finished"]:
        limit = f", on at most {args.eval_max_examples} examples of a task" if args.eval_max_examples else ""
        text = f"The run is not finished. Of its best evaluation so far by {args.select_by}, at step {summary['step']}{limit}."
    return [Heading("Dev scores"), Paragraph(text), TableBlock(header, rows), *remarks]


def conflict_section(args: Namespace, metrics: list[dict]) -> list:
    """How much the tasks' gradients are in conflict, in words, numbers and pictures."""
    from reporting import figures

    heading = Heading("Conflict between tasks")
    cosines, shares = means_of(metrics, "cosine"), means_of(metrics, "conflict")
    if not shares:
        return [heading, Paragraph("No two tasks' gradients were compared.")]

    def name(pair):
        return pair.replace("-", " and ")

    most = max(shares, key=shares.get)
    text = (
        "Two tasks are in conflict in a step where the cosine between their gradients is below 0; gradients that have"
        " nothing to do with each other are in about half of the steps."
        f" Most in conflict here: {name(most)}, in {percent(shares[most])} of the steps."
    )
    by_layer = {
        (part, pair): share
        for pair, parts in figures.layer_means(metrics, "layer_conflict").items()
        for part, share in parts.items()
    }
    if by_layer:
        least, most = min(by_layer, key=by_layer.get), max(by_layer, key=by_layer.get)
        text += (
            f" By part of the encoder: most in {most[0]} ({name(most[1])}, {percent(by_layer[most])}),"
            f" least in {least[0]} ({name(least[1])}, {percent(by_layer[least])})."
        )
    pair_rows = [(name(pair), f"{cosines[pair]:.4f}", percent(shares[pair])) for pair in shares]
    weights, norms = means_of(metrics, "grad_weight"), means_of(metrics, "task_grad_norm")
    task_rows = [(task, f"{weights[task]:.3f}", f"{norms.get(task, 0):.2f}") for task in weights]
    runs = {args.grad_method: [metrics]}
    over_steps, by_part = figures.plot_conflict(runs), figures.plot_layer_conflict(runs)
    heat = figures.plot_layer_conflict_over_time(metrics)
    return [
        heading,
        Paragraph(text),
        TableBlock(("pair of tasks", "mean cosine", "steps in conflict"), pair_rows),
        Paragraph(f"Mean weights in the gradient that {args.grad_method} makes; all 1 is the plain sum."),
        TableBlock(("task", "mean weight of its gradient", "mean length of its gradient"), task_rows),
        *picture("report/conflict.png", "conflict over the steps", over_steps),
        *picture("report/layer_conflict.png", "conflict by part of the encoder", by_part),
        *picture("report/layer_conflict_over_time.png", "the same over the steps", heat),
    ]


def task_section(task: str, result: DevResult) -> list:
    """A task's predictions on dev: a picture, and the mistakes that are furthest off."""
    from reporting import figures

    spec = TASKS[task]
    kind = TASK_KINDS[spec.kind]
    blocks = [Heading(f"{task}: {spec.title}")]
    if result.predictions is None:
        return [*blocks, Paragraph(f"Predictions and mistakes are left out. {result.remark}.")]
    if result.remark:
        blocks.append(Paragraph(f"Warning: {result.remark}."))
    labels, predictions = result.rows.labels, result.predictions
    if kind.is_discrete:
        names = CLASS_NAMES.get(task) or [str(number) for number in range(int(spec.label_range[1]) + 1)]
        figure = figures.plot_confusion(predictions, labels, names)

        def text(value):
            return names[int(value)]
    else:
        figure = figures.plot_regression(predictions, labels, spec.label_range, task)

        def text(value):
            return f"{value:.2f}"

    errors = np.abs(predictions - labels)
    wrong = [n for n in np.argsort(-errors, kind="stable") if errors[n] > 0]
    rows = [
        [*map(cut, result.rows.texts[n]), text(labels[n]), text(predictions[n])] for n in wrong[:NUM_MISTAKES]
    ]
    blocks += picture(f"report/{task}.png", f"predictions of {task}", figure)
    if rows:
        wrong_text = f"{len(wrong)} of {len(labels)} examples are wrong. " if kind.is_discrete else ""
        blocks.append(Paragraph(f"{wrong_text}Furthest off:"))
        blocks.append(TableBlock((*spec.text_columns, "true", "predicted"), rows))
    return blocks


def make_page(run_dir: Path) -> tuple[str, list]:
    """Title and blocks of a run's page, made from what the folder holds; nothing is written.

    Raises:
        UserError: if there is no run, or one of its files is damaged.
    """
    from reporting import figures

    args, stored = read_settings(run_dir)
    metrics = read_metrics(run_dir) if (run_dir / "metrics.jsonl").exists() else []
    summary, finished = None, (run_dir / "scores.json").exists()
    evaluated = [line for line in metrics if "dev" in line]
    if finished:
        scores = read_scores(run_dir)
        summary = scores["dev"] | {"step": scores["step"], "finished": True}
    elif evaluated:
        best = max(evaluated, key=lambda line: line["score"])
        summary = best["dev"] | {"step": best["step"], "finished": False}
    results = {
        task: read_dev(args, task, summary["tasks"].get(task) if finished else None) for task in args.tasks
    }
    title = f"Run {run_dir.resolve().name}"
    curves = picture("curves.png", "losses, dev scores, cosines, learning rate", figures.plot_curves(metrics))
    blocks = [
        Heading(title, level=1),
        *scores_section(args, summary, results),
        *settings_section(args, stored, metrics),
        Heading("Curves"),
        *(curves or [Paragraph("Nothing was logged yet.")]),
        *conflict_section(args, metrics),
    ]
    for task in args.tasks:
        blocks += task_section(task, results[task])
    return title, blocks


def plot_run(run_dir: Path) -> Path | None:
    """Draw `curves.png` in a run's folder; returns its path, or None if nothing was logged."""
    from reporting import figures

    drawn = picture("curves.png", "", figures.plot_curves(read_metrics(run_dir)))
    return write_picture(run_dir, drawn[0]) if drawn else None


def report(argv: list[str] | None) -> None:
    parser = OneLineParser(
        prog="reporting.report",
        description="Make the page of a run, report.md and report.html.",
        allow_abbrev=False,
    )
    parser.add_argument("run_dir", type=Path, help="run folder")
    run_dir = parser.parse_args(argv).run_dir
    title, blocks = make_page(run_dir)
    for block in blocks:
        if isinstance(block, Picture):
            write_picture(run_dir, block)
    for name, text in (("report.md", markdown_page(blocks)), ("report.html", html_page(title, blocks))):
        write_text(run_dir / name, text)
        print(run_dir / name)


def main(argv: list[str] | None = None) -> int:
    return run_script("reporting.report", partial(report, argv))


if __name__ == "__main__":
    sys.exit(main())

"""The page of a run: settings, scores, curves, conflict between tasks, mistakes; in Markdown and in HTML.

    python -m reporting.report runs/NAME
    python -m reporting.report runs

The first writes `report.md`, with its pictures in `report/` and `curves.png`, and `report.html`, which holds
its pictures and needs no other file; the second `runs/runs.html`, a list of the runs there (run_list.py). The
functions here collect what the page of a run says; templates/ has the page itself in both formats.
"""

if __name__ == "__main__":
    from support.interrupts import end_quietly

    end_quietly()

import base64
import io
import sys
from argparse import Namespace
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from config import TASKS
from datasets import Rows, read_rows
from evaluation import TASK_KINDS, check_predictions, overall_titles, read_predictions
from reporting.noise import estimate, format_cosine, format_share, probes_of, tasks_and_pairs
from reporting.pages import Table, command_line, percent, render_html, render_markdown
from reporting.read_run import read_metrics, read_settings, read_summary, training_seconds
from reporting.run_list import find_runs, is_run, write_run_list
from support.command_line import OneLineParser, run_script
from support.errors import UserError
from support.files import check_replaceable, read_head, whole_file, write_text
from training.args_file import ENSEMBLE_FILE
from training.resolve import data_settings, head_name, output_settings
from training.run_folder import read_args_file

NUM_MISTAKES = 5  # shown for each task
MAX_TEXT = 160  # characters shown of a sentence
# Between a run's scores and those recomputed from its prediction files, which hold float32 numbers as text.
SCORE_TOLERANCE = 1e-6
# How our pages begin, so that no other file is taken for one and replaced.
OWN_PAGES = {
    "report.md": lambda path: read_head(path).startswith(b"# Run "),
    "report.html": lambda path: b"<title>Run " in read_head(path),
}


@dataclass
class Picture:
    path: str  # under the run folder
    caption: str
    png: bytes

    @property
    def data_uri(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.png).decode()

    def write(self, run_dir: Path) -> Path:
        path = run_dir / self.path
        check_replaceable(path, "picture of a run", is_picture)
        with whole_file(path) as temporary:
            temporary.write_bytes(self.png)
        return path


def is_picture(path: Path) -> bool:
    head = read_head(path)
    return head.startswith(b"\x89PNG") and b"Matplotlib" in head


def draw(path: str, caption: str, figure) -> Picture | None:
    """A matplotlib Figure as a picture; None where there was nothing to draw."""
    if figure is None:
        return None
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return Picture(path, caption, buffer.getvalue())


# --- what a run folder holds ------------------------------------------------------------------------------


@dataclass
class DevResult:
    """A task's dev rows and the predictions (N,) for them, each None if it is not there, and a remark."""

    rows: Rows | None = None
    predictions: np.ndarray | None = None
    remark: str | None = None


def read_dev(task: str, data_file: Path, path: Path, scores: dict[str, float] | None) -> DevResult:
    """Read a task's dev rows and predictions.

    Args:
        path: of the predictions.
        scores: those of the finished run; files that do not give them have been replaced since, and are left
            out.
    """
    spec, result = TASKS[task], DevResult()
    kind = TASK_KINDS[spec.kind]
    try:
        result.rows = rows = read_rows(data_file, spec, "dev")
        result.remark = check_predictions(path, spec, rows.ids)
        by_id = read_predictions(path, spec)
    except UserError as error:
        return DevResult(result.rows, None, str(error).split(";")[0])
    result.predictions = np.array([by_id[row_id] for row_id in rows.ids])
    if scores:
        name, found = kind.main_score, kind.scores(result.predictions, rows.labels)[kind.main_score]
        if not abs(found - scores[name]) <= SCORE_TOLERANCE:  # in this form nan is refused, too
            remark = f"{path} and {rows.path} give {name} {found:.4f}, the run had {scores[name]:.4f}"
            return DevResult(remark=remark)
    return result


def means_of(metrics: list[dict], key: str) -> dict[str, float]:
    """Mean of each number under `key`, over the lines that have it."""
    values = {}
    for line in metrics:
        for name, value in line.get(key, {}).items():
            values.setdefault(name, []).append(value)
    return {name: sum(found) / len(found) for name, found in values.items()}


# --- the sections of the page -----------------------------------------------------------------------------


def list_values(values: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def settings_table(flags: dict, heads: dict[str, str], stored: dict, metrics: list[dict]) -> Table:
    """The settings that matter, with every default resolved."""
    seconds, surgery = training_seconds(metrics), flags["surgery_tasks"]
    batch_sizes = {task: flags[f"{task}_batch_size"] for task in flags["tasks"]}
    sources = [f"{name}={count}" if count else name for name, count in flags["extra_data"].items()]
    fingerprints = [f"; {split} {list_values(values)}" for split, values in stored["data"].items()]
    machine = {name: flags[name] for name in ("device", "precision")} | stored["machine"]
    frozen = " (frozen)" if flags["freeze_encoder"] else ""
    accumulated = f"; {flags['grad_accum']} of each in a step" if flags["grad_accum"] > 1 else ""
    facts = {
        "encoder": f"{flags['pretrained']}{frozen}: {stored.get('encoder')}",
        "heads": f"{list_values(heads)}; pooling {flags['pooling']}",
        "gradients": f"{flags['grad_method']}, {flags['grad_reduction']}"
        + (f", only of {', '.join(surgery)}" if surgery else ""),
        "teacher": f"{', '.join(flags['teacher'])}; weight {flags['teacher_weight']:g}"
        if flags["teacher"]
        else "",
        "sampler": flags["sampler"],
        "loss weighting": flags["loss_weighting"],
        "loss weights": list_values({task: w for task, w in flags["task_weights"].items() if w != 1}),
        "batch": list_values(batch_sizes) + accumulated,
        "learning rate": f"encoder {flags['lr']:g}, heads {flags['head_lr']:g}; {flags['schedule']},"
        f" {flags['warmup_steps']} steps of warm-up",
        "steps": f"{metrics[-1]['step'] if metrics else 0} of {flags['max_steps']}",
        "training time": f"{seconds / 60:.1f} minutes, evaluations not counted" if seconds else "",
        "seed": str(flags["seed"]),
        "machine": list_values(machine),
        "data": flags["data_dir"] + "".join(fingerprints),
        "additional data": ", ".join(sources),
        "versions": list_values(stored["versions"]),
    }
    return Table(("setting", "value"), [(name, fact) for name, fact in facts.items() if fact])


def scores_section(
    summary: dict | None,
    results: dict[str, DevResult],
    select_by: str,
    max_examples: int | None,
    final_eval: str,
) -> dict:
    """Dev scores beside those of a model that ignores its input.

    Args:
        select_by, max_examples: which score chose the checkpoint, and on how many examples of a task.
        final_eval: what the last evaluation is to look at.
    """
    if summary is None:
        return {"text": "Nothing was evaluated yet.", "table": None, "warnings": []}
    rows, warnings = [], []
    most = None if summary["finished"] and not summary["is_part"] else max_examples
    for task, scores in summary["tasks"].items():
        spec, result = TASKS[task], results[task]
        kind = TASK_KINDS[spec.kind]
        for name, value in scores.items():
            row = [spec.title, name, f"{value:.4f}", "", ""]
            if name == kind.main_score and result.rows:
                baseline = kind.baseline(result.rows.labels)
                row[3:] = f"{baseline:.4f}", str(len(result.rows.labels[:most]))
                if not value > baseline:  # in this form nan is warned about, too
                    warnings.append(f"Warning: {task} is no better than the {kind.baseline_name}.")
            rows.append(row)
    titles = overall_titles({task: TASKS[task] for task in summary["tasks"]})
    rows += [[title, "", f"{summary[name]:.4f}", "", ""] for name, title in titles.items()]
    limit = f", on at most {most} examples per task" if most else ""
    if summary["finished"]:
        text = f"Scores of the best checkpoint by {select_by}, from step {summary['step']}{limit}."
    else:
        best = f"by {select_by} was at step {summary['step']}{limit}"
        why = "had no last evaluation" if final_eval == "none" else "is not finished"
        text = f"The run {why}. Its best evaluation so far {best}."
    text += " The baseline gives every example the same answer: the most frequent class, or some constant."
    header = ("task", "score", "dev", "baseline", "examples")
    return {"text": text, "table": Table(header, rows), "warnings": warnings}


def conflict_section(metrics: list[dict], grad_method: str, seed: int) -> dict:
    """How much the tasks' gradients are in conflict, in words, numbers and pictures."""
    from reporting import figures

    cosines, shares = means_of(metrics, "cosine"), means_of(metrics, "conflict")
    if not shares:
        return {"text": "No two tasks' gradients were compared.", "pairs": None}

    def tasks_of(pair):
        return pair.replace("-", " and ")

    most = max(shares, key=shares.get)
    text = (
        "Two tasks are in conflict in a step where the cosine between their gradients is below 0; unrelated"
        " gradients are in about half of the steps. Most often in conflict here:"
        f" {tasks_of(most)}, in {percent(shares[most])} of the steps."
    )
    by_layer = {
        (group, pair): share
        for pair, groups in figures.layer_means(metrics, "layer_conflict").items()
        for group, share in groups.items()
    }
    if by_layer:
        least, most = (
            f"{group} ({tasks_of(pair)}, {percent(by_layer[group, pair])})"
            for group, pair in (min(by_layer, key=by_layer.get), max(by_layer, key=by_layer.get))
        )
        text += f" By layer: most often in {most}, least often in {least}."
    weights, norms = means_of(metrics, "grad_weight"), means_of(metrics, "task_grad_norm")
    factors = means_of(metrics, "loss_weight")  # none with --loss_weighting fixed
    runs = {grad_method: [metrics]}
    pictures = [
        draw(f"report/{name}.png", f"{caption}; seed {seed}", figure)
        for name, caption, figure in (
            ("conflict", "Conflict over the run, running means", figures.plot_conflict(runs)),
            ("layer_conflict", "Conflict by layer, mean over the steps", figures.plot_layer_conflict(runs)),
            (
                "layer_conflict_over_time",
                "Conflict by layer over the run, faded where it may be chance",
                figures.plot_layer_conflict_over_time(metrics),
            ),
            (
                "noise",
                "Signal in the gradients, and their cosines freed of noise, with intervals",
                figures.plot_noise(runs),
            ),
        )
    ]
    return {
        "text": text,
        "pairs": Table(
            ("pair of tasks", "mean cosine", "steps in conflict"),
            [(tasks_of(pair), f"{cosines[pair]:.4f}", percent(shares[pair])) for pair in shares],
        ),
        **noise_part(metrics),
        "weights_text": "Weight of each task's gradient in the combined one, made by --grad_method"
        f" {grad_method}; all 1 is the plain sum.",
        "weights": Table(
            ("task", "mean weight of its gradient", "mean length of its gradient")
            + (("mean factor of its loss",) if factors else ()),
            [
                (task, f"{weights[task]:.3f}", f"{norms.get(task, 0):.2f}")
                + ((f"{factors.get(task, 1):.3f}",) if factors else ())
                for task in weights
            ],
        ),
        "pictures": [picture for picture in pictures if picture],
    }


def noise_part(metrics: list[dict]) -> dict:
    """How much of the gradients is signal, and what their cosines are without the noise."""
    probes = probes_of(metrics)
    if not probes:
        return {"noise_text": "How much of this is noise was not measured (--noise_batches).", "noise": None}
    tasks, pairs = tasks_and_pairs(probes)
    num_batches = sum(len(line["noise"][tasks[0]]) - 1 for line in probes)
    text = (
        "Most of a batch's gradient is noise, and cosines of noisy gradients shrink towards 0. Measured with"
        f" {num_batches} batches of each task, from step {probes[0]['step']} to {probes[-1]['step']}: the"
        " share of the expected gradient in the mean square of a batch's, and the cosines of the expected"
        " gradients (about 95 %; - : not told apart from no gradient at all)."
    )
    rows = [(task, format_share(estimate(probes, task))) for task in tasks]
    rows += [(" and ".join(pair.split("-")), format_cosine(estimate(probes, pair))) for pair in pairs]
    return {"noise_text": text, "noise": Table(("task or pair", "share of signal, or cosine"), rows)}


def task_section(task: str, result: DevResult, seed: int) -> dict:
    """A task's predictions on dev: a picture, and the mistakes that are furthest off."""
    from reporting import figures

    spec = TASKS[task]
    kind = TASK_KINDS[spec.kind]
    section = {"title": f"{task}: {spec.title}", "remark": None, "picture": None, "mistakes": None}
    if result.predictions is None:
        return section | {"remark": f"Predictions and mistakes are left out. {result.remark}."}
    if result.remark:
        section["remark"] = f"Warning: {result.remark}."
    labels, predictions = result.rows.labels, result.predictions
    figure = figures.plot_predictions(task, predictions, labels)

    def value_text(value):
        return figures.class_names(task)[int(value)] if kind.is_discrete else f"{value:.2f}"

    def shorten(text):
        return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"

    errors = np.abs(predictions - labels)
    wrong = [n for n in np.argsort(-errors, kind="stable") if errors[n] > 0]
    caption = f"Predictions of {task}: the best checkpoint of seed {seed} on {len(labels)} dev examples"
    section["picture"] = draw(f"report/{task}.png", caption, figure)
    if wrong:
        count = f"{len(wrong)} of {len(labels)} examples are wrong. " if kind.is_discrete else ""
        section["mistakes_text"] = f"{count}Furthest off:"
        section["mistakes"] = Table(
            (*spec.text_columns, "true", "predicted"),
            [
                (*map(shorten, result.rows.texts[n]), value_text(labels[n]), value_text(predictions[n]))
                for n in wrong[:NUM_MISTAKES]
            ],
        )
    return section


# --- the page ---------------------------------------------------------------------------------------------


def collect(run_dir: Path) -> dict:
    """What the page of a run says, made from what the folder holds; nothing is written.

    Raises:
        UserError: if there is no run, or one of its files is damaged.
    """
    from reporting import figures

    flags, stored = read_settings(run_dir)
    args, tasks = Namespace(**flags), flags["tasks"]
    data_files, prediction_files = data_settings(args).files, output_settings(args).prediction_files
    metrics = read_metrics(run_dir) if (run_dir / "metrics.jsonl").exists() else []
    summary, results = read_summary(run_dir, metrics), {}
    for task in tasks:
        is_whole = summary and summary["finished"] and not summary["is_part"]
        scores = summary["tasks"].get(task) if is_whole else None
        results[task] = read_dev(task, data_files[task, "dev"], prediction_files[task, "dev"], scores)
    seed, most = flags["seed"], flags["eval_max_examples"]
    part = f"; dev scores of a part of dev, {most} examples of a task" if most else ""
    caption = f"Losses, dev scores, cosines and learning rate; seed {seed}{part}"
    return {
        "title": f"Run {run_dir.resolve().name}",
        "scores": scores_section(
            summary, results, flags["select_by"], flags["eval_max_examples"], flags["final_eval"]
        ),
        "commands": "\n".join(map(command_line, filter(None, stored["commands"]))),
        "settings": settings_table(flags, {task: head_name(args, task) for task in tasks}, stored, metrics),
        "curves": draw("curves.png", caption, figures.plot_curves(metrics, most)),
        "conflict": conflict_section(metrics, flags["grad_method"], seed),
        "tasks": [task_section(task, results[task], seed) for task in tasks],
    }


def plot_run(run_dir: Path) -> Path | None:
    """Draw `curves.png` in a run's folder; returns its path, or None if nothing was logged."""
    from reporting import figures

    max_examples = read_args_file(run_dir)["args"].get("eval_max_examples")
    picture = draw("curves.png", "", figures.plot_curves(read_metrics(run_dir), max_examples))
    return picture and picture.write(run_dir)


def report(argv: list[str] | None) -> None:
    parser = OneLineParser(
        prog="reporting.report",
        description="Make the page of a run, report.md and report.html in its folder; or, of a folder with"
        " several runs, runs.html there, which lists them.",
        allow_abbrev=False,
    )
    parser.add_argument("run_dir", type=Path, help="run folder, or a folder with run folders")
    run_dir = parser.parse_args(argv).run_dir
    if not is_run(run_dir) and find_runs(run_dir):
        print(write_run_list(run_dir))
        return
    if (run_dir / ENSEMBLE_FILE).exists():
        raise UserError(
            f"{run_dir}: is an ensemble, whose scores are in its scores.json; its members have pages"
        )
    page = collect(run_dir)
    pictures = [
        page["curves"],
        *page["conflict"].get("pictures", ()),
        *(task["picture"] for task in page["tasks"]),
    ]
    pictures = list(filter(None, pictures))
    for path, is_own in OWN_PAGES.items():
        check_replaceable(run_dir / path, "page of a run", is_own)
    for picture in pictures:
        check_replaceable(run_dir / picture.path, "picture of a run", is_picture)
    for picture in pictures:
        picture.write(run_dir)
    for name, render in (("report.md", render_markdown), ("report.html", render_html)):
        write_text(run_dir / name, render(f"{name}.jinja", **page))
        print(run_dir / name)


def main(argv: list[str] | None = None) -> int:
    return run_script("reporting.report", partial(report, argv))


if __name__ == "__main__":
    sys.exit(main())

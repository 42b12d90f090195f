"""One page over many runs: their scores, and the flags that tell them apart, in a table that can be sorted.

`python -m reporting.report runs` writes it as `runs/runs.html`, a single file.
"""

import math
from pathlib import Path

from config import TASKS
from evaluation import OVERALLS, TASK_KINDS
from reporting.pages import Table, render_html
from reporting.read_run import read_metrics, read_settings, read_summary, training_seconds
from support.command_line import printable
from support.errors import UserError, one_line
from support.files import check_replaceable, read_head, write_text
from training.checkpoint import SUMS_FILE
from training.flags import make_parser
from training.run_folder import ARGS_FILE

PAGE = "runs.html"
TITLE = "<title>Runs in "  # how our page begins, so that no other file is taken for it and replaced
# Flags that may tell runs apart; where files are and what is written says nothing about a result.
MARKS = ("result", "length", "machine", "text")


def is_run(folder: Path) -> bool:
    return (folder / ARGS_FILE).exists()


def find_runs(folder: Path) -> list[Path]:
    """The run folders right inside a folder, by name; checkpoints, with their copies of ARGS_FILE, not."""
    found = sorted(path.parent for path in folder.glob(f"*/{ARGS_FILE}"))
    return [path for path in found if not (path / SUMS_FILE).exists()]


def read_listed(folder: Path) -> dict:
    """What the list says of a run: `cells` by column, `flags`, and the score that it is sorted by.

    A folder that holds no readable run has a remark in their place.
    """
    listed = {"name": printable(folder.name), "cells": {}, "flags": {}, "score": None, "remark": ""}
    try:
        flags, _ = read_settings(folder)
        metrics = read_metrics(folder) if (folder / "metrics.jsonl").exists() else []
        summary = read_summary(folder, metrics)
    except UserError as error:
        return listed | {"remark": one_line(str(error), 200)}
    listed["flags"] = {name: flags[name] for name in make_parser().marked(*MARKS)} | {
        "data_dir": flags["data_dir"]
    }
    cells = listed["cells"]
    if summary:
        for task, scores in summary["tasks"].items():
            name = TASK_KINDS[TASKS[task].kind].main_score
            cells[f"{task} {name}"] = f"{scores[name]:.4f}"
        cells |= {name: f"{summary[name]:.4f}" for name in OVERALLS}
        cells["best step"] = str(summary["step"])
        listed["score"] = summary["mean"] if math.isfinite(summary["mean"]) else None
    last = max((line["step"] for line in metrics), default=0)
    cells |= {"steps": str(last), "minutes": f"{training_seconds(metrics) / 60:.1f}"}
    if not (summary and summary["finished"]):
        is_trained = summary and last == flags["max_steps"]  # as with --final_eval none
        listed["remark"] = (
            "no final evaluation" if is_trained else f"not finished: step {last} of {flags['max_steps']}"
        )
        if summary:
            listed["remark"] += "; scores of its evaluations so far"
    elif summary["is_part"]:
        listed["remark"] = "scores of part of dev"
    return listed


def format_value(value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        # Of a task file its task: the rest of it is many lines.
        return ", ".join(
            name + ("" if isinstance(inner, dict) else f"={format_value(inner)}")
            for name, inner in value.items()
        )
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def list_runs(folder: Path) -> tuple[Table, list[str]]:
    """The table of the runs in a folder, best first, and the flags that are equal in all of them."""
    runs = [read_listed(path) for path in find_runs(folder)]
    runs.sort(key=lambda run: (run["score"] is None, -(run["score"] or 0)))
    readable = [run["flags"] for run in runs if run["flags"]]
    values = {
        name: [format_value(flags[name]) for flags in readable]
        for name in sorted(readable[0] if readable else ())
    }
    differ = [name for name, found in values.items() if len(set(found)) > 1]
    shared = [
        f"--{name} {found[0]}"
        for name, found in values.items()
        if name not in differ and found[0] not in ("", "no")
    ]
    found = {name for run in runs for name in run["cells"]}
    mains = [f"{task} {TASK_KINDS[spec.kind].main_score}" for task, spec in TASKS.items()]
    columns = [name for name in (*OVERALLS, *mains, "best step", "steps", "minutes") if name in found]
    rows = [
        [
            run["name"],
            *(run["cells"].get(name, "") for name in columns),
            *(format_value(run["flags"][name]) if run["flags"] else "" for name in differ),
            run["remark"],
        ]
        for run in runs
    ]
    return Table(["run", *columns, *(f"--{name}" for name in differ), "remark"], rows), shared


def write_run_list(folder: Path) -> Path:
    """Write the page and return its path; a UserError if another file is in its place."""
    path = folder / PAGE
    check_replaceable(path, "list of runs", lambda path: TITLE.encode() in read_head(path))
    table, shared = list_runs(folder)
    pages = {run.name for run in find_runs(folder) if (run / "report.html").exists()}
    title = f"Runs in {folder.resolve().name}"
    write_text(
        path, render_html("runs.html.jinja", title=title, table=table, shared_flags=shared, pages=pages)
    )
    return path

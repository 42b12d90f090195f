"""Checks across data files, a record of the data for the run folder, and a command that checks without
training:

    python -m training.check_data data

Errors within one file are found where it is read, by `datasets.read_rows`.
"""

if __name__ == "__main__":
    from support.interrupts import end_quietly

    end_quietly()

import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from config import SPLITS, TASKS
from datasets import (
    NUM_NAMED,
    DataError,
    Rows,
    count_of,
    data_file,
    name_some,
    read_rows,
    warning_lines,
    warning_text,
)
from support.command_line import OneLineParser, run_script
from support.errors import UserError, one_line
from training.flags import COUNT, make_parser
from training.run_parser import find_task_files, task_files, task_list
from training.sources import EXTRA_SOURCES, read_source, source_paths
from training.task_file import set_own_tasks

MAX_SHOWN = 20  # errors of one file that the command lists


# --- across files -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CrossCheck:
    """Something doubtful about files that are each in order.

    Args:
        check: "overlap", "one class" or "fewer rows than a batch".
        count: how many examples are concerned.
        message: what to print.
    """

    check: str
    task: str
    split: str
    count: int
    message: str


def check_overlap(task: str, train: Rows, dev: Rows) -> list[CrossCheck]:
    """Dev examples that the model is trained on."""
    seen = set(train.texts)
    shared = [one_line(row_id, 60) for row_id, texts in zip(dev.ids, dev.texts, strict=True) if texts in seen]
    if not shared:
        return []
    message = (
        f"{len(shared)} of {len(dev.ids)} {task} dev examples also occur in its training data (dev ids"
        f" {name_some(shared)})"
    )
    return [CrossCheck("overlap", task, "dev", len(shared), message)]


def check_labels(task: str, split: str, rows: Rows) -> list[CrossCheck]:
    """Labels that are all the same."""
    labels = rows.labels
    if not len(labels) or (labels != labels[0]).any():
        return []
    consequence = "there is nothing to learn" if split == "train" else "its score will say nothing"
    message = f"all {task} {split} labels are {labels[0]:g}; {consequence}"
    return [CrossCheck("one class", task, split, len(labels), message)]


def check_number(task: str, train: Rows, batch_size: int) -> list[CrossCheck]:
    """Fewer training examples than a batch takes."""
    number = len(train.ids)
    if number >= batch_size:
        return []
    message = f"{count_of(number, f'{task} training example')}, fewer than a batch of {batch_size}"
    return [CrossCheck("fewer rows than a batch", task, "train", number, message)]


def cross_checks(
    train: Mapping[str, Rows], dev: Mapping[str, Rows], batch_sizes: Mapping[str, int] | None = None
) -> list[CrossCheck]:
    """What is doubtful about files that are each in order.

    Args:
        train, dev: task -> rows; either may lack tasks.
        batch_sizes: task -> examples per batch.
    """
    found = []
    for task in dict.fromkeys((*train, *dev)):
        if task in train and task in dev:
            found += check_overlap(task, train[task], dev[task])
        if task in train:
            found += check_labels(task, "train", train[task])
        if task in dev:
            found += check_labels(task, "dev", dev[task])
        if task in train:
            found += check_number(task, train[task], (batch_sizes or {}).get(task, 0))
    return found


def describe_labels(rows: Rows, task: str) -> dict:
    """How often each class occurs, or the mean, least and greatest label; empty without labels."""
    if rows.labels is None or not len(rows.labels):
        return {}
    if TASKS[task].kind == "regression":
        labels = rows.labels.astype(np.float64)
        return {"mean": labels.mean().item(), "min": labels.min().item(), "max": labels.max().item()}
    low, high = map(int, TASKS[task].label_range)
    return {"counts": {str(label): int((rows.labels == label).sum()) for label in range(low, high + 1)}}


def make_report(splits: Mapping[str, Mapping[str, Rows]], checks: list[CrossCheck]) -> dict:
    """A record of the data for a run's `data_report.json`: JSON-able, the same for the same files.

    Args:
        splits: split -> task -> rows, as read.
        checks: from `cross_checks`.
    """
    tasks: dict = {}
    for split, split_rows in splits.items():
        for task, rows in split_rows.items():
            tasks.setdefault(task, {})[split] = {
                "path": str(rows.path),
                "sha256": rows.sha256,
                "rows": rows.num_rows,
                "examples": len(rows.ids),
                "labels": describe_labels(rows, task),
                "warnings": {
                    kind: {
                        "count": len(lines),
                        "first_lines": lines[:NUM_NAMED],
                        "message": warning_text(kind, lines),
                    }
                    for kind, lines in rows.warnings.items()
                },
            }
    return {"tasks": tasks, "cross_checks": [asdict(check) for check in checks]}


# --- python -m training.check_data --------------------------------------------------------------------------


class Findings:
    """Lines to print, and the number of errors and warnings among them."""

    def __init__(self):
        self.lines: list[str] = []
        self.num_errors = self.num_warnings = 0

    def error(self, error: UserError) -> None:
        errors = error.errors if isinstance(error, DataError) else [str(error)]
        self.num_errors += len(errors)
        self.lines += [f"       error: {text}" for text in errors[:MAX_SHOWN]]
        if len(errors) > MAX_SHOWN:
            self.lines.append(f"       and {count_of(len(errors) - MAX_SHOWN, 'more error')} in this file")

    def warning(self, text: str) -> None:
        self.num_warnings += 1
        self.lines.append(f"       warning: {text}")


def check_task(data_dir: Path, task: str, batch_size: int | None, findings: Findings) -> None:
    """Read the three files of a task, and compare them."""
    splits: dict = {split: {} for split in SPLITS}
    for split in SPLITS:
        path = data_file(data_dir, TASKS[task], split)
        try:
            rows = splits[split][task] = read_rows(path, TASKS[task], split)
        except UserError as error:
            findings.lines.append(f"{task:6s} {split:5s} {'no':>6s} examples from {path}")
            if split == "test" and not os.path.lexists(path):
                findings.warning(f"{path}: no such file; without it, {task} gets no test predictions")
            else:
                findings.error(error)
            continue
        labels = describe_labels(rows, task)
        if "counts" in labels:
            described = ", ".join(f"{label}: {count}" for label, count in labels["counts"].items())
        else:
            described = ", ".join(f"{name} {value:.3g}" for name, value in labels.items())
        left_out = f" of {rows.num_rows} rows" if len(rows.ids) < rows.num_rows else ""
        described = f" (labels: {described})" if described else ""
        findings.lines.append(
            f"{task:6s} {split:5s} {len(rows.ids):6d} examples{left_out} from {path}{described}"
        )
        for line in warning_lines(rows):
            findings.warning(line)
    batch_sizes = {task: batch_size} if batch_size else None
    for check in cross_checks(splits["train"], splits["dev"], batch_sizes):
        findings.warning(check.message)


def check_source(data_dir: Path, name: str, findings: Findings) -> None:
    """Read a source of additional data."""
    paths = source_paths(name, data_dir)
    try:
        found, unusable = read_source(name, data_dir)
    except UserError as error:
        findings.lines.append(f"{EXTRA_SOURCES[name].task:6s} extra {'no':>6s} examples from {name}")
        findings.error(error)
        return
    left_out = f" of {len(found) + unusable} rows" if unusable else ""
    findings.lines.append(
        f"{EXTRA_SOURCES[name].task:6s} extra {len(found):6d} examples{left_out} from {name}"
        f" ({', '.join(map(str, paths))})"
    )
    if not found:
        findings.warning(f"{name}: no row with a usable label and sentence")


def check_folder(
    data_dir: str | Path, tasks: tuple[str, ...] | None = None, batch_size: int | None = None
) -> tuple[list[str], int, int]:
    """Read all data files in a folder.

    Args:
        tasks: those whose files must be there; None for all that are there.
        batch_size: examples of a task in a batch.

    Returns:
        lines to print, and the numbers of errors and of warnings among them.

    Raises:
        UserError: if there is no such folder.
    """
    data_dir, findings, num_present = Path(data_dir), Findings(), 0
    if not data_dir.is_dir():
        raise UserError(f"{data_dir}: no such folder; expected one with data files, such as data/sample")
    os.listdir(data_dir)  # where that is not permitted, all files would seem to be absent
    for task in tasks or TASKS:
        paths = [data_file(data_dir, TASKS[task], split) for split in SPLITS]
        if any(map(os.path.lexists, paths)):
            num_present += 1
            check_task(data_dir, task, batch_size, findings)
        else:
            findings.lines.append(f"{task:6s} absent")
            if tasks:
                findings.error(
                    UserError(f"{data_dir}: none of {', '.join(path.name for path in paths)} is there")
                )
    if not num_present and not tasks:
        findings.error(UserError(f"{data_dir}: no data file of any task is there"))
    for name, source in EXTRA_SOURCES.items():
        present = any(map(os.path.lexists, source_paths(name, data_dir)))
        if present and source.task in (tasks or TASKS):
            check_source(data_dir, name, findings)
    return findings.lines, findings.num_errors, findings.num_warnings


def check(argv: list[str] | None) -> None:
    set_own_tasks(find_task_files(argv))
    parser = OneLineParser(
        prog="training.check_data",
        description="Check data files without training on them; exit code 2 if there is an error.",
        allow_abbrev=False,
    )
    parser.add_argument("data_dir", metavar="DIR", help="folder with the data files")
    parser.add_argument(
        "--tasks", type=task_list(), metavar="TASK,...", help="tasks to check (default: those that are there)"
    )
    parser.add_argument(
        "--batch_size",
        type=COUNT,
        default=make_parser().get_default("batch_size"),
        help="warn if a task has fewer training examples than this (default: %(default)s, as in training)",
    )
    text = "also check tasks of your own, a TOML file each"
    parser.add_argument("--task_file", type=task_files, metavar=task_files.metavar, help=text)
    args = parser.parse_args(argv)
    lines, num_errors, num_warnings = check_folder(args.data_dir, args.tasks, args.batch_size)
    for line in lines:
        print(line)
    total = f"{count_of(num_errors, 'error')}, {count_of(num_warnings, 'warning')}"
    if num_errors:
        raise UserError(f"{args.data_dir}: {total}, listed above")
    print(total)


def main(argv: list[str] | None = None) -> int:
    return run_script("training.check_data", partial(check, argv))


if __name__ == "__main__":
    sys.exit(main())

"""What the data are like: checks across files, a record for the run folder, and a check without training.

    python -m training.check_data data

What is wrong within one file is found where it is read, by `datasets.read_rows`.
"""

import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from config import SPLITS, TASKS
from datasets import NUM_NAMED, DataError, Rows, count_of, name_some, read_rows, warning_lines, warning_text
from support.command_line import OneLineParser, run_script
from support.errors import UserError, one_line
from training.flags import COUNT, make_parser, task_list
from training.sources import EXTRA_SOURCES, read_source

MAX_SHOWN = 20  # errors of one file that --check lists


# --- across files ------------------------------------------------------------------------------------------------


def cross_checks(
    train: Mapping[str, Rows], dev: Mapping[str, Rows], batch_sizes: Mapping[str, int] | None = None
) -> list[dict]:
    """What is doubtful about files that are each in order.

    Args:
        train, dev: task -> rows; either may lack tasks.
        batch_sizes: task -> examples per batch.

    Returns:
        for each finding `check` ("overlap", "one class" or "fewer rows than a batch"), `task`, `split`, `count`, and
        a `message` to print.
    """
    found = []

    def add(check: str, task: str, split: str, count: int, message: str) -> None:
        found.append({"check": check, "task": task, "split": split, "count": count, "message": message})

    for task in dict.fromkeys((*train, *dev)):
        if task in train and task in dev:
            seen = set(train[task].texts)
            rows = dev[task]
            shared = [one_line(row_id, 60) for row_id, texts in zip(rows.ids, rows.texts) if texts in seen]
            if shared:
                add(
                    "overlap",
                    task,
                    "dev",
                    len(shared),
                    f"{len(shared)} of {len(rows.ids)} {task} dev examples also occur in its training data (dev ids"
                    f" {name_some(shared)})",
                )
        for split, split_rows in (("train", train), ("dev", dev)):
            labels = split_rows[task].labels if task in split_rows else ()
            if len(labels) and (labels == labels[0]).all():
                add(
                    "one class",
                    task,
                    split,
                    len(labels),
                    f"all {task} {split} labels are {labels[0]:g}; "
                    + ("there is nothing to learn" if split == "train" else "its score will say nothing"),
                )
        batch_size = (batch_sizes or {}).get(task, 0)
        if task in train and len(train[task].ids) < batch_size:
            number = len(train[task].ids)
            add(
                "fewer rows than a batch",
                task,
                "train",
                number,
                f"{count_of(number, f'{task} training example')}, fewer than a batch of {batch_size}",
            )
    return found


def describe_labels(rows: Rows, task: str) -> dict:
    """How often each class occurs, or mean, least and greatest label; empty without labels."""
    if rows.labels is None or not len(rows.labels):
        return {}
    if TASKS[task].kind == "regression":
        labels = rows.labels.astype(np.float64)
        return {"mean": labels.mean().item(), "min": labels.min().item(), "max": labels.max().item()}
    low, high = map(int, TASKS[task].label_range)
    return {"counts": {str(label): int((rows.labels == label).sum()) for label in range(low, high + 1)}}


def make_report(splits: Mapping[str, Mapping[str, Rows]], checks: list[dict]) -> dict:
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
    return {"tasks": tasks, "cross_checks": checks}


# --- python -m training.check_data -------------------------------------------------------------------------------


class Findings:
    """Lines to print, and how many errors and warnings are among them."""

    def __init__(self):
        self.lines, self.num_errors, self.num_warnings = [], 0, 0

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
        path = data_dir / TASKS[task].files[split]
        try:
            rows = splits[split][task] = read_rows(path, TASKS[task], split)
        except UserError as error:
            findings.lines.append(f"{task:6s} {split:5s} {'no':>6s} examples from {path}")
            if split == "test" and not os.path.lexists(path):
                findings.warning(str(error))  # training does without
            else:
                findings.error(error)
            continue
        labels = describe_labels(rows, task)
        if "counts" in labels:
            said = ", ".join(f"{label}: {count}" for label, count in labels["counts"].items())
        else:
            said = ", ".join(f"{name} {value:.3g}" for name, value in labels.items())
        left_out = f" of {rows.num_rows} rows" if len(rows.ids) < rows.num_rows else ""
        findings.lines.append(
            f"{task:6s} {split:5s} {len(rows.ids):6d} examples{left_out} from {path}"
            + (f" (labels: {said})" if said else "")
        )
        for line in warning_lines(rows):
            findings.warning(line)
    batch_sizes = {task: batch_size} if batch_size else None
    for check in cross_checks(splits["train"], splits["dev"], batch_sizes):
        findings.warning(check["message"])


def check_source(data_dir: Path, name: str, findings: Findings) -> None:
    """Read a source of additional data."""
    paths = [data_dir / file_name for file_name in EXTRA_SOURCES[name].files]
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
    """Read all data files of a folder.

    Args:
        tasks: those that must be there; None for whichever are.
        batch_size: examples of a task in a batch.

    Returns:
        lines to print, the number of errors and of warnings among them.

    Raises:
        UserError: if there is no such folder.
    """
    data_dir, findings, num_present = Path(data_dir), Findings(), 0
    if not data_dir.is_dir():
        raise UserError(
            f"--check {data_dir}: no such folder; expected one with data files, such as data/sample"
        )
    for task in tasks or TASKS:
        names = TASKS[task].files.values()
        if any(os.path.lexists(data_dir / name) for name in names):
            num_present += 1
            check_task(data_dir, task, batch_size, findings)
        else:
            findings.lines.append(f"{task:6s} absent")
            if tasks:
                findings.error(UserError(f"{data_dir}: none of {', '.join(names)} is there"))
    if not num_present and not tasks:
        findings.error(UserError(f"{data_dir}: no data file of any task is there"))
    for name, source in EXTRA_SOURCES.items():
        present = any(os.path.lexists(data_dir / file_name) for file_name in source.files)
        if present and source.task in (tasks or TASKS):
            check_source(data_dir, name, findings)
    return findings.lines, findings.num_errors, findings.num_warnings


def check(argv: list[str] | None) -> None:
    parser = OneLineParser(
        prog="training.check_data",
        description="Check data files without training on them; exit code 2 if there is an error.",
        allow_abbrev=False,
    )
    parser.add_argument("data_dir", metavar="DIR", help="folder with the data files")
    parser.add_argument(
        "--tasks", type=task_list, metavar="TASK,...", help="tasks to check (default: those that are there)"
    )
    parser.add_argument(
        "--batch_size",
        type=COUNT,
        default=make_parser().get_default("batch_size"),
        help="examples per task in a batch, of which fewer are warned about (default: %(default)s, as in training)",
    )
    args = parser.parse_args(argv)
    lines, num_errors, num_warnings = check_folder(args.data_dir, args.tasks, args.batch_size)
    for line in lines:
        print(line)
    said = f"{count_of(num_errors, 'error')}, {count_of(num_warnings, 'warning')}"
    if num_errors:
        raise UserError(f"{args.data_dir}: {said}, listed above")
    print(said)


def main(argv: list[str] | None = None) -> int:
    return run_script("training.check_data", partial(check, argv))


if __name__ == "__main__":
    sys.exit(main())

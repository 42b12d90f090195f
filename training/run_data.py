"""The data of a run: the files that the flags name are read, checked, reported on and tokenized."""

import zlib
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

from config import TASKS
from datasets import Rows, TaskData, read_rows, warning_lines
from heads import HEADS
from support.files import file_digest
from tokenizer import BertTokenizer
from training.check_data import cross_checks, make_report
from training.resolve import cache_dir, data_file, head_name
from training.sources import EXTRA_SOURCES, add_sources, held_out_keys
from training.token_cache import tokenize_cached


def read_split(args: Namespace, split: str, tasks: Iterable[str]) -> dict[str, Rows]:
    """Read one split of each task, and say what was found and what was left out."""
    split_rows = {}
    for task in tasks:
        rows = split_rows[task] = read_rows(data_file(args, task, split), TASKS[task], split)
        print(f"{task:6s} {split:5s} {len(rows.ids):6d} examples from {rows.path}")
        for line in warning_lines(rows):
            print(f"       warning: {line}")
    return split_rows


def read_test_rows(args: Namespace) -> dict[str, Rows]:
    """The test rows that --predict_splits asks for; before training, which a bad row should not come after."""
    asked = args.tasks if "test" in args.predict_splits else ()
    present = [task for task in asked if data_file(args, task, "test").exists()]
    for task in (task for task in asked if task not in present):
        print(f"warning: no test predictions for {task}: {data_file(args, task, 'test')} does not exist")
    return read_split(args, "test", present)


def add_extra_data(args: Namespace, train_rows: dict[str, Rows]) -> tuple[dict[str, Rows], list[str]]:
    """Training rows with those of --extra_data after them, and lines that say what was taken and what was dropped."""
    if not args.extra_data:
        return train_rows, []
    files = [
        (data_file(args, task, split), spec, split)
        for task, spec in TASKS.items()
        for split in ("dev", "test")
    ]
    for path in (path for path, _, _ in files if not path.exists()):
        print(f"warning: {path} does not exist, so its rows are not kept out of the additional data")
    held_out = held_out_keys([file for file in files if file[0].exists()])
    extended, said = {}, []
    for task, rows in train_rows.items():
        sources = {name: n for name, n in args.extra_data.items() if EXTRA_SOURCES[name].task == task}
        extended[task], lines = add_sources(rows, sources, args.data_dir, held_out)
        said += [f"{task:6s} extra {line}" for line in lines]
    return extended, said


def read_data(args: Namespace) -> tuple[dict[str, dict[str, Rows]], dict]:
    """All rows of a run, by split and task, and what is known about their files."""
    files = {split: read_split(args, split, args.tasks) for split in ("train", "dev")}
    train_rows, extra_lines = add_extra_data(args, files["train"])
    for line in extra_lines:
        print(line)
    files["test"] = read_test_rows(args)
    rows = files | {"train": train_rows}
    batch_sizes = {task: getattr(args, f"{task}_batch_size") or args.batch_size for task in args.tasks}
    checks = cross_checks(rows["train"], rows["dev"], batch_sizes)
    for check in checks:
        print(f"warning: {check.message}")
    report = make_report(files, checks) | {"extra_data": extra_lines}
    report["files"] = {found.path: found.sha256 for split in files.values() for found in split.values()}
    for path in (
        Path(args.data_dir) / name for source in args.extra_data for name in EXTRA_SOURCES[source].files
    ):
        report["files"][path] = file_digest(path)
    report["files"] = {str(path): digest for path, digest in report["files"].items()}
    return rows, report


def fingerprint(rows: Rows) -> str:
    """A short name for the content of a data file: equal for equal ids, texts and labels."""
    labels = None if rows.labels is None else rows.labels.tolist()
    return f"{zlib.crc32(repr((rows.ids, rows.texts, labels)).encode('utf-8', 'replace')):08x}"


def tokenize_split(
    args: Namespace, split_rows: dict[str, Rows], tokenizer: BertTokenizer
) -> dict[str, TaskData]:
    """Tokenize what `read_split` read, and say how much --max_length cuts off."""
    data = {}
    for task, rows in split_rows.items():
        joint = HEADS[head_name(args, task)].joint
        data[task] = tokenize_cached(
            rows, tokenizer, joint=joint, max_length=args.max_length, cache_dir=cache_dir(args)
        )
        cut = int((data[task].sequences.lengths >= args.max_length).sum())
        if cut:
            print(f"{rows.path}: {cut} sequences reach the limit of {args.max_length} word pieces")
    return data

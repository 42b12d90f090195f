"""What a run starts from: data files, read, checked, reported on and tokenized; the encoder, the model."""

import zlib
from collections.abc import Iterable
from pathlib import Path

import torch

from base_bert import check_vocab_size
from bert import BertModel
from config import TASKS
from datasets import Rows, TaskData, count_of, name_some, read_rows, unknown_rows, warning_lines
from heads import MultitaskBERT
from support.errors import UserError, one_line
from support.files import file_digest
from support.seeds import make_seed
from tokenizer import BertTokenizer
from training.check_data import cross_checks, make_report
from training.checkpoint import SUMS_FILE, find_damage
from training.settings import DataSettings, ModelSettings, TokenSettings
from training.sources import EXTRA_SOURCES, add_sources, held_out_keys, source_paths
from training.token_cache import tokenize_cached


def read_split(settings: DataSettings, split: str, tasks: Iterable[str]) -> dict[str, Rows]:
    """Read one split of each task, and say what was found and what was left out."""
    split_rows = {}
    for task in tasks:
        rows = split_rows[task] = read_rows(settings.files[task, split], TASKS[task], split)
        print(f"{task:6s} {split:5s} {len(rows.ids):6d} examples from {rows.path}")
        for line in warning_lines(rows):
            print(f"       warning: {line}")
    return split_rows


def read_test_rows(settings: DataSettings) -> dict[str, Rows]:
    """The test rows that are to be predicted; read early, so that a bad row ends no long run."""
    present = []
    for task in settings.predict_tasks if "test" in settings.predict_splits else ():
        path = settings.files[task, "test"]
        if path.exists():
            present.append(task)
        else:
            print(f"warning: no test predictions for {task}: {path} does not exist")
    return read_split(settings, "test", present)


def add_extra_data(settings: DataSettings, train_rows: dict[str, Rows]) -> tuple[dict[str, Rows], list[str]]:
    """Training rows followed by those of --extra_data, and lines that say what was taken and dropped."""
    if not settings.extra_data:
        return train_rows, []
    present = []
    for task, spec in TASKS.items():
        for split in ("dev", "test"):
            path = settings.files[task, split]
            if path.exists():
                present.append((path, spec, split))
            else:
                print(f"warning: {path} does not exist, so its rows are not kept out of the additional data")
    held_out = held_out_keys(present)
    extended, lines = {}, []
    for task, rows in train_rows.items():
        sources = {name: n for name, n in settings.extra_data.items() if EXTRA_SOURCES[name].task == task}
        extended[task], said = add_sources(rows, sources, settings.data_dir, held_out)
        lines += [f"{task:6s} extra {line}" for line in said]
    return extended, lines


def read_data(settings: DataSettings) -> tuple[dict[str, dict[str, Rows]], dict]:
    """All rows of a run, by split and task, and what is known about their files."""
    files = {split: read_split(settings, split, settings.tasks) for split in ("train", "dev")}
    train_rows, extra_lines = add_extra_data(settings, files["train"])
    for line in extra_lines:
        print(line)
    files["test"] = read_test_rows(settings)
    rows = files | {"train": train_rows}
    checks = cross_checks(rows["train"], rows["dev"], settings.batch_sizes)
    for check in checks:
        print(f"warning: {check.message}")
    report = make_report(files, checks) | {"extra_data": extra_lines}
    digests = {found.path: found.sha256 for split in files.values() for found in split.values()}
    for source in settings.extra_data:
        for path in source_paths(source, settings.data_dir):
            digests[path] = file_digest(path)
    report["files"] = {str(path): digest for path, digest in digests.items()}
    return rows, report


def fingerprint(rows: Rows) -> str:
    """A short name for the content of a data file: equal for equal ids, texts and labels."""
    labels = None if rows.labels is None else rows.labels.tolist()
    return f"{zlib.crc32(repr((rows.ids, rows.texts, labels)).encode('utf-8', 'replace')):08x}"


def tokenize_split(
    settings: TokenSettings, split_rows: dict[str, Rows], tokenizer: BertTokenizer
) -> dict[str, TaskData]:
    """Tokenize what `read_split` read; say what --max_length cuts off, and which texts are all unknown."""
    special_ids = [tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.unk_token_id]
    data = {}
    for task, rows in split_rows.items():
        data[task] = tokenize_cached(
            rows,
            tokenizer,
            joint=settings.joint[task],
            max_length=settings.max_length,
            cache_dir=settings.cache_dir,
        )
        num_cut = int((data[task].sequences.lengths >= settings.max_length).sum())
        if num_cut:
            print(f"{rows.path}: {num_cut} sequences reach the limit of {settings.max_length} word pieces")
        unknown = unknown_rows(data[task], special_ids)
        if unknown:
            ids = name_some([one_line(row_id, 60) for row_id in unknown])
            print(
                f"warning: {rows.path}: {count_of(len(unknown), 'row')} with a sentence of unknown words only"
                f" ([UNK]), kept (id{'' if len(unknown) == 1 else 's'} {ids})"
            )
    return data


def fingerprints(rows: dict[str, Rows]) -> dict[str, str]:
    return {task: fingerprint(found) for task, found in rows.items()}


def load_encoder(source: str | Path, hidden_dropout_prob: float | None) -> tuple[BertModel, BertTokenizer]:
    """The encoder and tokenizer to start from, or those of a checkpoint.

    Args:
        source: as --pretrained has it.
        hidden_dropout_prob: in place of the checkpoint's own; None keeps that.
    """
    damage = find_damage(Path(source)) if (Path(source) / SUMS_FILE).is_file() else None
    if damage:
        raise UserError(f"--pretrained {source}: {damage}")
    tokenizer = BertTokenizer.from_pretrained(source)
    overrides = {} if hidden_dropout_prob is None else {"hidden_dropout_prob": hidden_dropout_prob}
    bert = BertModel.from_pretrained(source, **overrides)
    check_vocab_size(len(tokenizer), bert.config.vocab_size, source)
    return bert, tokenizer


def make_model(settings: ModelSettings, bert: BertModel) -> MultitaskBERT:
    """The model on top of an encoder; the heads' first weights depend on --seed only."""
    torch.manual_seed(make_seed(settings.seed))
    return MultitaskBERT(
        bert,
        {task: TASKS[task] for task in settings.heads},
        settings.heads,
        pooling=settings.pooling,
        head_layers=settings.head_layers,
        head_dropout_prob=settings.head_dropout_prob,
        freeze_encoder=settings.freeze_encoder,
    )

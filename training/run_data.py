"""What a run starts from: data files, read, checked, reported on and tokenized; the encoder, the model."""

import math
import zlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from base_bert import check_vocab_size
from bert import BertModel
from config import TASKS, TaskSpec
from datasets import Rows, TaskData, count_of, name_some, read_rows, unknown_rows, warning_lines
from heads import MultitaskBERT
from support.errors import UserError, one_line
from support.files import file_digest
from support.seeds import make_seed, seed_of
from tokenizer import BertTokenizer
from training.check_data import cross_checks, make_report
from training.checkpoint import SUMS_FILE, find_damage
from training.phrases import Tree, make_phrases, phrase_sources, read_tree_file, tree_files
from training.settings import DataSettings, ModelSettings, RunSettings, TokenSettings
from training.sources import EXTRA_SOURCES, add_sources, held_out_keys, source_paths, text_key
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


def keys_of_splits(
    settings: DataSettings, splits: Iterable[str], tasks: Iterable[str] | None = None
) -> set[tuple[str, ...]]:
    """Keys of all examples of these splits, of some tasks or of every task that there is."""
    present = []
    for task in TASKS if tasks is None else tasks:
        spec = TASKS[task]
        for split in splits:
            path = settings.files[task, split]
            if path.exists():
                present.append((path, spec, split))
            else:
                print(f"warning: {path} does not exist, so its rows are not kept out of the additional data")
    return held_out_keys(present)


def add_extra_data(settings: DataSettings, train_rows: dict[str, Rows]) -> tuple[dict[str, Rows], list[str]]:
    """Training rows followed by those of --extra_data, and lines that say what was taken and dropped."""
    if not settings.extra_data:
        return train_rows, []
    held_out = keys_of_splits(settings, ("dev", "test"))
    extended, lines = {}, []
    for task, rows in train_rows.items():
        sources = {name: n for name, n in settings.extra_data.items() if EXTRA_SOURCES[name].task == task}
        extended[task], said = add_sources(rows, sources, settings.data_dir, held_out)
        lines += [f"{task:6s} extra {line}" for line in said]
    return extended, lines


def read_unlabelled(path: Path, spec: TaskSpec, flag: str) -> list[tuple[str, ...]]:
    """The sentences of a table in the form of the task's data files; ids and labels are not looked at.

    Raises:
        UserError: as `read_rows`, naming the flag that asks for the file.
    """
    try:
        rows = read_rows(path, replace(spec, id_column=None, label_column=""), "test")
    except UserError as error:
        raise UserError(f"{flag}: {error}") from None
    return [texts for texts in rows.texts if all(texts)]


def add_unlabelled(
    settings: DataSettings, train_rows: dict[str, Rows]
) -> tuple[dict[str, Rows], list[str], dict[Path, str]]:
    """Training rows followed by those without a label, which is NaN, for a teacher to answer.

    Returns:
        the rows, lines that say what was taken and dropped, and the sha256 of the files.
    """
    if not settings.needs_teacher:
        return train_rows, [], {}
    held_out = keys_of_splits(settings, ("dev",))
    not_named = held_out | keys_of_splits(settings, ("test",)) if settings.unlabelled else set()
    extended, lines, digests = dict(train_rows), [], {}
    for task in settings.needs_teacher:
        rows, spec = train_rows[task], TASKS[task]
        seen = {text_key(texts) for texts in rows.texts}
        added = {}  # id -> texts
        sources = {"unlabelled": settings.unlabelled.get(task)}
        sources["test"] = settings.files[task, "test"] if task in settings.transductive else None
        for name, path in sources.items():
            if path is None:
                continue
            flag = f"--{task}_unlabelled" if name == "unlabelled" else f"--transductive {task}"
            found = read_unlabelled(path, spec, flag)
            digests[path] = file_digest(path)
            kept_out = held_out if name == "test" else not_named
            fresh = {text_key(texts): texts for texts in found if text_key(texts) not in kept_out | seen}
            chosen = list(fresh.values())
            if name == "unlabelled":
                limit = math.ceil(settings.unlabelled_ratio * len(rows.ids))
                order = np.random.default_rng(seed_of(name)).permutation(len(chosen))
                chosen = [chosen[i] for i in np.sort(order[:limit])]
            seen |= {text_key(texts) for texts in chosen}
            added |= {f"{name}-{n}": texts for n, texts in enumerate(chosen)}
            lines.append(
                f"{task:6s} {len(chosen)} examples without labels from {path} (of {len(found)}:"
                f" {len(found) - len(fresh)} held out or already known, {len(fresh) - len(chosen)} beyond the"
                " limit)"
            )
        labels = np.concatenate([rows.labels, np.full(len(added), np.nan, dtype=np.float32)])
        extended[task] = replace(
            rows, ids=[*rows.ids, *added], texts=[*rows.texts, *added.values()], labels=labels
        )
    return extended, lines, digests


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
    rows["train"], unlabelled_lines, more = add_unlabelled(settings, rows["train"])
    for line in unlabelled_lines:
        print(line)
    report |= {"unlabelled": unlabelled_lines} if unlabelled_lines else {}
    digests |= more
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
            **settings.pairs(task),
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


def read_trees(settings: RunSettings) -> dict[str, list[Tree]]:
    """The trees that --phrase_weight asks for, by task; read early, as all files are."""
    if not settings.phrases.weight:
        return {}
    paths = {task: tree_files(task, settings.data.data_dir) for task in phrase_sources(settings.data.tasks)}
    return {task: [tree for path in paths[task] for tree in read_tree_file(path, task)] for task in paths}


def add_phrases(
    settings: RunSettings,
    trees: dict[str, list[Tree]],
    data: dict[str, TaskData],
    tokenizer: BertTokenizer,
    report: dict,
) -> dict[str, dict[str, str]]:
    """Give training data their labelled phrases, in place, and the run's report what is known of them.

    Returns:
        their fingerprints, by task under the name `phrases`; nothing if there are none.

    Raises:
        UserError: if no phrase of a task's trees belongs to its training sentences.
    """
    if not trees:
        return {}
    report["phrases"], digests = {}, {}
    for task, found in trees.items():
        held_out = keys_of_splits(settings.data, ("dev", "test"), [task])
        phrases, line = make_phrases(data[task], found, tokenizer, settings.phrases, held_out)
        paths = tree_files(task, settings.data.data_dir)
        if not len(phrases.labels):
            raise UserError(
                f"--phrase_weight {settings.phrases.weight:g}: no phrase of --phrase_min_words"
                f" {settings.phrases.min_words} or more in {', '.join(map(str, paths))} belongs to a training"
                f" sentence of {task}"
            )
        print(f"{task:6s} phrases {line}")
        report["phrases"][task] = line
        report["files"] |= {str(path): file_digest(path) for path in paths}
        data[task] = replace(data[task], phrases=phrases)
        arrays = (phrases.starts, phrases.stops, phrases.labels, phrases.offsets)
        digests[task] = f"{zlib.crc32(b''.join(array.tobytes() for array in arrays)):08x}"
    return {"phrases": digests}


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
    """The model on top of an encoder; the heads' first weights, and redrawn layers, depend on --seed only."""
    if settings.redraw_layers:
        torch.manual_seed(make_seed(settings.seed, seed_of("redraw_layers")))
        bert.redraw_layers(settings.redraw_layers)
    torch.manual_seed(make_seed(settings.seed))
    return MultitaskBERT(
        bert,
        {task: replace(TASKS[task], loss=settings.losses.get(task)) for task in settings.heads},
        settings.heads,
        pooling=settings.pooling,
        head_layers=settings.head_layers,
        head_dropout_prob=settings.head_dropout_prob,
        freeze_encoder=settings.freeze_encoder,
        objective=settings.objective,
    )

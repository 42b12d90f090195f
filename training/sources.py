"""Additional training rows from other data sets (`--extra_data`), except those that would leak.

EXTRA_SOURCES says of each source which task it feeds and how its labels become that task's. Rows that occur
in any of our dev or test files are dropped, because the public releases of STS-B, Quora and SST overlap the
class's splits; so are rows that the training data already have, whatever label the source gives them. Reviews
that SST took its sentences from may contain one as well: `HeldOut` finds those.
"""

import ast
import csv
import io
import json
import os
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from config import TASKS, TaskSpec
from datasets import MAX_FIELD_SIZE, Rows, clean_text, parse_label, read_rows
from support.bars import Bar
from support.errors import UserError, one_line
from support.files import MAX_DATA_BYTES, read_bytes, unique_keys
from support.seeds import seed_of
from support.text_files import decode
from training.source_table import EXTRA_SOURCES, SourceSpec

TREE_TOKEN = re.compile(r"\(|\)|[^\s()]+")
MAX_STOCK_PHRASE = 15  # letters and digits
MAX_TREE_DEPTH = 100  # each level repeats its words; a sentence of SST has at most 57
BYTE_LITERAL = re.compile(r"""b'(?:[^'\\\n]|\\.)*'|b"(?:[^"\\\n]|\\.)*\"""")


def text_key(texts: tuple[str, ...]) -> tuple[str, ...]:
    """Equal for examples that count as the same: letters and digits matter, not case, accents or order."""
    folded = (unicodedata.normalize("NFKD", text).casefold() for text in texts)
    return tuple(sorted("".join(filter(str.isalnum, text)) for text in folded))


# --- forms: (lines of a file, its columns if it has no header) -> the cells of each row by column -----------


def read_table(lines: Iterable[str], columns, **dialect) -> Iterator[dict]:
    reader = csv.DictReader(lines, fieldnames=columns, strict=True, **dialect)
    reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
    names = list(filter(None, reader.fieldnames))
    if len(set(names)) < len(names):
        raise ValueError("two columns have the same name")
    for row in reader:
        if None in row:
            raise ValueError("more fields than the header has columns")
        if any("\n" in cell and dialect["delimiter"] in cell for cell in row.values() if cell):
            raise ValueError("a quotation mark in an earlier line has swallowed the rows up to here")
        yield row


def quoted(lines: Iterable[str], columns=None) -> Iterator[dict]:
    """Tab-separated, with quotation marks around fields that need them: the course's form."""
    return read_table(lines, columns, delimiter="\t")


def plain(lines: Iterable[str], columns=None) -> Iterator[dict]:
    """Tab-separated; a quotation mark is text like any other."""
    return read_table(lines, columns, delimiter="\t", quoting=csv.QUOTE_NONE)


def byte_literals(lines: Iterable[str], columns=None) -> Iterator[dict]:
    """Tab-separated, each sentence written as a Python bytes literal (PAWS-QQP)."""
    for row in plain(lines, columns):
        yield {column: unpack_bytes(cell) if cell else cell for column, cell in row.items()}


def unpack_bytes(cell: str) -> str:
    """The text in a bytes literal; any other cell as it is."""
    if cell[:2] not in ("b'", 'b"'):
        return cell
    if not BYTE_LITERAL.fullmatch(cell):  # checked first: Python's own parser is not made for hostile text
        raise ValueError("a bytes literal is not closed, or goes on after its end")
    return ast.literal_eval(cell).decode("utf-8")


def triplets(lines: Iterable[str], columns=None) -> Iterator[dict]:
    """Comma-separated premise, entailed and contradicting sentence (SimCSE's NLI file): two pairs a line."""
    for row in read_table(lines, columns, delimiter=","):
        for column, label in (("sent1", "entailment"), ("hard_neg", "contradiction")):
            yield {"sentence1": row["sent0"], "sentence2": row[column], "label": label}


def json_object(lines: Iterable[str], columns=None) -> Iterator[dict]:
    """One JSON object whose values are the rows, objects of texts by column (samples of SNLI and MNLI)."""
    rows = json.loads("".join(lines), object_pairs_hook=unique_keys)
    for row in rows.values() if isinstance(rows, dict) else [rows]:
        if not isinstance(row, dict) or not all(isinstance(cell, str) for cell in row.values()):
            raise ValueError("expected an object of objects, each with a text for every column")
        yield row


def sentences(lines: Iterable[str], columns=None, *, label: str) -> Iterator[dict]:
    """A sentence a line, all with the same label (Movie Review)."""
    for line in lines:
        if len(line) > MAX_FIELD_SIZE:
            raise ValueError(f"a line of more than {MAX_FIELD_SIZE} characters; expected one sentence")
        yield {"sentence": line, "label": label}


def trees(lines: Iterable[str], columns=None) -> Iterator[dict]:
    """One bracketed tree a line, `(3 (2 word) ...)`, with a label on each node (SST): each node is a row.

    Beside its text it has the line's `sentence` and its `words`, which a node is from `first` up to `last`.
    """
    for line in lines:
        if len(line) > MAX_FIELD_SIZE:
            raise ValueError(f"a line of more than {MAX_FIELD_SIZE} characters; expected one sentence")
        words, nodes = [], []
        opened = []  # (label, number of words before) of nodes not yet closed
        tokens = iter(TREE_TOKEN.findall(line))
        for token in tokens:
            if token == "(":
                opened.append((next(tokens, ""), len(words)))
                if len(opened) > MAX_TREE_DEPTH:
                    raise ValueError(f"more than {MAX_TREE_DEPTH} nested brackets")
            elif not opened:
                raise ValueError(
                    "one closing bracket too many" if token == ")" else "a word outside all brackets"
                )
            elif token == ")":
                label, start = opened.pop()
                words_of_node = {"words": words, "first": start, "last": len(words)}
                nodes.append({"phrase": " ".join(words[start:]), "label": label} | words_of_node)
            else:
                words.append(token)
        if opened:
            raise ValueError(f"{len(opened)} brackets are not closed")
        sentence = " ".join(words)
        yield from (node | {"sentence": sentence} for node in nodes)


SOURCE_FORMS: dict[str, Callable[..., Iterator[dict]]] = {
    "quoted": quoted,
    "plain": plain,
    "byte_literals": byte_literals,
    "triplets": triplets,
    "trees": trees,
    # By the ending of a file's name.
    "json": json_object,
    "pos": partial(sentences, label="1"),
    "neg": partial(sentences, label="0"),
}


# --- reading and choosing -----------------------------------------------------------------------------------


def map_label(cell: str, source: SourceSpec, place: str) -> float | None:
    """The task's label for a cell of the source; None if rows with this cell are left out."""
    task = TASKS[source.task]
    if isinstance(source.labels, dict):
        return source.labels.get(cell)
    scale = source.labels or task.label_range
    kind = "regression" if source.labels else task.kind
    source_task = replace(task, label_range=scale, kind=kind, label_column=source.label_column)
    label = parse_label(cell, source_task, place)
    (low, high), (task_low, task_high) = scale, task.label_range
    return task_low + (label - low) * (task_high - task_low) / (high - low)


class CountedLines:
    """The lines of a file, counted: `number` is that of the last one read."""

    def __init__(self, lines: Iterable[str]):
        self.lines, self.number = lines, 0

    def __iter__(self) -> Iterator[str]:
        for line in self.lines:
            self.number += 1
            yield line


class SourceRow(NamedTuple):
    """One row of a source; `whole` is the sentence that it must not take from a held-out one, if any."""

    texts: tuple[str, ...]
    label: float | None  # None: missing, or left out
    whole: str | None


def source_paths(name: str, data_dir: str | Path) -> list[Path]:
    """The files of a source: as they are published, unless only its others are there."""
    source = EXTRA_SOURCES[name]
    published, others = (
        [Path(data_dir) / file_name for file_name in names] for names in (source.files, source.other_files)
    )
    use_others = others and all(map(os.path.lexists, others)) and not any(map(os.path.lexists, published))
    return others if use_others else published


def read_source(name: str, data_dir: str | Path) -> tuple[list[SourceRow], int]:
    """Read all files of a source.

    Returns:
        each usable row, and the number of rows without a usable label or sentence.

    Raises:
        UserError: for a missing or unreadable file, a missing column, a bad label; naming file:line if there
            is one.
    """
    found, unusable = [], 0
    for path in source_paths(name, data_dir):
        if not os.path.lexists(path) and EXTRA_SOURCES[name].published:
            raise UserError(
                f"--extra_data: {path}: no such file; 'make extra_data NAMES={name}' downloads it"
            )
        for row in read_file(path, EXTRA_SOURCES[name]):
            if row.label is None or not all(row.texts):
                unusable += 1
            else:
                found.append(row)
    return found, unusable


def read_file(path: Path, source: SourceSpec) -> Iterator[SourceRow]:
    """Every row in a source's file."""
    for _, row, label in read_cells(path, source):
        texts = tuple(clean_text(row[column] or "") for column in source.text_columns)
        yield SourceRow(texts, label, row.get(source.screened_column))


def read_cells(
    path: Path, source: SourceSpec, flag: str = "--extra_data"
) -> Iterator[tuple[int, dict, float | None]]:
    """Line, cells by column, and label of each row in a source's file; `flag` is what asks for it."""
    wanted = [*source.text_columns, source.label_column]
    ending = path.suffix.removeprefix(".")
    form = ending if ending in SOURCE_FORMS else source.form
    lines, num_rows, known = CountedLines(()), 0, {}  # known: label of a cell; few cells differ
    csv.field_size_limit(MAX_FIELD_SIZE)
    try:
        contents = read_bytes(path, MAX_DATA_BYTES)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from None
    try:
        text = decode(contents, path)
        lines = CountedLines(io.StringIO(text, newline=""))
        with Bar(text.count("\n"), " lines", f"reading {path.name}") as bar:
            for row in SOURCE_FORMS[form](lines, source.columns):
                absent = [column for column in wanted if column not in row]
                if absent:
                    raise UserError(f"{path}:1: no column {absent[0]!r}; expected {', '.join(wanted)}")
                cell = (row[source.label_column] or "").strip()
                if cell not in known:
                    known[cell] = map_label(cell, source, f"{path}:{lines.number}") if cell else None
                yield lines.number, row, known[cell]
                num_rows += 1
                bar.update(lines.number - bar.n)
        if not num_rows:
            raise UserError(f"{path}: holds no row; expected the form {form}")
    except UserError:  # a ValueError too, but one that already says where
        raise
    except (
        csv.Error,
        ValueError,
        SyntaxError,
        KeyError,
        RecursionError,
    ) as error:  # what a form cannot parse
        reason = f"no column {error}" if isinstance(error, KeyError) else one_line(error)
        raise UserError(f"{path}:{lines.number}: not readable as {form} ({reason})") from None


def held_out_keys(files: Iterable[tuple[Path, TaskSpec, str]]) -> set[tuple[str, ...]]:
    """Keys of all examples of dev and test files.

    Args:
        files: path, task and split of each file.
    """
    return {text_key(texts) for path, spec, split in files for texts in read_rows(path, spec, split).texts}


class HeldOut:
    """Finds sentences that have a held-out one in them.

    Args:
        keys: text keys of held-out sentences. Short ones, of at most MAX_STOCK_PHRASE letters and digits, are
            in many a text by chance.
    """

    def __init__(self, keys: Iterable[str]):
        self.size = MAX_STOCK_PHRASE + 1
        self.by_start: dict[str, list[str]] = {}
        for key in keys:
            if len(key) >= self.size:
                self.by_start.setdefault(key[: self.size], []).append(key)

    def is_in(self, key: str) -> bool:
        places = range(len(key) - self.size + 1)
        return any(
            key.startswith(held_out, place)
            for place in places
            for held_out in self.by_start.get(key[place : place + self.size], ())
        )


def add_sources(
    rows: Rows,
    sources: Mapping[str, int | None],
    data_dir: str | Path,
    held_out: Collection[tuple[str, ...]],
    sentences_held_out: Collection[str] | None = None,
) -> tuple[Rows, list[str]]:
    """Training rows of a task, followed by those of its additional sources.

    Args:
        sources: name -> how many examples to take, None for the source's own `max_examples`. They are drawn
            with a seed made from the name, so that runs with different seeds see the same data.
        held_out: keys of the examples that must not be trained on.
        sentences_held_out: keys of the sentences that no row of a screened source may contain. One that the
            training data themselves contain does not keep out the phrases of that training sentence. None:
            the single sentences of `held_out`.

    Returns:
        the rows, and a line for each source that says what was taken and what was dropped.
    """
    ids, texts, labels, lines = list(rows.ids), list(rows.texts), rows.labels.tolist(), []
    taken = {text_key(example) for example in texts}
    train_keys = frozenset(taken)
    if sentences_held_out is None:
        sentences_held_out = {key[0] for key in held_out if len(key) == 1}
    inside = HeldOut(sentences_held_out)

    @cache  # a tree's sentence is that of all its phrases
    def has_leak(whole: str) -> bool:
        key = text_key((clean_text(whole),))
        return key not in train_keys and (key[0] in sentences_held_out or inside.is_in(key[0]))

    for name, limit in sources.items():
        found, unusable = read_source(name, data_dir)
        fresh, leaked, known = [], 0, 0
        for example, label, whole in found:
            key = text_key(example)
            if key in held_out or (whole is not None and has_leak(whole)):
                leaked += 1
            elif key in taken:
                known += 1
            else:
                taken.add(key)
                fresh.append((example, label))
        limit = limit or EXTRA_SOURCES[name].max_examples or len(fresh)
        order = np.random.default_rng(seed_of(name)).permutation(len(fresh))
        chosen = [fresh[i] for i in np.sort(order[:limit])]
        ids += [f"{name}-{n}" for n in range(len(chosen))]
        texts += [example for example, _ in chosen]
        labels += [label for _, label in chosen]
        lines.append(
            f"{len(chosen)} examples from {name} (of {len(found) + unusable}: {leaked} in a dev or test file,"
            f" {known} already known, {unusable} without a usable label or sentence,"
            f" {len(fresh) - len(chosen)} beyond the limit)"
        )
    return replace(rows, ids=ids, texts=texts, labels=np.array(labels, dtype=np.float32)), lines

"""Additional training rows from other data sets (`--extra_data`), except those that would leak.

EXTRA_SOURCES says of each source which task it feeds and how its labels become that task's. Rows that occur
in any of our dev or test files are dropped, because the public releases of STS-B, Quora and SST overlap the
class's splits; so are rows that the training data already have, whatever label the source gives them.
"""

import ast
import csv
import io
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from config import TASKS, TaskSpec
from datasets import MAX_FIELD_SIZE, Rows, clean_text, parse_label, read_rows
from support.bars import Bar
from support.errors import UserError, one_line
from support.files import MAX_DATA_BYTES, read_bytes
from support.seeds import seed_of
from support.text_files import decode


@dataclass(frozen=True)
class SourceSpec:
    """A data set that adds training rows to a task.

    `labels` turns its labels into the task's: a dict from a cell's text to a label (rows with any other text
    are left out), or (low, high), a scale that is stretched to the task's; None if they are the task's
    already.
    """

    task: str  # whose training rows it adds to
    files: tuple[str, ...]  # under --data_dir
    form: str  # row of FORMS
    text_columns: tuple[str, ...]
    label_column: str
    labels: dict[str, float] | tuple[float, float] | None = None
    columns: tuple[str, ...] | None = None  # of files without a header
    max_examples: int | None = None  # how many are taken, at random; None: all


NLI_LABELS = {"entailment": 1.0, "contradiction": 0.0}  # neutral pairs say nothing about paraphrase
# The most frequent SST labels among the negative and among the positive sentences of Movie Review.
POLARITY_LABELS = {"0": 1.0, "1": 3.0}

EXTRA_SOURCES = {
    "sick": SourceSpec(
        task="sts",
        files=("extra/sick/SICK.txt",),
        form="plain",
        text_columns=("sentence_A", "sentence_B"),
        label_column="relatedness_score",
        labels=(1, 5),
    ),
    "mrpc": SourceSpec(
        task="para",
        files=("extra/mrpc/msr_paraphrase_train.txt", "extra/mrpc/msr_paraphrase_test.txt"),
        form="plain",
        text_columns=("#1 String", "#2 String"),
        label_column="Quality",
    ),
    "paws_wiki": SourceSpec(
        task="para",
        files=("extra/paws_wiki/dev.tsv", "extra/paws_wiki/test.tsv"),
        form="plain",
        text_columns=("sentence1", "sentence2"),
        label_column="label",
        columns=("id", "sentence1", "sentence2", "label"),
    ),
    "paws_qqp": SourceSpec(
        task="para",
        files=("extra/paws_qqp/dev_and_test.tsv",),
        form="byte_literals",
        text_columns=("sentence1", "sentence2"),
        label_column="label",
    ),
    "quora_positives": SourceSpec(
        task="para",
        files=("extra/quora_positives/quora-positives.tsv",),
        form="quoted",
        text_columns=("sentence1", "sentence2"),
        label_column="is_duplicate",
        max_examples=10_000,  # all of them would reverse the majority of the training labels
    ),
    "snli": SourceSpec(
        task="para",
        files=("extra/snli_sample/train.tsv", "extra/snli_sample/dev.tsv"),
        form="quoted",
        text_columns=("text_a", "text_b"),
        label_column="label",
        labels=NLI_LABELS,
    ),
    "mnli": SourceSpec(
        task="para",
        files=("extra/mnli_sample/train.tsv", "extra/mnli_sample/dev.tsv"),
        form="quoted",
        text_columns=("text_a", "text_b"),
        label_column="label",
        labels=NLI_LABELS,
    ),
    "nli_triplets": SourceSpec(
        task="para",
        files=("extra/nli_triplets/nli_for_simcse-dev.csv",),
        form="triplets",
        text_columns=("sentence1", "sentence2"),
        label_column="label",
        labels=NLI_LABELS,
        max_examples=20_000,
    ),
    "sst_trees": SourceSpec(
        task="sst",
        files=("extra/sst_trees/train.txt",),
        form="trees",
        text_columns=("phrase",),
        label_column="label",
        max_examples=20_000,
    ),
    "movie_review": SourceSpec(
        task="sst",
        files=("extra/rotten_tomatoes_mr/rt-polarity.tsv",),
        form="quoted",
        text_columns=("sentence",),
        label_column="label",
        labels=POLARITY_LABELS,
    ),
    "rotten_tomatoes": SourceSpec(
        task="sst",
        files=("extra/rotten_tomatoes_5class/rotten15k.csv",),
        form="quoted",
        text_columns=("sentence",),
        label_column="sentiment",
    ),
    "kindle": SourceSpec(
        task="sst",
        files=("extra/kindle_5class/kindle15k.csv",),
        form="quoted",
        text_columns=("sentence",),
        label_column="sentiment",
    ),
    "cfimdb": SourceSpec(
        task="sst",
        files=("ids-cfimdb-train.csv",),
        form="quoted",
        text_columns=("sentence",),
        label_column="sentiment",
        labels=POLARITY_LABELS,
    ),
}

TREE_TOKEN = re.compile(r"\(|\)|[^\s()]+")
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


def trees(lines: Iterable[str], columns=None) -> Iterator[dict]:
    """One bracketed tree a line, `(3 (2 word) ...)`, with a label on each node (SST): each node is a row.

    Beside its text it has the line's `words` so far, which a node is from `first` up to `last`.
    """
    for line in lines:
        if len(line) > MAX_FIELD_SIZE:
            raise ValueError(f"a line of more than {MAX_FIELD_SIZE} characters; expected one sentence")
        words, opened = [], []  # opened: (label, number of words before) of nodes not yet closed
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
                phrase = {"phrase": " ".join(words[start:]), "label": label}
                yield phrase | {"words": words, "first": start, "last": len(words)}
            else:
                words.append(token)
        if opened:
            raise ValueError(f"{len(opened)} brackets are not closed")


FORMS: dict[str, Callable[..., Iterator[dict]]] = {
    "quoted": quoted,
    "plain": plain,
    "byte_literals": byte_literals,
    "triplets": triplets,
    "trees": trees,
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


def read_source(name: str, data_dir: str | Path) -> tuple[list[tuple[tuple[str, ...], float]], int]:
    """Read all files of a source.

    Returns:
        texts and label of each usable row, and the number of rows without a usable label or sentence.

    Raises:
        UserError: for a missing or unreadable file, a missing column, a bad label; naming file:line if there
            is one.
    """
    source = EXTRA_SOURCES[name]
    found, unusable = [], 0
    for file_name in source.files:
        for texts, label in read_file(Path(data_dir) / file_name, source):
            if label is None or not all(texts):
                unusable += 1
            else:
                found.append((texts, label))
    return found, unusable


def read_file(path: Path, source: SourceSpec) -> Iterator[tuple[tuple[str, ...], float | None]]:
    """Texts and label of each row in a source's file; the label is None if it is missing or left out."""
    for _, row, label in read_cells(path, source):
        yield tuple(clean_text(row[column] or "") for column in source.text_columns), label


def read_cells(
    path: Path, source: SourceSpec, flag: str = "--extra_data"
) -> Iterator[tuple[int, dict, float | None]]:
    """Line, cells by column, and label of each row in a source's file; `flag` is what asks for it."""
    wanted = [*source.text_columns, source.label_column]
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
            for row in FORMS[source.form](lines, source.columns):
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
            raise UserError(f"{path}: holds no row; expected the form {source.form}")
    except UserError:  # a ValueError too, but one that already says where
        raise
    except (csv.Error, ValueError, SyntaxError, KeyError) as error:  # what a form cannot parse
        reason = f"no column {error}" if isinstance(error, KeyError) else one_line(error)
        raise UserError(f"{path}:{lines.number}: not readable as {source.form} ({reason})") from None


def held_out_keys(files: Iterable[tuple[Path, TaskSpec, str]]) -> set[tuple[str, ...]]:
    """Keys of all examples of dev and test files.

    Args:
        files: path, task and split of each file.
    """
    return {text_key(texts) for path, spec, split in files for texts in read_rows(path, spec, split).texts}


def add_sources(
    rows: Rows, sources: Mapping[str, int | None], data_dir: str | Path, held_out: set[tuple[str, ...]]
) -> tuple[Rows, list[str]]:
    """Training rows of a task, followed by those of its additional sources.

    Args:
        sources: name -> how many examples to take, None for the source's own `max_examples`. They are drawn
            with a seed made from the name, so that runs with different seeds see the same data.
        held_out: keys of the examples that must not be trained on.

    Returns:
        the rows, and a line for each source that says what was taken and what was dropped.
    """
    ids, texts, labels, lines = list(rows.ids), list(rows.texts), rows.labels.tolist(), []
    taken = {text_key(example) for example in texts}
    for name, limit in sources.items():
        found, unusable = read_source(name, data_dir)
        fresh, leaked, known = [], 0, 0
        for example, label in found:
            key = text_key(example)
            if key in held_out:
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

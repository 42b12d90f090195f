"""From files to mini-batches: reading rows, token arrays, batches of similar length, task samplers.

The course's files are tab-separated with an unnamed index column, and the test files have extra leading
columns, so columns are found by name. Anything wrong with a file is reported: as an error, one line with
file:line, or as a warning that is counted and kept with the rows. To check files without training on them:

    python -m training.check_data data

The order of everything is a pure function of (seed, task, position): there is no iterator state to save.

Shapes: N examples of a task, U distinct sequences among them, B examples in a batch, R sequences in a batch
(R = 2 * B when the two sentences of a pair are encoded separately), T padded length in word pieces, K tasks.
"""

import csv
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING
from unicodedata import category

import numpy as np
import torch

from config import TaskSpec
from kernels.static import PackedBatch
from support.bars import Bar
from support.command_line import number
from support.errors import UserError, one_line, quote
from support.seeds import make_seed, seed_of
from support.specs import Param, find_row
from support.text_files import BYTE_ORDER_MARK, decode, line_at, read_data_file

if TYPE_CHECKING:  # the tokenizer imports what reads checkpoints, which `--help` has no use for
    from tokenizer import BertTokenizer

# Characters of one field; a longer one is an unclosed quotation mark, not a sentence.
MAX_FIELD_SIZE = 2**17
MAX_ERRORS = 1000  # of one file, which is then read no further
NUM_NAMED = 5  # lines or ids that a warning names
# Batches that are sorted by length together: more of them mean less padding, but less mixing.
BUCKET_BATCHES = 50

# Penn Treebank escapes, as in the SST and CFIMDB files, and what they stand for.
TREEBANK = {"``": '"', "''": '"', "-lrb-": "(", "-rrb-": ")"}
TREEBANK_PATTERN = re.compile("|".join(map(re.escape, TREEBANK)), re.IGNORECASE)
# In `\/` and `\*`. All backslashes at once: one per round would take minutes for a line of them.
BACKSLASHES = re.compile(r"(?<!\\)\\+(?=[/*])")
# What leaves no mark of its own on a page: Unicode's categories of control and format characters, private
# use, marks that stand on another character, spaces; and five letters and symbols that are blank.
INVISIBLE_CATEGORIES = {"Cc", "Cf", "Co", "Mn", "Zs", "Zl", "Zp"}
BLANKS = "\u115f\u1160\u3164\uffa0\u2800"


def is_visible(character: str) -> bool:
    return category(character) not in INVISIBLE_CATEGORIES and character not in BLANKS


def clean_text(text: str) -> str:
    """Clean one sentence; the only place where text is cleaned, the same way for every task and split.

    Undoes further layers of CSV quoting (many rows of Quora, several layers in CFIMDB), Treebank escapes
    (SST), and odd white space. Case and punctuation are left to the tokenizer. Clean text does not change.
    A text with nothing visible is an empty one: the encoder would see [CLS] [SEP].
    """
    before = None
    while text != before:  # each round shortens the text, so this ends
        before = text
        text = " ".join(text.split())
        if len(text) > 1 and text[0] == text[-1] == '"' and '""' in text[1:-1]:
            text = text[1:-1].replace('""', '"').strip()
        text = TREEBANK_PATTERN.sub(lambda match: TREEBANK[match[0].lower()], text)
        if "\\" in text:
            text = BACKSLASHES.sub("", text)
    return text if any(map(is_visible, text)) else ""


# --- what messages say --------------------------------------------------------------------------------------


def name_some(things: Sequence, limit: int = NUM_NAMED) -> str:
    """`1, 2, 3`, or the first of them `and 7 more`."""
    more = f" and {len(things) - limit} more" if len(things) > limit else ""
    return ", ".join(map(str, things[:limit])) + more


def count_of(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


class DataError(UserError):
    """All errors of one file, in `errors`; its text is the first of them and how many more there are."""

    def __init__(self, errors: list[str], hint: str = ""):
        self.errors = errors
        more = len(errors) - 1
        least = "at least " if len(errors) >= MAX_ERRORS else ""
        more = f", and {least}{count_of(more, 'more error')} in this file{hint}" if more else ""
        super().__init__(errors[0] + more)


# --- reading ------------------------------------------------------------------------------------------------

# What is doubtful about a file or some of its rows, but no error: kind -> its message.
WARNINGS = {
    "byte order mark": "begins with a byte order mark, ignored",
    "CRLF": "has Windows line ends (CRLF), accepted",
    "CR": "has lone carriage returns (old Mac line ends), taken for line ends",
    "blanks in the header": "has blanks around names of columns, ignored",
    "no label": "{rows} without a label, left out",
    "empty sentence": "{rows} with an empty sentence, left out",
    "too few fields": "{rows} with fewer fields than the header has columns, left out",
    "empty sentence, kept": "{rows} with an empty sentence, kept: each test row needs a prediction",
    "too few fields, kept": "{rows} with fewer fields than the header has columns, kept",
    "label in a test file": "{rows} with a label, which is not read in a test file",
}
DELIMITERS = {"\t": "tabs", ",": "commas", ";": "semicolons", "|": "vertical bars", " ": "spaces"}
# What an id must not contain, since a line of a prediction file is an id, a comma, a number.
BAD_ID = re.compile('[,"\x00-\x1f\x7f-\x9f\u2028\u2029]')


@dataclass(frozen=True)
class Form:
    """How a data file is written."""

    expected: str  # what its columns are called in messages
    delimiter: str | None  # None: each line is a JSON object


FORMS = {  # the names are also the endings that --task_file knows them by
    "tsv": Form("the tab-separated columns", "\t"),
    "csv": Form("the comma-separated columns", ","),
    "jsonl": Form("a JSON object in each line with the keys", None),
}
QUOTES = 'write a quotation mark inside a quoted field as "", or quote no field'


@dataclass
class Rows:
    """The usable rows of one file.

    `labels` is (N,) float32, or None for a test file. `warnings` maps a key of WARNINGS to the lines where
    its rows begin, or to the first line if it concerns the whole file.
    """

    path: Path
    ids: list[str]
    texts: list[tuple[str, ...]]
    labels: np.ndarray | None
    warnings: dict[str, list[int]] = field(default_factory=dict)
    num_rows: int = 0  # in the file, including those left out
    sha256: str = ""  # of the file


def warning_text(kind: str, lines: list[int]) -> str:
    """A warning without the file's name: `2 rows without a label, left out (lines 17, 204)`."""
    text = WARNINGS[kind].format(rows=count_of(len(lines), "row"))
    if kind in ("byte order mark", "CRLF", "blanks in the header"):
        return text
    if kind == "CR":
        return f"{text} (first in line {lines[0]})"
    return f"{text} (line{'' if len(lines) == 1 else 's'} {name_some(lines)})"


def warning_lines(rows: Rows) -> list[str]:
    """One line for each kind of warning."""
    return [f"{rows.path}: {warning_text(kind, lines)}" for kind, lines in rows.warnings.items()]


def table_rows(
    lines: Iterable[str], path: str | Path, delimiter: str = "\t"
) -> Iterator[tuple[int, list[str]]]:
    """For each row that is not blank, the line where it begins, and its fields.

    Args:
        lines: of the table, with their ends.

    Raises:
        UserError: for misplaced quotation marks and overlong fields.
    """
    csv.field_size_limit(MAX_FIELD_SIZE)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    line = 1
    try:
        for fields in reader:
            last = reader.line_num
            # A sentence may hold line breaks, but one that also holds a tab is really several rows. Of commas
            # between columns that cannot be said.
            if last > line and any(
                "\t" == delimiter in field and re.search("[\r\n]", field) for field in fields
            ):
                raise UserError(
                    f"{path}:{line}: a quotation mark in this row is closed only in line {last} and swallows"
                    f" the rows between; {QUOTES}"
                )
            if fields:
                yield line, fields
            line = last + 1
    except csv.Error as error:  # strict: unclosed quotation marks are errors
        last = reader.line_num
        if "end of data" in str(error):
            what = f"a quotation mark in this row is never closed; {QUOTES}"
        elif "limit" in str(error) and last > line:
            what = f"a quotation mark in this row is not closed up to line {last}; {QUOTES}"
        elif "limit" in str(error):
            what = f"a field of more than {MAX_FIELD_SIZE} characters; expected a sentence"
        elif last > line:
            what = f"a quotation mark in this row is closed only in line {last}, with text after it; {QUOTES}"
        else:
            what = f"text after the quotation mark that closes a field; {QUOTES}"
        raise UserError(f"{path}:{line}: {what}") from None


def read_text(path: Path) -> tuple[str, str, dict[str, list[int]]]:
    """A file's text, its sha256, and the warnings that concern the whole file."""
    raw = read_data_file(path)
    warnings = {}
    if raw.startswith(BYTE_ORDER_MARK):
        warnings["byte order mark"] = [1]
    if b"\r\n" in raw:
        warnings["CRLF"] = [1]
    lone = re.search(b"\r(?!\n)", raw)
    if lone:
        warnings["CR"] = [line_at(raw, lone.start())]
    return decode(raw, path), hashlib.sha256(raw).hexdigest(), warnings


def json_rows(text: str, path: Path, columns: Collection[str]) -> Iterator[tuple[int, list[str]]]:
    """What `table_rows` gives, from a JSON object in each line; the keys of the first one are the header.

    Args:
        columns: whose values are needed; others are left empty.

    Raises:
        UserError: for a line that is no JSON object, or a value that is neither text nor a number.
    """
    header = None
    for at, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise UserError(f"{path}:{at}: line is {quote(line)}; expected a JSON object")
        if header is None:
            header = list(values)
            yield at, header
        cells = [values.get(column) if column in columns else None for column in header]
        for column, cell in zip(header, cells, strict=True):
            if isinstance(cell, list | dict) or len(str(cell)) > MAX_FIELD_SIZE:
                raise UserError(f"{path}:{at}: {column} is {quote(str(cell))}; expected text or a number")
        yield (
            at,
            ["" if cell is None else cell if isinstance(cell, str) else json.dumps(cell) for cell in cells],
        )


def data_file(data_dir: str | Path, spec: TaskSpec, split: str) -> Path:
    """Where a task's file is: under its name or, where only that is there, its other name."""
    paths = [Path(data_dir) / names[split] for names in (spec.files, spec.other_files) if names]
    return next((path for path in paths if os.path.lexists(path)), paths[0])


def find_form(path: Path, spec: TaskSpec) -> Form:
    """How a data file of a task is written.

    Raises:
        UserError: if that is for the file's name to say, and it does not.
    """
    name = spec.form or path.suffix.lower().lstrip(".")
    if name not in FORMS:
        endings = ", ".join(f".{ending}" for ending in FORMS)
        raise UserError(f"{path}: of no known format; expected a name that ends in one of {endings}")
    return FORMS[name]


def check_delimiter(text: str, columns: list[str], path: Path, form: Form) -> None:
    """Raise a UserError if something else than the form's delimiter seems to separate the columns."""
    first_line = re.match("[^\r\n]*", text)[0][:2000]
    for delimiter, name in DELIMITERS.items():
        names = [part.strip() for part in first_line.replace('"', "").strip().split(delimiter)]
        if form.delimiter not in first_line and len(names) > 1 and set(columns) & set(names):
            raise UserError(
                f"{path}:1: separated by {name}, it seems; expected {form.expected} {', '.join(columns)}"
            )


def check_header(header: list[str], columns: list[str], place: str, form: Form) -> None:
    """Raise a UserError unless each of `columns` is there exactly once."""
    for column in columns:
        if header.count(column) != 1:
            found = [one_line(name, 60) or "(unnamed)" for name in header[:8]] + header[8:]
            raise UserError(
                f"{place}: {'two columns' if column in header else 'no column'} {column!r};"
                f" expected {form.expected} {', '.join(columns)}, found {name_some(found, 8)}"
            )


class RowReader:
    """Turns the fields of each row of one file into id, sentences and label.

    Args:
        path: of the file, for messages.
        header: names of its columns; all that are needed are among them.
        warnings: kind -> lines, to which rows are added that are doubtful but not wrong.
    """

    def __init__(
        self, path: Path, header: list[str], spec: TaskSpec, split: str, warnings: dict[str, list[int]]
    ):
        self.path, self.spec, self.is_test, self.warnings = path, spec, split == "test", warnings
        self.num_columns = len(header)
        self.separator = "comma" if find_form(path, spec).delimiter == "," else "tab"
        self.id_at = header.index(spec.id_column) if spec.id_column else None
        self.text_at = [header.index(column) for column in spec.text_columns]
        self.label_at = header.index(spec.label_column) if spec.label_column in header else None
        needed = [*self.text_at] + ([] if self.is_test else [self.label_at])
        self.num_needed = 1 + max(needed if self.id_at is None else [self.id_at, *needed])
        self.num_rows = 0
        self.first_lines: dict[str, int] = {}  # id -> line
        self.known_labels: dict[str, float] = {}  # cell -> number; few cells differ

    def read(self, line: int, fields: list[str]) -> tuple[str, tuple[str, ...], float | None] | None:
        """Read one row.

        Returns:
            id, sentences and label (None in a test file); or None for a row that is left out.

        Raises:
            UserError: for a bad row, naming file:line.
        """
        self.num_rows += 1
        num_fields = len(fields)
        if num_fields > self.num_columns:
            raise UserError(
                f"{self.path}:{line}: {num_fields} fields, more fields than the header has columns"
                f" ({self.num_columns}); put a sentence that holds a {self.separator} in quotation marks"
            )
        fields += [""] * (self.num_columns - num_fields)
        row_id = str(self.num_rows) if self.id_at is None else self.read_id(line, fields[self.id_at])
        texts = tuple([clean_text(fields[n]) for n in self.text_at])
        cell = fields[self.label_at].strip() if self.label_at is not None else ""
        if self.is_test:
            if cell:
                self.warn("label in a test file", line)
            if num_fields == self.num_columns and not all(texts):
                self.warn("empty sentence, kept", line)
        elif num_fields < self.num_needed or not cell or not all(texts):
            few = num_fields < self.num_needed
            self.warn("too few fields" if few else "empty sentence" if cell else "no label", line)
            return None
        if num_fields < self.num_columns:
            self.warn("too few fields, kept", line)
        return row_id, texts, None if self.is_test else self.read_label(line, cell)

    def read_id(self, line: int, cell: str) -> str:
        row_id = cell.strip().lower() if self.spec.lower_ids else cell.strip()
        if not row_id:
            raise UserError(f"{self.path}:{line}: the row has no id; expected one in each row")
        if not row_id.isalnum() and BAD_ID.search(row_id):
            raise UserError(
                f"{self.path}:{line}: id is {quote(row_id)}; expected no comma, tab, quotation mark or line"
                " break, which would break the prediction file"
            )
        first = self.first_lines.setdefault(row_id, line)
        if first != line:
            raise UserError(f"{self.path}:{line}: id {quote(row_id)} appears twice, first in line {first}")
        return row_id

    def read_label(self, line: int, cell: str) -> float:
        if cell not in self.known_labels:
            self.known_labels[cell] = parse_label(cell, self.spec, f"{self.path}:{line}")
        return self.known_labels[cell]

    def warn(self, kind: str, line: int) -> None:
        self.warnings.setdefault(kind, []).append(line)


def read_rows(path: str | Path, spec: TaskSpec, split: str) -> Rows:
    """Read one data file of a task.

    Training and dev rows without a label or with an empty sentence are left out, and counted in `warnings`.
    Test rows are all kept, since each id needs a prediction; their labels, if any, are not read.

    Raises:
        UserError: for a file that cannot be read as a table, or lacks a column or a usable row; naming
            file:line where there is one.
        DataError: with all bad rows: too many fields; an id that is missing, repeated, or unfit for a
            prediction file; a label that is not a number or out of range.
    """
    path = Path(path)
    form = find_form(path, spec)
    columns = [*filter(None, [spec.id_column]), *spec.text_columns]
    columns += [] if split == "test" else [spec.label_column]
    text, sha256, warnings = read_text(path)
    if form.delimiter is None:
        table = json_rows(text, path, {*columns, spec.label_column})
    else:
        check_delimiter(text, columns, path, form)
        table = table_rows(io.StringIO(text, newline=""), path, form.delimiter)
    line, header = next(table, (1, None))
    if header is None:
        raise UserError(f"{path}: the file is empty; expected {form.expected} {', '.join(columns)}")
    names = [name.strip() for name in header]
    if any(name != given and name in columns for name, given in zip(names, header, strict=True)):
        warnings["blanks in the header"] = [line]
    header = names
    check_header(header, columns, f"{path}:{line}", form)

    reader = RowReader(path, header, spec, split, warnings)
    rows, errors, num_rows = [], [], 0
    try:
        with Bar(text.count("\n"), " lines", f"reading {path.name}") as bar:
            for line, fields in table:
                num_rows += 1
                bar.update(line - bar.n)
                try:
                    row = reader.read(line, fields)
                    if row is not None:
                        rows.append(row)
                except UserError as error:
                    errors.append(str(error))
                    if len(errors) == MAX_ERRORS:
                        break
    except UserError as error:  # of the table itself: nothing after it can be read
        errors.insert(0, str(error))
    if errors:
        hint = f"; 'python -m training.check_data {path.parent}' lists them"
        is_found = path.name in (spec.files[split], spec.other_files.get(split))
        raise DataError(errors, hint if is_found else "")
    if not rows:
        reasons = "; ".join(warning_text(kind, lines) for kind, lines in warnings.items())
        raise UserError(
            f"{path}: no usable row; {reasons if num_rows else 'the file holds a header and no rows'}"
        )
    ids, texts, labels = map(list, zip(*rows, strict=True))
    labels = None if split == "test" else np.array(labels, dtype=np.float32)
    return Rows(path, ids, texts, labels, warnings, num_rows, sha256)


def parse_label(text: str, spec: TaskSpec, place: str) -> float:
    """The number that a label's cell stands for; `place` is the file:line that a UserError names."""
    low, high = spec.label_range
    if spec.label_texts:
        if text not in spec.label_texts:
            names = name_some(spec.label_texts, 20)
            raise UserError(f"{place}: {spec.label_column} is {quote(text)}; expected one of {names}")
        return float(spec.label_texts.index(text))
    try:
        label = math.nan if "_" in text else float(text)  # float() takes 0_1 for 1
    except ValueError:
        label = math.nan
    whole = spec.kind == "regression" or label == label // 1
    if not (low <= label <= high and whole):
        fraction = "" if spec.kind == "regression" else ", without fraction"
        raise UserError(
            f"{place}: {spec.label_column} is {quote(text)}; expected a number from {low:g} to"
            f" {high:g}{fraction}"
        )
    return label


# --- tokens -------------------------------------------------------------------------------------------------


@dataclass
class TokenArrays:
    """U token sequences in flat arrays: sequence i is `input_ids[offsets[i] : offsets[i + 1]]`."""

    input_ids: np.ndarray  # int32, all sequences end to end
    token_type_ids: np.ndarray  # int8, the same length
    offsets: np.ndarray  # int64, (U + 1,)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @classmethod
    def from_encodings(cls, encodings: list[dict[str, list[int]]]) -> "TokenArrays":
        offsets = np.zeros(len(encodings) + 1, dtype=np.int64)
        np.cumsum([len(encoding["input_ids"]) for encoding in encodings], out=offsets[1:])

        def flat(key, dtype):
            return np.fromiter((n for encoding in encodings for n in encoding[key]), dtype, count=offsets[-1])

        return cls(flat("input_ids", np.int32), flat("token_type_ids", np.int8), offsets)

    def pad(self, indices: np.ndarray, pad_token_id: int) -> dict[str, torch.Tensor]:
        """Pad the chosen sequences to the longest of them.

        Args:
            indices: numbers of the sequences, (R,).

        Returns:
            `input_ids`, `attention_mask` and `token_type_ids`, int64, (R, T).
        """
        lengths = self.lengths[indices]
        positions = np.arange(lengths.max())
        mask = positions < lengths[:, None]  # (R, T)
        where = np.where(mask, self.offsets[indices][:, None] + positions, 0)
        return {
            "input_ids": torch.from_numpy(
                np.where(mask, self.input_ids[where], pad_token_id).astype(np.int64)
            ),
            "attention_mask": torch.from_numpy(mask.astype(np.int64)),
            "token_type_ids": torch.from_numpy(
                np.where(mask, self.token_type_ids[where], 0).astype(np.int64)
            ),
        }


def batch_seed(seed: int, step: int, draw: int, micro_step: int) -> int:
    """The seed of what a batch draws anew each time; `draw` counts the batches of a step."""
    return make_seed(seed, step, draw, micro_step, seed_of("batch"))


@dataclass(frozen=True)
class Phrases:
    """Labelled phrases inside the sentences of a task, whose loss is added to that of the sentences.

    Phrase i is the positions `starts[i]` to `stops[i]` of its sequence, where [CLS] is position 0; those of
    example n are `offsets[n]` to `offsets[n + 1]`.

    Args:
        counts_as: (P,) how much each phrase counts beside the others of a batch.
        loss_weight: factor of the weighted mean of the phrases' losses.
        limit: the most phrases of a sentence in a batch, drawn anew each time; None: all.
    """

    starts: np.ndarray  # int32, (P,)
    stops: np.ndarray  # int32, (P,)
    labels: np.ndarray  # int64, (P,)
    counts_as: np.ndarray  # float32, (P,)
    offsets: np.ndarray  # int64, (N + 1,)
    loss_weight: float
    limit: int | None = None

    @property
    def width(self) -> int:
        """The most phrases that a sentence can have in a batch."""
        longest = int(np.diff(self.offsets).max(initial=0))
        return longest if self.limit is None else min(longest, self.limit)

    def batch(self, examples: np.ndarray, seed: int, width: int | None = None) -> dict[str, np.ndarray]:
        """The phrases of some examples as a rectangle of `width` phrases each, by default as many as needed.

        Returns:
            `phrase_spans` (B, n, 2), first position and the one after the last; `phrase_labels` (B, n); and
            `phrase_weights` (B, n), with which each loss is added to the batch's: 0 for filling, and
            `loss_weight` in all.
        """
        firsts, counts = self.offsets[examples], np.diff(self.offsets)[examples]  # (B,) each
        order = np.arange(counts.max(initial=0))[None].repeat(len(examples), 0)  # (B, n)
        if self.limit is not None and order.shape[1] > self.limit:
            keys = np.random.default_rng(seed).random(order.shape)
            keys[order >= counts[:, None]] = 1.0  # beyond the sentence's own: last
            order = keys.argsort(1)[:, : self.limit]
        if width is not None:  # what is filled up lies beyond every count
            order = np.pad(order, ((0, 0), (0, width - order.shape[1])), constant_values=len(self.labels))
        is_real = order < counts[:, None]
        chosen = np.where(is_real, firsts[:, None] + order, 0)
        weights = self.counts_as[chosen] * is_real
        weights *= self.loss_weight / max(weights.sum(), 1e-30)  # no phrase at all: 0
        spans = np.stack([self.starts[chosen], self.stops[chosen]], -1)
        return {"phrase_spans": spans, "phrase_labels": self.labels[chosen], "phrase_weights": weights}


@dataclass
class TaskData:
    """One split of one task, tokenized.

    `sequences` holds each distinct sequence once; example n consists of the sequences `index[n]`: the
    sentence, or both of a pair, where they are encoded separately; then the joint pair, where it is encoded;
    and last, where `symmetric`, the same in the other order, one of which a batch draws.
    """

    rows: Rows
    sequences: TokenArrays
    index: np.ndarray  # (N, 1 to 4)
    symmetric: bool = False
    phrases: Phrases | None = None
    # (N,) or (N, C) float32: trained for in the labels' place, see TaskKind
    targets: np.ndarray | None = None

    @property
    def trained_for(self) -> np.ndarray | None:
        """(N,) or (N, C): targets, or else labels, if any."""
        return self.rows.labels if self.targets is None else self.targets

    def __len__(self) -> int:
        return len(self.index)

    @property
    def lengths(self) -> np.ndarray:
        """Length of each example's longest sequence in word pieces, (N,)."""
        return self.sequences.lengths[self.index].max(axis=1)

    def subset(self, examples: np.ndarray) -> "TaskData":
        """The chosen examples, by number and ascending, with the sequences that they need."""
        rows = self.rows
        used, index = np.unique(self.index[examples], return_inverse=True)
        spans = [slice(*self.sequences.offsets[[i, i + 1]]) for i in used]
        sequences = TokenArrays(
            np.concatenate([self.sequences.input_ids[span] for span in spans]),
            np.concatenate([self.sequences.token_type_ids[span] for span in spans]),
            np.concatenate([[0], np.cumsum(self.sequences.lengths[used])]),
        )
        kept = replace(
            rows,
            ids=[rows.ids[i] for i in examples],
            texts=[rows.texts[i] for i in examples],
            labels=None if rows.labels is None else rows.labels[examples],
        )
        assert self.phrases is None  # of training data, which nobody cuts
        targets = None if self.targets is None else self.targets[examples]
        index = index.reshape(len(examples), -1)
        return replace(self, rows=kept, sequences=sequences, index=index, targets=targets)

    def sample(self, limit: int | None, seed: int) -> "TaskData":
        """At most `limit` examples, chosen at random by the seed; all of them for None."""
        if limit is None or limit >= len(self):
            return self
        return self.subset(np.sort(np.random.default_rng(seed).permutation(len(self))[:limit]))

    def _draw(self, examples: np.ndarray, seed: int) -> np.ndarray:
        """The sequences of a batch, all first ones before all second ones; of joint pairs one order each."""
        index = self.index[examples]
        if self.symmetric:
            # One, not both: a step takes as long as without, and over the epochs each pair is seen both ways.
            # R-Drop has each pair twice, in the same order.
            distinct, places = np.unique(examples, return_inverse=True)
            orders = np.random.default_rng(seed).integers(2, size=(len(distinct), 1))[places]
            index = np.hstack([index[:, :-2], np.take_along_axis(index[:, -2:], orders, 1)])
        return index.T.ravel()

    def packed_batch(self, examples: np.ndarray, task_number: int, seed: int = 0) -> PackedBatch:
        """`batch` for a step of static shape: the same sequences end to end, without padding."""
        sequences, chosen = self.sequences, self._draw(examples, seed)
        lengths = sequences.offsets[chosen + 1] - sequences.offsets[chosen]
        firsts = np.cumsum(lengths) - lengths
        at = np.repeat(sequences.offsets[chosen] - firsts, lengths) + np.arange(lengths.sum())
        tokens = (sequences.input_ids[at], sequences.token_type_ids[at])
        phrases = self.phrases and self.phrases.batch(examples, seed, self.phrases.width)
        return PackedBatch(task_number, *tokens, lengths, self.trained_for[examples], phrases)

    def batch(self, examples: np.ndarray, pad_token_id: int, seed: int = 0) -> dict[str, torch.Tensor]:
        """Padded sequences of the chosen examples, first sentences before second ones; labels (B,) if any.

        Targets, where there are some, take the labels' place: (B,), or (B, C).

        Args:
            seed: of what is drawn anew each time: the order of a joint pair, and which phrases.
        """
        batch = self.sequences.pad(self._draw(examples, seed), pad_token_id)
        if self.trained_for is not None:
            batch["labels"] = torch.from_numpy(self.trained_for[examples])
        if self.phrases is not None:
            found = self.phrases.batch(examples, seed)
            batch |= {name: torch.from_numpy(values) for name, values in found.items()}
        return batch


def tokenize(
    rows: Rows,
    tokenizer: "BertTokenizer",
    *,
    joint: bool,
    max_length: int,
    apart: bool = False,
    symmetric: bool = False,
) -> TaskData:
    """Turn rows into token arrays, each distinct sentence (or joint pair) once.

    Args:
        joint: encode a pair as one sequence with segment ids.
        max_length: longest sequence in word pieces, special tokens included.
        apart: with `joint`, encode its two sentences separately as well.
        symmetric: encode joint pairs in both orders.
    """
    symmetric = symmetric and joint
    examples = [
        (*(texts if apart or not joint else ()), *([texts] * joint), *([texts[::-1]] * symmetric))
        for texts in rows.texts
    ]
    numbers: dict = {}  # of each sequence: a sentence, or a tuple of two
    index = [[numbers.setdefault(sequence, len(numbers)) for sequence in example] for example in examples]
    encodings: list = [None] * len(numbers)
    for kind, encode in ((str, tokenizer.encode_batch), (tuple, tokenizer.encode_pair_batch)):
        chosen = [sequence for sequence in numbers if isinstance(sequence, kind)]
        for sequence, encoding in zip(chosen, encode(chosen, max_length) if chosen else (), strict=True):
            encodings[numbers[sequence]] = encoding
    return TaskData(rows, TokenArrays.from_encodings(encodings), np.array(index), symmetric)


def unknown_rows(data: TaskData, special_ids: Sequence[int]) -> list[str]:
    """Ids of the examples with a sentence, not an empty one, of which the encoder knows no word piece.

    Args:
        special_ids: of [CLS], [SEP] and [UNK].
    """
    sequences, num_sentences = data.sequences, len(data.rows.texts[0])
    is_known = ~np.isin(sequences.input_ids, special_ids)
    known = []  # for each sentence of an example: whether any piece of it is known, (N,)
    for n in range(num_sentences):
        joint = num_sentences > data.index.shape[1] - data.symmetric
        in_sentence = is_known & (sequences.token_type_ids == n) if joint else is_known
        any_known = np.logical_or.reduceat(in_sentence, sequences.offsets[:-1])  # (U,)
        known.append(any_known[data.index[:, 0 if joint else n]])
    doubtful = np.flatnonzero(~np.stack(known).all(axis=0))
    texts = data.rows.texts
    return [
        data.rows.ids[i]
        for i in doubtful
        if any(texts[i][n] and not known[n][i] for n in range(num_sentences))
    ]


# --- the order of examples and tasks ------------------------------------------------------------------------


class BatchOrder:
    """Endless mini-batches of one task: batch i is a pure function of (seed, task, i).

    Each epoch visits every example once. Examples are shuffled, sorted by length within large groups, cut
    into batches, and the batches shuffled, so that a batch holds similar lengths but an epoch is in random
    order.

    Args:
        lengths: (N,) word pieces of each example.
        batch_size: examples per batch; one batch of an epoch may have fewer.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int, task: str):
        self.lengths, self.batch_size = lengths, batch_size
        self.seed, self.task = seed, task
        self.batches_per_epoch = -(-len(lengths) // batch_size)
        self._epoch, self._batches = None, []

    def __getitem__(self, i: int) -> np.ndarray:
        epoch, position = divmod(i, self.batches_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffle(epoch)
        return self._batches[position]

    def _shuffle(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng([self.seed, seed_of(self.task), epoch])
        order = rng.permutation(len(self.lengths))
        group_size = BUCKET_BATCHES * self.batch_size
        groups = [order[start : start + group_size] for start in range(0, len(order), group_size)]
        order = np.concatenate([group[np.argsort(self.lengths[group], kind="stable")] for group in groups])
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        return [batches[i] for i in rng.permutation(len(batches))]


# Samplers: (number of examples of each task (K,), progress in [0, 1]), and the row's parameters by name
# -> the tasks' chances (K,), up to a factor, of each of a step's K batches. One that goes by the gradients
# also has `state`, (K,) each, as its `update` has left it.


def round_robin(sizes: np.ndarray, progress: float) -> np.ndarray:
    """Every task once, always in the same order (the poster's)."""
    return np.ones(len(sizes))


def proportional(sizes: np.ndarray, progress: float) -> np.ndarray:
    """Tasks drawn with probability ~ N: every example is seen equally often."""
    return sizes**1.0


def sqrt_sampling(sizes: np.ndarray, progress: float) -> np.ndarray:
    """Tasks drawn with probability ~ sqrt(N)."""
    return sizes**0.5


def annealed(sizes: np.ndarray, progress: float) -> np.ndarray:
    """Tasks drawn with probability ~ N ** alpha, where alpha falls from 1 to 0.2.

    Stickland and Murray 2019, https://arxiv.org/abs/1902.02671.
    """
    return sizes ** (1.0 - 0.8 * progress)


def temperature(sizes: np.ndarray, progress: float, t: float) -> np.ndarray:
    """Tasks drawn with probability ~ N ** (1 / t): 1 is proportional, a large t gives all the same chance.

    Arivazhagan et al. 2019, https://arxiv.org/abs/1907.05019.
    """
    return sizes ** (1.0 / t)


def pike(sizes: np.ndarray, progress: float, state: Mapping[str, np.ndarray], **params) -> np.ndarray:
    """PiKE (Li et al. 2025, https://arxiv.org/abs/2502.06244): tasks drawn by how fast their loss can fall.

    Probabilities ~ w, from equal ones on; where the gradients are measured, at each evaluation,

        w_k <- w_k exp(z1 |E g_k|^2 - z2 / 2 E |g_k - E g_k|^2)

    g_k being a batch's gradient: long expected gradients are worth a batch, noisy ones are not. Differences
    from the paper: whole batches are drawn, not shares of one; and squares are divided by the tasks' mean
    square, so that z1 and z2 do not depend on the scale of the losses.
    """
    log_weights = state.get("log_weights", np.zeros(len(sizes)))
    return np.exp(log_weights - log_weights.max())


def weigh_by_gradients(
    squares: np.ndarray, signal: np.ndarray, state: Mapping[str, np.ndarray], z1: float, z2: float
) -> dict[str, np.ndarray]:
    """A step of PiKE's weights."""
    mean, signal = max(squares.mean(), np.finfo(float).tiny), signal.clip(min=0)  # an estimate may be below 0
    change = (z1 * signal - z2 / 2 * (squares - signal)) / mean
    log_weights = state.get("log_weights", np.zeros(len(squares))) + change
    return {"log_weights": log_weights - log_weights.max()}


@dataclass(frozen=True)
class Sampler:
    """A row of SAMPLERS.

    Args:
        params: its parameters, by name.
        is_random: whether draws are; otherwise a step takes each task once.
        update: for one that goes by the gradients, (mean square of a batch's gradient (K,), that of the
            expected gradient (K,), state) and parameters -> state, (K,) each; empty at the start.
    """

    chances: Callable[..., np.ndarray]
    params: Mapping[str, Param] = field(default_factory=dict)
    is_random: bool = True
    update: Callable[..., dict[str, np.ndarray]] | None = None


SAMPLERS: dict[str, Sampler] = {
    "round_robin": Sampler(round_robin, is_random=False),
    "proportional": Sampler(proportional),
    "sqrt": Sampler(sqrt_sampling),
    "annealed": Sampler(annealed),
    "temperature": Sampler(temperature, {"t": Param(5.0, number(float, 0.1), "temperature")}),
    "pike": Sampler(
        pike,
        {
            "z1": Param(1.0, number(float, 0), "strength of the signal"),
            "z2": Param(0.1, number(float, 0), "strength of the noise"),
        },
        update=weigh_by_gradients,
    ),
}


def draw_tasks(
    sampler: str,
    sizes: Sequence[int],
    progress: tuple[int, int],
    seed: int,
    *,
    state: Mapping[str, Sequence[float]] | None = None,
    shares: np.ndarray | None = None,
) -> np.ndarray:
    """The tasks of a step's batches, (K,), from a random sampler; they depend on the arguments alone.

    Args:
        sampler: a key of SAMPLERS, maybe with parameters, as in `temperature:t=5`.
        sizes: (K,) number of examples of each task.
        progress: steps so far, and of the whole run.
        state: of a sampler that goes by the gradients, as `update_sampler` gives it.
        shares: (K,) in [0, 1], not all 0: factors of the chances.
    """
    row, params = find_row(sampler, SAMPLERS)
    step, total_steps = progress
    if row.update:
        params = params | {"state": {name: np.asarray(values) for name, values in (state or {}).items()}}
    chances = row.chances(np.asarray(sizes, dtype=np.float64), step / max(1, total_steps - 1), **params)
    if shares is not None:  # of tasks that the largest weight leaves next to no chance, one may have to come
        chances = chances.clip(min=np.finfo(float).tiny) * shares
    rng = np.random.default_rng([seed, step])
    return np.sort(rng.choice(len(sizes), size=len(sizes), p=chances / chances.sum()))


def update_sampler(
    sampler: str, squares: torch.Tensor, signal: torch.Tensor, state: Mapping[str, Sequence[float]]
) -> dict[str, list[float]]:
    """The state of a sampler, as JSON holds it, after the gradients were measured; {} if it has none.

    Args:
        squares: (K,) mean square of a batch's gradient.
        signal: (K,) square of the expected gradient, as estimated.
    """
    row, params = find_row(sampler, SAMPLERS)
    if not row.update:
        return {}
    before = {name: np.asarray(values) for name, values in state.items()}
    after = row.update(squares.numpy(), signal.numpy(), before, **params)
    return {name: values.tolist() for name, values in after.items()}


def plan_tasks(
    sampler: str, sizes: Sequence[int], total_steps: int, seed: int, shares: np.ndarray | None = None
) -> np.ndarray | None:
    """The tasks of each step's batches, (total_steps, K); None for a sampler that goes by the gradients.

    Args:
        shares: (total_steps, K) as for `draw_tasks`; with a sampler that takes each task once, the share of
            the steps that do, and -1 fills the others' places.
    """
    row, _ = find_row(sampler, SAMPLERS)
    if row.update:
        return None
    shares = np.ones((total_steps, len(sizes))) if shares is None else shares
    if not row.is_random:
        return thin_out(shares)
    plan = [
        draw_tasks(sampler, sizes, (step, total_steps), seed, shares=share)
        for step, share in enumerate(shares)
    ]
    return np.array(plan, dtype=np.int64).reshape(shares.shape)


def thin_out(shares: np.ndarray) -> np.ndarray:
    """A plan of draws (S, K) in which task k is drawn in a share shares[:, k] of the steps, evenly spread.

    A task's share adds to what it is owed, and it is drawn when that is a whole draw. Where that would leave
    a step empty, the task that is owed most comes early.
    """
    owed = np.zeros(shares.shape[1])
    plan = np.full(shares.shape, -1, dtype=np.int64)
    for step, share in enumerate(shares):
        owed += share
        drawn = np.flatnonzero((owed > 1 - 1e-9) & (share > 0))  # ten times 0.1 is not quite 1
        if not len(drawn):
            drawn = np.array([np.where(share > 0, owed, -np.inf).argmax()])
        plan[step, : len(drawn)] = drawn
        owed[drawn] -= 1
    return plan


def draw_batches(
    num_examples: int, batch_size: int, num_batches: int, seed: tuple[int, str, int]
) -> list[np.ndarray]:
    """Random batches of a task, without a common example, for measuring noise; smaller ones of small data.

    Args:
        seed: of the run, the task, the step.
    """
    run_seed, task, step = seed
    order = np.random.default_rng([run_seed, seed_of("noise"), seed_of(task), step]).permutation(num_examples)
    size = max(1, min(batch_size, num_examples // num_batches))
    return [order.take(range(n * size, (n + 1) * size), mode="wrap") for n in range(num_batches)]

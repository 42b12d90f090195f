"""From files to mini-batches: reading and checking rows, token arrays, length buckets, task samplers.

The course's files are tab-separated with an unnamed index column, and the test files have extra leading columns, so
columns are found by name. Nothing that is wrong with a file goes unsaid: it is an error, one line with file:line, or a
warning that is counted and kept with the rows. To check a folder of files without training on them:

    python -m training.check_data data

The order of everything is a pure function of (seed, task, position): there is no iterator state to save.

Shapes: N examples of a task, U distinct sequences among them, B examples in a batch, R sequences in a batch (R = 2 * B
when the two sentences of a pair are encoded apart), T padded length in word pieces, K tasks.
"""

import csv
import hashlib
import io
import math
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from config import TaskSpec
from support.errors import UserError, one_line, quote
from support.files import MAX_DATA_BYTES, read_bytes
from support.seeds import task_seed

if TYPE_CHECKING:  # the tokenizer imports what reads checkpoints, which `--help` has no use for
    from tokenizer import BertTokenizer

MAX_FIELD_SIZE = 2**17  # characters of one field; a longer one is an unclosed quotation mark, not a sentence
MAX_ERRORS = 1000  # of one file; after as many it is not read on
NUM_NAMED = 5  # lines or ids that a warning names
BUCKET_BATCHES = 50  # batches that are sorted by length together: more means less padding, but less mixing

# Penn Treebank escapes, as in the SST and CFIMDB files, and what they stand for.
TREEBANK = {"``": '"', "''": '"', "-lrb-": "(", "-rrb-": ")"}
TREEBANK_PATTERN = re.compile("|".join(map(re.escape, TREEBANK)), re.IGNORECASE)
# Also `\/` and `\*`. All backslashes at once: with one in each round, a line of them would take minutes.
BACKSLASHES = re.compile(r"(?<!\\)\\+(?=[/*])")


def clean_text(text: str) -> str:
    """The one place where text is cleaned, the same for every task and split.

    Undoes further layers of CSV quoting (many rows of Quora, several layers in CFIMDB), Treebank escapes (SST), and
    odd white space. Case and punctuation are left to the tokenizer. Clean text is left as it is.
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
    return text


# --- what messages say ------------------------------------------------------------------------------------------


def name_some(things: Sequence, limit: int = NUM_NAMED) -> str:
    """`1, 2, 3`, or the first ones `and 7 more`."""
    more = f" and {len(things) - limit} more" if len(things) > limit else ""
    return ", ".join(map(str, things[:limit])) + more


def count_of(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


class DataError(UserError):
    """All errors of one file, `errors`; as text the first of them, and how many there are."""

    def __init__(self, errors: list[str], hint: str = ""):
        self.errors = errors
        more = len(errors) - 1
        least = "at least " if len(errors) >= MAX_ERRORS else ""
        more = f", and {least}{count_of(more, 'more error')} in this file{hint}" if more else ""
        super().__init__(errors[0] + more)


# --- reading -----------------------------------------------------------------------------------------------------

# What is wrong with a file or some of its rows and yet no error: kind -> how it is said.
WARNINGS = {
    "byte order mark": "begins with a byte order mark, ignored",
    "CRLF": "has Windows line ends (CRLF), accepted",
    "CR": "has lone carriage returns (old Mac line ends), taken for line ends",
    "no label": "{rows} without a label, left out",
    "empty sentence": "{rows} with an empty sentence, left out",
    "too few fields": "{rows} with fewer fields than the header has columns, left out",
    "empty sentence, kept": "{rows} with an empty sentence, kept: each test row needs a prediction",
    "too few fields, kept": "{rows} with fewer fields than the header has columns, kept",
    "label in a test file": "{rows} with a label, which is not read in a test file",
}
UTF_16 = "UTF-16; save it as UTF-8"
# How files begin that are no UTF-8 text.
FILE_STARTS = {
    b"\x1f\x8b": "a gzip archive; unpack it",
    b"PK\x03\x04": "a zip archive or a spreadsheet; unpack it, or export it as tab-separated text",
    b"BZh": "a bzip2 archive; unpack it",
    b"\xfd7zXZ\x00": "an xz archive; unpack it",
    b"\xff\xfe": UTF_16,
    b"\xfe\xff": UTF_16,
}
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
DELIMITERS = {",": "commas", ";": "semicolons", "|": "vertical bars", " ": "spaces"}
# What must not stand in an id, since a line of a prediction file is an id, a comma, a number.
BAD_ID = re.compile('[,"\x00-\x1f\x7f-\x9f\u2028\u2029]')
QUOTES = 'write a quotation mark inside a quoted field as "", or quote no field'


@dataclass
class Rows:
    """The usable rows of one file.

    `labels` is (N,) float32, or None for a test file. `warnings` holds for each kind, a key of WARNINGS, the lines
    where its rows begin, or the first line if it concerns the whole file.
    """

    path: Path
    ids: list[str]
    texts: list[tuple[str, ...]]
    labels: np.ndarray | None
    warnings: dict[str, list[int]] = field(default_factory=dict)
    num_rows: int = 0  # in the file, with those left out
    sha256: str = ""  # of the file


def warning_text(kind: str, lines: list[int]) -> str:
    """What a warning says, without the file: `2 rows without a label, left out (lines 17, 204)`."""
    text = WARNINGS[kind].format(rows=count_of(len(lines), "row"))
    if kind in ("byte order mark", "CRLF"):
        return text
    if kind == "CR":
        return f"{text} (first in line {lines[0]})"
    return f"{text} (line{'' if len(lines) == 1 else 's'} {name_some(lines)})"


def warning_lines(rows: Rows) -> list[str]:
    """One line for each kind of warning."""
    return [f"{rows.path}: {warning_text(kind, lines)}" for kind, lines in rows.warnings.items()]


def require_file(path: Path) -> None:
    """Raise a UserError for a folder, and for a pipe or device, which might keep `open` or `read` waiting."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; 'make data' downloads the course's files into data/, and '--data_dir data/sample'"
            " takes the sample that comes with the project"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(mode):
        kind = "folder" if stat.S_ISDIR(mode) else "pipe or device"
        raise UserError(f"{path}: is a {kind}; expected a file")


def line_at(raw: bytes, offset: int) -> int:
    """The number of the line in which a byte stands."""
    before = raw[:offset]
    return 1 + before.count(b"\n") + before.count(b"\r") - before.count(b"\r\n")


def decode(raw: bytes, path: Path) -> str:
    """The file's text.

    Raises:
        UserError: for NUL bytes and what is not UTF-8, naming its line.
    """
    for start, kind in FILE_STARTS.items():
        if raw.startswith(start):
            raise UserError(f"{path}: looks like {kind}")
    nul = raw.find(b"\0")
    if nul >= 0:
        even, odd = (raw[n:1000:2].count(0) for n in (0, 1))
        if (not even or not odd) and max(even, odd) > len(raw[:1000]) / 4:  # every other byte
            raise UserError(f"{path}: looks like {UTF_16}")
        raise UserError(f"{path}:{line_at(raw, nul)}: a NUL byte; expected text, so the file may be damaged")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bad = raw[error.start]
        raise UserError(
            f"{path}:{line_at(raw, error.start)}: not UTF-8 text (byte 0x{bad:02x}); save the file as UTF-8"
        ) from None


def table_rows(text: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """The line where a row begins and the row's fields, for each row that is not blank.

    Raises:
        UserError: for what is wrong with quotation marks, and overlong fields.
    """
    csv.field_size_limit(MAX_FIELD_SIZE)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True)
    line = 1
    try:
        for fields in reader:
            last = reader.line_num
            # A sentence may hold line breaks, but with a tab among them it is several rows.
            if last > line and any("\t" in field and re.search("[\r\n]", field) for field in fields):
                raise UserError(
                    f"{path}:{line}: a quotation mark in this row is closed only in line {last} and swallows the"
                    f" rows between; {QUOTES}"
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
    """A file's text, its sha256, and warnings that concern the whole file."""
    require_file(path)
    raw = read_bytes(path, MAX_DATA_BYTES)
    warnings = {}
    if raw.startswith(BYTE_ORDER_MARK):
        warnings["byte order mark"] = [1]
    if b"\r\n" in raw:
        warnings["CRLF"] = [1]
    lone = re.search(b"\r(?!\n)", raw)
    if lone:
        warnings["CR"] = [line_at(raw, lone.start())]
    return decode(raw, path), hashlib.sha256(raw).hexdigest(), warnings


def check_header(header: list[str], columns: list[str], place: str) -> None:
    """Raise a UserError unless each of `columns` is there, once."""
    for column in columns:
        if header.count(column) != 1:
            found = [one_line(name, 60) or "(unnamed)" for name in header[:8]] + header[8:]
            raise UserError(
                f"{place}: {'two columns' if column in header else 'no column'} {column!r}; expected the tab-separated"
                f" columns {', '.join(columns)}, found {name_some(found, 8)}"
            )


def read_rows(path: str | Path, spec: TaskSpec, split: str) -> Rows:
    """Read one data file of a task.

    Training and dev rows without a label or with an empty sentence are left out, and counted in `warnings`. Test
    rows are all kept, since each id needs a prediction; their labels, if any, are not read.

    Raises:
        UserError: for a file that cannot be read as a table, or lacks a column or a usable row; naming file:line
            where there is one.
        DataError: with all bad rows: too many fields, an id that is missing, unfit for a prediction file or given
            twice, a label that is no number or out of range.
    """
    path = Path(path)
    columns = ["id", *spec.text_columns] + ([] if split == "test" else [spec.label_column])
    expected = f"expected the tab-separated columns {', '.join(columns)}"
    text, sha256, warnings = read_text(path)
    first_line = re.match("[^\r\n]*", text)[0][:2000]
    for delimiter, name in DELIMITERS.items():
        if "\t" not in first_line and set(columns) & set(first_line.replace('"', "").split(delimiter)):
            raise UserError(f"{path}:1: separated by {name}, it seems; {expected}")
    table = table_rows(text, path)
    line, header = next(table, (1, None))
    if header is None:
        raise UserError(f"{path}: the file is empty; {expected}")
    check_header(header, columns, f"{path}:{line}")

    id_at, *text_at = (header.index(column) for column in ("id", *spec.text_columns))
    label_at = header.index(spec.label_column) if spec.label_column in header else None
    num_needed = 1 + max(header.index(column) for column in columns)
    ids, texts, labels, errors, num_rows = [], [], [], [], 0
    first_lines: dict[str, int] = {}  # id -> line
    known: dict[str, float] = {}  # label as it stands there -> number

    def wrong(what: str) -> None:
        errors.append(f"{path}:{line}: {what}")

    def warn(kind: str) -> None:
        warnings.setdefault(kind, []).append(line)

    try:
        for line, fields in table:
            if len(errors) == MAX_ERRORS:
                break
            num_rows += 1
            num_fields = len(fields)
            if num_fields > len(header):
                wrong(
                    f"{num_fields} fields, more fields than the header has columns ({len(header)}); put a sentence"
                    " that holds a tab in quotation marks"
                )
                continue
            if num_fields < len(header):
                fields += [""] * (len(header) - num_fields)
            row_id = fields[id_at].strip().lower()
            if not row_id:
                wrong("the row has no id; expected one in each row")
                continue
            if not row_id.isalnum() and BAD_ID.search(row_id):
                wrong(
                    f"id is {quote(row_id)}; expected no comma, tab, quotation mark or line break, which would break"
                    " the prediction file"
                )
                continue
            if row_id in first_lines:
                wrong(
                    f"id {quote(row_id)} stands here for the second time, first in line {first_lines[row_id]}"
                )
                continue
            first_lines[row_id] = line
            sentences = tuple([clean_text(fields[n]) for n in text_at])
            label = fields[label_at].strip() if label_at is not None else ""
            if split == "test":
                if label:
                    warn("label in a test file")
                if num_fields < len(header):
                    warn("too few fields, kept")
                elif not all(sentences):
                    warn("empty sentence, kept")
            else:
                few = num_fields < num_needed
                if few or not label or not all(sentences):
                    warn("too few fields" if few else "no label" if not label else "empty sentence")
                    continue
                if num_fields < len(header):
                    warn("too few fields, kept")
                if label not in known:
                    try:
                        known[label] = parse_label(label, spec, f"{path}:{line}")
                    except UserError as error:
                        errors.append(str(error))
                        continue
                labels.append(known[label])
            ids.append(row_id)
            texts.append(sentences)
    except UserError as error:  # of the table: what comes after it cannot be read
        errors.insert(0, str(error))
    if errors:
        hint = f"; 'python -m training.check_data {path.parent}' lists them"
        raise DataError(errors, hint if path.name == spec.files[split] else "")
    if not ids:
        said = "; ".join(warning_text(kind, lines) for kind, lines in warnings.items())
        raise UserError(
            f"{path}: no usable row; {said if num_rows else 'the file holds a header and no rows'}"
        )
    labels = None if split == "test" else np.array(labels, dtype=np.float32)
    return Rows(path, ids, texts, labels, warnings, num_rows, sha256)


def parse_label(text: str, spec: TaskSpec, place: str) -> float:
    low, high = spec.label_range
    try:
        label = math.nan if "_" in text else float(text)  # float() takes 0_1 for 1
    except ValueError:
        label = math.nan
    whole = spec.kind == "regression" or label == label // 1
    if not (low <= label <= high and whole):
        expected = f"a number from {low:g} to {high:g}" + (
            "" if spec.kind == "regression" else ", without fraction"
        )
        raise UserError(f"{place}: {spec.label_column} is {quote(text)}; expected {expected}")
    return label


# --- tokens ------------------------------------------------------------------------------------------------------


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
            indices: (R,) rows.

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


@dataclass
class TaskData:
    """One split of one task, tokenized.

    `sequences` holds each distinct sequence once; example n consists of the sequences `index[n]`: one, or two
    for a pair whose sentences are encoded apart.
    """

    rows: Rows
    sequences: TokenArrays
    index: np.ndarray  # (N, 1 or 2)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def lengths(self) -> np.ndarray:
        """Length of each example's longest sequence in word pieces, (N,)."""
        return self.sequences.lengths[self.index].max(axis=1)

    def part(self, examples: np.ndarray) -> "TaskData":
        """The chosen examples (rows, ascending), with the sequences they need."""
        rows = self.rows
        used, index = np.unique(self.index[examples], return_inverse=True)
        pieces = [slice(*self.sequences.offsets[[i, i + 1]]) for i in used]
        sequences = TokenArrays(
            np.concatenate([self.sequences.input_ids[piece] for piece in pieces]),
            np.concatenate([self.sequences.token_type_ids[piece] for piece in pieces]),
            np.concatenate([[0], np.cumsum(self.sequences.lengths[used])]),
        )
        kept = replace(
            rows,
            ids=[rows.ids[i] for i in examples],
            texts=[rows.texts[i] for i in examples],
            labels=None if rows.labels is None else rows.labels[examples],
        )
        return TaskData(kept, sequences, index.reshape(len(examples), -1))

    def batch(self, examples: np.ndarray, pad_token_id: int) -> dict[str, torch.Tensor]:
        """Padded sequences of the chosen examples, all first sentences before all second ones; labels (B,) if any."""
        batch = self.sequences.pad(self.index[examples].T.ravel(), pad_token_id)
        if self.rows.labels is not None:
            batch["labels"] = torch.from_numpy(self.rows.labels[examples])
        return batch


def tokenize(rows: Rows, tokenizer: "BertTokenizer", *, joint: bool, max_length: int) -> TaskData:
    """Turn rows into token arrays, each distinct sentence (or joint pair) once.

    Args:
        joint: encode a pair as one sequence with segment ids.
        max_length: longest sequence in word pieces, special tokens included.
    """
    examples = [(texts,) for texts in rows.texts] if joint else rows.texts
    numbers: dict = {}
    index = [[numbers.setdefault(sequence, len(numbers)) for sequence in example] for example in examples]
    encode = tokenizer.encode_pair_batch if joint else tokenizer.encode_batch
    return TaskData(rows, TokenArrays.from_encodings(encode(list(numbers), max_length)), np.array(index))


# --- the order of examples and tasks -----------------------------------------------------------------------------


class BatchOrder:
    """Endless mini-batches of one task: batch i is a pure function of (seed, task, i).

    Each epoch visits every example once. Examples are shuffled, sorted by length within large groups, cut into
    batches, and the batches shuffled, so a batch holds similar lengths but an epoch looks random.

    Args:
        lengths: (N,) word pieces of each example.
        batch_size: examples per batch; an epoch's shortest batch may have fewer.
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
        rng = np.random.default_rng([self.seed, task_seed(self.task), epoch])
        order = rng.permutation(len(self.lengths))
        group_size = BUCKET_BATCHES * self.batch_size
        groups = [order[start : start + group_size] for start in range(0, len(order), group_size)]
        order = np.concatenate([group[np.argsort(self.lengths[group], kind="stable")] for group in groups])
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        return [batches[i] for i in rng.permutation(len(batches))]


# Samplers: (number of examples of each task (K,), progress in [0, 1], rng) -> the tasks of a step's K slots.


def round_robin(sizes: np.ndarray, progress: float, rng: np.random.Generator) -> np.ndarray:
    """Every task once, always in the same order (the poster's)."""
    return np.arange(len(sizes))


def draw_by_size(sizes: np.ndarray, exponent: float, rng: np.random.Generator) -> np.ndarray:
    weights = np.asarray(sizes, dtype=np.float64) ** exponent
    return np.sort(rng.choice(len(sizes), size=len(sizes), p=weights / weights.sum()))


def proportional(sizes: np.ndarray, progress: float, rng: np.random.Generator) -> np.ndarray:
    """Slots drawn with probability ~ N: every example is seen equally often."""
    return draw_by_size(sizes, 1.0, rng)


def sqrt(sizes: np.ndarray, progress: float, rng: np.random.Generator) -> np.ndarray:
    """Slots drawn with probability ~ sqrt(N)."""
    return draw_by_size(sizes, 0.5, rng)


def annealed(sizes: np.ndarray, progress: float, rng: np.random.Generator) -> np.ndarray:
    """Slots drawn with probability ~ N ** alpha, alpha falling from 1 to 0.2 (Stickland and Murray 2019, arXiv:1902.02671)."""
    return draw_by_size(sizes, 1.0 - 0.8 * progress, rng)


SAMPLERS: dict[str, Callable[[np.ndarray, float, np.random.Generator], np.ndarray]] = {
    "round_robin": round_robin,
    "proportional": proportional,
    "sqrt": sqrt,
    "annealed": annealed,
}


def plan_slots(sampler: str, sizes: Sequence[int], total_steps: int, seed: int) -> np.ndarray:
    """The task of every slot of every step, (total_steps, K); step s depends on (seed, s) and its progress only."""
    sizes = np.asarray(sizes)
    plan = np.empty((total_steps, len(sizes)), dtype=np.int64)
    for step in range(total_steps):
        rng = np.random.default_rng([seed, step]) if sampler != "round_robin" else None
        plan[step] = SAMPLERS[sampler](sizes, step / max(1, total_steps - 1), rng)
    return plan


def limit_examples(data: TaskData, limit: int | None, seed: int) -> TaskData:
    """A fixed random part of the examples, for evaluations during a run."""
    if limit is None or limit >= len(data):
        return data
    chosen = np.sort(np.random.default_rng(seed).permutation(len(data))[:limit])
    return data.part(chosen)

"""From files to mini-batches: reading and checking rows, token arrays, length buckets, task samplers.

The course's files are tab-separated with an unnamed index column, and the test files have extra leading columns, so
columns are found by name. The order of everything is a pure function of (seed, task, position): there is no
iterator state to save.

Shapes: N examples of a task, U distinct sequences among them, B examples in a batch, R sequences in a batch (R = 2 * B
when the two sentences of a pair are encoded apart), T padded length in word pieces, K tasks.
"""

import csv
import math
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from config import TaskSpec, UserError
from tokenizer import BertTokenizer

MAX_FIELD_SIZE = 2**17  # characters of one field; a longer one is an unclosed quotation mark, not a sentence
BUCKET_BATCHES = 50  # batches that are sorted by length together: more means less padding, but less mixing

# Penn Treebank escapes, as in the SST and CFIMDB files, and what they stand for.
TREEBANK = {"\\/": "/", "\\*": "*", "``": '"', "''": '"', "-lrb-": "(", "-rrb-": ")"}
TREEBANK_PATTERN = re.compile("|".join(map(re.escape, TREEBANK)), re.IGNORECASE)


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
    return text


@dataclass
class Rows:
    """The usable rows of one file.

    `labels` is (N,) float32, or None for a test file; `skipped` says of each unusable row where it is and why.
    """

    path: Path
    ids: list[str]
    texts: list[tuple[str, ...]]
    labels: np.ndarray | None
    skipped: list[str]


def read_rows(path: str | Path, spec: TaskSpec, split: str) -> Rows:
    """Read one data file of a task.

    Training and dev rows without a label or with an empty sentence are skipped, and named in `skipped`. Test
    rows are all kept, since each id needs a prediction; their labels, if any, are not read.

    Raises:
        UserError: for a missing or unreadable file, a missing column, an id given twice, a label that is no
            number or out of range, a file without a usable row; naming file:line where there is one.
    """
    path = Path(path)
    columns = ["id", *spec.text_columns] + ([] if split == "test" else [spec.label_column])
    ids, texts, labels, skipped, seen = [], [], [], [], {}
    csv.field_size_limit(MAX_FIELD_SIZE)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t", strict=True)  # strict: unclosed quotes are errors
            absent = [column for column in columns if column not in (reader.fieldnames or ())]
            if absent:
                raise UserError(
                    f"{path}:1: no column {absent[0]!r}; expected the tab-separated columns {', '.join(columns)},"
                    f" found {', '.join(name or '(unnamed)' for name in reader.fieldnames or ()) or 'an empty file'}"
                )
            for row in reader:
                place = f"{path}:{reader.reader.line_num}"  # the row's last line, if a quoted sentence has several
                if None in row:
                    raise UserError(f"{place}: more fields than the header has columns")
                if any("\t" in value and "\n" in value for value in row.values() if value):
                    raise UserError(
                        f"{place}: a quotation mark in an earlier line has swallowed the rows up to here"
                    )
                row_id = (row["id"] or "").strip().lower()
                sentences = tuple(clean_text(row[column] or "") for column in spec.text_columns)
                if not row_id:
                    raise UserError(f"{place}: the row has no id")
                if row_id in seen:
                    raise UserError(
                        f"{place}: id {row_id} stands here for the second time, first in line {seen[row_id]}"
                    )
                seen[row_id] = reader.reader.line_num
                if split != "test":
                    label = (row[spec.label_column] or "").strip()
                    if not label or not all(sentences):
                        skipped.append(f"{place}: {'no label' if not label else 'an empty sentence'}")
                        continue
                    labels.append(parse_label(label, spec, place))
                elif not all(sentences):
                    skipped.append(f"{place}: an empty sentence (kept: a test row needs a prediction)")
                ids.append(row_id)
                texts.append(sentences)
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; 'make data' downloads the course's files into data/, and '--data_dir data/sample'"
            " takes the sample that comes with the project"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text, some way after line {reader.reader.line_num} ({error})"
        ) from None
    except csv.Error as error:
        raise UserError(
            f"{path}:{reader.reader.line_num}: not readable as tab-separated text ({error})"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if not ids:
        raise UserError(
            f"{path}: no usable row; {len(skipped)} skipped{': ' + skipped[0] if skipped else ''}"
        )
    return Rows(path, ids, texts, None if split == "test" else np.array(labels, dtype=np.float32), skipped)


def parse_label(text: str, spec: TaskSpec, place: str) -> float:
    low, high = spec.label_range
    try:
        label = float(text)
    except ValueError:
        label = math.nan
    whole = spec.kind == "regression" or label == label // 1
    if not (low <= label <= high and whole):
        expected = f"a number from {low:g} to {high:g}" + (
            "" if spec.kind == "regression" else ", without fraction"
        )
        raise UserError(f"{place}: {spec.label_column} is {text!r}; expected {expected}")
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
        kept = Rows(
            rows.path,
            [rows.ids[i] for i in examples],
            [rows.texts[i] for i in examples],
            None if rows.labels is None else rows.labels[examples],
            rows.skipped,
        )
        return TaskData(kept, sequences, index.reshape(len(examples), -1))

    def batch(self, examples: np.ndarray, pad_token_id: int) -> dict[str, torch.Tensor]:
        """Padded sequences of the chosen examples, all first sentences before all second ones; labels (B,) if any."""
        batch = self.sequences.pad(self.index[examples].T.ravel(), pad_token_id)
        if self.rows.labels is not None:
            batch["labels"] = torch.from_numpy(self.rows.labels[examples])
        return batch


def tokenize(rows: Rows, tokenizer: BertTokenizer, *, joint: bool, max_length: int) -> TaskData:
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


def task_seed(task: str) -> int:
    """A number for a task's name that is the same in every process."""
    return zlib.crc32(task.encode())


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

"""The batches of a step as data of static shape, so that a GPU can replay one captured step for all of them.

A CUDA graph repeats the same kernels on the same addresses: shapes, and every number that the host looks at,
are fixed when it is captured. But each step has sequences of other lengths. So all of them are laid end to
end, as in kernels/packing.py, and filled up with spare rows to a multiple of ROW_MULTIPLE; where tasks and
sequences begin, and which rows of an embedding table occur, is data in one buffer that is copied to the
device as a whole:

    rows       a0 a0 a1 a1 a1 .. b0 b0 b0 b1 .. .. ..     `..` are spare; each task starts at TASK_MULTIPLE
    ends       |------ task 0 -----|----- task 1 ---|     (K,)
    starts     ^     ^           ^        ^               (R,) of each sequence, with `lengths` (R,)

Spare rows belong to no sequence: attention gives them zeros, no head reads them, and their gradients are
zero. What differs in shape is a `StepShape`, of which a run sees few.

Shapes: K tasks, R sequences of a micro-batch of all tasks, M rows, T width of a rectangle, H hidden_size.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch

ROW_MULTIPLE = 256  # of M: fewer shapes to capture
TASK_MULTIPLE = 16  # of where a task starts: bfloat16 products by task need rows aligned to 16 bytes and more
WIDTH_MULTIPLE = 32  # of T
PIECE = 128  # rows that are added up in one go, see `TableRows`
TABLES = ("words", "positions", "segments")
TOKEN_FIELDS = ("input_ids", "position_ids", "token_type_ids")  # what looks up a row in each table
ROWS_FIELDS = ("order", "pieces", "sums", "offsets")  # of a `TableRows`
PHRASE_FIELDS = {"phrase_spans": 2, "phrase_labels": 1, "phrase_weights": 1}  # numbers for each phrase


@dataclass(frozen=True)
class Draw:
    """The shape of one task's micro-batch.

    Args:
        task: its number.
        num_sequences: two for each example of a two-vector head.
        label_shape: (b,), or (b, C) where labels are probabilities of classes.
        float_labels: labels are numbers, not classes.
        num_phrases: room for labelled phrases of each example.
    """

    task: int
    num_sequences: int
    label_shape: tuple[int, ...]
    float_labels: bool
    num_phrases: int = 0


@dataclass(frozen=True)
class StepShape:
    """All that a captured forward and backward pass depends on besides data; the key of its graph."""

    draws: tuple[Draw, ...]
    num_tasks: int
    num_rows: int  # M
    width: int  # T, at least the longest sequence

    @property
    def num_sequences(self) -> int:
        return sum(draw.num_sequences for draw in self.draws)

    def num_pieces(self, table: str) -> int:
        """The most pieces that the rows of a table can have: each is full, or the last of its row."""
        rows = {
            "words": self.num_rows,
            "positions": self.num_tasks * self.width,
            "segments": 2 * self.num_tasks,
        }
        return min(self.num_rows, rows[table] + self.num_rows // PIECE)

    @cached_property
    def fields(self) -> dict[str, slice]:
        """Where each array stands in the buffer, in units of int32."""
        sizes = {"rng": 4}  # two int64: first, for their alignment
        sizes |= dict.fromkeys((*TOKEN_FIELDS, "sequence_ids"), self.num_rows)
        sizes |= {"ends": self.num_tasks, "starts": self.num_sequences, "lengths": self.num_sequences}
        for table in TABLES:
            sizes |= {f"{table}.order": self.num_rows, f"{table}.pieces": self.num_pieces(table) + 1}
            sizes |= {f"{table}.sums": self.num_pieces(table) + 1, f"{table}.offsets": self.num_pieces(table)}
        sizes |= {f"labels.{n}": math.prod(draw.label_shape) for n, draw in enumerate(self.draws)}
        for name, width in PHRASE_FIELDS.items():
            sizes |= {
                f"{name}.{n}": draw.label_shape[0] * draw.num_phrases * width
                for n, draw in enumerate(self.draws)
            }
        sizes["loss_weights"] = len(self.draws)
        sizes["shares"] = len(self.draws)
        stops = accumulate(sizes.values())
        return {
            name: slice(stop - size, stop) for (name, size), stop in zip(sizes.items(), stops, strict=True)
        }

    @property
    def size(self) -> int:
        return self.fields["shares"].stop


@dataclass(frozen=True)
class PackedBatch:
    """One task's micro-batch: sequences end to end, as `TaskData.packed_batch` makes it."""

    task: int
    input_ids: np.ndarray  # (m,)
    token_type_ids: np.ndarray  # (m,)
    lengths: np.ndarray  # (r,)
    labels: np.ndarray  # (b,) int64 or float32, or (b, C) float32
    phrases: Mapping[str, np.ndarray] | None = None  # PHRASE_FIELDS, of b times as many phrases


@dataclass(frozen=True)
class TableRows:
    """Which rows of the hidden gradient are added up to which row of an embedding table.

    A GPU adds with atomic operations in no fixed order, and a word that occurs a thousand times would be one
    long queue. So the host sorts: rows of one table row stand together in `order`, cut into pieces of at most
    PIECE rows, which are added up first, each by itself; then the pieces of a table row are.

    Args:
        order: rows, sorted by table row.
        pieces: piece i is order[pieces[i] : pieces[i + 1]].
        sums: table row j is the sum of pieces sums[j] to sums[j + 1].
        offsets: of each table row, where it starts in the flat gradients of all tasks.
    """

    order: np.ndarray
    pieces: np.ndarray
    sums: np.ndarray
    offsets: np.ndarray


def sort_rows(numbers: np.ndarray, tasks: Sequence[slice], starts: Sequence[int], width: int) -> TableRows:
    """Group hidden rows, numbered from 0, by the table row that each is added to.

    Args:
        numbers: (m,) what was looked up.
        tasks: the hidden rows of each task.
        starts: where the table's gradients of each task start.
        width: elements of a table row.
    """
    # 16 bits, where they suffice, are sorted in linear time: 0.3 ms instead of 2 for 23,000 words.
    keys = numbers.astype(np.uint16 if numbers.max() < 2**16 else np.int32)
    order = np.concatenate([keys[task].argsort(kind="stable") + task.start for task in tasks])
    offsets = np.concatenate(
        [
            keys[order[task]].astype(np.int64) * width + start
            for task, start in zip(tasks, starts, strict=True)
        ]
    )
    is_first = np.empty(len(offsets), dtype=bool)  # of those that are added to the same table row
    is_first[0] = True
    np.not_equal(offsets[1:], offsets[:-1], out=is_first[1:])
    firsts = is_first.nonzero()[0]
    counts = np.append(firsts[1:], len(offsets)) - firsts
    num_pieces = -(-counts // PIECE)  # of each table row
    sums = np.concatenate([[0], num_pieces.cumsum()])
    nth = np.arange(sums[-1]) - sums[:-1].repeat(num_pieces)  # of a piece among those of its table row
    pieces = np.append(firsts.repeat(num_pieces) + nth * PIECE, len(offsets))
    return TableRows(order, pieces, sums, offsets[firsts])


def pack_step(
    batches: Sequence[PackedBatch],
    num_tasks: int,
    task_stride: int,
    table_starts: dict[str, int],
    hidden_size: int,
) -> tuple[StepShape, dict[str, np.ndarray]]:
    """Lay the micro-batches of a step end to end, by task.

    Args:
        batches: sorted by task.
        task_stride: elements from one task's embedding gradients to the next one's.
        table_starts: table -> where its gradient starts in a task's; tables that are not trained are absent.
    """
    # 1. Where each batch starts: neighbours of one task follow each other, another task is aligned.
    starts, ends, row = [], [], 0
    for task in range(num_tasks):
        for batch in (each for each in batches if each.task == task):
            starts.append(row)
            row += len(batch.input_ids)
        row = -(-row // TASK_MULTIPLE) * TASK_MULTIPLE
        ends.append(row)
    num_rows = -(-row // ROW_MULTIPLE) * ROW_MULTIPLE
    lengths = np.concatenate([batch.lengths for batch in batches])
    shape = StepShape(
        tuple(
            Draw(
                each.task,
                len(each.lengths),
                each.labels.shape,
                each.labels.dtype.kind == "f",
                each.phrases["phrase_labels"].shape[1] if each.phrases else 0,
            )
            for each in batches
        ),
        num_tasks,
        num_rows,
        -(-int(lengths.max()) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE,
    )

    # 2. The rows themselves.
    real = np.concatenate(
        [np.arange(start, start + len(batch.input_ids)) for start, batch in zip(starts, batches, strict=True)]
    )
    firsts = np.cumsum(lengths) - lengths  # of each sequence, among the real rows
    positions = np.arange(len(real)) - np.repeat(firsts, lengths)
    arrays = {
        "input_ids": np.concatenate([batch.input_ids for batch in batches]),
        "position_ids": positions,
        "token_type_ids": np.concatenate([batch.token_type_ids for batch in batches]),
        "sequence_ids": np.repeat(np.arange(len(lengths)), lengths),
    }
    spare = {"sequence_ids": -1}
    rows = {name: scatter(values, real, num_rows, spare.get(name, 0)) for name, values in arrays.items()}

    # 3. What each table's gradient adds up.
    tasks = slices_by_task(batches)
    tables = {}
    for table, name in zip(TABLES, TOKEN_FIELDS, strict=True):
        if table in table_starts:
            table_rows = sort_rows(
                arrays[name],
                list(tasks.values()),
                [task * task_stride + table_starts[table] for task in tasks],
                hidden_size,
            )
            tables |= {f"{table}.{field}": getattr(table_rows, field) for field in ROWS_FIELDS}
            tables[f"{table}.order"] = real[table_rows.order]

    labels = {f"labels.{n}": batch.labels.ravel() for n, batch in enumerate(batches)}
    for n, batch in enumerate(batches):
        labels |= {f"{name}.{n}": values.ravel() for name, values in (batch.phrases or {}).items()}
    return shape, rows | {
        "ends": np.array(ends),
        "starts": real[firsts],
        "lengths": lengths,
    } | tables | labels


def slices_by_task(batches: Sequence[PackedBatch]) -> dict[int, slice]:
    """Task -> its sequences' rows, all end to end without spare ones."""
    slices: dict[int, slice] = {}
    row = 0
    for batch in batches:
        first = slices[batch.task].start if batch.task in slices else row
        row += len(batch.input_ids)
        slices[batch.task] = slice(first, row)
    return slices


def scatter(values: np.ndarray, at: np.ndarray, size: int, fill: int) -> np.ndarray:
    array = np.full(size, fill, dtype=np.int32)
    array[at] = values
    return array


def fill_buffer(shape: StepShape, arrays: dict[str, np.ndarray], buffer: np.ndarray) -> None:
    """Write arrays to their places in an int32 buffer; the last value fills up what is shorter."""
    for name, where in shape.fields.items():
        if name not in arrays:
            continue
        values = arrays[name]
        place = buffer[where]
        if values.dtype.kind == "f":
            place = place.view(np.float32)
        elif name == "rng":
            place = place.view(np.int64)
        place[: len(values)] = values
        # Pieces and sums beyond the last are empty: they start where the last one ends.
        place[len(values) :] = values[-1] if len(values) else 0


def read_field(shape: StepShape, buffer: torch.Tensor, name: str) -> torch.Tensor:
    """One array of the buffer in its own type: a view, but for classes, which become int64."""
    field = buffer[shape.fields[name]]
    if name in ("loss_weights", "shares"):
        return field.view(torch.float32)
    name, _, number = name.partition(".")
    if name in ("labels", *PHRASE_FIELDS):
        draw = shape.draws[int(number)]
        is_float = draw.float_labels if name == "labels" else name == "phrase_weights"
        field = field.view(torch.float32) if is_float else field.long()
        if name == "labels":
            return field.view(draw.label_shape)
        return field.view(draw.label_shape[0], draw.num_phrases, *([2] if name == "phrase_spans" else []))
    return field.view(torch.int64) if name == "rng" else field

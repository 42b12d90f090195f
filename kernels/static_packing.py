"""One step's rows on the device, and what the encoder's layers do with them there, without a wait.

`StaticPacking` takes the place of `packing.Packing` in a step of static shape (see static.py). The layers in
task_grads.py and bert.py ask it for what is done differently: products and sums by task whose borders only
the device knows, attention and LayerNorm as one kernel each, dropout from a seed in device memory.

Shapes: K tasks, R sequences, M rows, T width, H hidden_size, `in` and `out` the widths of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.packing import Packing
from kernels.static import PHRASE_FIELDS, ROWS_FIELDS, TABLES, TOKEN_FIELDS, StepShape, read_field

if TYPE_CHECKING:
    from kernels.task_grads import GradTarget


class StaticPacking(Packing):
    """The rows of a step on the device, and which task, sequence and table row each belongs to.

    Args:
        shape: of the step.
        buffer: int32, filled as `static.fill_buffer` does.
        targets: `FlatMemory.targets`; None where no gradient is kept, with a frozen encoder.
        table_params: the parameters of the embedding tables, in the order of `static.TABLES`.
        table_grads: the flat memory that gradients of tables lie in, at `offsets`.
        ops: the module `kernels.triton_kernels`, or a twin of it in plain operations.
    """

    is_static = True

    def __init__(
        self,
        shape: StepShape,
        buffer: Tensor,
        targets: Mapping[int, GradTarget] | None,
        table_params: Sequence[nn.Parameter],
        table_grads: Tensor,
        ops: ModuleType,
    ):
        self.shape, self.targets, self.ops, self.table_grads = shape, targets, ops, table_grads
        read = partial(read_field, shape, buffer)
        self.rng = read("rng")  # (2,) int64: seed, and whether anything is dropped
        self.input_ids, self.position_ids, self.token_type_ids = map(read, TOKEN_FIELDS)  # (M,) each
        self.sequence_ids = read("sequence_ids")  # (M,) -1 for spare rows
        self.ends = read("ends")  # (K,) where each task's rows end
        self.starts, self.lengths = read("starts"), read("lengths")  # (R,)
        self.labels = [read(f"labels.{n}") for n in range(len(shape.draws))]
        self.phrases = [  # of each draw, as in `TaskData.batch`
            {name: read(f"{name}.{n}") for name in PHRASE_FIELDS} if draw.num_phrases else {}
            for n, draw in enumerate(shape.draws)
        ]
        self.loss_weights, self.shares = read("loss_weights"), read("shares")  # (draws,)
        self.table_rows = {  # id of a table's target -> its `static.TableRows`
            id(targets[id(param)]): [read(f"{table}.{name}") for name in ROWS_FIELDS]
            for table, param in zip(TABLES, table_params, strict=True)
            if targets and id(param) in targets
        }
        drawn = sorted({draw.task for draw in shape.draws})
        self.tasks = drawn if targets is not None else []  # not empty: keep gradients by task
        self.undrawn = [task for task in range(shape.num_tasks) if task not in drawn]
        self.num_sites = 0  # calls so far that draw random numbers

    def next_site(self) -> int:
        """A number of its own for each call that draws random numbers, the same in every step."""
        self.num_sites += 1
        return self.num_sites

    # --- gradients by task, called by the backward passes in task_grads.py ----------------------------------

    def write_products(self, target: GradTarget, dy: Tensor, x: Tensor) -> None:
        """Gradients of a weight: dy^T @ x over each task's rows; (M, out), (M, in) -> (K, out, in)."""
        if has_grouped_mm(dy):
            # The borders of the tasks are in device memory. Without a kernel for that, other rows are zeroed.
            products = F.grouped_mm(dy.t(), x, offs=self.ends)
        else:
            products = torch.stack([(dy * owned).t() @ x for owned in self.owned_rows(dy.dtype)])
        for task in self.undrawn:
            products[task].zero_()
        target.write_all(products)

    def write_sums(self, target: GradTarget, dy: Tensor, times: Tensor | None = None) -> None:
        """Gradients of a bias, or of LayerNorm's scale: of each task the sum of dy (* times), (K, H)."""
        sums = dy.new_empty(self.shape.num_tasks, dy.shape[1], dtype=torch.float32)
        self.ops.sum_by_task(dy.contiguous(), self.ends, sums, times)
        target.write_all(sums)

    def write_rows(self, target: GradTarget, ids: Tensor, dy: Tensor) -> None:
        """Gradients of a table: rows of dy (M, H) are added to those that `ids` looked up."""
        self.ops.sum_rows(dy.contiguous(), *self.table_rows[id(target)], self.table_grads)

    def owned_rows(self, dtype: torch.dtype) -> Tensor:
        """(K, M, 1) 1 where a row is in a task's range."""
        rows = torch.arange(self.shape.num_rows, device=self.ends.device)
        first = F.pad(self.ends[:-1], (1, 0))
        return ((rows >= first[:, None]) & (rows < self.ends[:, None])).to(dtype).unsqueeze(-1)

    # --- what layers do in another way ----------------------------------------------------------------------

    def attention(self, qkv: Tensor, num_heads: int, p: float) -> Tensor:
        """(M, 3 * H) -> (M, H)"""
        return StaticAttention.apply(qkv, self, num_heads, p, self.next_site())

    def dropout(self, x: Tensor, p: float) -> Tensor:
        return StaticDropout.apply(x, self, p, self.next_site())

    def dropout_add_norm(self, x: Tensor, residual: Tensor | None, layer: nn.LayerNorm, p: float) -> Tensor:
        """LayerNorm(residual + dropout(x)), (M, H) -> (M, H)."""
        return StaticAddNorm.apply(x, residual, layer.weight, layer.bias, self, layer, (p, self.next_site()))

    # --- from rows to sentences -----------------------------------------------------------------------------

    def rectangles(self, hidden_states: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Of each draw its hidden states (r, T, H), zeros at padding, and its mask (r, T)."""
        positions = torch.arange(self.shape.width, device=hidden_states.device)
        mask = positions < self.lengths[:, None]  # (R, T)
        rows = torch.where(mask, self.starts[:, None] + positions, 0)  # (R, T)
        # Each row stands in one place of the rectangle, or in none.
        places = self.sequence_ids.clamp(min=0) * self.shape.width + self.position_ids
        states = Rectangle.apply(hidden_states, rows, mask, places, self.sequence_ids >= 0)  # (R, T, H)
        sizes = [draw.num_sequences for draw in self.shape.draws]
        return list(zip(states.split(sizes), mask.split(sizes), strict=True))


def has_grouped_mm(x: Tensor) -> bool:
    """Whether torch has a kernel that multiplies by groups without asking the device for their borders."""
    if x.dtype != torch.bfloat16 or not hasattr(F, "grouped_mm"):
        return False
    return x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) >= (9, 0)


class StaticAttention(torch.autograd.Function):
    """Attention of sequences that fit into a tile; nothing is kept but query, key and value."""

    @staticmethod
    def forward(ctx, qkv: Tensor, packing: StaticPacking, num_heads: int, p: float, site: int) -> Tensor:
        ctx.save_for_backward(qkv)
        longest = packing.shape.width
        ctx.arguments = (packing.starts, packing.lengths, num_heads, longest, p, packing.rng, site)
        ctx.ops = packing.ops
        return ctx.ops.attention_forward(qkv, *ctx.arguments)

    @staticmethod
    def backward(ctx, dcontext: Tensor):
        (qkv,) = ctx.saved_tensors
        return ctx.ops.attention_backward(qkv, dcontext.contiguous(), *ctx.arguments), None, None, None, None


class StaticAddNorm(torch.autograd.Function):
    """LayerNorm(residual + dropout(x)), whose scale and offset have a target each."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, packing: StaticPacking, layer: nn.LayerNorm, drop):
        p, site = drop
        ctx.drop = (p, packing.rng, site)
        y, normalised, rstd = packing.ops.dropout_add_norm_forward(
            x, residual, weight, bias, layer.eps, *ctx.drop
        )
        ctx.save_for_backward(normalised, rstd, weight)
        ctx.packing, ctx.layer, ctx.has_residual = packing, layer, residual is not None
        return y

    @staticmethod
    def backward(ctx, dy):
        normalised, rstd, weight = ctx.saved_tensors
        packing, dy = ctx.packing, dy.contiguous()
        if packing.tasks:
            packing.write_sums(packing.target(ctx.layer.weight), dy, normalised)
            packing.write_sums(packing.target(ctx.layer.bias), dy)
        dx, dresidual = packing.ops.dropout_add_norm_backward(
            dy, normalised, rstd, weight, *ctx.drop, ctx.has_residual
        )
        return dx, dresidual, *[None] * 5


class StaticDropout(torch.autograd.Function):
    """Dropout from a seed in device memory; the mask is drawn again in the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, packing: StaticPacking, p: float, site: int) -> Tensor:
        ctx.drop, ctx.ops = (p, packing.rng, site), packing.ops
        return ctx.ops.dropout_forward(x.contiguous(), *ctx.drop)

    @staticmethod
    def backward(ctx, dy: Tensor):
        return ctx.ops.dropout_backward(dy.contiguous(), *ctx.drop), None, None, None


class Rectangle(torch.autograd.Function):
    """Rows to a rectangle and back, both by reading: a scatter would add in no fixed order."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor, mask: Tensor, places: Tensor, is_real: Tensor) -> Tensor:
        ctx.save_for_backward(places, is_real)
        return x[rows] * mask.unsqueeze(-1)  # (R, T, H)

    @staticmethod
    def backward(ctx, dy: Tensor):
        places, is_real = ctx.saved_tensors
        return dy.flatten(0, 1)[places] * is_real.unsqueeze(-1), None, None, None, None


# --- dropout outside the encoder: heads know no packing -----------------------------------------------------

current: StaticPacking | None = None  # of the step at work


@contextmanager
def static_dropout(packing: StaticPacking) -> Iterator[None]:
    """Within this context, `kernels.cpu.dropout` draws from the packing's seed."""
    global current
    current = packing
    try:
        yield
    finally:
        current = None

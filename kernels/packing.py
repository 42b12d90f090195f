"""Sequences laid end to end without padding, and which tokens belong to which task.

A batch arrives as a rectangle of B sentences by T positions. Linear layers, LayerNorm and GELU treat every
position alike, so for them only the real word pieces of all batches are laid end to end, as M *tokens*:

    batch 0, a task's        batch 1, another's        tokens (. is padding)
    a0 a1 .                  b0 b1 b2 b3
    a2 a3 a4                 b4 .  .  .                a0 a1 a2 a3 a4 b0 b1 b2 b3 b4
                                                       |-- batch 0 --||-- batch 1 --|

    Padding of batch 0:   positions = [0, 1, 3, 4, 5]     where its tokens stand, counted row by row
    Packing of both:      batches = [0:5, 5:10]           the tokens of each batch
                          tasks = [(0, 0:5), (2, 5:10)]   the tokens of each task, by its number

Attention alone needs the rectangle, since a word piece attends to those of its own sentence only. `Padding`
takes tokens there and back; `Packing` tells the kernels whose gradient a token contributes to.

Shapes: B sentences, T padded length, M tokens (of one batch in `Padding`, of all in `Packing`), H
hidden_size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from kernels.task_grads import GradTarget

# Matrix libraries set up every new shape, and every batch has another number of word pieces. Rounding M up to
# this multiple made a step 17 % faster (570 -> 475 ms, MiniLM, two cores).
TOKEN_MULTIPLE = 32


@dataclass(frozen=True, eq=False)
class Padding:
    """Where the tokens of one padded batch stand; moves hidden states between the two layouts.

    Args:
        mask: (B, T) bool, True for real word pieces.
        positions: (M,) where each token stands in the flattened rectangle, 0 to B * T - 1; None if every
            position is a token. Besides the real word pieces it may hold some padding, which is treated as a
            token by all but attention.
    """

    mask: torch.Tensor
    positions: torch.Tensor | None

    @classmethod
    def of_mask(cls, attention_mask: torch.Tensor, num_spare: int = 0) -> Padding:
        """The `Padding` that a mask (B, T) describes, non-zero for real word pieces.

        Args:
            num_spare: how many padding positions to keep among the tokens, as far as there are any.
        """
        mask = attention_mask.bool()
        if mask.all():
            return cls(mask, None)
        is_token = mask.flatten().clone()  # (B * T,)
        # Not in a sentence without any real word piece, whose softmax would be over nothing, which is NaN.
        spare = (~mask & mask.any(1, keepdim=True)).flatten().nonzero().squeeze(1)
        is_token[spare[:num_spare]] = True
        return cls(mask, is_token.nonzero().squeeze(1))

    def to(self, device: torch.device) -> Padding:
        """The same on a device: a mask that stays on the host until here costs a GPU no wait."""
        positions = None if self.positions is None else self.positions.to(device, non_blocking=True)
        return Padding(self.mask.to(device, non_blocking=True), positions)

    @property
    def num_tokens(self) -> int:
        return self.mask.numel() if self.positions is None else len(self.positions)

    @cached_property
    def key_mask(self) -> torch.Tensor | None:
        """(B, 1, 1, T), True for what may be attended to; None if that is everything."""
        return None if self.positions is None else self.mask[:, None, None, :]

    @cached_property
    def key_bias(self) -> torch.Tensor:
        """On the CPU: (B, 1, 1, T) what is added to attention scores: 0, and minus infinity at padding."""
        return torch.zeros(self.key_mask.shape).masked_fill_(~self.key_mask, float("-inf"))

    @cached_property
    def sources(self) -> torch.Tensor:
        """(B * T,) which token to read for each position; token 0 stands in for padding."""
        sources = torch.zeros_like(self.mask.flatten(), dtype=torch.long)
        numbers = torch.arange(len(self.positions), device=self.positions.device)
        return sources.index_copy_(0, self.positions, numbers)

    def widen(self, width: int) -> Padding:
        """The same tokens in a rectangle of at least this many positions."""
        num_positions = self.mask.shape[1]
        if num_positions >= width:
            return self
        old = self.positions
        if old is None:
            old = torch.arange(self.mask.numel(), device=self.mask.device)
        new = old // num_positions * width + old % num_positions  # same sentence, same place in it
        return Padding(F.pad(self.mask, (0, width - num_positions)), new)

    def remove(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, ...) -> (M, ...)"""
        # By position, not by boolean mask, which would be searched again at every call.
        x = x.flatten(0, 1)
        return x if self.positions is None else x.index_select(0, self.positions)

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """(M, H) -> (B, T, H), zeros at positions that are not tokens."""
        if self.positions is not None:
            x = x.new_zeros(self.mask.numel(), x.shape[-1]).index_copy(0, self.positions, x)
        return x.view(*self.mask.shape, -1)

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """(M, H) -> (B, T, H), faster than `restore`: one read instead of zeroing and writing, but with
        copies of token 0 at padding, which the caller has to mask."""
        if self.positions is None or not len(self.positions):
            return self.restore(x)
        return x.index_select(0, self.sources).view(*self.mask.shape, -1)


def make_paddings(attention_masks: Sequence[torch.Tensor]) -> list[Padding]:
    """A `Padding` for each mask.

    As far as the last batch has padding, it keeps so much of it among its tokens that M is a multiple of
    TOKEN_MULTIPLE; one batch is enough for that.
    """
    num_real = sum(int(mask.count_nonzero()) for mask in attention_masks)
    *others, last = attention_masks
    return [*map(Padding.of_mask, others), Padding.of_mask(last, -num_real % TOKEN_MULTIPLE)]


class Packing:
    """Which tokens belong to which batch and task, and where the gradients of each task go.

    Args:
        sizes: number of tokens of each batch, in order.
        task_numbers: the number of each batch's task; None means ordinary gradients, not kept by task.
        targets: `id(parameter)` -> where its gradients go, as in `FlatMemory.targets`; needed with
            `task_numbers`.
    """

    is_static = False  # a `static_packing.StaticPacking` does some layers' work in another way

    def __init__(
        self,
        sizes: Sequence[int],
        task_numbers: Sequence[int] | None = None,
        targets: Mapping[int, GradTarget] | None = None,
    ):
        stops = torch.tensor(sizes).cumsum(0).tolist()
        self.targets = targets
        self.batches = [slice(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]
        self.tasks: list[tuple[int, slice]] = []  # (task number, its tokens)
        for task, tokens in zip(task_numbers or (), self.batches, strict=False):
            if self.tasks and self.tasks[-1][0] == task:
                # Neighbours of one task are one range: one matrix product for both.
                tokens = slice(self.tasks.pop()[1].start, tokens.stop)
            self.tasks.append((task, tokens))

    def target(self, param: torch.nn.Parameter) -> GradTarget:
        return self.targets[id(param)]

    # --- gradients by task, called by the backward passes in task_grads.py ----------------------------------

    def write_products(self, target: GradTarget, dy: torch.Tensor, x: torch.Tensor) -> None:
        """Gradients of a weight: of each task dy^T @ x over its tokens; dy (M, out), x (M, in)."""
        for task, tokens in self.tasks:
            target.write_product(task, dy[tokens].t(), x[tokens])  # (out, m) @ (m, in) -> (out, in)

    def write_sums(self, target: GradTarget, dy: torch.Tensor) -> None:
        """Gradients of a bias: of each task the sum of dy (M, out) over its tokens."""
        for task, tokens in self.tasks:
            target.write(task, dy[tokens].sum(0))

    def write_rows(self, target: GradTarget, ids: torch.Tensor, dy: torch.Tensor) -> None:
        """Gradients of a table (V, H): rows of dy (M, H) are added to those that `ids` (M,) looked up."""
        for task, tokens in self.tasks:
            # Always added, since a word occurs more than once; `FlatMemory.start_step` has zeroed these rows.
            # To touch them alone, not the whole table, took 1.0 ms a task instead of 19.5 (MiniLM, two
            # cores).
            target.grads[task].index_add_(0, ids[tokens], dy[tokens])  # (V, H) += (m, H)

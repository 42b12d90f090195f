"""Sequences laid end to end without padding, and which rows belong to which task."""

from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F

# Matrix libraries prepare each shape they have not met before; few different row counts make that rare.
ROW_MULTIPLE = 32


class Padding:
    """Where the real word pieces of a padded batch are; moves hidden states between the two layouts.

    Args:
        attention_mask: (B, T), non-zero for real word pieces.
        num_spare: padding to keep among the rows, if there is so much.
    """

    def __init__(self, attention_mask: torch.Tensor, num_spare: int = 0):
        self.mask = attention_mask.bool()
        self.rows = self.key_mask = None
        if not self.mask.all():
            kept = self.mask.flatten().clone()
            # A sentence without any real word piece has nothing to attend to: its softmax is not a number.
            spare = (~self.mask & self.mask.any(1, keepdim=True)).flatten().nonzero().squeeze(1)
            kept[spare[:num_spare]] = True
            self.rows = kept.nonzero().squeeze(1)  # (M,) positions in B * T
            self.key_mask = self.mask[:, None, None, :]  # (B, 1, 1, T), True = attend

    @property
    def num_rows(self) -> int:
        return self.mask.numel() if self.rows is None else len(self.rows)

    def widen(self, width: int) -> "Padding":
        """The same rows in a rectangle of at least this many positions."""
        num_positions = self.mask.shape[1]
        if num_positions >= width:
            return self
        wide = Padding.__new__(Padding)
        rows = torch.arange(self.mask.numel(), device=self.mask.device) if self.rows is None else self.rows
        wide.mask = F.pad(self.mask, (0, width - num_positions))
        wide.rows = rows // num_positions * width + rows % num_positions
        wide.key_mask = wide.mask[:, None, None, :]
        return wide

    @cached_property
    def sources(self) -> torch.Tensor:
        """(B * T,) the row of the flat layout for each position; for padding the first one, as good as any."""
        sources = torch.zeros_like(self.mask.flatten(), dtype=torch.long)
        return sources.index_copy_(0, self.rows, torch.arange(len(self.rows), device=self.rows.device))

    @cached_property
    def key_bias(self) -> torch.Tensor:
        """(B, 1, 1, T) what is added to attention scores: 0, and minus infinity at padding."""
        return torch.zeros(self.key_mask.shape).masked_fill_(~self.key_mask, float("-inf"))

    def remove(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, ...) -> (M, ...)"""
        x = x.flatten(0, 1)
        return x if self.rows is None else x.index_select(0, self.rows)

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """(M, H) -> (B, T, H), zeros at padding that is not among the rows."""
        if self.rows is not None:
            x = x.new_zeros(self.mask.numel(), x.shape[-1]).index_copy(0, self.rows, x)
        return x.view(*self.mask.shape, -1)

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """As `restore`, faster, with something finite at padding."""
        if self.rows is None or not len(self.rows):
            return self.restore(x)
        return x.index_select(0, self.sources).view(*self.mask.shape, -1)


def make_paddings(attention_masks: Sequence[torch.Tensor]) -> list[Padding]:
    """A `Padding` for each mask; with some padding kept in the last one, the rows are a multiple of ROW_MULTIPLE."""
    num_real = sum(int(mask.count_nonzero()) for mask in attention_masks)
    *others, last = attention_masks
    return [*map(Padding, others), Padding(last, -num_real % ROW_MULTIPLE)]


class Packing:
    """Which rows belong to which task.

    Args:
        sizes: number of rows of each batch, in order.
        tasks: of each batch the number of its task; None means that gradients are not kept by task.
    """

    def __init__(self, sizes: list[int], tasks: list[int] | None = None):
        stops = torch.tensor(sizes).cumsum(0).tolist()
        self.batches = [slice(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]
        self.tasks: list[tuple[int, slice]] = []  # neighbours of one task are taken together
        for task, rows in zip(tasks or (), self.batches, strict=False):
            if self.tasks and self.tasks[-1][0] == task:
                rows = slice(self.tasks.pop()[1].start, rows.stop)
            self.tasks.append((task, rows))

"""packing.py: batches laid end to end and brought back, worked by hand; wide and filled-up paddings."""

import math

import pytest
import torch
import torch.nn.functional as F

from kernels import packing
from kernels.packing import Packing, Padding, make_paddings


def test_packing_by_hand():
    found = Packing([3, 2, 4, 1, 5], [1, 1, 0, 1, 1])
    assert found.batches == [slice(0, 3), slice(3, 5), slice(5, 9), slice(9, 10), slice(10, 15)]
    assert found.tasks == [(1, slice(0, 5)), (0, slice(5, 9)), (1, slice(9, 15))]  # neighbours together
    assert Packing([3, 2]).tasks == [] and Packing([3, 2]).batches == [slice(0, 3), slice(3, 5)]


def test_padding_moves_between_layouts_by_hand():
    padding = Padding.of_mask(torch.tensor([[1, 0, 1], [0, 1, 0]]))
    x = torch.tensor([[[1.0], [2.0], [3.0]], [[4.0], [5.0], [6.0]]])
    assert padding.num_tokens == 3 and padding.positions.tolist() == [0, 2, 4]
    assert padding.remove(x).tolist() == [[1.0], [3.0], [5.0]]
    assert padding.restore(padding.remove(x)).tolist() == [[[1.0], [0.0], [3.0]], [[0.0], [5.0], [0.0]]]
    assert padding.spread(padding.remove(x)).tolist() == [[[1.0], [1.0], [3.0]], [[1.0], [5.0], [1.0]]]
    assert padding.key_bias.flatten(1).tolist() == [[0, -math.inf, 0], [-math.inf, 0, -math.inf]]
    full = Padding.of_mask(torch.ones(2, 3))
    assert full.key_mask is None and full.num_tokens == 6
    assert torch.equal(full.restore(full.remove(x)), x) and torch.equal(full.spread(full.remove(x)), x)


@pytest.mark.parametrize("mask", [[[1, 0, 1], [0, 1, 0]], [[1, 1, 1], [1, 1, 1]]])
def test_a_wider_padding_has_the_same_tokens(mask):
    padding = Padding.of_mask(torch.tensor(mask))
    wide = padding.widen(5)
    x = torch.arange(1.0, 13.0).view(2, 3, 2)
    tokens = padding.remove(x)
    assert wide.num_tokens == padding.num_tokens
    assert torch.equal(wide.mask, F.pad(padding.mask, (0, 2)))
    assert torch.equal(wide.key_mask, wide.mask[:, None, None, :])
    expected = F.pad(padding.restore(tokens), (0, 0, 0, 2))  # (2, 5, 2), zeros at the new positions
    assert torch.equal(wide.restore(tokens), expected)
    assert torch.equal(wide.remove(expected), tokens)
    spread = wide.spread(tokens)
    assert torch.equal(spread[wide.mask], expected[wide.mask]) and spread.isfinite().all()
    assert padding.widen(3) is padding and padding.widen(2) is padding  # wide enough


@pytest.mark.parametrize(("multiple", "num_tokens"), [(1, 12), (4, 12), (8, 16), (16, 16), (64, 19)])
def test_tokens_are_filled_up_with_padding(monkeypatch, multiple, num_tokens):
    """3 + 9 real word pieces; the last batch has 7 of padding to give, in its second sentence only."""
    monkeypatch.setattr(packing, "TOKEN_MULTIPLE", multiple)
    masks = [torch.tensor([[1, 1, 0, 1]]), torch.tensor([[1] * 8, [1] + [0] * 7, [0] * 8])]
    first, last = make_paddings(masks)
    assert first.positions.tolist() == [0, 1, 3]
    assert first.num_tokens + last.num_tokens == num_tokens
    positions = last.positions.tolist()
    assert positions == sorted(set(positions)) and max(positions) < 16
    assert set(masks[1].flatten().nonzero().flatten().tolist()) <= set(positions)
    assert torch.equal(last.mask, masks[1].bool())

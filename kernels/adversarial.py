"""Adversarial training on the embeddings: the fast gradient method, in a packed pass of all tasks.

Miyato, Dai and Goodfellow 2017, https://arxiv.org/abs/1605.07725: besides its loss L(s), a sequence of
embeddings s gets the loss L(s + r), where r = length * g / |g| and g is the gradient of L with respect to s.
Of the two usual methods this is the one that fits here. Its gradient g comes with the ordinary backward pass,
at the price of keeping one (M, H) tensor; the second pass is one more micro-batch, whose gradients are added
to each task's row. SMART (https://arxiv.org/abs/1911.03437) needs the clean and the changed predictions in
one graph, and a pass more to find r.

Differences from the paper: s is the sum of word, position and segment embeddings before LayerNorm, and words
are not normalised by their frequency; both passes draw the same dropout.

Shapes: M tokens, R sequences of all batches, H hidden_size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.packing import Padding


class AdversarialNoise:
    """What is added to the embeddings of a micro-batch: nothing in its first pass, r in its second.

    Args:
        length: of r, for each sequence, in units of the embeddings.
    """

    def __init__(self, length: float):
        self.length = length
        self.clear()

    def clear(self) -> None:
        """Before another micro-batch."""
        self.noise = self.sequences = None

    def add(self, embeddings: Tensor, paddings: Sequence[Padding]) -> Tensor:
        """(M, H) -> (M, H)"""
        if self.noise is None:
            self.noise = torch.zeros_like(embeddings, requires_grad=True)
            self.sequences = number_sequences(paddings)
        return embeddings + self.noise

    @torch.no_grad()
    def turn_adversarial(self) -> None:
        """After the backward pass of the first pass: from its gradient make the noise of the second."""
        grad = self.noise.grad.double()  # squares of small gradients would be 0 in float32
        squares = grad.square().sum(-1)  # (M,)
        sums = squares.new_zeros(len(self.sequences)).index_add_(0, self.sequences, squares)  # (R,) and more
        norms = sums[self.sequences].sqrt().clamp(min=torch.finfo(torch.float64).tiny)  # (M,)
        self.noise = (self.length * grad / norms.unsqueeze(-1)).to(self.noise.dtype)


def number_sequences(paddings: Sequence[Padding]) -> Tensor:
    """(M,) the number of each token's sequence."""
    numbers, first = [], 0
    for padding in paddings:
        num_sequences, width = padding.mask.shape
        positions = padding.positions
        if positions is None:
            positions = torch.arange(padding.mask.numel(), device=padding.mask.device)
        numbers.append(first + positions // width)
        first += num_sequences
    return torch.cat(numbers)

"""How much of a batch's gradient is signal, and gradient methods that act on what is not noise.

A task's gradient in a step is its expected gradient plus the noise of the batch. Cosines of noisy gradients
shrink towards 0, by the root of both tasks' shares of signal, so that a cosine near 0 in the log says nothing
about the tasks. What is known without noise follows from batches that were drawn independently at the same
weights: of n batches of each task, with sums S_i over them,

    |E g_i|^2     is estimated by (|S_i|^2 - sum of |g_i|^2) / (n (n - 1))
    E g_i . E g_j is estimated by S_i . S_j / n^2, as two tasks' batches are independent anyway

without bias. (McCandlish et al. 2018, https://arxiv.org/abs/1812.06162, use the first for the noise scale.)
Gradients of neighbouring steps would cost nothing, but are not independent: a step moves the weights against
its own noise, which the next gradient sees, and a signal of 1 % may drown in that bias. The halves of one
batch are alike in length, since batches are. Hence a probe: random batches of its own, without an update.
Of the gradients, sums of NUM_PARTS columns with random signs are kept (feature hashing, Weinberger et al.
2009, https://arxiv.org/abs/0902.2206): inner products stay unbiased, with an error of 1 / sqrt(m) of the
lengths. Of expected gradients that is next to nothing (0.2 % for MiniLM, 0.6 % in one of its layers); of
noise it is another in each batch, so that intervals hold it. (A choice of columns errs alike in all batches.
Of 8 batches, MiniLM with new heads, a cosine of -0.015 was -0.020 to -0.145 with every 13th column, -0.004 to
-0.025 with sums of 61 columns.)

Shapes: n batches of each of K tasks, P columns of gradients, m sums of them, L layer groups, G gram matrices
(1, or L).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.flat_memory import FlatMemory
from support.command_line import number
from support.specs import Param, find_row

NUM_PARTS = 61  # a prime: parts do not begin with a row of a weight matrix, whose columns are alike


# --- the estimate -------------------------------------------------------------------------------------------


def sketch_grads(memory: FlatMemory) -> list[Tensor]:
    """Of the gradients in memory, the sums kept of each layer group, (K, m) float32 on the CPU."""
    groups: list[list[Tensor]] = [[] for _ in memory.layout.layer_groups]
    generator = torch.Generator().manual_seed(0)  # the same signs for all batches
    for matrix, ranges in memory.group_columns():
        for group, where in ranges:
            groups[group].append(add_parts(matrix[:, where], generator).cpu())
    return [torch.cat(pieces, dim=1) for pieces in groups]


def add_parts(grads: Tensor, generator: torch.Generator) -> Tensor:
    """Gradients (K, P) in NUM_PARTS parts, added up with random signs: (K, m) float32."""
    width = -(-grads.shape[1] // NUM_PARTS)
    # Signs of a part are those of the one before, moved by one: to draw them all would take twice as long as
    # to add up.
    signs = torch.randint(2, (width + NUM_PARTS,), generator=generator).mul(2).sub(1).to(grads.device).float()
    sums = torch.zeros(len(grads), width, device=grads.device)
    for first, part in enumerate(grads.split(width, dim=1)):
        size = part.shape[1]  # of the last one, less than width
        sums[:, :size].addcmul_(part.float(), signs[first : first + size])
    return sums


@dataclass(frozen=True)
class Moments:
    """What n batches say of the expected gradients: first with all of them, then leaving out each in turn.

    Args:
        squares: (1 + n, K) mean square of a batch's gradient.
        expected: (1 + n, K, K) inner products of the expected gradients; the diagonal may be below 0.
    """

    squares: Tensor
    expected: Tensor

    def __add__(self, other: "Moments") -> "Moments":
        """Those of two layer groups together."""
        return Moments(self.squares + other.squares, self.expected + other.expected)

    @property
    def shares(self) -> Tensor:
        """(1 + n, K, K) `expected` over the roots of both mean squares; the diagonal is the share of signal.

        0 for a task without any gradient.
        """
        roots = self.squares.sqrt()
        product = roots[:, :, None] * roots[:, None, :]
        return torch.where(product > 0, self.expected / torch.where(product > 0, product, 1.0), 0.0)


def moments_of(batches: Tensor) -> Moments:
    """Moments of gradients (n, K, m), n > 2, of independent batches."""
    num_batches, num_tasks, _ = batches.shape
    rows = batches.flatten(0, 1).double()
    products = (rows @ rows.T).view(num_batches, num_tasks, num_batches, num_tasks)
    own = torch.einsum("aiaj->aij", products)  # (n, K, K) within each batch
    with_all = products.sum(2)  # (n, K, K): of a batch's task i, with the sum of task j
    total = with_all.sum(0)
    # What all batches have, less all that one of them has a part in.
    sums = torch.cat([total[None], total - with_all - with_all.transpose(1, 2) + own])  # (1 + n, K, K)
    own_sums = torch.cat([own.sum(0)[None], own.sum(0) - own])
    counts = torch.tensor([num_batches, *[num_batches - 1] * num_batches], dtype=torch.float64)[:, None, None]
    between = (sums - own_sums) / (counts * (counts - 1))
    is_task = torch.eye(num_tasks, dtype=torch.bool)
    expected = torch.where(is_task, between, sums / counts**2)
    return Moments((own_sums / counts).diagonal(dim1=1, dim2=2).clone(), expected)


def jackknife_error(values: Tensor) -> Tensor:
    """Standard error, (...), of values (1 + n, ...), those with all batches and those without each."""
    left_out = values[1:]
    return ((len(left_out) - 1) * left_out.var(0, correction=0)).sqrt()


def known_share(moments: Moments, num_batches: int) -> Tensor:
    """(K,) the share of signal in the mean of so many batches, in (0, 1], as far as it is known.

    At least its standard error: a share that is not told apart from 0 must not make a gradient look as if
    it had no length at all.
    """
    shares = moments.shares.diagonal(dim1=1, dim2=2)  # (1 + n, K)
    share = torch.maximum(shares[0], jackknife_error(shares)).clamp(1e-6, 1.0)
    return share / (share + (1 - share) / num_batches)


# --- which inner products a gradient method acts on: grams (G, K, K) of a step -> grams (G, K, K), state ----


def mean_grams(
    grams: Tensor, present: Sequence[int], state: Mapping[str, Tensor], params: Mapping[str, float]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Running means of the inner products, the squares among them reduced to their signal.

    Inner products of two tasks are unbiased in every step, so that their mean is that of the expected
    gradients. Squares are not: they are multiplied by the share of signal that the last probe has found.

    Args:
        present: tasks with a batch; products with the others keep their mean.
        state: `total` (G * K, K) and `weight` (K, K), sums of products and of their weights; `signal` (G, K).
    """
    num_grams, num_tasks, _ = grams.shape
    drawn = torch.zeros(num_tasks, dtype=torch.bool)
    drawn[list(present)] = True
    both = drawn[:, None] & drawn
    zeros = torch.zeros(num_grams, num_tasks, num_tasks, dtype=torch.float64)
    before, weight = state.get("total", zeros).view_as(zeros), state.get("weight", zeros[0])
    keep = params["b"]
    total = torch.where(both, keep * before + (1 - keep) * grams.double(), before)
    weight = torch.where(both, keep * weight + (1 - keep), weight)
    signal = state.get("signal", torch.ones(num_grams, num_tasks, dtype=torch.float64))
    means = total / torch.where(weight > 0, weight, 1.0)
    acted_on = torch.stack([reduce_squares(*each) for each in zip(means, signal, strict=True)])
    return acted_on.to(grams), {"total": total.flatten(0, 1), "weight": weight, "signal": signal}


def reduce_squares(gram: Tensor, signal: Tensor) -> Tensor:
    """A gram matrix (K, K) whose squares are multiplied by their signal (K,), made one of vectors again.

    Cosines then may exceed 1, or not fit together: they are cut, and so are negative eigenvalues.
    """
    lengths = (gram.diagonal() * signal).clamp(min=0).sqrt()
    product = lengths[:, None] * lengths
    cosines = torch.where(product > 0, gram / torch.where(product > 0, product, 1.0), 0.0).clamp(-1, 1)
    cosines.fill_diagonal_(1.0)
    values, vectors = torch.linalg.eigh(cosines)
    if values[0] < 0:
        cosines = vectors @ (values.clamp(min=0)[:, None] * vectors.T)
        roots = cosines.diagonal().sqrt()
        cosines = cosines / (roots[:, None] * roots)
    return cosines * product


@dataclass(frozen=True)
class GramSource:
    """A row of GRAMS; without `grams`, a method acts on the inner products of the step alone."""

    grams: Callable[..., tuple[Tensor, dict[str, Tensor]]] | None = None
    params: Mapping[str, Param] = field(default_factory=dict)


GRAMS: dict[str, GramSource] = {
    "step": GramSource(),
    "ema": GramSource(
        mean_grams, {"b": Param(0.99, number(float, 0, 1, high_open=True), "share that the past keeps")}
    ),
}


def grams_to_act_on(
    grams: Tensor, present: Sequence[int], state: Mapping[str, Tensor], spec: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """What a gradient method is given for the grams (G, K, K) of a step, and the state after it.

    Args:
        spec: a key of GRAMS, maybe with parameters, as in `ema:b=0.99`.
    """
    source, params = find_row(spec, GRAMS)
    return source.grams(grams, present, state, params) if source.grams else (grams, {})

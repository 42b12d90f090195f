"""Gradient surgery on the matrix of inner products: the matrix, PCGrad and GradVac.

PCGrad: Yu et al. 2020, https://arxiv.org/abs/2001.06782.

A gradient method never sees the gradients. Each projection of the paper adds a multiple of one task gradient
to another, so every result is a weighted sum of the original task gradients, and the weights follow from
their inner products alone. For K tasks that is arithmetic on a K x K matrix, instead of passes over K copies
of the model. (The idea of working on the Gramian: Quinton and Rey, https://arxiv.org/abs/2406.16232.)
The table of all methods is in kernels/grad_methods.py; what they may know besides the matrix is `TaskFacts`.

Shapes: K tasks, P shared parameters, G (K, P) the task gradients.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from support.seeds import make_seed

COSINE_EMA_BETA = 0.01  # weight of the newest step in the running mean of cosines, as in GradVac
HALVES = (torch.bfloat16, torch.float16)
CHUNK_SIZE = 2**18  # columns of a G in one of them converted at once: the float32 copy stays in the cache
BLOCK_SIZE = 2**14  # columns of G handled at once: K blocks stay in a core's cache, so G is read once


def gram_matrix(task_grads: torch.Tensor) -> torch.Tensor:
    """Inner products of the task gradients, (K, P) -> (K, K), in float32 and one pass over memory.

    Summing per block first is also more exact than one long float32 sum.
    """
    if task_grads.dtype in HALVES:
        # Their products need float32: rounded to bfloat16 they would be off by 0.4 %, in float16 overflow.
        return sum(gram_matrix(chunk.float()) for chunk in task_grads.split(CHUNK_SIZE, dim=1))
    num_params = task_grads.shape[1]
    whole = num_params - num_params % BLOCK_SIZE
    blocks = task_grads[:, :whole].unflatten(1, (whole // BLOCK_SIZE, BLOCK_SIZE))
    blocks = blocks.transpose(0, 1)  # (blocks, K, BLOCK_SIZE)
    rest = task_grads[:, whole:]
    return torch.bmm(blocks, blocks.transpose(1, 2)).sum(0) + rest @ rest.T


def weighted_sum(task_grads: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> None:
    """Write weights (K,) @ task_grads (K, P) to `out` (P,), in float32."""
    if task_grads.dtype not in HALVES:
        torch.mv(task_grads.T, weights, out=out)
        return
    for chunk, part in zip(task_grads.split(CHUNK_SIZE, dim=1), out.split(CHUNK_SIZE), strict=True):
        torch.mv(chunk.float().T, weights, out=part)


def cosine_matrix(gram: torch.Tensor) -> torch.Tensor:
    """Cosines between the task gradients, (..., K, K) -> (..., K, K); 0 where a gradient is zero."""
    norms = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    product = norms[..., :, None] * norms[..., None, :]
    return torch.where(product > 0, gram / product.clamp(min=torch.finfo(gram.dtype).tiny), 0.0).clamp(-1, 1)


def update_cosine_ema(ema: torch.Tensor | None, gram: torch.Tensor) -> torch.Tensor:
    """Running mean of the cosine matrix, (K, K), from 0; pairs with a zero gradient (no batch) keep it."""
    ema = torch.zeros_like(gram) if ema is None else ema
    present = gram.diagonal() > 0
    return torch.where(present[:, None] & present, ema + COSINE_EMA_BETA * (cosine_matrix(gram) - ema), ema)


# --- what a gradient method is told -------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskFacts:
    """What a gradient method, or a loss weighting, may know of the K tasks of a step.

    All is on one device. `params` and `state` are those of its own row of the table.

    Args:
        gram: (K, K) inner products of the task gradients.
        orders: (K, K) task numbers, row i a permutation, as `draw_orders` gives it.
        cosine_ema: (K, K) running mean of the cosine matrix over the steps so far; None, or 0, at the first.
        adjusted: (K,) bool, whether a task's gradient may be changed; None means all may.
        losses: (K,) before any weighting.
        params: values of the row's parameters.
        state: (K,) each, float64: what the row remembers from step to step; 0 at the start.
        generator: for random numbers of this step; it depends on the seed and the step alone.
    """

    gram: torch.Tensor
    orders: torch.Tensor | None = None
    cosine_ema: torch.Tensor | None = None
    adjusted: torch.Tensor | None = None
    losses: torch.Tensor | None = None
    params: Mapping[str, float] = field(default_factory=dict)
    state: Mapping[str, torch.Tensor] = field(default_factory=dict)
    generator: torch.Generator | None = None


def draw_orders(num_tasks: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """(K, K) for each task the order in which it meets the others; itself is among them, and left out."""
    return torch.stack([torch.randperm(num_tasks, generator=generator) for _ in range(num_tasks)])


def draw_step_orders(seed: int, step: int, num_tasks: int) -> torch.Tensor:
    """`draw_orders` for a step of a run: the same whenever the run is repeated or resumed."""
    # A generator of its own: nothing else that a run draws may change the order of projections.
    return draw_orders(num_tasks, torch.Generator().manual_seed(make_seed(seed, step)))


# --- PCGrad and GradVac: facts -> weights (K,), so that the combined gradient is weights @ G ----------------
# Nothing here waits for the device or branches on a value, so that a GPU can capture it.


def project(
    gram: torch.Tensor, orders: torch.Tensor, aims: torch.Tensor, adjusted: torch.Tensor | None
) -> torch.Tensor:
    """Shared walk of PCGrad and GradVac; `aims[i, j]` is the least cosine that task i keeps with task j.

    Each adjusted task i meets the other tasks j in its order. Where the current gradient of i has a cosine
    with the original gradient of j below the aim, add the multiple of gradient j that lifts it to the aim. A
    zero gradient meets nobody; a task that is not adjusted keeps its gradient. Returns the sum over tasks of
    the adjusted gradients, as weights (K,).

    Args:
        orders: (K, K) task numbers, row i a permutation, as `draw_orders` gives it.
        aims: (K, K) in (-1, 1).
        adjusted: (K,) bool, whether a task's gradient may be changed; None means all may.
    """
    # In float64: these are K x K numbers, and projections subtract what is nearly equal.
    inner, aims = gram.double(), aims.double()
    norms = inner.diagonal().clamp(min=0).sqrt()  # (K,)
    tasks = torch.arange(len(inner), device=inner.device)
    may_change = (norms > 0) if adjusted is None else (norms > 0) & adjusted
    # Row i: the current gradient of task i, as coefficients of the originals. Rows do not depend on each
    # other, so all tasks take their n-th meeting at once.
    coefficients = torch.eye(len(inner), dtype=torch.float64, device=inner.device)
    for others in orders.unbind(1):  # (K,) whom each task meets now
        # Inner product with the other's gradient and length of the current one, from the coefficients alone.
        product = (coefficients * inner[others]).sum(1)  # (K,)
        norm = (coefficients @ inner * coefficients).sum(1).clamp(min=0).sqrt()
        other_norm, aim = norms[others], aims[tasks, others]
        is_below = (product < aim * norm * other_norm) & (norm > 0) & (other_norm > 0)
        # PCGrad's projection onto the normal plane of the other gradient, or GradVac's lift to the aim.
        projection = -product / inner.diagonal()[others]
        cosine = (product / (norm * other_norm)).clamp(min=-1, max=1)
        rest = (1 - aim**2).sqrt()
        lift = norm * (aim * (1 - cosine**2).sqrt() - cosine * rest) / (other_norm * rest)
        change = torch.where(aim == 0, projection, lift)
        change = torch.where(is_below & may_change & (others != tasks), change, 0.0)  # also what is NaN
        coefficients.scatter_add_(1, others[:, None], change[:, None])
    return coefficients.sum(0).to(gram)


def pcgrad(facts: TaskFacts) -> torch.Tensor:
    """PCGrad, Algorithm 1: take out of each task's gradient what conflicts with the others, then sum.

    The order of the others is redrawn for each task, the task itself is left out, and projections use the
    others' original gradients.
    """
    return project(facts.gram, facts.orders, torch.zeros_like(facts.gram), facts.adjusted)


def gradvac(facts: TaskFacts) -> torch.Tensor:
    """GradVac (Wang et al. 2021, https://arxiv.org/abs/2010.05874): lift each cosine to its running mean.

    Two differences from the paper: the running mean is that of the cosines between the original gradients,
    not the partly adjusted ones, which keeps it a property of the tasks; and it is kept within -0.99 and
    0.99, beyond which the formula divides by almost nothing. Without a running mean yet, the aim is 0, which
    is PCGrad.
    """
    ema = facts.cosine_ema
    aims = torch.zeros_like(facts.gram) if ema is None else ema.double().clamp(-0.99, 0.99)
    return project(facts.gram, facts.orders, aims, facts.adjusted)

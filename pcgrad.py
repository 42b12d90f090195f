"""Gradient surgery on the matrix of inner products.

PCGrad: Yu et al. 2020, https://arxiv.org/abs/2001.06782.

A gradient method never sees the gradients. Each projection of the paper adds a multiple of one task gradient
to another, so every result is a weighted sum of the original task gradients, and the weights follow from
their inner products alone. For K tasks that is arithmetic on a K x K matrix, instead of passes over K copies
of the model. (The idea of working on the Gramian: Quinton and Rey, https://arxiv.org/abs/2406.16232.)
A method that needs more than inner products, losses say, needs another argument in
`multitask_classifier.combination_weights`, and a field of `training.run_folder.RunState` if it has a memory.

Shapes: K tasks, P shared parameters, G (K, P) the task gradients.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

COSINE_EMA_BETA = 0.01  # weight of the newest step in the running mean of cosines, as in GradVac
CHUNK_SIZE = 2**18  # columns of a bfloat16 G converted at once: the float32 copy stays in the cache
BLOCK_SIZE = 2**14  # columns of G handled at once: K blocks stay in a core's cache, so G is read once


def gram_matrix(task_grads: torch.Tensor) -> torch.Tensor:
    """Inner products of the task gradients, (K, P) -> (K, K), in float32 and one pass over memory.

    Summing per block first is also more exact than one long float32 sum.
    """
    if task_grads.dtype == torch.bfloat16:
        # Products of bfloat16 numbers need float32: rounded to bfloat16 they would be off by 0.4 %.
        return sum(gram_matrix(chunk.float()) for chunk in task_grads.split(CHUNK_SIZE, dim=1))
    num_params = task_grads.shape[1]
    whole = num_params - num_params % BLOCK_SIZE
    blocks = task_grads[:, :whole].unflatten(1, (whole // BLOCK_SIZE, BLOCK_SIZE))
    blocks = blocks.transpose(0, 1)  # (blocks, K, BLOCK_SIZE)
    rest = task_grads[:, whole:]
    return torch.bmm(blocks, blocks.transpose(1, 2)).sum(0) + rest @ rest.T


def weighted_sum(task_grads: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> None:
    """Write weights (K,) @ task_grads (K, P) to `out` (P,), in float32."""
    if task_grads.dtype != torch.bfloat16:
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


# --- gradient methods: (gram (K, K), generator, cosine_ema (K, K) or None, adjusted or None) -> weights (K,)
# The combined gradient is weights @ G. `cosine_ema` is the running mean of the cosine matrix over the steps
# so far (None at the first); the training loop keeps it for its log, and GradVac aims at it. `adjusted` says
# of each task whether its gradient may be changed (None: all may).


def sum_grads(
    gram: torch.Tensor, generator: torch.Generator | None = None, cosine_ema=None, adjusted=None
) -> torch.Tensor:
    """Plain sum: the gradient of the summed losses."""
    return torch.ones(len(gram), dtype=gram.dtype, device=gram.device)


def mean_grads(
    gram: torch.Tensor, generator: torch.Generator | None = None, cosine_ema=None, adjusted=None
) -> torch.Tensor:
    """Plain mean: the gradient of the averaged losses."""
    return sum_grads(gram) / len(gram)


def project(
    gram: torch.Tensor,
    generator: torch.Generator | None,
    target: Callable[[int, int], float],
    adjusted: Sequence[bool] | None,
) -> torch.Tensor:
    """Shared walk of PCGrad and GradVac; `target(i, j)` is the least cosine that task i keeps with task j.

    For each adjusted task i, meet the other tasks j in a freshly drawn order. Where the current gradient of i
    has a cosine with the original gradient of j below the target, add the multiple of gradient j that lifts
    it to the target. A zero gradient meets nobody; a task that is not adjusted keeps its gradient. Returns
    the sum over tasks of the adjusted gradients, as weights (K,).
    """
    # In float64 on the CPU: these are K x K numbers, and projections subtract what is nearly equal.
    inner = gram.double().cpu()
    num_tasks = len(inner)
    combined = torch.zeros(num_tasks, dtype=torch.float64)
    for i in range(num_tasks):
        coefficients = torch.zeros(num_tasks, dtype=torch.float64)  # of task i's gradient, over the originals
        coefficients[i] = 1.0
        order = torch.randperm(num_tasks, generator=generator).tolist()
        for j in order if adjusted is None or adjusted[i] else ():
            if i == j or inner[j, j] <= 0 or inner[i, i] <= 0:
                continue
            # Inner product with gradient j and length of task i's current gradient, from its coefficients
            # alone.
            product = float(coefficients @ inner[j])
            norm = math.sqrt(max(0.0, float(coefficients @ inner @ coefficients)))
            norm_j, least = math.sqrt(inner[j, j]), target(i, j)
            if norm == 0 or product >= least * norm * norm_j:
                continue
            if least == 0:  # PCGrad's projection onto the normal plane of gradient j
                coefficients[j] -= product / float(inner[j, j])
            else:  # GradVac's lift to the target
                cosine = max(-1.0, product / (norm * norm_j))
                lift = least * math.sqrt(1 - cosine**2) - cosine * math.sqrt(1 - least**2)
                coefficients[j] += norm * lift / (norm_j * math.sqrt(1 - least**2))
        combined += coefficients
    return combined.to(gram)


def pcgrad(
    gram: torch.Tensor, generator: torch.Generator | None = None, cosine_ema=None, adjusted=None
) -> torch.Tensor:
    """PCGrad, Algorithm 1: take out of each task's gradient what conflicts with the others, then sum.

    The order of the others is redrawn for each task, the task itself is left out, and projections use the
    others' original gradients.
    """
    return project(gram, generator, lambda i, j: 0.0, adjusted)


def gradvac(
    gram: torch.Tensor, generator: torch.Generator | None = None, cosine_ema=None, adjusted=None
) -> torch.Tensor:
    """GradVac (Wang et al. 2021, https://arxiv.org/abs/2010.05874): lift each cosine to its running mean.

    Two differences from the paper: the running mean is that of the cosines between the original gradients,
    not the partly adjusted ones, which keeps it a property of the tasks; and it is kept within -0.99 and
    0.99, beyond which the formula divides by almost nothing. Without a running mean yet, the target is 0,
    which is PCGrad.
    """
    if cosine_ema is None:
        return pcgrad(gram, generator, adjusted=adjusted)
    aims = cosine_ema.double().clamp(-0.99, 0.99).tolist()
    return project(gram, generator, lambda i, j: aims[i][j], adjusted)


@dataclass(frozen=True)
class GradMethod:
    """A row of GRAD_METHODS.

    Args:
        weights: as described above.
        is_mean: it already divides by the number of tasks, so that losses are averaged, not summed.
        changes_gradients: tasks can be kept from it by `adjusted`; the others only add gradients up.
    """

    weights: Callable[..., torch.Tensor]
    is_mean: bool = False
    changes_gradients: bool = False

    @property
    def reduction(self) -> str:
        """The key of GRAD_REDUCTIONS that goes with it."""
        return "mean" if self.is_mean else "sum"


GRAD_METHODS: dict[str, GradMethod] = {
    "sum": GradMethod(sum_grads),
    "mean": GradMethod(mean_grads, is_mean=True),
    "pcgrad": GradMethod(pcgrad, changes_gradients=True),
    "gradvac": GradMethod(gradvac, changes_gradients=True),
}
# Over the task batches of a step, after the method; value: is the combined gradient divided by their number?
GRAD_REDUCTIONS = {"sum": False, "mean": True}

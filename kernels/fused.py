"""The kernels that go over flat memory, compiled: each reads and writes every number once.

Plain tensor operations go over memory once per operation, and convert bfloat16 gradients beforehand.
`torch.compile` (https://docs.pytorch.org/docs/stable/torch.compiler.html) makes one loop of each function
here, which takes a C++ compiler and some seconds. Measured for MiniLM on two cores: AdamW 12.8 ms instead of
27.9 with plain operations, PCGrad with its gram matrix and weighted sum 20.1 ms instead of 36.2 (13.7 with
bfloat16 gradients), a whole step in bfloat16 378 ms instead of 415.

The plain twins `gram_matrix`, `weighted_sum` and `adamw_update` give the same numbers up to rounding, and
stand in for small tensors and where compiling fails.

Shapes: K tasks, n columns of their gradients.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch

from optimizer import adamw_update
from pcgrad import gram_matrix, weighted_sum

# Measured on two cores: compiling takes 15 s the first time on a machine, 2 s when torch has kept the code,
# and saves about 1.6e-9 s for each shared parameter and step. A slower machine should not lose by it either.
COMPILE_SECONDS = 30.0
SAVED_SECONDS = 1.5e-9
MIN_SIZE = 2**20  # elements; going over fewer takes no time


@dataclass(frozen=True)
class Kernels:
    """The three kernels that go over flat memory; signatures as those of the defaults, the plain ones."""

    gram_matrix: Callable = gram_matrix
    weighted_sum: Callable = weighted_sum
    adamw_update: Callable = adamw_update


PLAIN = Kernels()


def find_compiler() -> str | None:
    """The C++ compiler that `torch.compile` would take on the CPU, or None."""
    candidates = [os.environ.get("CXX", ""), "g++", "clang++"]
    return next(filter(None, map(shutil.which, filter(None, candidates))), None)


def pays_off(num_params: int, num_steps: int) -> bool:
    """Whether a run is long enough to win back what compiling takes."""
    return num_params * num_steps * SAVED_SECONDS > COMPILE_SECONDS


def compile_kernels() -> Kernels:
    """The kernels, each to be compiled at its first call with a large tensor."""
    return Kernels(
        CompiledKernel(fused_gram_matrix, gram_matrix),
        CompiledKernel(fused_weighted_sum, weighted_sum),
        CompiledKernel(fused_adamw_update, adamw_update),
    )


class CompiledKernel:
    """A compiled function, with a plain one for small tensors and for where compiling fails."""

    def __init__(self, function: Callable, plain: Callable):
        # The number of threads is compiled in; without this option, torch's cache would hand out code for
        # another.
        options = {"cpp.threads": torch.get_num_threads()}
        self.compiled = torch.compile(function, dynamic=False, options=options)
        self.plain = plain

    def __call__(self, tensor: torch.Tensor, *others):
        if self.compiled is None or tensor.numel() < MIN_SIZE:
            return self.plain(tensor, *others)
        try:
            return self.compiled(tensor, *others)
        except Exception as error:  # noqa: BLE001 (compilers fail in many ways, all before anything was written)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            print(f"warning: torch.compile failed, going on with plain operations ({reason})", flush=True)
            self.compiled = None
            return self.plain(tensor, *others)


# --- the functions to be compiled: written for one loop over the columns, not for speed as they stand -------


def fused_gram_matrix(task_grads: torch.Tensor) -> torch.Tensor:
    """(K, n) -> (K, K), as sums of products: a matrix product would not share a loop with the conversion."""
    rows = task_grads.float()
    num_tasks = len(rows)
    sums = {(i, j): (rows[i] * rows[j]).sum() for i in range(num_tasks) for j in range(i, num_tasks)}
    pairs = [sums[min(i, j), max(i, j)] for i in range(num_tasks) for j in range(num_tasks)]
    return torch.stack(pairs).view(num_tasks, num_tasks)


def fused_weighted_sum(task_grads: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> None:
    """Weights (K,) and (K, n) -> (n,)."""
    out.copy_(sum(row.float() * weight for row, weight in zip(task_grads, weights, strict=True)))


def fused_adamw_update(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    hyperparameters: torch.Tensor,
) -> None:
    """`optimizer.adamw_update`; the hyperparameters stay a tensor, whose values are not compiled in."""
    beta1, beta2, step_size, eps, early_decay, late_decay = hyperparameters.unbind()
    exp_avg.add_((grad - exp_avg) * (1 - beta1))
    exp_avg_sq.mul_(beta2).add_(grad * grad * (1 - beta2))
    step = step_size * (1 - early_decay) * exp_avg / (exp_avg_sq.sqrt() + eps)
    param.sub_(step + early_decay * param)
    param.sub_(late_decay * param)

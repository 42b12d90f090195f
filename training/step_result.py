"""What one training step did."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class StepResult:
    """What one update did, K tasks. Tasks without a batch have loss nan, and zeros in the other fields."""

    losses: Tensor  # (K,) mean over the task's examples, before task weights
    gram: Tensor  # (K, K) inner products of the task gradients, multiplied by task and loss weights
    group_grams: Tensor  # (layer groups, K, K) the same within each group of `memory.layout.layer_groups`
    weights: Tensor  # (K,) coefficient of each task's gradient in the combined one, before clipping; by
    # --surgery_scope layer the mean over layer groups
    head_squares: Tensor  # (K,) squared length of the gradient of each task's head
    cosine_ema: Tensor | None  # (K, K) running mean of the cosines between task gradients, this step included
    grad_norm: float  # of the combined gradient, encoder and heads, before clipping
    num_tokens: int  # real word pieces
    applied: bool  # False: something was not finite and nothing was updated
    overflow: bool = False  # not applied, and a smaller loss scale may mend it
    learned: Mapping[str, Tensor] = field(default_factory=dict)  # what the next step has to know, float64:
    # of the gradient method (1, K), or (layer groups, K); of the loss weighting (K,); of --gram (.., K)
    gains: Tensor | None = None  # (K,) inner product of each task's gradient with the combined one, before
    # clipping; None: follows from `gram` and `weights`
    loss_weights: Tensor | None = None  # (K,) factor of each task's loss; None for --loss_weighting fixed

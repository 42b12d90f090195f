"""What a run is told, as small frozen objects: each says who uses what, so that nobody below needs all flags.

`training.resolve` makes them of the command line; the names are those of the flags.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field

HEAD_DROPOUT_PROB = 0.3  # the course's default, which in its starter reaches the heads only


@dataclass(frozen=True)
class StepSettings:
    """How the losses of a step become one update; for the values see the flags of the same names."""

    seed: int
    grad_method: str = "pcgrad"  # a key of pcgrad.GRAD_METHODS
    grad_reduction: str = "sum"  # a key of pcgrad.GRAD_REDUCTIONS
    task_weights: Mapping[str, float] = field(default_factory=dict)  # task -> factor of its loss; 1 if absent
    clip_norm: float = 0.0  # longest gradient, encoder and heads together; 0 means no clipping
    surgery_tasks: tuple[str, ...] | None = None  # whose gradients the method may change; None means all
    autocast: Callable = nullcontext  # makes the context for mixed precision

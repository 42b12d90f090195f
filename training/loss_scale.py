"""The loss scale of training in float16 (Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740).

Float16 has no numbers below 6e-8, where many gradients are, and none above 65,504. The losses are therefore
multiplied by a power of two before the backward pass, and gradients divided by it where they are used. How
large it may be shows in training: it grows until a gradient overflows.
"""

from dataclasses import dataclass

FIRST_SCALE, MAX_SCALE = 2**16, 2**24
GROWTH_STEPS = 2000


@dataclass
class LossScale:
    """The scale, and what it depends on; a run that is resumed needs all of it."""

    scale: int = FIRST_SCALE  # a power of two from 1 to MAX_SCALE, by which nothing is rounded
    good_steps: int = 0  # in a row, since the scale last changed
    overflow_steps: int = 0  # in all: skipped, because the scale was too large

    def count(self, *, applied: bool, overflow: bool) -> None:
        """Note how a step ended: halve the scale after an overflow, double it after GROWTH_STEPS good steps.

        Args:
            applied: the step was made.
            overflow: it was not, for a gradient that a smaller scale might have fitted into float16.
        """
        self.good_steps = self.good_steps + 1 if applied else 0
        if overflow:
            self.overflow_steps += 1
            self.scale = max(1, self.scale // 2)
        elif self.good_steps == GROWTH_STEPS:
            self.good_steps = 0
            self.scale = min(MAX_SCALE, 2 * self.scale)

    def overflow_text(self, num_steps: int) -> str:
        """One line on the steps that were skipped, out of so many."""
        return (
            f"{self.overflow_steps} of {num_steps} steps were skipped because a float16 gradient overflowed;"
            f" the loss scale, which that halves, is {self.scale} now"
        )

    @classmethod
    def from_json(cls, values: dict | None) -> "LossScale | None":
        """Read what `dataclasses.asdict` made; None stays None.

        Raises:
            ValueError: if something is missing or of another kind.
        """
        if values is None:
            return None
        limits = {"scale": MAX_SCALE, "good_steps": GROWTH_STEPS - 1, "overflow_steps": 2**53}
        fits = isinstance(values, dict) and set(values) == set(limits)
        fits = fits and all(type(n) is int and 0 <= n <= limits[name] for name, n in values.items())
        if not fits or values["scale"].bit_count() != 1:
            raise ValueError("'loss_scale' is of another kind")
        return cls(**values)


def scale_of(loss_scale: LossScale | None) -> int:
    """What to multiply losses by; 1 in precisions that need no scale."""
    return 1 if loss_scale is None else loss_scale.scale

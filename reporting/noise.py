"""What the probes of a run, or of several, say of signal and noise in the gradients, with intervals.

A line of the log with `noise` holds what `training.metrics.noise_record` says: estimates from n batches, and
those without each of them. The interval is the jackknife's over the batches of all probes: 1.96 standard
errors either way, about 95 %; more where there is hardly any signal, whose error the jackknife overstates.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from reporting.significance import Interval


def probes_of(metrics: Sequence[dict]) -> list[dict]:
    """The lines of a log that hold a probe."""
    return [line for line in metrics if line.get("noise")]


def tasks_and_pairs(probes: Sequence[dict]) -> tuple[list[str], list[str]]:
    """The names in the probes: of tasks, and of pairs of them."""
    names = list(dict.fromkeys(name for line in probes for name in line["noise"]))
    return [name for name in names if "-" not in name], [name for name in names if "-" in name]


def estimate(probes: Sequence[dict], name: str, group: str | None = None) -> Interval | None:
    """A task's share of signal, or the cosine of a pair's expected gradients, over all probes.

    The cosine is mean product / sqrt(mean share * mean share): a ratio of means, which few batches bias less
    than a mean of ratios. Each probe counts the same.

    Args:
        group: of one layer group; None: of the whole encoder.

    Returns:
        None if it is not known: no probe, or a share that is not above 0 with and without each batch.
    """
    found = [
        line["noise"] if group is None else line.get("layer_noise", {}).get(group, {}) for line in probes
    ]
    names = [name, *name.split("-")] if "-" in name else [name]
    values = [np.array([each[key] for key in names]) for each in found if all(key in each for key in names)]
    if not values or min(each.shape[1] for each in values) < 3:
        return None
    return jackknife(values, cosine if "-" in name else lambda means: means[0])


def cosine(means: np.ndarray) -> float:
    """Of the means of a product and of two shares; nan if a share is not above 0."""
    return means[0] / math.sqrt(means[1] * means[2]) if min(means[1:]) > 0 else math.nan


def jackknife(probes: Sequence[np.ndarray], of_means: Callable[[np.ndarray], float]) -> Interval | None:
    """A function of the means over probes, each (numbers, 1 + n): with all n batches, and without each."""
    whole = np.mean([probe[:, 0] for probe in probes], axis=0)
    variance = 0.0
    for probe in probes:
        num_batches = probe.shape[1] - 1
        changes = (probe[:, 1:] - probe[:, :1]) / len(probes)
        left_out = np.array([of_means(whole + change) for change in changes.T])
        variance += (num_batches - 1) * left_out.var()
    middle = of_means(whole)
    if not (math.isfinite(middle) and math.isfinite(variance)):
        return None
    return Interval(middle, middle - 1.96 * math.sqrt(variance), middle + 1.96 * math.sqrt(variance))


def format_share(interval: Interval | None) -> str:
    """A share in percent."""
    if interval is None:
        return "-"
    return f"{100 * interval.estimate:.1f} % ({100 * interval.low:.1f} to {100 * interval.high:.1f})"


def format_cosine(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    return f"{interval.estimate:+.2f} ({interval.low:+.2f} to {interval.high:+.2f})"

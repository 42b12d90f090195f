"""Statistics of a results table: each row (a recipe) was trained with several seeds on the same examples.

The intervals are paired bootstraps on two levels. The examples are resampled, and one draw serves all rows
and seeds; the seeds are resampled, and one draw serves all rows and tasks. Every draw depends on the seed,
the task's name and the counts alone, never on predictions, so the resamples of two rows may be subtracted one
by one:

    to_interval(resampled_means(a, labels, tasks)["sts"] - resampled_means(b, labels, tasks)["sts"])

Bootstrap: Efron and Tibshirani 1993. Paired, for language tasks: Berg-Kirkpatrick et al. 2012,
https://aclanthology.org/D12-1091. Few seeds: Davison and Hinkley 1997. Two crossed levels: Owen 2007,
https://arxiv.org/abs/0712.1111.

Shapes: S seeds, N examples of a task, R resamples.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from config import TaskSpec
from evaluation import OVERALLS, TASK_KINDS
from support.seeds import seed_of

LEVEL = 0.95  # of the intervals
ROUNDING = 1e-12  # scores that are equal may differ by less
MAX_COUNTS = 2**21  # counts held at once (16 MiB): the resamples are drawn and scored in chunks


@dataclass(frozen=True)
class Interval:
    """A number with its interval; the bootstrap is not centred, so `estimate` may lie anywhere in it."""

    estimate: float
    low: float
    high: float


def mean_and_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (divisor S - 1); the latter is nan for a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def with_overalls(scores: dict, tasks: dict[str, TaskSpec]) -> dict:
    """Add the overalls to the main scores of several tasks: numbers, or arrays of resamples."""
    if len(scores) < 2:
        return scores
    pairs = {task: (tasks[task].kind, score) for task, score in scores.items()}
    return scores | {name: overall.score(pairs) for name, overall in OVERALLS.items()}


# --- scores of resamples: (predictions (S, N), labels (N,), weights (R, N)) -> (S, R) ---------------------
# Weighted sums over the examples, as one matrix product, in float64: its rounding shows in no result.


def resampled_accuracy(predictions: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return (predictions == labels).astype(np.float64) @ weights.T / weights.sum(1)


def resampled_pearson(predictions: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Pearson's r; 0 when either side of a resample is constant, as in `evaluation.pearson`."""
    x, y = predictions.astype(np.float64), labels.astype(np.float64)
    x, y = x - x.mean(1, keepdims=True), y - y.mean()  # so that the differences below do not lose digits
    terms = np.concatenate([x, x * x, x * y, y[None], (y * y)[None]])  # (3S + 2, N)
    means = terms @ weights.T / weights.sum(1)  # (3S + 2, R)
    mean_x, mean_xx, mean_xy = means[:-2].reshape(3, *x.shape[:1], -1)  # (S, R) each
    mean_y, mean_yy = means[-2:]  # (R,) each
    var_x, var_y = mean_xx - mean_x**2, mean_yy - mean_y**2
    # The variance of a constant is not 0 but some rounding error.
    varies = (var_x > 1e-12 * mean_xx) & (var_y > 1e-12 * mean_yy)
    r = (mean_xy - mean_x * mean_y) / np.sqrt(np.where(varies, var_x * var_y, 1.0))
    return np.where(varies, r, 0.0).clip(-1, 1)


# `TaskKind.main_score` -> its function.
RESAMPLED_SCORES: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "accuracy": resampled_accuracy,
    "pearson": resampled_pearson,
}


def resampled_scores(
    kind: str, predictions: np.ndarray, labels: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """The main score of each seed on each resample.

    Args:
        kind: a row of `evaluation.TASK_KINDS`.
        predictions: (S, N), on the scale of the labels.
        labels: (N,)
        weights: (R, N), how often each resample holds each example.

    Returns:
        (S, R)
    """
    score = RESAMPLED_SCORES[TASK_KINDS[kind].main_score]
    return score(np.asarray(predictions), np.asarray(labels), weights)


# --- resamples --------------------------------------------------------------------------------------------


def resample_weights(rng: np.random.Generator, num_examples: int, num_resamples: int) -> np.ndarray:
    """How often N draws with replacement give each example, (R, N) float64; each row adds up to N."""
    drawn = rng.integers(num_examples, size=(num_resamples, num_examples))
    drawn += num_examples * np.arange(num_resamples)[:, None]  # every resample has its own bins
    counts = np.bincount(drawn.ravel(), minlength=drawn.size)  # many times faster than rng.multinomial
    return counts.reshape(drawn.shape).astype(np.float64)


def make_rng(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng([seed, seed_of(name)])


def resampled_means(
    predictions: dict[str, np.ndarray],
    labels: dict[str, np.ndarray],
    tasks: dict[str, TaskSpec],
    num_resamples: int = 2000,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """The mean over seeds of a row's main scores: the actual value, then its resamples.

    A resample is the seeds' mean score on resampled examples, plus the mean deviation of resampled seeds from
    all. S resampled seeds vary less than S new ones would, by (S - 1) / S in the variance, so the deviations
    are widened by sqrt(S / (S - 1)) (Davison and Hinkley 1997). The deviations are those on the actual
    examples: on the resampled ones, as in Owen 2007, they would contain the chance of the examples a second
    time, and the intervals of similar rows would be too wide.

    With one seed only examples are resampled, and the interval says nothing about other seeds. With three or
    so it is still too narrow where seeds matter more than examples: unlike Student's t, percentiles do not
    allow for few values.

    Args:
        predictions: task -> (S, N), the same seeds in the same order for every task.
        labels: task -> (N,)
        tasks: task -> its row; may hold more tasks.
        seed: of the draws; rows to be compared need the same, and the same `num_resamples`.

    Returns:
        task -> (1 + R,), and the same for each overall if there are several tasks.

    Raises:
        ValueError: naming the task or tasks, if the numbers of seeds or examples do not match.
    """
    shapes = {task: np.shape(rows) for task, rows in predictions.items()}
    for task, shape in shapes.items():
        if shape[1:] != np.shape(labels[task]) or 0 in shape:
            raise ValueError(
                f"{task}: predictions are {shape}, labels {np.shape(labels[task])};"
                " expected (seeds, examples) and (examples,)"
            )
    num_seeds = {task: shape[0] for task, shape in shapes.items()}
    if len(set(num_seeds.values())) > 1:
        raise ValueError(f"numbers of seeds are {num_seeds}; expected the same for every task")
    means = {}
    for task, rows in predictions.items():
        kind, (num_rows, num_examples) = tasks[task].kind, shapes[task]
        rng, chunk = make_rng(seed, task), max(1, MAX_COUNTS // num_examples)
        actual = resampled_scores(kind, rows, labels[task], np.ones((1, num_examples)))  # (S, 1)
        scores = [actual]
        for start in range(0, num_resamples, chunk):
            weights = resample_weights(rng, num_examples, min(chunk, num_resamples - start))
            scores.append(resampled_scores(kind, rows, labels[task], weights))
        means[task] = np.concatenate(scores, axis=1).mean(0)  # (1 + R,)
        if num_rows > 1:
            drawn = resample_weights(make_rng(seed, "seeds"), num_rows, num_resamples)  # (R, S)
            deviations = (actual - actual.mean())[:, 0] * math.sqrt(num_rows / (num_rows - 1))
            means[task][1:] += drawn @ deviations / num_rows
    return with_overalls(means, tasks)


def to_interval(resamples: np.ndarray) -> Interval:
    """The actual value and the 95 % percentile interval of an array of `resampled_means`, or of a sum."""
    low, high = np.quantile(resamples[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(resamples[0]), float(low), float(high))


def verdict(interval: Interval, direction: int, margin: float = 0.0) -> str:
    """Whether a claim about a difference holds.

    Args:
        direction: 1 claims a difference above `margin`, -1 one below it.

    Returns:
        "confirmed" if the whole interval is on the claimed side, "refuted" if it is on the other, else
        "undecided"; an interval that touches the margin is on neither side.
    """
    if direction not in (1, -1):
        raise ValueError(f"direction is {direction!r}; expected 1 or -1")
    above, below = interval.low > margin + ROUNDING, interval.high < margin - ROUNDING
    if direction < 0:
        above, below = below, above
    return "confirmed" if above else "refuted" if below else "undecided"

"""Resamples and intervals against scipy, scikit-learn and numbers worked by hand."""

import math
import warnings

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import accuracy_score

from config import TASKS
from evaluation import OVERALLS, TASK_KINDS, summarise
from reporting import significance
from reporting.significance import (
    RESAMPLED_SCORES,
    Interval,
    mean_and_sd,
    resample_weights,
    resampled_means,
    resampled_scores,
    to_interval,
    verdict,
)

SIZES = {"sst": 31, "para": 57, "sts": 23}  # odd and different, so that swapped axes are caught


def make_labels() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    labels = {task: rng.integers(5 if task == "sst" else 2, size=size) for task, size in SIZES.items()}
    labels["sts"] = rng.uniform(0, 5, size=SIZES["sts"])
    return {task: values.astype(np.float32) for task, values in labels.items()}  # as `datasets.Rows` has them


def make_row(seed: int, num_seeds: int = 3) -> dict[str, np.ndarray]:
    """Predictions that are right more often than not."""
    rng, row = np.random.default_rng(seed), {}
    for task, labels in make_labels().items():
        noise = rng.normal(size=(num_seeds, len(labels)))
        row[task] = labels + noise if task == "sts" else np.where(noise < 0.4, labels, 1).astype(int)
    return row


def intervals(means):
    return {name: to_interval(values) for name, values in means.items()}


def compare(a, b, labels, num_resamples=50):
    """The differences a - b of two rows with the same tasks, paired in examples and seeds, with intervals."""
    means_a, means_b = (resampled_means(row, labels, TASKS, num_resamples) for row in (a, b))
    return intervals({name: means_a[name] - means_b[name] for name in means_a})


def same(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def check_interval(found: Interval, estimate: float, low: float, high: float, tolerance: float) -> None:
    assert found.estimate == pytest.approx(estimate, abs=1e-12)
    assert found.low == pytest.approx(low, abs=tolerance) and found.high == pytest.approx(high, abs=tolerance)


def test_mean_and_sd():
    """Of 1, 2, 4: deviations -4/3, -1/3, 5/3, their squares add up to 42/9, half of that is 7/3."""
    assert mean_and_sd([1, 2, 4]) == pytest.approx((7 / 3, math.sqrt(7 / 3)), abs=1e-12)
    with warnings.catch_warnings(action="error"):
        mean, sd = mean_and_sd([0.5])
    assert mean == 0.5 and math.isnan(sd)


# --- scores of resamples ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TASK_KINDS)
def test_resampled_scores_equal_those_of_repeated_examples(kind):
    """To 1e-12: float64 on both sides, summed in another order."""
    assert TASK_KINDS[kind].main_score in RESAMPLED_SCORES
    rng = np.random.default_rng(0)
    labels = rng.uniform(0, 5, size=41) if kind == "regression" else rng.integers(2, size=41)
    predictions = rng.normal(labels, 0.8, size=(3, 41))
    predictions = 1e3 + predictions if kind == "regression" else (predictions > 0.5).astype(int)
    weights = resample_weights(rng, 41, 7)
    scores = resampled_scores(kind, predictions, labels, weights)
    assert scores.shape == (3, 7)
    for s, r in np.ndindex(3, 7):
        index = np.repeat(np.arange(41), weights[r].astype(int))
        x, y = predictions[s, index], labels[index]
        if TASK_KINDS[kind].main_score == "accuracy":
            expected = accuracy_score(y, x)
        else:
            expected = scipy.stats.pearsonr(x, y).statistic
        assert scores[s, r] == pytest.approx(expected, abs=1e-12)


def test_resampled_scores_by_hand():
    """The first seed is right in the first two examples, the second in the first.

    Points (1, 1), (2, 3), (3, 2): r is 1/2; of the first and third 1, of the other two -1, of one point 0.
    """
    predictions, labels = np.array([[0, 1, 0], [0, 0, 0]]), np.array([0, 1, 2])
    weights = np.array([[3, 0, 0], [1, 1, 1], [0, 1, 2]])
    scores = resampled_scores("classification", predictions, labels, weights)
    same(scores, [[1, 2 / 3, 1 / 3], [1, 1 / 3, 0]])
    predictions, labels = np.array([[1, 2, 3], [-10, -20, -30]]), np.array([1, 3, 2])
    weights = np.array([[1, 1, 1], [2, 0, 1], [0, 1, 2], [0, 3, 0]])
    scores = resampled_scores("regression", predictions, labels, weights)
    same(scores, [[0.5, 1, -1, 0], [-0.5, -1, 1, 0]])


def test_pearson_at_its_limits():
    """Constants, also where the mean of equal numbers rounds or a resample is constant; r = 1 and -1."""
    rng = np.random.default_rng(1)
    x, weights = rng.normal(size=13), resample_weights(rng, 13, 50)
    for constant in (0.0, 0.1, 1e6 / 3):
        assert not resampled_scores("regression", np.full((2, 13), constant), x, weights).any()
        assert not resampled_scores("regression", x[None], np.full(13, constant), weights).any()
    weights[:, 12] = 0  # the example that differs from the other twelve
    for value in rng.normal(size=50):
        twelve = np.append(np.full(12, value), 1.0)
        assert not resampled_scores("regression", twelve[None], x, weights).any()
        assert not resampled_scores("regression", x[None], twelve, weights).any()
    scores = resampled_scores("regression", np.stack([3 * x, -3 * x]), x, resample_weights(rng, 13, 300))
    assert scores.max() <= 1 and scores.min() >= -1


def test_resample_weights_are_multinomial():
    """Counts of an example: mean 1, variance 1 - 1/N; of two: covariance -1/N. 30,000 resamples."""
    weights = resample_weights(np.random.default_rng(0), 5, 30_000)
    assert weights.shape == (30_000, 5) and (weights.sum(1) == 5).all() and (weights >= 0).all()
    # Four standard errors of a mean, sqrt(0.8 / 30,000) = 0.005, and about twice that for squares.
    np.testing.assert_allclose(weights.mean(0), 1, rtol=0, atol=0.02)
    np.testing.assert_allclose(np.cov(weights.T), np.eye(5) - 1 / 5, rtol=0, atol=0.04)


# --- resamples of rows ------------------------------------------------------------------------------------


def test_resampled_means_by_hand(monkeypatch):
    """Two seeds that score 2/3 and 1/3, so they deviate by +-1/6, which widens by sqrt(2).

    First resample: the first example thrice (both seeds right) and the first seed twice; second: one of the
        second example, two of the third (1/3 and 0), and each seed once.
    """
    counts = {3: np.array([[3.0, 0, 0], [0, 1, 2]]), 2: np.array([[2.0, 0], [1, 1]])}
    monkeypatch.setattr(significance, "resample_weights", lambda rng, n, r: counts[n])
    predictions, labels = np.array([[0, 1, 0], [0, 0, 0]]), np.array([0, 1, 2])
    means = resampled_means({"sst": predictions}, {"sst": labels}, TASKS, num_resamples=2)
    assert set(means) == {"sst"}  # one task: no overall
    same(means["sst"], [1 / 2, 1 + math.sqrt(2) / 6, 1 / 6])


def test_actual_values_are_those_of_evaluation():
    row, labels = make_row(0), make_labels()
    kinds = {task: TASK_KINDS[TASKS[task].kind] for task in row}
    summaries = []
    for s in range(3):
        scores = {task: kinds[task].scores(rows[s], labels[task]) for task, rows in row.items()}
        mains = {task: scores[task][kinds[task].main_score] for task in scores}
        summary = summarise(scores, TASKS)
        summaries.append(mains | {name: summary[name] for name in OVERALLS})
    means = resampled_means(row, labels, TASKS, num_resamples=50)
    found = intervals(means)
    assert set(found) == set(summaries[0])
    for name, value in found.items():
        assert value.estimate == pytest.approx(np.mean([summary[name] for summary in summaries]), abs=1e-12)
        assert value.low < value.estimate < value.high
    # And so for each resample.
    same(means["mean"], (means["sst"] + means["para"] + means["sts"]) / 3)
    same(means["mean_2024"], (means["sst"] + means["para"] + (means["sts"] + 1) / 2) / 3)


def test_draws_depend_on_seed_task_and_counts_only(monkeypatch):
    """A task's resamples are the same alone, in another order, beside another row, and in chunks.

    Nothing is drawn from, or written to, what other code uses.
    """
    row, labels = make_row(0), make_labels()
    for array in (*row.values(), *labels.values()):
        array.setflags(write=False)  # an edit in place would raise
    before = np.random.get_state()[1].copy()
    means = resampled_means(row, labels, TASKS, num_resamples=50)
    for other in (row, dict(reversed(row.items())), {"para": row["para"]}):
        for task, values in resampled_means(other, labels, TASKS, num_resamples=50).items():
            assert task not in row or np.array_equal(values, means[task])
    other = resampled_means(row, labels, TASKS, num_resamples=50, seed=1)
    assert not np.array_equal(other["sst"], means["sst"]) and other["sst"][0] == means["sst"][0]
    twice = (dict.fromkeys(("para", "cfimdb"), values["para"]) for values in (row, labels))
    twice = resampled_means(*twice, TASKS, num_resamples=50)
    assert not np.array_equal(twice["para"], twice["cfimdb"])
    monkeypatch.setattr(significance, "MAX_COUNTS", 50)  # chunks of 1 and 2
    chunks = resampled_means(row, labels, TASKS, num_resamples=50)
    for task in row:
        same(chunks[task], means[task])
    assert np.array_equal(np.random.get_state()[1], before)


def test_seeds_are_drawn_together_for_all_tasks():
    """Tasks whose seeds deviate alike vary in the same direction, although their examples are drawn apart."""
    labels = {task: np.zeros(5) for task in ("sst", "para")}
    predictions = np.repeat([[0], [1], [0], [1]], 5, axis=1)  # all right or all wrong: examples do not matter
    means = resampled_means(dict.fromkeys(labels, predictions), labels, TASKS, num_resamples=50)
    assert means["sst"].std() > 0.1 and np.array_equal(means["sst"], means["para"])


def test_variance_over_seeds_is_that_of_their_mean():
    """Where examples are all alike, the resamples' variance is s^2 / S, as for a plain standard error."""
    for num_seeds in (2, 3, 5):
        predictions = np.ones((num_seeds, 4))
        predictions[0] = 0
        means = resampled_means({"sst": predictions}, {"sst": np.ones(4)}, TASKS, num_resamples=20_000)
        _, sd = mean_and_sd(predictions[:, 0])
        # A variance of 20,000 numbers has a relative error of about 1 %.
        assert means["sst"][1:].var() == pytest.approx(sd**2 / num_seeds, rel=0.05)


def test_one_seed_resamples_examples_only():
    """And is the same as three seeds that predict the same."""
    row, labels = make_row(0, num_seeds=1), make_labels()
    thrice = {task: np.repeat(rows, 3, axis=0) for task, rows in row.items()}
    one, three = (resampled_means(r, labels, TASKS, num_resamples=50) for r in (row, thrice))
    for name in one:
        assert one[name].std() > 0
        same(one[name], three[name])


# --- intervals against scipy ------------------------------------------------------------------------------
# A 2.5 % quantile of R resamples has a standard error of sqrt(0.025 * 0.975 / R) / density, which is 2.7 /
# sqrt(R) standard deviations of a normal: 0.03 for the difference of two such with R = 20,000. Four of them
# are allowed.

MANY = 20_000
QUANTILE_ERROR = 4 * math.sqrt(2) * 2.7 / math.sqrt(MANY)


def check_against_scipy(found, columns, statistic):
    """Percentile intervals with paired resamples."""
    options = {"paired": len(columns) > 1, "n_resamples": MANY, "batch": 1000, "method": "percentile"}
    theirs = scipy.stats.bootstrap(columns, statistic, rng=np.random.default_rng(5), **options)
    estimate, tolerance = statistic(*columns, axis=0), QUANTILE_ERROR * theirs.standard_error
    check_interval(found, estimate, *theirs.confidence_interval, tolerance)


def make_equal_seeds(seed: int, num_right: int) -> tuple[dict, np.ndarray]:
    """Three seeds with equally many right answers, though others: their scores are equal, examples matter."""
    rng = np.random.default_rng(seed)
    wrong = np.stack([rng.permutation(np.arange(300) >= num_right) for _ in range(3)]).astype(int)
    return {"para": wrong}, (wrong == 0).mean(0)  # labels are all 0


def test_intervals_of_accuracies_equal_scipy():
    (a, correct_a), (b, correct_b) = make_equal_seeds(0, 210), make_equal_seeds(1, 195)
    labels = {"para": np.zeros(300)}
    found = to_interval(resampled_means(a, labels, TASKS, MANY)["para"])
    check_against_scipy(found, (correct_a,), np.mean)
    found = compare(a, b, labels, MANY)["para"]
    check_against_scipy(found, (correct_a, correct_b), lambda x, y, axis: (x - y).mean(axis))


def test_interval_of_a_difference_of_correlations_equals_scipy():
    rng = np.random.default_rng(0)
    y = rng.normal(size=200)
    a, b = y + rng.normal(size=200), y + 1.5 * rng.normal(size=200)

    def statistic(a, b, y, axis):
        r = scipy.stats.pearsonr
        return r(a, y, axis=axis).statistic - r(b, y, axis=axis).statistic

    found = compare({"sts": a[None]}, {"sts": b[None]}, {"sts": y}, MANY)["sts"]
    check_against_scipy(found, (a, b, y), statistic)


# --- comparisons ------------------------------------------------------------------------------------------


def test_constant_differences():
    """The same row; one that is always right, the other never; correlations, which do not see a shift."""
    labels = make_labels()
    found = compare(make_row(0), make_row(0), labels)
    assert set(found) == {*SIZES, *OVERALLS} and set(found.values()) == {Interval(0.0, 0.0, 0.0)}
    right = {"para": np.stack([labels["para"]] * 3)}
    assert compare(right, {"para": 1 - right["para"]}, labels) == {"para": Interval(1.0, 1.0, 1.0)}
    row = {"sts": make_row(0)["sts"]}
    check_interval(compare(row, {"sts": row["sts"] + 100}, labels)["sts"], 0, 0, 0, 1e-12)


def test_seeds_or_examples_that_do_not_fit():
    for shape, message in {
        (3, 30): r"sst: predictions are \(3, 30\), labels \(31,\); expected \(seeds, examples\)",
        (31,): r"sst: predictions are \(31,\), labels \(31,\)",
        (0, 31): r"sst: predictions are \(0, 31\)",
        (2, 31): r"numbers of seeds are {'sst': 2, 'para': 3}; expected the same for every task",
    }.items():
        row = {"sst": np.zeros(shape), "para": np.zeros((3, 57))}
        with pytest.raises(ValueError, match=message):
            resampled_means(row, make_labels(), TASKS, num_resamples=5)


def test_verdict():
    """Low, high and margin; of the other direction the opposite is true. Rounding may not decide."""
    opposite = {"confirmed": "refuted", "refuted": "confirmed", "undecided": "undecided"}
    touching = [(0.0, 0.03, 0), (2e-16, 0.03, 0), (-0.03, -2e-16, 0), (0.0, 0.0, 0)]
    for word, cases in {
        "confirmed": [(0.01, 0.03, 0), (0.03, 0.05, 0.02), (-0.01, 0.01, -0.02)],
        "refuted": [(-0.03, -0.01, 0), (-0.01, 0.01, 0.02)],
        "undecided": [(-0.01, 0.03, 0), (0.01, 0.03, 0.02), (math.nan, math.nan, 0), *touching],
    }.items():
        for low, high, margin in cases:
            found = Interval((low + high) / 2, low, high)
            assert verdict(found, 1, margin) == word and verdict(found, -1, margin) == opposite[word]
    with pytest.raises(ValueError, match="direction is 0; expected 1 or -1"):
        verdict(Interval(0.0, 0.0, 0.0), 0)

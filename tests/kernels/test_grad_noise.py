"""kernels/grad_noise.py: the estimate by hand and where the truth is known; grams freed of noise."""

import pytest
import torch

from kernels import grad_noise
from kernels.grad_noise import (
    GRAMS,
    add_parts,
    grams_to_act_on,
    jackknife_error,
    known_share,
    moments_of,
    reduce_squares,
    sketch_grads,
)
from pcgrad import TaskFacts, cosine_matrix, pcgrad
from tests.test_pcgrad import seeded
from tests.tiny import make_model, make_task_batches, make_training, take_step

TRUTH = torch.tensor([[3.0, 0.0, 0.0], [-1.0, 1.7320508, 0.0], [0.0, 0.0, 2.0]]).double()  # cosine -1/2, 0, 0


def noisy(num_batches: int, seed: int) -> torch.Tensor:
    """Gradients (n, 3, 200) with the expectations TRUTH and noise of 1 a column: 1 to 4 % of signal."""
    grads = torch.randn(num_batches, 3, 200, generator=seeded(seed), dtype=torch.float64)
    grads[:, :, :3] += TRUTH
    return grads


def test_moments_by_hand():
    """Task a: 1, 3, 2, with sum 6 and squares 14. Task b: (1, 1), (1, -1), (1, 0), with sum (3, 0) and 5."""
    batches = torch.tensor([[[1.0, 0], [1, 1]], [[3, 0], [1, -1]], [[2, 0], [1, 0]]])
    found = moments_of(batches)
    squares = [[14 / 3, 5 / 3], [13 / 2, 3 / 2], [5 / 2, 3 / 2], [5, 2]]
    # (36 - 14) / 6, (9 - 5) / 6, 18 / 9; without the first (25 - 13) / 2, (5 - 3) / 2, 10 / 4 = S_a . S_b / 4
    expected = [(22 / 6, 4 / 6, 2), (6, 1, 2.5), (2, 1, 1.5), (3, 0, 2)]
    torch.testing.assert_close(found.squares, torch.tensor(squares).double())
    for matrix, (a, b, both) in zip(found.expected.tolist(), expected, strict=True):
        assert matrix == [pytest.approx([a, both]), pytest.approx([both, b])]
    assert float(found.shares[0, 0, 0]) == pytest.approx(22 / 28)
    # Deviations of the three from their mean 11/3: 7/3, -5/3, -2/3; (n - 1) / n of the sum of their squares.
    assert float(jackknife_error(found.expected)[0, 0]) == pytest.approx((2 / 3 * 78 / 9) ** 0.5)
    halves = moments_of(batches[:, :, :1]) + moments_of(batches[:, :, 1:])
    torch.testing.assert_close(halves.expected, found.expected)


def test_estimates_find_the_truth_where_cosines_of_batches_shrink_to_0():
    found = [moments_of(noisy(40, seed)) for seed in range(100)]
    expected = torch.stack([each.expected[0] for each in found])
    spread = expected.std(0)
    assert ((expected.mean(0) - TRUTH @ TRUTH.T).abs() < 4 * spread / 10).all()  # unbiased
    errors = torch.stack([jackknife_error(each.expected) for each in found]).mean(0)
    assert ((errors / spread - 1).abs() < 0.3).all()  # the spread itself is known to 7 %
    long = noisy(2000, 0)
    of_batches = cosine_matrix(long @ long.transpose(1, 2)).mean(0)[0, 1]
    assert abs(of_batches) < 0.02 and moments_of(long).expected[0] == pytest.approx(TRUTH @ TRUTH.T, abs=0.6)
    assert float(cosine_matrix(moments_of(long).expected[0])[0, 1]) == pytest.approx(-0.5, abs=0.1)


def test_a_share_is_at_least_its_error_and_larger_in_a_mean_of_batches():
    found = moments_of(noisy(2000, 1))
    torch.testing.assert_close(
        known_share(found, 1), torch.tensor([9 / 209, 4 / 204, 4 / 204]).double(), rtol=0.1, atol=0
    )
    torch.testing.assert_close(known_share(found, 4)[0], torch.tensor(9 / 59).double(), rtol=0.1, atol=0)
    nothing = moments_of(torch.randn(8, 1, 50, generator=seeded(2)))
    error = jackknife_error(nothing.shares[:, 0, 0])
    assert float(nothing.shares[0, 0, 0]) < error and known_share(nothing, 1).tolist() == [
        pytest.approx(float(error))
    ]


def test_pcgrad_on_running_means_does_what_it_would_do_without_noise():
    """Of 3000 steps, with the shares of signal known; on a step's own products its weights are near 1."""
    orders = torch.tensor([[0, 1, 2], [0, 1, 2], [0, 1, 2]])
    without_noise = pcgrad(TaskFacts(TRUTH @ TRUTH.T, orders))  # 1 + 3/4 and 1 + 1/3, 1
    signal = torch.tensor([[9 / 209, 4 / 204, 4 / 204]]).double()
    state, grads = {"signal": signal}, noisy(3000, 3)
    for gram in grads @ grads.transpose(1, 2):
        acted_on, state = grams_to_act_on(gram[None], [0, 1, 2], state, "ema:b=0.999")
    found, of_step = (pcgrad(TaskFacts(each, orders)) for each in (acted_on[0], gram))
    torch.testing.assert_close(found, without_noise, rtol=0, atol=0.15)
    assert float((of_step - 1).abs().max()) < 0.15 < float((without_noise - 1).abs().max())


def test_running_means_are_over_the_steps_that_have_both_tasks():
    grams = [torch.tensor([[4.0, 1.0], [1.0, 9.0]]), torch.tensor([[8.0, 0.0], [0.0, 0.0]])]
    state = {}
    for gram, present in zip(grams, ([0, 1], [0]), strict=True):
        acted_on, state = grams_to_act_on(gram[None], present, state, "ema:b=0.5")
    # (4 / 4 + 8 / 2) / (3 / 4), and the rest as it was
    torch.testing.assert_close(acted_on[0], torch.tensor([[20 / 3, 1.0], [1.0, 9.0]]))
    assert grams_to_act_on(gram, [0], {}, "step") == (gram, {}) and list(GRAMS) == ["step", "ema"]


def test_reduced_squares_stay_those_of_vectors():
    gram = torch.tensor([[4.0, -1.0, 0.0], [-1.0, 16.0, 0.0], [0.0, 0.0, 1.0]]).double()
    found = reduce_squares(gram, torch.tensor([0.25, 0.25, 0.0]).double())
    assert found.tolist() == [[1, -1, 0], [-1, 4, 0], [0, 0, 0]]  # cosine -1/2
    impossible = 1.5 * torch.eye(3).double() - 0.5  # three at 120 degrees, then shorter: cosines of -1
    found = reduce_squares(impossible, torch.tensor([0.5, 0.5, 0.5]).double())
    assert float(torch.linalg.eigvalsh(found)[0]) > -1e-12
    torch.testing.assert_close(found.diagonal(), torch.full((3,), 0.5).double())
    assert (found[0, 1:] < 0).all()


def test_sums_of_columns_are_kept_by_layer_group(monkeypatch):
    model = make_model().train()
    training = (model, *make_training(model))
    memory = training[1]
    result = take_step(training, make_task_batches(), grad_method="sum")
    sizes = [sum(each.stop - each.start for each in where) for where in memory.layout.layer_groups.values()]
    sketch = sketch_grads(memory)
    assert all(map(torch.equal, sketch, sketch_grads(memory)))  # the same signs for all batches
    assert all(each.shape[1] < size / 61 + 3 for each, size in zip(sketch, sizes, strict=True))
    monkeypatch.setattr(grad_noise, "NUM_PARTS", 1)
    grams = torch.stack([each @ each.T for each in sketch_grads(memory)])
    torch.testing.assert_close(grams, result.group_grams, rtol=1e-4, atol=1e-5 * float(result.gram.max()))


def test_intervals_hold_the_error_of_the_sums(monkeypatch):
    """Of 100 probes 95 are expected to, and 86 with a chance of 1 in 5,000. Signal is in all columns, and
    in few; noise, as that of real gradients, in far fewer directions than there are columns."""
    monkeypatch.setattr(grad_noise, "NUM_PARTS", 7)
    size, num_batches, num_directions = 7000, 8, 50
    truth = torch.tensor([[0.3], [-0.2], [0.1]]).repeat(1, size)
    truth[:, ::700] += torch.tensor([[9.0], [9.0], [0.0]])
    directions = 0.15 * torch.randn(num_directions, size, generator=seeded(0))
    inner = truth @ truth.T
    roots = (inner.diagonal() + directions.square().sum()).sqrt()
    held = torch.zeros(3, 3)
    for seed in range(100):
        noise = torch.randn(num_batches, 3, num_directions, generator=seeded(seed)) @ directions
        sums = torch.stack([add_parts(truth + each, seeded(1000 + seed)) for each in noise])
        shares = moments_of(sums).shares
        held += (shares[0] - inner / (roots[:, None] * roots)).abs() < 1.96 * jackknife_error(shares)
    assert (held > 86).all(), held

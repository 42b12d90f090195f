"""kernels/loss_weightings.py: every row by hand, what all of them promise, and a step with factors."""

import math

import pytest
import torch

from kernels.loss_weightings import LOSS_WEIGHTINGS, loss_factors
from pcgrad import TaskFacts
from support.specs import find_row
from tests.test_pcgrad import seeded
from tests.tiny import make_model, make_task_batches, make_training, take_step


def follow(spec: str, losses: list[list[float]], lengths: list[float] | None = None) -> torch.Tensor:
    """The factors of each step of a run with these losses, (steps, K), and the last state."""
    state, found = {}, []
    lengths = torch.tensor(lengths or [1.0] * len(losses[0]))
    for step, each in enumerate(losses):
        facts = TaskFacts(
            lengths.square().diag(), losses=torch.tensor(each), state=state, generator=seeded(step)
        )
        factors, state = loss_factors(facts, list(range(len(each))), spec)
        found.append(factors)
    return torch.stack(found)


# Two tasks with losses 1 and 4 -> the factors of the first step and, after the same losses, of the second.
HAND_FACTORS = {
    "fixed": ([1, 1], [1, 1]),
    # log s^2 from 0 by -0.1 (1/2 - L / 2): 0 and 0.15
    "uw:lr=0.1": ([0.5, 0.5], [0.5, 0.5 * math.exp(-0.15)]),
    # s from 0 by -0.1 (L - 1): 0 and -0.3
    "imtl_l:lr=0.1": ([1, 1], [1, math.exp(-0.3)]),
    "dwa": ([1, 1], [1, 1]),  # see below
    "famo": ([0.8, 0.2], [0.8, 0.2]),  # 1/2 : 1/8, and no loss has fallen
    "gls": ([1, 0.25], [1, 0.25]),  # 2 / (2 L)
    "stch:mu=3": ([1 / (1 + math.e), math.e / (1 + math.e)],) * 2,
    # Lengths 1 and 3 with mean 2: the first is below its target, the second above; the mean length is 2.
    "gradnorm:lr=0.1": ([1, 1], [2 * 1.05 / 1.9, 2 * 0.85 / 1.9]),
    "rlw": None,
}


def test_every_weighting_by_hand():
    assert {spec.partition(":")[0] for spec in HAND_FACTORS} == set(LOSS_WEIGHTINGS)
    for spec, expected in HAND_FACTORS.items():
        if expected:
            found = follow(spec, [[1.0, 4.0]] * 2, lengths=[1.0, 3.0])
            torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=1e-6, atol=0, msg=spec)


def test_dwa_goes_by_the_means_of_two_windows():
    """Means 2 and 3, then 1 and 3: ratios 1/2 and 1, over 2."""
    losses = [[1.0, 2.0], [3.0, 4.0], [1.0, 3.0], [1.0, 3.0], [9.0, 9.0]]
    found = follow("dwa:t=2,every=2", losses)
    share = 1 / (1 + math.exp(1 / 2 - 1 / 4))
    assert torch.equal(found[:4], torch.ones(4, 2).double())
    torch.testing.assert_close(found[4], torch.tensor([2 * share, 2 - 2 * share]).double())


def test_famo_favours_the_task_whose_loss_falls_less():
    """Log-losses fall by log 2 and 0: logits from 0 by -lr z_i (fall_i - mean), z 1/2 each."""
    found = follow("famo:lr=1,decay=0", [[2.0, 1.0], [1.0, 1.0]])
    move = math.log(2) / 4
    share = 1 / (1 + math.exp(2 * move))
    torch.testing.assert_close(found[1], torch.tensor([share, 1 - share]).double())


@pytest.mark.parametrize("spec", ["uw:lr=0.5", "imtl_l:lr=0.05"])
def test_learned_factors_tend_to_one_over_the_loss(spec):
    found = follow(spec, [[0.5, 2.0, 8.0]] * 2000)[-1] * torch.tensor([0.5, 2.0, 8.0])
    limit = 0.5 if "uw" in spec else 1.0
    torch.testing.assert_close(found, torch.full_like(found, limit), rtol=1e-3, atol=0)


def test_gradnorm_brings_weighted_gradients_to_one_length():
    lengths = torch.tensor([1.0, 2.0, 4.0])
    weighted = follow("gradnorm:lr=0.01", [[1.0, 1.0, 1.0]] * 500, lengths.tolist())[-1] * lengths
    assert float(weighted.max() / weighted.min()) < 1.1  # a step moves by one hundredth


LOSSES = {
    "usual": [[1.6, 0.7, 2.0], [1.5, 0.6, 1.0], [1.4, 0.5, 0.5]],
    "zero": [[0.0, 0.7, 2.0], [0.0, 0.0, 0.0], [1.0, 0.0, 1.0]],
    "huge": [[1e30, 1.0, 1e-30], [1.0, 1e30, 1.0], [1.0, 1.0, 1.0]],
    "one task": [[1.5], [1.4], [1.3]],
}


@pytest.mark.parametrize("case", LOSSES)
@pytest.mark.parametrize("name", LOSS_WEIGHTINGS)
def test_factors_are_finite_and_not_negative(name, case):
    for lengths in ([1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [0.0, 1e15, 1e-15]):
        found = follow(name, LOSSES[case], lengths[: len(LOSSES[case][0])])
        assert found.isfinite().all() and (found >= 0).all() and found.dtype == torch.float64
        if case == "one task" and name not in ("uw", "imtl_l"):
            torch.testing.assert_close(found, torch.ones_like(found))


@pytest.mark.parametrize("name", [name for name in LOSS_WEIGHTINGS if name != "rlw"])
def test_permuting_tasks_permutes_factors(name):
    losses, lengths = torch.tensor(LOSSES["usual"]), torch.tensor([1.0, 2.0, 3.0])
    order = [2, 0, 1]
    found = follow(name, losses[:, order].tolist(), lengths[order].tolist())
    torch.testing.assert_close(found, follow(name, losses.tolist(), lengths.tolist())[:, order])


@pytest.mark.parametrize("name", LOSS_WEIGHTINGS)
def test_absent_tasks_keep_their_state(name):
    weighting, _ = find_row(name, LOSS_WEIGHTINGS)
    state = {each: torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64) for each in weighting.state}
    losses = torch.tensor([1.0, math.nan, 2.0])
    facts = TaskFacts(torch.eye(3), losses=losses, state=state, generator=seeded(0))
    factors, after = loss_factors(facts, [0, 2], name)
    assert factors[1] == 1 and factors.isfinite().all() and set(after) == set(state)
    assert all(each[1] == 0.2 and each.isfinite().all() for each in after.values())


# --- in a step ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sum", "pcgrad", "mgda"])
def test_a_step_with_factors_is_one_with_task_weights_of_that_size(method):
    """Gradients of encoder and heads, inner products and lengths; GLS' factors depend on the losses."""
    batches, outcomes = make_task_batches(), []
    factors = None
    for options in ({"loss_weighting": "gls", "task_weights": {"sts": 3.0}}, {}):
        model = make_model(dropout=False).train()
        memory, optimizer = make_training(model, lr=1e-9)
        if factors is not None:
            options = {"task_weights": dict(zip(model.tasks, factors, strict=True))}
        found = take_step((model, memory, optimizer), batches, grad_method=method, clip_norm=0.5, **options)
        if factors is None:
            expected = found.losses.log().mean().exp() / (3 * found.losses)
            torch.testing.assert_close(found.loss_weights, expected)
            factors = (expected * torch.tensor([1.0, 1.0, 3.0])).tolist()
        outcomes.append((memory.grad.clone(), found.gram, found.weights, torch.tensor(found.grad_norm)))
    assert found.loss_weights is None  # of --loss_weighting fixed
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))  # float32


def test_a_skipped_step_teaches_nothing():
    model = make_model(dropout=False).train()
    training = (model, *make_training(model))
    options = {"loss_weighting": "imtl_l", "grad_method": "cr_mogm", "grad_reduction": "mean"}
    learned = take_step(training, make_task_batches(), **options).learned
    assert set(learned) == {"loss_weighting.log_factor", "grad_method.weights", "grad_method.age"}
    assert learned["grad_method.age"].tolist() == [[1.0] * 3] and learned["loss_weighting.log_factor"].all()
    skipped = take_step(training, make_task_batches(), learned=learned, task_weights={"sst": 1e30}, **options)
    assert not skipped.applied and skipped.learned == learned

"""optimizer.py: AdamW against torch, a textbook loop and the course's numbers; the schedules by hand."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from optimizer import (
    BLOCK_SIZE,
    SCHEDULES,
    AdamW,
    adamw_update,
    average_weights,
    lr_factor,
    points_factor,
    rectification,
    set_lr,
)

# --- AdamW --------------------------------------------------------------------------------------------------


def random_grads(num_steps: int, size: int, seed: int = 0) -> torch.Tensor:
    """A fixed sequence of gradients of very different sizes, (num_steps, size) float64."""
    generator = torch.Generator().manual_seed(seed)
    scales = 10.0 ** torch.arange(-3, 3).repeat(size)[:size]
    return torch.randn(num_steps, size, generator=generator, dtype=torch.float64) * scales


def take_steps(param: nn.Parameter, optimizer: torch.optim.Optimizer, grads: torch.Tensor) -> torch.Tensor:
    """The parameter after each step on the given gradients, (num_steps, size)."""
    path = []
    for grad in grads:
        param.grad = grad.to(param)
        optimizer.step()
        path.append(param.detach().clone())
    return torch.stack(path)


def run_steps(make_optimizer, start: torch.Tensor, grads: torch.Tensor) -> torch.Tensor:
    param = nn.Parameter(start.clone())
    return take_steps(param, make_optimizer([param]), grads)


def textbook_adamw(start, grads, lr, betas, eps, weight_decay, correct_bias):
    """Kingma and Ba's algorithm as in their section 2, then Loshchilov and Hutter's decay, in numpy."""
    param, m, v, path = start.numpy(), 0.0, 0.0, []
    for step, grad in enumerate(grads.numpy(), start=1):
        m = betas[0] * m + (1 - betas[0]) * grad
        v = betas[1] * v + (1 - betas[1]) * grad**2
        rate = lr * math.sqrt(1 - betas[1] ** step) / (1 - betas[0] ** step) if correct_bias else lr
        param = param - rate * m / (np.sqrt(v) + eps)
        param = param - lr * weight_decay * param
        path.append(param)
    return np.stack(path)


def test_adamw_reproduces_the_reference_numbers_of_the_course():
    torch.manual_seed(0)
    model = nn.Linear(3, 2, bias=False)
    optimizer = AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    rng = np.random.default_rng(0)
    for _ in range(1000):
        x = torch.tensor(rng.uniform(size=3), dtype=torch.float32)
        target = torch.stack([x[0] + x[1], -x[2]])
        optimizer.zero_grad()
        (model(x) - target).square().sum().backward()
        optimizer.step()
    expected = [[0.55482787, 0.86665666, 0.07291982], [-0.44724506, -0.2951228, -0.2717272]]
    # The course itself allows 1e-6 + 1e-4 of a number, which a slip in the order of eps, decay or bias
    # correction misses by far. Multiplying by 1 - decay is 1.8e-5 off.
    torch.testing.assert_close(model.weight.detach(), torch.tensor(expected), atol=2e-7, rtol=0)


@pytest.mark.parametrize("correct_bias", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize(("betas", "eps"), [((0.9, 0.999), 1e-6), ((0.5, 0.9), 0.1)])  # 0.1 shows its place
def test_adamw_equals_the_textbook_loop(betas, eps, weight_decay, correct_bias):
    options = {"lr": 0.03, "betas": betas, "eps": eps}
    options |= {"weight_decay": weight_decay, "correct_bias": correct_bias}
    start, grads = torch.linspace(-1, 3, 7, dtype=torch.float64), random_grads(12, 7)
    ours = run_steps(partial(AdamW, **options), start, grads)
    # float64 against float64: only the order of rounding differs.
    np.testing.assert_allclose(ours.numpy(), textbook_adamw(start, grads, **options), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.9), (0.0, 0.99)])
def test_rectified_adamw_equals_torch_radam(betas):
    """Both add eps before the bias correction, and wait until rho exceeds 5: with beta2 0.999, five steps."""
    options = {"lr": 0.02, "betas": betas, "eps": 0.05}  # a large eps shows where it is added
    start, grads = torch.linspace(-2, 2, 13, dtype=torch.float64), random_grads(20, 13)
    ours = run_steps(partial(AdamW, rectify=True, **options), start, grads)
    theirs = run_steps(partial(torch.optim.RAdam, **options), start, grads)
    # float64; torch sums rho in another order, which costs a few digits where rho - 4 is small.
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def check_decay(**options) -> None:
    """Two hundred float32 steps at a small learning rate decay as float64 says.

    To 1 % where the decay shares the step's rounding. By itself, 1e-7 is 0.84 to 1.68 of a number's last
    digit, and becomes 1 or 2 of them: to 10 % over a tensor. Multiplied by 1 - decay, a tensor would get 1.14
    of the first of these decays, and nothing of the second.
    """
    grads = torch.randn(200, 3000, generator=torch.Generator().manual_seed(5))
    start = torch.linspace(-0.1, 0.1, 3000)
    exact_options = {name: value for name, value in options.items() if name != "update"}
    for lr, tolerance in ((1e-5, 0.1), (2e-6, 0.01)):
        decays = []
        for used, dtype in ((options, torch.float32), (exact_options, torch.float64)):
            plain, decayed = (
                run_steps(partial(AdamW, lr=lr, weight_decay=each, **used), start.to(dtype), grads)[-1]
                for each in (0.0, 0.01)
            )
            decays.append(float((plain - decayed).double() @ start.double()))
        assert decays[0] == pytest.approx(decays[1], rel=tolerance), lr
        assert decays[1] == pytest.approx(200 * lr * 0.01 * float(start @ start), rel=0.1)


@pytest.mark.parametrize(
    "options",
    # With so short a memory of squares, rectification never gets beyond momentum.
    [{}, {"correct_bias": False}, {"rectify": True}, {"rectify": True, "betas": (0.9, 0.5)}],
)
def test_small_decay_is_not_lost(options):
    check_decay(**options)


def test_large_tensor_is_updated_like_its_pieces_bit_for_bit():
    """More than two blocks, the last one short; each element's update is its own."""
    generator, make = torch.Generator().manual_seed(1), partial(AdamW, weight_decay=0.1)
    start, *grads = torch.randn(4, 2 * BLOCK_SIZE + 13, generator=generator)
    whole = run_steps(make, start, grads)
    pieces = zip(start.split(7001), torch.stack(grads).split(7001, dim=1), strict=True)
    assert torch.equal(whole, torch.cat([run_steps(make, *piece) for piece in pieces], dim=1))
    for block in (whole[-1] != start).split(BLOCK_SIZE):  # none was left out; few elements return by chance
        assert block.float().mean() > 0.99


@pytest.mark.parametrize("which", ["param", "grad"])
def test_non_contiguous_parameters_and_gradients(which):
    generator = torch.Generator().manual_seed(2)
    start, *grads = (torch.randn(5, 7, generator=generator) for _ in range(4))
    plain = run_steps(partial(AdamW, weight_decay=0.1), start, grads)
    param = nn.Parameter(start.T.contiguous().T if which == "param" else start.clone())
    if which == "grad":
        grads = [grad.T.contiguous().T for grad in grads]
    assert param.is_contiguous() != grads[0].is_contiguous()
    strided = take_steps(param, AdamW([param], weight_decay=0.1), grads)
    # Other loops may fuse a multiplication differently: one float32 rounding.
    torch.testing.assert_close(strided, plain, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rectify", [False, True])
def test_state_dict_round_trip_continues_bit_for_bit(rectify, tmp_path):
    start, grads = torch.linspace(-1, 1, 13), random_grads(12, 13).float()
    options = {"lr": 0.01, "weight_decay": 0.1, "rectify": rectify}
    whole = run_steps(partial(AdamW, **options), start, grads)

    param = nn.Parameter(start.clone())
    optimizer = AdamW([param], **options)
    take_steps(param, optimizer, grads[:7])
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    resumed = nn.Parameter(param.detach().clone())
    optimizer = AdamW([resumed], lr=0.7)  # the file brings the options back as well
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert torch.equal(take_steps(resumed, optimizer, grads[7:]), whole[7:])


@pytest.mark.parametrize(
    ("make", "decay"),
    [(torch.optim.AdamW, 0.1), (torch.optim.Adam, 0.0)],  # Adam's is part of the gradient
)
def test_state_of_torchs_adamw_is_gone_on_from(tmp_path, make, decay):
    """Five steps there and seven here are twelve there.

    But for where the decay stands: after the update here, before it there. With d = 1 - lr * weight_decay
    that is a shift by one decay: given the same gradients, if torch starts from p / d, torch stays at our
    parameter / d. In float64 and with a negligible eps, so 1e-11 leaves room for rounding only.
    """
    options = {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-30, "weight_decay": decay}
    start, grads = torch.linspace(-1, 1, 13, dtype=torch.float64), random_grads(12, 13)
    whole = run_steps(partial(make, **options), start, grads)

    param = nn.Parameter(start.clone())
    theirs = make([param], **options)
    take_steps(param, theirs, grads[:5])
    torch.save(theirs.state_dict(), tmp_path / "optimizer.pt")
    ours = nn.Parameter(param.detach() * (1 - 0.01 * decay))
    optimizer = AdamW([{"params": [ours], "initial_lr": 0.5}], lr=0.7)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    (group,) = optimizer.param_groups
    assert {name: group[name] for name in options} == options
    assert group["initial_lr"] == 0.5 and group["correct_bias"] and not group["rectify"]
    take_steps(ours, optimizer, grads[5:])
    assert optimizer.state[ours]["step"] == 12 and type(optimizer.state[ours]["step"]) is int
    torch.testing.assert_close(ours.detach() / (1 - 0.01 * decay), whole[-1], rtol=1e-11, atol=1e-13)
    again = AdamW([nn.Parameter(start.clone())])
    again.load_state_dict(optimizer.state_dict())  # ours again
    assert again.param_groups[0].keys() == group.keys()


# Optimizer and options whose state is refused, sizes of the parameters by group -> what the message names.
OTHER_STATES = [
    (torch.optim.SGD, {"momentum": 0.9}, "has momentum_buffer; expected step, exp_avg, exp_avg_sq"),
    (torch.optim.Adagrad, {}, "has step, sum; expected step, exp_avg"),
    (torch.optim.AdamW, {"amsgrad": True}, "amsgrad=True"),
    (torch.optim.AdamW, {"maximize": True}, "maximize=True"),
    (torch.optim.Adam, {"weight_decay": 0.1}, "decoupled_weight_decay=False"),
    (AdamW, [[2], [2]], "different number of parameter groups"),
    (AdamW, [[2, 2]], "doesn't match the size of optimizer's group"),
    (AdamW, [[3]], r"exp_avg of parameter 0 has shape \(3,\); expected \(2,\)"),
]


@pytest.mark.parametrize(("make", "options", "message"), OTHER_STATES)
def test_state_that_does_not_fit_is_refused_by_name(make, options, message):
    sizes, options = ([[2]], options) if isinstance(options, dict) else (options, {})
    groups = [{"params": [nn.Parameter(torch.ones(size)) for size in group]} for group in sizes]
    other = make(groups, lr=0.1, **options)
    for group in groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    other.step()
    optimizer = AdamW([nn.Parameter(torch.ones(2))], lr=0.25)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(other.state_dict())
    assert not optimizer.state and optimizer.param_groups[0]["lr"] == 0.25  # nothing was taken


BAD_OPTIONS = {
    "lr": [-1e-3, math.nan],
    "betas": [(1.0, 0.999), (0.9, 1.0), (-0.1, 0.999), (0.9, math.nan)],
    "eps": [-1e-8, math.nan],
    "weight_decay": [-0.1, math.nan],
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options_raise(name):
    for value in BAD_OPTIONS[name]:
        with pytest.raises(ValueError, match=name) as caught:
            AdamW([nn.Parameter(torch.zeros(1))], **{name: value})
        assert str(value) in str(caught.value)
    with pytest.raises(ValueError, match="rectify is True and correct_bias False"):
        AdamW([nn.Parameter(torch.zeros(1))], rectify=True, correct_bias=False)


def test_sparse_gradient_raises():
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="sparse"):
        AdamW(embedding.parameters()).step()


def test_groups_have_their_own_options_and_parameters_without_gradients_stay():
    """By hand: the first corrected step is lr * sign(gradient) when eps is 0; then the decay."""
    fast, slow, zero, unused = (nn.Parameter(torch.ones(1)) for _ in range(4))
    groups = [{"params": [fast], "lr": 0.5, "weight_decay": 0.2}, {"params": [slow, unused]}]
    optimizer = AdamW([*groups, {"params": [zero], "eps": 1e-6}], lr=0.125, eps=0.0)
    fast.grad, slow.grad, zero.grad = torch.tensor([3.0]), torch.tensor([-3.0]), torch.zeros(1)
    assert optimizer.step(lambda: 7.0) == 7.0
    # 1 - 0.5 = 0.5, times 1 - 0.5 * 0.2 = 0.45; 1 + 0.125. Tolerance: float32.
    found = [param.item() for param in (fast, slow, zero, unused)]
    assert found == pytest.approx([0.45, 1.125, 1.0, 1.0], rel=1e-6)
    assert optimizer.state[fast]["step"] == 1 and unused not in optimizer.state


@pytest.mark.parametrize("rectify", [False, True])
def test_another_update_sees_the_hyperparameters_of_the_step(rectify):
    """Bias correction and decay are in them; rectified momentum, the first five steps, needs no update."""
    seen = []

    def update(param, grad, exp_avg, exp_avg_sq, hyperparameters):
        assert exp_avg.shape == exp_avg_sq.shape == grad.shape == param.shape
        assert hyperparameters.dtype == torch.float64
        seen.append(hyperparameters.tolist())
        adamw_update(param, grad, exp_avg, exp_avg_sq, hyperparameters)

    options = {"lr": 0.02, "betas": (0.9, 0.999), "eps": 1e-3, "weight_decay": 0.1, "rectify": rectify}
    start, grads = torch.linspace(-1, 1, 13), random_grads(8, 13).float()
    path = run_steps(partial(AdamW, update=update, **options), start, grads)
    assert torch.equal(path, run_steps(partial(AdamW, **options), start, grads))
    steps = range(6, 9) if rectify else range(1, 9)
    factors = [rectification(0.999, step) if rectify else 1.0 for step in steps]
    for step, factor, found in zip(steps, factors, seen, strict=True):
        size = 0.02 * factor * math.sqrt(1 - 0.999**step) / (1 - 0.9**step)
        assert found == pytest.approx([0.9, 0.999, size, 1e-3, 0.0, 0.002], rel=1e-12)  # float64


# --- schedules ----------------------------------------------------------------------------------------------

# The factor at each of ten updates, total_steps 10, worked with a pocket calculator to six digits: without
# warm-up (progress n / 10), and the last six after a warm-up of 4 (progress n / 6), whose own factors are 1/5
# to 4/5.
HAND_FACTORS = {
    "constant": ([1.0] * 10, [1.0] * 6),
    "linear": (
        [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1],
        [1.0, 0.833333, 0.666667, 0.5, 0.333333, 0.166667],
    ),
    "cosine": (
        [1.0, 0.975528, 0.904508, 0.793893, 0.654508, 0.5, 0.345492, 0.206107, 0.095492, 0.024472],
        [1.0, 0.933013, 0.75, 0.5, 0.25, 0.066987],
    ),
    "inverse_sqrt": (
        [1.0, 0.302891, 0.219265, 0.180481, 0.156941, 0.140720, 0.128671, 0.119268, 0.111664, 0.105351],
        [1.0, 0.239046, 0.171499, 0.140720, 0.122169, 0.109435],
    ),
}


def factors_of(schedule, warmup_steps, total_steps, num_steps):
    options = {"warmup_steps": warmup_steps, "total_steps": total_steps}
    return [lr_factor(schedule, step, **options) for step in range(num_steps)]


def test_every_schedule_has_hand_worked_factors():
    assert set(HAND_FACTORS) == set(SCHEDULES)
    for schedule, (plain, after_warmup) in HAND_FACTORS.items():
        assert factors_of(schedule, 0, 10, 10) == pytest.approx(plain, abs=1e-6)  # the digits written down
        warmed_up = [0.2, 0.4, 0.6, 0.8, *after_warmup]
        assert factors_of(schedule, 4, 10, 10) == pytest.approx(warmed_up, abs=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup_steps", [0, 1, 7, 100, 150])
def test_factor_stays_between_0_and_1(schedule, warmup_steps):
    """Also beyond the end, and with a warm-up as long as the run or longer."""
    factors = factors_of(schedule, warmup_steps, 100, 200)
    assert all(0 <= factor <= 1 for factor in factors)
    assert all(factor > 0 for factor in factors[:100])  # no update of the run is wasted
    assert warmup_steps >= 100 or set(factors[100:]) == {factors[100]}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_rises_evenly_into_a_falling_schedule(schedule):
    """No jump at the end of warm-up: the last step up is as high as each before, and then it never rises."""
    factors = factors_of(schedule, 50, 100_000, 120)
    assert np.diff(factors[:51]) == pytest.approx([1 / 51] * 50, abs=1e-12)  # float64 rounding only
    assert factors[50] == 1
    falls = -np.diff(factors[50:])
    assert (falls >= 0).all() and falls.max() < 1e-3  # a long run's decay starts slowly


@pytest.mark.parametrize("warmup_steps", [0, 5])  # also while the warm-up hides it
def test_unknown_schedule_raises(warmup_steps):
    with pytest.raises(ValueError, match=r"'cosin'.*constant, linear, cosine, inverse_sqrt"):
        lr_factor("cosin", 0, warmup_steps=warmup_steps, total_steps=10)


def test_points_factor_by_hand():
    points = [(0.2, 1.0), (0.6, 0.5), (0.6, 0.0), (0.8, 2.0)]  # a slope, a jump, a slope
    expected = {0.0: 1.0, 0.2: 1.0, 0.3: 0.875, 0.6: 0.0, 0.7: 1.0, 0.8: 2.0, 1.0: 2.0}
    for progress, factor in expected.items():
        assert points_factor(points, progress) == pytest.approx(factor)
    assert points_factor([(0.5, 0.3)], 0.1) == points_factor([(0.5, 0.3)], 0.9) == 0.3


def test_average_weights_by_hand():
    """Whatever it starts from: 1, then (1 / 2 + 3) / (1 / 2 + 1), then (1 / 4 + 3 / 2 + 5) / (7 / 4)."""
    average = torch.full((2,), 99.0)
    for step, (value, expected) in enumerate([(1.0, 1.0), (3.0, 7 / 3), (5.0, 27 / 7)], start=1):
        average_weights(average, torch.full((2,), value), 0.5, step)
        assert average.tolist() == pytest.approx([expected] * 2, rel=1e-6)  # float32


def test_set_lr_is_a_factor_of_the_base_learning_rates():
    params = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    rates = [0.5, 0.25]
    groups = [{"params": [p], "lr": lr, "initial_lr": lr} for p, lr in zip(params, rates, strict=True)]
    optimizer = AdamW(groups)
    for factor in (0.5, 1.0, 0.0):  # each from the base, not from the last
        set_lr(optimizer, factor)
        assert [group["lr"] for group in optimizer.param_groups] == [0.5 * factor, 0.25 * factor]

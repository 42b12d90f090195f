"""Tests of optimizer.py: AdamW against references, the schedules by hand, the flat memory against autograd."""

import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from bert import BertModel
from config import BertConfig
from optimizer import BLOCK_SIZE, SCHEDULES, AdamW, FlatMemory, lr_factor, rectification

# --- AdamW -------------------------------------------------------------------------------------------------------


def random_grads(num_steps: int, size: int, seed: int = 0) -> torch.Tensor:
    """A fixed sequence of gradients of very different sizes, (num_steps, size) float64."""
    generator = torch.Generator().manual_seed(seed)
    scales = 10.0 ** torch.arange(-3, 3).repeat(size)[:size]
    return torch.randn(num_steps, size, generator=generator, dtype=torch.float64) * scales


def run_steps(make_optimizer, start: torch.Tensor, grads: torch.Tensor) -> torch.Tensor:
    """The parameter after each step on the given gradients, (num_steps, size)."""
    param = nn.Parameter(start.clone())
    optimizer = make_optimizer([param])
    path = []
    for grad in grads:
        param.grad = grad.to(param)
        optimizer.step()
        path.append(param.detach().clone())
    return torch.stack(path)


def textbook_adamw(start, grads, lr, betas, eps, weight_decay, correct_bias):
    """Kingma and Ba's algorithm in the order of their section 2, then Loshchilov and Hutter's decay, in numpy."""
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
    # The course's own tolerances; a slip in the order of eps, decay or bias correction misses them by far.
    torch.testing.assert_close(model.weight.detach(), torch.tensor(expected), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5), (0.95, 0.0)])
def test_adamw_equals_torch_over_ten_steps(betas, weight_decay):
    """The definitions coincide when eps is negligible; the decay comes after the update here, before it there.

    With d = 1 - lr * weight_decay that is a shift by one decay: given the same gradients, if torch starts from
    p / d, torch stays at our parameter / d. Both in float64, so 1e-11 leaves room for rounding only.
    """
    options = {"lr": 0.01, "betas": betas, "eps": 1e-30, "weight_decay": weight_decay}
    start, grads = torch.linspace(-2, 2, 13, dtype=torch.float64), random_grads(10, 13)
    decay = 1 - 0.01 * weight_decay
    ours = run_steps(lambda params: AdamW(params, **options), start, grads)
    theirs = run_steps(lambda params: torch.optim.AdamW(params, **options), start / decay, grads)
    torch.testing.assert_close(ours / decay, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("correct_bias", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("eps", [1e-6, 0.1])  # 0.1 shows where it is added
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9)])
def test_adamw_equals_the_textbook_loop(betas, eps, weight_decay, correct_bias):
    options = {
        "lr": 0.03,
        "betas": betas,
        "eps": eps,
        "weight_decay": weight_decay,
        "correct_bias": correct_bias,
    }
    start, grads = torch.linspace(-1, 3, 7, dtype=torch.float64), random_grads(12, 7)
    ours = run_steps(lambda params: AdamW(params, **options), start, grads)
    # float64 against float64: only the order of rounding differs.
    np.testing.assert_allclose(ours.numpy(), textbook_adamw(start, grads, **options), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.9), (0.0, 0.99)])
def test_rectified_adamw_equals_torch_radam(betas):
    """Both add eps before the bias correction, and both wait until rho exceeds 5: with beta2 0.999, five steps."""
    options = {"lr": 0.02, "betas": betas, "eps": 0.05}  # a large eps shows where it is added
    start, grads = torch.linspace(-2, 2, 13, dtype=torch.float64), random_grads(20, 13)
    ours = run_steps(lambda params: AdamW(params, rectify=True, **options), start, grads)
    theirs = run_steps(lambda params: torch.optim.RAdam(params, **options), start, grads)
    # float64; torch sums rho in another order, which costs a few digits where rho - 4 is small.
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_rectification_waits_five_steps_then_grows_towards_one():
    factors = [rectification(0.999, step) for step in range(1, 20001)]
    assert factors[:5] == [None] * 5
    assert all(a < b for a, b in pairwise(factors[5:]))
    assert 0 < factors[5] < 0.1 and 0.99 < factors[-1] < 1


def test_rectified_first_steps_are_plain_momentum():
    """By hand, gradient 1 each step: the corrected mean is 1, so each step is lr, whatever the second moment."""
    path = run_steps(lambda params: AdamW(params, lr=0.5, rectify=True), torch.zeros(1), torch.ones(5, 1))
    torch.testing.assert_close(path.flatten(), torch.tensor([-0.5, -1.0, -1.5, -2.0, -2.5]))


def test_large_tensor_is_updated_like_its_pieces_bit_for_bit():
    """More than two blocks and an odd size, so that the last block is short; each element's update is its own."""
    size = 2 * BLOCK_SIZE + 13
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(size, generator=generator)
    whole = nn.Parameter(start.clone())
    pieces = [nn.Parameter(piece.clone()) for piece in start.split(7001)]
    optimizers = [AdamW([whole], weight_decay=0.1), AdamW(pieces, weight_decay=0.1)]
    for _ in range(3):
        grad = torch.randn(size, generator=generator)
        whole.grad = grad
        for piece, part in zip(pieces, grad.split(7001), strict=True):
            piece.grad = part.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(whole, torch.cat(list(pieces)))
    for block in (whole != start).split(BLOCK_SIZE):  # none was left out; a few elements may return by chance
        assert block.float().mean() > 0.99


@pytest.mark.parametrize("which", ["param", "grad", "both"])
def test_non_contiguous_parameters_and_gradients(which):
    generator = torch.Generator().manual_seed(2)
    start, *grads = (torch.randn(5, 7, generator=generator) for _ in range(4))
    plain = nn.Parameter(start.clone())
    strided = nn.Parameter(start.T.contiguous().T if which != "grad" else start.clone())
    assert strided.is_contiguous() == (which == "grad")
    optimizers = [AdamW([param], weight_decay=0.1) for param in (plain, strided)]
    for grad in grads:
        plain.grad = grad.clone()
        strided.grad = grad.T.contiguous().T if which != "param" else grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    # Same operations on each element; other loops may fuse a multiplication differently, so one float32 rounding.
    torch.testing.assert_close(strided.detach(), plain.detach(), rtol=1e-6, atol=1e-7)


def test_parameter_without_gradient_is_skipped():
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = AdamW([used, unused], weight_decay=0.5)
    used.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(unused, torch.ones(3)) and not torch.any(used == 1)
    assert unused not in optimizer.state and optimizer.state[used]["step"] == 1


def test_zero_gradient_stays_finite_and_changes_nothing():
    param = nn.Parameter(torch.tensor([1.0, -2.0]))
    param.grad = torch.zeros(2)
    AdamW([param]).step()
    assert torch.equal(param, torch.tensor([1.0, -2.0]))


@pytest.mark.parametrize("rectify", [False, True])
def test_state_dict_round_trip_continues_bit_for_bit(rectify, tmp_path):
    start, grads = torch.linspace(-1, 1, 13), random_grads(12, 13).float()
    options = {"lr": 0.01, "weight_decay": 0.1, "rectify": rectify}
    whole = run_steps(lambda params: AdamW(params, **options), start, grads)

    param = nn.Parameter(start.clone())
    optimizer = AdamW([param], **options)
    for grad in grads[:7]:
        param.grad = grad.clone()
        optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    resumed = nn.Parameter(param.detach().clone())
    optimizer = AdamW([resumed], lr=0.7)  # the file brings the options back as well
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for grad in grads[7:]:
        resumed.grad = grad.clone()
        optimizer.step()
    assert torch.equal(resumed, whole[-1])


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1e-3},
        {"lr": math.nan},
        {"betas": (1.0, 0.999)},
        {"betas": (0.9, 1.0)},
        {"betas": (-0.1, 0.999)},
        {"betas": (0.9, math.nan)},
        {"eps": -1e-8},
        {"eps": math.nan},
        {"weight_decay": -0.1},
        {"weight_decay": math.nan},
    ],
)
def test_bad_options_raise(options):
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=name) as caught:
        AdamW([nn.Parameter(torch.zeros(1))], **options)
    assert str(value) in str(caught.value)  # the message shows the value


def test_rectify_needs_corrected_moments():
    with pytest.raises(ValueError, match="rectify is True and correct_bias False"):
        AdamW([nn.Parameter(torch.zeros(1))], rectify=True, correct_bias=False)


def test_sparse_gradient_raises():
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="sparse"):
        AdamW(embedding.parameters()).step()


def test_groups_have_their_own_options():
    """By hand: the first corrected step is lr * sign(gradient) when eps is 0; then the decay."""
    fast, slow = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    groups = [{"params": [fast], "lr": 0.5, "weight_decay": 0.2}, {"params": [slow]}]
    optimizer = AdamW(groups, lr=0.125, eps=0.0)
    fast.grad, slow.grad = torch.tensor([3.0]), torch.tensor([-3.0])
    optimizer.step()
    # 1 - 0.5 = 0.5, times 1 - 0.5 * 0.2 = 0.45; 1 + 0.125. Tolerance: float32.
    assert fast.item() == pytest.approx(0.45, rel=1e-6) and slow.item() == pytest.approx(1.125, rel=1e-6)


def test_works_on_any_module_and_returns_the_closure_loss():
    """Every kind of parameter shape: 4-d convolution, embedding, LayerNorm, scalar."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(7, 6)
            self.convolution = nn.Conv2d(1, 2, 3)
            self.norm = nn.LayerNorm(8)
            self.scale = nn.Parameter(torch.tensor(1.0))

        def forward(self, ids):
            x = self.convolution(self.embedding(ids).unsqueeze(1))  # (B, T) -> (B, 2, T - 2, 4)
            return self.norm(x.transpose(1, 2).flatten(2)) * self.scale

    torch.manual_seed(3)
    model = Net()
    ids = torch.tensor([[0, 1, 2, 3, 4], [4, 5, 6, 0, 1]])
    target = torch.randn(2, 3, 8)
    optimizer = AdamW(model.parameters(), lr=0.02)
    before = copy.deepcopy(model.state_dict())
    first_loss = (model(ids) - target).square().mean().item()

    def closure():
        optimizer.zero_grad()
        loss = (model(ids) - target).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(30)]
    assert losses[0] == pytest.approx(first_loss) and losses[-1] < 0.5 * first_loss
    for name, param in model.named_parameters():
        assert not torch.equal(param, before[name]), name


def test_step_without_closure_returns_none():
    assert AdamW([nn.Parameter(torch.zeros(1))]).step() is None


# --- schedules ---------------------------------------------------------------------------------------------------

# The factor at each of ten updates, total_steps 10, worked with a pocket calculator to six digits: without warm-up
# (progress n / 10), and the last six after a warm-up of 4 (progress n / 6), whose own factors are 1/5 to 4/5.
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


def test_every_schedule_has_hand_worked_factors():
    assert set(HAND_FACTORS) == set(SCHEDULES)


@pytest.mark.parametrize("schedule", HAND_FACTORS)
def test_schedule_equals_hand_worked_factors(schedule):
    plain, after_warmup = HAND_FACTORS[schedule]
    factors = [lr_factor(schedule, step, warmup_steps=0, total_steps=10) for step in range(10)]
    assert factors == pytest.approx(plain, abs=1e-6)  # the digits that are written down
    factors = [lr_factor(schedule, step, warmup_steps=4, total_steps=10) for step in range(10)]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, *after_warmup], abs=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup_steps", [0, 1, 7, 100, 150])
def test_factor_stays_between_0_and_1(schedule, warmup_steps):
    """Also beyond the end, and with a warm-up as long as the run or longer."""
    factors = [lr_factor(schedule, step, warmup_steps=warmup_steps, total_steps=100) for step in range(200)]
    assert all(0 <= factor <= 1 for factor in factors)
    assert all(factor > 0 for factor in factors[:100])  # no update of the run is wasted


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_rises_evenly_into_a_falling_schedule(schedule):
    """No jump at the end of warm-up: the last step up is as high as each before, and then it never rises."""
    warmup_steps, total_steps = 50, 100_000
    factors = [
        lr_factor(schedule, step, warmup_steps=warmup_steps, total_steps=total_steps) for step in range(120)
    ]
    # float64 rounding only
    assert np.diff(factors[: warmup_steps + 1]) == pytest.approx([1 / 51] * 50, abs=1e-12)
    assert factors[warmup_steps] == 1
    falls = -np.diff(factors[warmup_steps:])
    assert (falls >= 0).all() and falls.max() < 1e-3  # a long run's decay starts slowly


@pytest.mark.parametrize(
    "schedule, final", [("constant", 1), ("linear", 0), ("cosine", 0), ("inverse_sqrt", 0.1)]
)
def test_factor_stays_at_its_last_value_beyond_the_end(schedule, final):
    for step in (100, 101, 5000):
        assert lr_factor(schedule, step, warmup_steps=10, total_steps=100) == pytest.approx(final, abs=1e-12)


def test_unknown_schedule_raises():
    with pytest.raises(ValueError, match=r"'cosin'.*constant, linear, cosine, inverse_sqrt"):
        lr_factor("cosin", 0, warmup_steps=0, total_steps=10)
    with pytest.raises(ValueError, match="'cosin'"):  # also while the warm-up hides it
        lr_factor("cosin", 0, warmup_steps=5, total_steps=10)


# --- flat memory -------------------------------------------------------------------------------------------------

HEAD_OUTPUTS = {"first": 3, "second": 1}


def make_two_heads(seed: int = 0) -> nn.ModuleDict:
    """A shared encoder with every kind of parameter, and two heads; odd sizes catch swapped axes."""
    torch.manual_seed(seed)
    encoder = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 5), nn.LayerNorm(5))
    heads = {task: nn.Linear(5, num_outputs) for task, num_outputs in HEAD_OUTPUTS.items()}
    return nn.ModuleDict({"encoder": encoder, **heads})


def make_memory(model: nn.ModuleDict) -> FlatMemory:
    heads = {task: dict(model[task].named_parameters()) for task in HEAD_OUTPUTS}
    return FlatMemory(dict(model["encoder"].named_parameters()), heads)


def task_loss(model: nn.ModuleDict, task: str, seed: int = 0) -> torch.Tensor:
    """A loss on a random batch that depends on the seed and the task."""
    generator = torch.Generator().manual_seed(100 * seed + len(task))
    ids = torch.randint(0, 11, (13, 7), generator=generator)
    return model[task](model["encoder"](ids)).square().mean() + model[task](model["encoder"](ids[:2])).sum()


def plain_grads(model: nn.ModuleDict, task: str, seeds=(0,)) -> dict[str, torch.Tensor]:
    """Ordinary autograd's gradients of the summed losses, by parameter name."""
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = sum(task_loss(model, task, seed) for seed in seeds)
    grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    return dict(zip(params, grads, strict=True))


def flat(
    memory: FlatMemory, owner: str, model: nn.ModuleDict, grads: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Named gradients in the order of the flat buffer."""
    names = {id(p): name for name, p in model.named_parameters()}
    return torch.cat([grads[names[id(p)]].flatten() for who, p, _ in memory.views if who == owner])


def test_parameters_become_views_with_their_values():
    model, untouched = make_two_heads(), make_two_heads()
    params = list(model.parameters())
    memory = make_memory(model)
    assert memory.data.numel() == sum(p.numel() for p in params)
    assert all(a is b for a, b in zip(params, model.parameters(), strict=True))  # the same Parameter objects
    for (name, p), expected in zip(model.named_parameters(), untouched.parameters(), strict=True):
        assert torch.equal(p, expected), name
        assert p.untyped_storage().data_ptr() == memory.data.untyped_storage().data_ptr(), name
    memory.data.fill_(0.25)
    assert all(torch.all(p == 0.25) for p in model.parameters())
    with torch.no_grad():
        model["second"].bias.fill_(7.0)
    assert (memory.data == 7.0).sum() == 1


def test_layout_is_encoder_first_and_each_element_has_one_owner():
    model = make_two_heads()
    memory = make_memory(model)
    assert memory.num_shared == 11 * 6 + 6 * 5 + 5 + 5 + 5
    assert memory.task_grads.shape == (2, memory.num_shared)
    stops = [0]
    for (owner, _), where in memory.slices.items():
        assert where.start == stops[-1], owner
        stops.append(where.stop)
    assert stops[-1] == memory.data.numel()
    assert [owner for owner, _ in memory.slices] == ["shared"] * 2 + ["first"] * 2 + ["second"] * 2


def test_parts_of_the_encoder_are_its_columns():
    names = [
        "embeddings.word",
        "encoder.layer.0.a.weight",
        "encoder.layer.0.a.bias",
        "encoder.layer.0.b.weight",
    ]
    names += ["encoder.layer.10.a.weight", "pooler.dense.weight"]
    shared = {
        name: nn.Parameter(torch.zeros(*(3,) if name.endswith("bias") else (2, n + 1)))
        for n, name in enumerate(names)
    }
    shared["pooler.dense.weight"].requires_grad_(False)
    memory = FlatMemory(shared, {"a": {"weight": nn.Parameter(torch.zeros(1, 1))}})
    assert memory.parts == {
        "embeddings": [slice(0, 2)],
        "layer.0": [
            slice(2, 14),
            slice(24, 27),
        ],  # two matrices side by side; the bias stands with what does not decay
        "layer.10": [slice(14, 24)],
    }


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])  # two backward passes add up: gradient accumulation
def test_task_gradients_land_in_their_rows_and_equal_autograd(seeds):
    model = make_two_heads()
    expected = {task: plain_grads(model, task, seeds) for task in HEAD_OUTPUTS}
    memory = make_memory(model)
    memory.zero_grad()
    for task in HEAD_OUTPUTS:
        memory.point_grads(task)
        for seed in seeds:
            task_loss(model, task, seed).backward()
        row = memory.task_grads[memory.tasks.index(task)]
        for name, p in model["encoder"].named_parameters():  # written in place: no copy was made
            assert row.data_ptr() <= p.grad.data_ptr() < row.data_ptr() + 4 * row.numel(), name
    for k, task in enumerate(memory.tasks):
        # Same graph, same kernels; adding into a buffer may round once more, so float32's tolerance.
        torch.testing.assert_close(memory.task_grads[k], flat(memory, "shared", model, expected[task]))
        torch.testing.assert_close(memory.head_grad(task), flat(memory, task, model, expected[task]))
    memory.zero_grad()
    assert not memory.task_grads.any() and not memory.grad[memory.num_shared :].any()


def test_one_task_leaves_the_rows_of_the_others_alone():
    model = make_two_heads()
    memory = make_memory(model)
    memory.task_grads[0], memory.grad[:] = 5.0, 5.0
    memory.point_grads("second")
    task_loss(model, "second").backward()
    assert torch.all(memory.task_grads[0] == 5.0) and torch.all(memory.head_grad("first") == 5.0)
    assert memory.task_grads[1].any() and not torch.all(memory.head_grad("second") == 5.0)


def test_combine_is_the_weighted_sum_of_the_rows():
    memory = make_memory(make_two_heads())
    generator = torch.Generator().manual_seed(4)
    memory.task_grads.copy_(torch.randn(memory.task_grads.shape, generator=generator))
    memory.grad[memory.num_shared :] = 3.0
    weights = torch.tensor([0.5, -2.0])
    memory.combine(weights)
    expected = 0.5 * memory.task_grads[0] - 2.0 * memory.task_grads[1]
    torch.testing.assert_close(memory.grad[: memory.num_shared], expected)  # float32 rounding
    assert torch.all(memory.grad[memory.num_shared :] == 3.0)  # heads keep their own gradient


def test_whole_step_equals_plain_training_with_summed_losses():
    """Weights of 1 are ordinary training: the flat path must give what AdamW on the plain model gives."""
    model, plain = make_two_heads(), make_two_heads()
    memory = make_memory(model)
    optimizer = AdamW(memory.param_groups(0.01, 0.01, weight_decay=0.1))
    decays = [p for p in plain.parameters() if p.ndim >= 2]
    others = [p for p in plain.parameters() if p.ndim < 2]
    reference = AdamW([{"params": decays, "weight_decay": 0.1}, {"params": others}], lr=0.01)
    for step in range(3):
        memory.zero_grad()
        for task in HEAD_OUTPUTS:
            memory.point_grads(task)
            task_loss(model, task, step).backward()
        memory.combine(torch.ones(2))
        memory.show_grads(set(HEAD_OUTPUTS))
        optimizer.step()
        reference.zero_grad()
        sum(task_loss(plain, task, step) for task in HEAD_OUTPUTS).backward()
        reference.step()
    for (name, p), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        # The sum of the two tasks is rounded in another order, and Adam divides small gradients by themselves.
        torch.testing.assert_close(
            p, expected, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_head_without_a_batch_gets_no_update_and_keeps_its_step_count():
    model = make_two_heads()
    memory = make_memory(model)
    optimizer = AdamW(memory.param_groups(0.1, 0.1, weight_decay=0.5))

    def step(tasks):
        memory.zero_grad()
        for task in tasks:
            memory.point_grads(task)
            task_loss(model, task).backward()
        memory.combine(torch.ones(2))
        memory.show_grads(set(tasks))
        optimizer.step()

    step(["first", "second"])  # so that there is momentum that could move the absent head
    before = copy.deepcopy(model.state_dict())
    step(["first"])
    step(["first"])
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith("second."), name
    steps = {key: optimizer.state[p]["step"] for key, p in memory.flat_params.items()}
    assert {owner: count for (owner, _), count in steps.items()} == {"shared": 3, "first": 3, "second": 1}


def test_biases_and_layernorm_do_not_decay():
    """With all gradients zero an update is the decay alone: 1 - lr * weight_decay, or nothing."""
    model = make_two_heads()
    memory = make_memory(model)
    memory.data.fill_(1.0)
    groups = memory.param_groups(lr=0.5, head_lr=0.25, weight_decay=0.1)
    memory.show_grads(set(HEAD_OUTPUTS))
    AdamW(groups).step()
    values = {name: p.unique().item() for name, p in model.named_parameters()}
    assert values == pytest.approx(
        {
            "encoder.0.weight": 0.95,
            "encoder.1.weight": 0.95,
            "encoder.1.bias": 1.0,
            "encoder.2.weight": 1.0,
            "encoder.2.bias": 1.0,
            "first.weight": 0.975,
            "first.bias": 1.0,
            "second.weight": 0.975,
            "second.bias": 1.0,
        },
        rel=1e-6,  # float32
    )


def test_param_groups_carry_the_base_learning_rates():
    memory = make_memory(make_two_heads())
    groups = memory.param_groups(lr=0.5, head_lr=0.25, weight_decay=0.1)
    assert [group["lr"] for group in groups] == [0.5, 0.5, 0.25, 0.25, 0.25, 0.25]
    assert [group["initial_lr"] for group in groups] == [group["lr"] for group in groups]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0] * 3
    assert sum(p.numel() for group in groups for p in group["params"]) == memory.data.numel()


def test_frozen_parameters_are_left_out():
    model = make_two_heads()
    model["encoder"][0].requires_grad_(False)
    model["second"].bias.requires_grad_(False)
    frozen = [model["encoder"][0].weight, model["second"].bias]
    addresses = [p.data_ptr() for p in frozen]
    memory = make_memory(model)
    assert memory.num_shared == 6 * 5 + 5 + 5 + 5
    assert [p.data_ptr() for p in frozen] == addresses
    assert not any(p is view for _, view, _ in memory.views for p in frozen)
    memory.point_grads("second")
    task_loss(model, "second").backward()
    assert all(p.grad is None for p in frozen)


def test_frozen_encoder_trains_heads_only():
    model = make_two_heads()
    model["encoder"].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    memory = make_memory(model)
    assert memory.num_shared == 0 and memory.task_grads.shape == (2, 0)
    optimizer = AdamW(memory.param_groups(0.1, 0.1, 0.0))
    for task in HEAD_OUTPUTS:
        memory.point_grads(task)
        task_loss(model, task).backward()
    memory.combine(torch.ones(2))
    memory.show_grads(set(HEAD_OUTPUTS))
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith("encoder."), name


def test_overlap_raises():
    model = make_two_heads()
    shared = dict(model["encoder"].named_parameters())
    heads = {task: dict(model[task].named_parameters()) for task in HEAD_OUTPUTS}
    with pytest.raises(ValueError, match="two owners"):
        FlatMemory(shared, heads | {"second": {"tied": model["encoder"][1].weight}})
    with pytest.raises(ValueError, match="two owners"):
        FlatMemory(shared, heads | {"second": heads["first"]})


def test_nothing_trainable_raises():
    model = make_two_heads().requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        make_memory(model)


def test_sparse_word_embedding_gives_the_same_dense_gradient():
    """`BertEmbeddings.sparse_grad` only saves work: same gradient, and rows of absent words stay zero."""
    config = BertConfig(
        vocab_size=31,
        hidden_size=12,
        num_hidden_layers=1,
        num_attention_heads=3,
        intermediate_size=17,
        max_position_embeddings=9,
    )
    torch.manual_seed(5)
    bert = BertModel(config).eval()
    bert.pooler.requires_grad_(False)
    head = nn.Linear(12, 1)
    memory = FlatMemory(dict(bert.named_parameters()), {"task": dict(head.named_parameters())})
    input_ids = torch.randint(5, 20, (13, 7))
    attention_mask = (torch.arange(7) < torch.randint(2, 8, (13, 1))).long()
    rows = []
    for sparse in (False, True):
        bert.embeddings.sparse_grad = sparse
        memory.zero_grad()
        memory.point_grads("task")
        for part in (slice(0, 8), slice(8, 13)):  # accumulated over two micro-batches
            outputs = bert(input_ids[part], attention_mask[part])
            head(outputs["last_hidden_state"][:, 0]).square().sum().backward()
        weight_grad = bert.embeddings.word_embeddings.weight.grad
        assert not weight_grad.is_sparse
        assert memory.task_grads[0].data_ptr() == weight_grad.data_ptr()
        used = torch.zeros(31, dtype=torch.bool)
        used[input_ids[attention_mask.bool()]] = True
        assert not weight_grad[~used].any() and weight_grad[used].any(1).all()
        rows.append(memory.task_grads[0].clone())
    # Rows of repeated words are summed in another order: float32 rounding.
    torch.testing.assert_close(rows[1], rows[0], rtol=1e-5, atol=1e-6)

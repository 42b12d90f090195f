"""pcgrad.py: inner products and weights against the papers' vector forms, hand-worked cases, properties."""

import itertools
import math
from collections import Counter

import pytest
import torch

import pcgrad as pcgrad_module
from kernels.grad_methods import GRAD_METHODS
from pcgrad import (
    BLOCK_SIZE,
    CHUNK_SIZE,
    COSINE_EMA_BETA,
    TaskFacts,
    cosine_matrix,
    gradvac,
    gram_matrix,
    pcgrad,
    update_cosine_ema,
    weighted_sum,
)

CONFLICT = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])  # two tasks whose gradients point apart


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_grads(num_tasks: int, num_params: int, seed: int) -> torch.Tensor:
    """Gradients of different lengths, most pairs with a clear cosine of either sign, (K, P) float64."""
    generator = seeded(seed)
    grads = torch.randn(num_tasks, num_params, generator=generator, dtype=torch.float64)
    return grads * 10 ** torch.empty(num_tasks, 1, dtype=torch.float64).uniform_(-2, 2, generator=generator)


def meetings(tasks, seed: int) -> torch.Tensor:
    """(K, K) the order in which each of K tasks meets the others; `tasks` are K of anything."""
    return pcgrad_module.draw_orders(len(tasks), seeded(seed))


def draw_orders(num_tasks: int, seed: int) -> list[list[int]]:
    """The orders that a generator with this seed gives: one per task, the task itself struck out."""
    generator = seeded(seed)
    orders = [torch.randperm(num_tasks, generator=generator).tolist() for _ in range(num_tasks)]
    return [[j for j in order if j != i] for i, order in enumerate(orders)]


def textbook_pcgrad(grads: torch.Tensor, orders: list[list[int]]) -> torch.Tensor:
    """Algorithm 1 of Yu et al. on the vectors themselves, (K, P) -> (P,)."""
    total = torch.zeros_like(grads[0])
    for i, order in enumerate(orders):
        adjusted = grads[i].clone()
        for j in order:
            product = adjusted @ grads[j]
            if product < 0:
                adjusted -= product / (grads[j] @ grads[j]) * grads[j]
        total += adjusted
    return total


def textbook_gradvac(grads: torch.Tensor, orders: list[list[int]], targets: torch.Tensor) -> torch.Tensor:
    """Algorithm 1 of Wang et al. on the vectors themselves, with fixed targets (K, K)."""
    total = torch.zeros_like(grads[0])
    for i, order in enumerate(orders):
        adjusted = grads[i].clone()
        for j in order:
            cosine = adjusted @ grads[j] / (adjusted.norm() * grads[j].norm())
            target = targets[i, j]
            if cosine < target:
                numerator = adjusted.norm() * (
                    target * (1 - cosine**2).sqrt() - cosine * (1 - target**2).sqrt()
                )
                adjusted += numerator / (grads[j].norm() * (1 - target**2).sqrt()) * grads[j]
        total += adjusted
    return total


# --- inner products -----------------------------------------------------------------------------------------


# Around the borders of blocks and chunks, and sizes that none of them divides.
SIZES = [0, 1, 7, BLOCK_SIZE - 1, BLOCK_SIZE, 3 * BLOCK_SIZE + 11, CHUNK_SIZE, CHUNK_SIZE + 1]
SIZES += [2 * CHUNK_SIZE + BLOCK_SIZE + 11]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tasks", [1, 3])
@pytest.mark.parametrize("num_params", SIZES)
def test_gram_matrix_and_weighted_sum_equal_the_products_in_float64(num_tasks, num_params, dtype):
    generator = seeded(num_params)
    grads = torch.randn(num_tasks, num_params, generator=generator).to(dtype)
    weights = torch.randn(num_tasks, generator=generator)
    kept, kept_weights = grads.clone(), weights.clone()
    gram, exact = gram_matrix(grads), grads.double() @ grads.double().T
    assert gram.shape == (num_tasks, num_tasks) and gram.dtype == torch.float32
    # Relative to the lengths: float32 has 1.2e-7, and sums over a block add a little to it. Rounding
    # bfloat16's products even once to bfloat16 would be off by 4e-3.
    scale = float(exact.diagonal().max()) if num_params else 1.0
    torch.testing.assert_close(gram.double(), exact, rtol=0, atol=1e-5 * scale)
    buffer = torch.full((num_params + 2,), math.nan)
    assert weighted_sum(grads, weights, buffer[1:-1]) is None
    # float32: three products of order 1, added
    expected = weights.double() @ grads.double()
    torch.testing.assert_close(buffer[1:-1].double(), expected, rtol=1e-6, atol=1e-6)
    assert buffer[0].isnan() and buffer[-1].isnan()
    assert torch.equal(grads, kept) and torch.equal(weights, kept_weights)


def test_gram_matrix_by_hand():
    expected = torch.tensor([[18.0, -22.0], [-22.0, 38.0]])
    assert torch.equal(gram_matrix(CONFLICT), expected)  # small whole numbers are exact
    assert torch.equal(gram_matrix(CONFLICT.bfloat16()), expected)
    # 65537 takes 17 bits, 1 + 2**-16 as many: with the 8 of bfloat16 they would be 65536 and 1.
    grads = torch.tensor([[256.0, 1.0, 2**-5], [1.0, 2**-8, 0.0]]).bfloat16()
    expected = torch.tensor([[65537.0 + 2**-10, 256 + 2**-8], [256 + 2**-8, 1 + 2**-16]])
    torch.testing.assert_close(gram_matrix(grads), expected, rtol=1e-7, atol=0)  # float32: 2**-24


@pytest.mark.parametrize("method", ["pcgrad", "gradvac"])
def test_only_adjusted_tasks_change(method):
    grads = random_grads(4, 6, seed=0)
    gram = grads @ grads.T
    assert (gram < 0).any()
    ema = torch.full((4, 4), 0.3, dtype=torch.float64) if method == "gradvac" else None

    def combine(*adjusted):
        flags = [i in adjusted for i in range(4)]
        return GRAD_METHODS[method].weights(TaskFacts(gram, meetings(gram, 3), ema, torch.tensor(flags)))

    assert torch.equal(combine(), torch.ones(4, dtype=torch.float64))
    everything = GRAD_METHODS[method].weights(TaskFacts(gram, meetings(gram, 3), ema))
    assert torch.equal(combine(0, 1, 2, 3), everything)
    # Tasks are adjusted independently of each other, so their changes add up (float64).
    torch.testing.assert_close(1 + sum(combine(i) - 1 for i in range(4)), everything)


def test_cosine_matrix_by_hand_and_of_several_grams():
    """Vectors (3, 4), (4, -3), (-6, -8), 0: right angle, opposite, and a zero gradient."""
    grads = torch.tensor([[3.0, 4.0], [4.0, -3.0], [-6.0, -8.0], [0.0, 0.0]])
    expected = torch.tensor([[1.0, 0.0, -1.0, 0.0], [0.0, 1.0, 0.0, 0.0], [-1.0, 0.0, 1.0, 0.0], [0.0] * 4])
    grams = torch.stack([grads @ grads.T, torch.zeros(4, 4)])
    torch.testing.assert_close(cosine_matrix(grams), torch.stack([expected, torch.zeros(4, 4)]))  # float32
    for scale in (1.0, 1e-15, 1e15):  # lengths whose squares still fit into float32
        cosine = cosine_matrix(gram_matrix(CONFLICT * scale))[0, 1].item()
        assert cosine == pytest.approx(-22 / math.sqrt(18 * 38), rel=1e-6)
    rounded = torch.tensor([[1.0, 1.0001], [1.0001, 1.0]])  # inner products rounded up
    assert cosine_matrix(rounded).max() == 1 and cosine_matrix(-rounded).min() >= -1


def test_update_cosine_ema_by_hand():
    first, second = torch.tensor([[4.0, -2.0], [-2.0, 4.0]]), torch.tensor([[9.0, 4.5], [4.5, 9.0]])
    assert COSINE_EMA_BETA == 0.01
    ema = update_cosine_ema(None, first)  # from 0 a hundredth of the way to -0.5
    torch.testing.assert_close(ema, torch.tensor([[0.01, -0.005], [-0.005, 0.01]]))  # float32 rounding
    kept = ema.clone()
    updated = update_cosine_ema(ema, second)  # 0.99 * 0.01 + 0.01 and 0.99 * -0.005 + 0.005
    torch.testing.assert_close(updated, torch.tensor([[0.0199, 0.00005], [0.00005, 0.0199]]))
    assert torch.equal(ema, kept)
    absent = torch.tensor([[9.0, 0.0], [0.0, 0.0]])  # the second task had no batch
    expected = torch.tensor([[0.99 * 0.01 + 0.01, -0.005], [-0.005, 0.01]])
    torch.testing.assert_close(update_cosine_ema(ema, absent), expected)


# --- PCGrad -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tasks", [2, 3, 4, 5])
def test_pcgrad_equals_the_vector_form(num_tasks):
    for seed in range(40):
        grads = random_grads(num_tasks, 4, seed)  # few dimensions: conflicts are strong and chain
        weights = pcgrad(TaskFacts(grads @ grads.T, meetings(grads, seed)))
        expected = textbook_pcgrad(grads, draw_orders(num_tasks, seed))
        # float64 on both sides. What remains of a vector after projections may be small beside what was taken
        # out, so the error is measured against the longest gradient.
        error = (weights @ grads - expected).norm() / grads.norm(dim=1).max()
        assert error < 1e-6, seed


def test_pcgrad_from_float32_gradients():
    """The path of a run: float32 rows, blockwise inner products, weights back in float32."""
    grads = random_grads(3, 2 * BLOCK_SIZE + 5, seed=1)
    # Noise of many dimensions alone hardly conflicts.
    grads[1] -= 5 * grads[0] * grads[1].norm() / grads[0].norm()
    weights = pcgrad(TaskFacts(gram_matrix(grads.float()), meetings(grads, 1)))
    expected = textbook_pcgrad(grads, draw_orders(3, 1))
    assert weights.dtype == torch.float32
    # Weights inherit the inner products' 1e-6 or so.
    assert (weights.double() @ grads - expected).norm() / grads.norm(dim=1).max() < 1e-4


def test_order_is_redrawn_for_each_task():
    """Three tasks in conflict have 2 orders each, so 2 ** 3 results; one order for all gives at most 6."""
    grads = torch.tensor([[1.0, 0.0, 0.2], [-0.7, 0.9, 0.1], [-0.5, -0.8, 0.3]], dtype=torch.float64)
    gram = grads @ grads.T
    assert gram[0, 1] < 0 and gram[0, 2] < 0 and gram[1, 2] < 0
    others = [[1, 2], [0, 2], [0, 1]]
    all_orders = itertools.product(*(itertools.permutations(rest) for rest in others))
    expected = {rounded(textbook_pcgrad(grads, orders)) for orders in all_orders}
    num_draws = 320
    counts = Counter(
        rounded(pcgrad(TaskFacts(gram, meetings(gram, seed))) @ grads) for seed in range(num_draws)
    )
    assert len(expected) == 8 and set(counts) == expected
    # Each comes up with probability 1/8; 5 standard errors of the binomial, and the seeds are fixed.
    standard_error = math.sqrt(num_draws / 8 * 7 / 8)
    assert all(abs(count - num_draws / 8) < 5 * standard_error for count in counts.values())


def rounded(vector: torch.Tensor) -> tuple[float, ...]:
    return tuple(round(value, 8) + 0.0 for value in vector.tolist())


# Gradients -> weights by hand.
SPECIAL = {
    "no conflict is the plain sum": ([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0], [1.0, 1.0, 0.5]], [1.0, 1.0, 1.0]),
    "three that are the same": ([[1.0, 2.0]] * 3, [1.0, 1.0, 1.0]),
    # Each is projected onto the other, nothing of either is left.
    "opposite ones cancel": ([[1.0, 0.0], [-2.0, 0.0]], [3.0, 1.5]),
    "zero neither changes nor is changed": ([*CONFLICT.tolist(), [0.0] * 3], [1 + 22 / 18, 1 + 22 / 38, 1.0]),
    "a million times longer": (
        (CONFLICT * torch.tensor([[1e6], [1]])).tolist(),
        [1 + 22 / 18e6, 1 + 22e6 / 38],
    ),
    # Squared lengths still fit into float32.
    "tiny": ((CONFLICT * 1e-15).tolist(), [1 + 22 / 18, 1 + 22 / 38]),
    "huge": ((CONFLICT * 1e15).tolist(), [1 + 22 / 18, 1 + 22 / 38]),
}


@pytest.mark.parametrize("case", SPECIAL)
def test_pcgrad_of_special_gradients_by_hand(case):
    grads, expected = SPECIAL[case]
    weights = pcgrad(TaskFacts(gram_matrix(torch.tensor(grads)), meetings(grads, 0)))
    torch.testing.assert_close(weights, torch.tensor(expected), rtol=1e-5, atol=0)  # float32


# --- GradVac ------------------------------------------------------------------------------------------------


def random_targets(num_tasks: int, seed: int) -> torch.Tensor:
    """Running means of cosines, symmetric, of either sign, (K, K) float64."""
    raw = torch.empty(num_tasks, num_tasks, dtype=torch.float64).uniform_(-0.9, 0.9, generator=seeded(seed))
    return (raw + raw.T) / 2


@pytest.mark.parametrize("num_tasks", [2, 3, 4])
def test_gradvac_equals_the_vector_form(num_tasks):
    for seed in range(40):
        grads, targets = random_grads(num_tasks, 5, seed), random_targets(num_tasks, 1000 + seed)
        weights = gradvac(TaskFacts(grads @ grads.T, meetings(grads, seed), targets))
        expected = textbook_gradvac(grads, draw_orders(num_tasks, seed), targets)
        # As for PCGrad; lifting a short gradient along a long one adds nothing longer than the former.
        assert (weights @ grads - expected).norm() / grads.norm(dim=1).max() < 1e-6, seed


@pytest.mark.parametrize("num_tasks", [2, 3, 5])
def test_gradvac_without_a_running_mean_is_pcgrad(num_tasks):
    for seed in range(20):
        grads = random_grads(num_tasks, 4, seed)
        gram = grads @ grads.T
        assert torch.equal(
            gradvac(TaskFacts(gram, meetings(gram, seed))), pcgrad(TaskFacts(gram, meetings(gram, seed)))
        )
        zero = torch.zeros(num_tasks, num_tasks)
        assert torch.equal(
            gradvac(TaskFacts(gram, meetings(gram, seed), zero)),
            pcgrad(TaskFacts(gram, meetings(gram, seed))),
        )


def test_gradvac_target_of_one_stays_finite():
    """The formula divides by sqrt(1 - target ** 2); the target is capped at 0.99."""
    grads = CONFLICT.double()
    weights = gradvac(TaskFacts(grads @ grads.T, meetings(grads, 0), torch.ones(2, 2)))
    capped = gradvac(
        TaskFacts(grads @ grads.T, meetings(grads, 0), torch.full((2, 2), 0.99, dtype=torch.float64))
    )
    assert weights.isfinite().all() and torch.equal(weights, capped)

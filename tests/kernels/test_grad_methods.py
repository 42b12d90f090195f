"""kernels/grad_methods.py: every row by hand, against TorchJD, and what the table promises of all of them."""

import math

import pytest
import torch

from kernels.grad_methods import (
    GRAD_METHODS,
    GRAD_REDUCTIONS,
    combination_weights,
    weights_by_group,
)
from pcgrad import TaskFacts, gram_matrix
from support.specs import find_row
from tests.test_pcgrad import CONFLICT, meetings, random_grads, random_targets, seeded

ORDERED, RANDOM = {"pcgrad", "gradvac"}, {"random"}  # what draws an order, and what draws weights


def weigh(spec: str, gram: torch.Tensor, seed: int = 0, ema=None, **facts) -> torch.Tensor:
    """The weights of a method, such as `cagrad:c=0.4`, at its first step or with the `state` given."""
    method, params = find_row(spec, GRAD_METHODS)
    state = {name: torch.zeros(len(gram), dtype=torch.float64) for name in method.state} | facts.pop(
        "state", {}
    )
    orders, generator = meetings(gram, seed), seeded(seed)
    return method.weights(
        TaskFacts(gram, orders, ema, params=params, state=state, generator=generator, **facts)
    )


# --- by hand ------------------------------------------------------------------------------------------------

# g1 = (-4, 1, 1), g2 = (6, 1, 1): g1.g2 = -22, |g1|^2 = 18, |g2|^2 = 38, cosine -0.8412.
HAND_COMBINED = {
    "sum": [2.0, 2.0, 2.0],
    "mean": [1.0, 1.0, 1.0],
    # g1 + 22/38 g2 = (-0.5263, 1.5789, 1.5789) and g2 + 22/18 g1 = (1.1111, 2.2222, 2.2222), added
    "pcgrad": [0.5848, 3.8012, 3.8012],
    "gradvac": [0.5848, 3.8012, 3.8012],  # without a running mean it is PCGrad
    "mgda": [0.0, 1.0, 1.0],  # the line from g1 to g2 comes nearest to 0 at 0.6 g1 + 0.4 g2
    "upgrad": [0.2924, 1.9006, 1.9006],  # of two tasks, half of PCGrad's
    "dualproj": [0.5556, 1.1111, 1.1111],  # the mean (1, 1, 1) has -2 with g1: plus 2/18 g1
    # Of two tasks, weights go by 1 / length: 6.1644 and 4.2426 over their sum.
    "imtl_g": [0.0767, 1.0, 1.0],
    # Along the sum of the unit gradients, (0.0542, 0.7061, 0.7061), as long as 1.1955 + 1.7371.
    "config": [0.1588, 2.0706, 2.0706],
    # Eigenvalues 52.1661 and 3.8339; the square root of the gram matrix is (gram + sqrt(200)) / 9.1806.
    "aligned_mtl": [0.2133, 0.9673, 0.9673],
    "krum": [-4.0, 1.0, 1.0],  # two are equally far from each other: the first
    # x + 2 + 0.4 sqrt(3) sqrt(x^2 + 2) over x from -4 to 6, the first entry of g_w, grows: g_w = g1.
    "cagrad": [0.3468, 1.1633, 1.1633],
    # w = t / length with t^2 (1 + cosine) = 1.
    "fairgrad:alpha=1": [0.0766, 0.9985, 0.9985],
    "nash_mtl": [0.0542, 0.7061, 0.7061],  # the same direction, cut to length 1
    "random": None,  # see below
    "cr_mogm": [0.0, 1.0, 1.0],  # at its first step that of MGDA
}


def test_every_method_by_hand_and_what_the_rows_say():
    assert {spec.partition(":")[0] for spec in HAND_COMBINED} == set(GRAD_METHODS)
    for spec, expected in HAND_COMBINED.items():
        if expected:
            combined = weigh(spec, gram_matrix(CONFLICT)).float() @ CONFLICT
            torch.testing.assert_close(combined, torch.tensor(expected), rtol=0, atol=6e-5, msg=spec)
    assert {name for name in GRAD_METHODS if GRAD_METHODS[name].changes_gradients} == ORDERED
    assert {method.reduction for method in GRAD_METHODS.values()} == set(GRAD_REDUCTIONS)


# Of orthogonal gradients of length 1: a mean, a sum, or what the docstring says.
ORTHOGONAL = dict.fromkeys(("mean", "mgda", "upgrad", "dualproj", "imtl_g", "aligned_mtl", "cr_mogm"), 1 / 3)
ORTHOGONAL |= dict.fromkeys(("sum", "pcgrad", "gradvac", "config", "fairgrad"), 1.0)
ORTHOGONAL |= {"nash_mtl": 1 / math.sqrt(3), "cagrad": (1 + 0.4) / 3}


@pytest.mark.parametrize("name", ORTHOGONAL)
def test_means_average_orthogonal_gradients_and_sums_add_them_up(name):
    weights = weigh(name, torch.eye(3, dtype=torch.float64))
    expected = torch.full((3,), ORTHOGONAL[name], dtype=torch.float64)
    torch.testing.assert_close(weights, expected, rtol=2e-6, atol=0)  # a ridge of 1e-6
    assert GRAD_METHODS[name].is_mean == (ORTHOGONAL[name] < 0.5)


def test_random_weights_are_a_softmax_of_normal_numbers():
    draws = torch.stack([weigh("random", torch.eye(3), seed) for seed in range(2000)])
    torch.testing.assert_close(draws.sum(1), torch.ones(2000, dtype=torch.float64))
    # The mean of 2000 draws with a standard deviation of about 0.2: 5 standard errors.
    torch.testing.assert_close(draws.mean(0), torch.full((3,), 1 / 3).double(), rtol=0, atol=0.025)
    ratios = (draws[:, 0] / draws[:, 1]).log()  # a difference of two normal numbers
    assert float(ratios.std()) == pytest.approx(math.sqrt(2), rel=0.08)


def test_fair_weights_solve_their_equation_and_a_single_task_has_the_papers_length():
    for alpha in (0.5, 1.0, 2.0, 8.0):
        for seed in range(10):
            grads = random_grads(4, 9, seed)
            weights = weigh(f"fairgrad:alpha={alpha}", grads @ grads.T)
            # The ridge of 1e-6 is magnified where gradients conflict.
            torch.testing.assert_close(grads @ (weights @ grads), weights ** (-1 / alpha), rtol=1e-2, atol=0)
    assert float(weigh("fairgrad:alpha=1", torch.tensor([[9.0]]))) == pytest.approx(1 / 3, rel=1e-5)
    # w^(3/2) = 1/64: w = 64^(-2/3)
    assert float(weigh("fairgrad:alpha=2", torch.tensor([[64.0]]))) == pytest.approx(1 / 16, rel=1e-5)


def test_mgda_finds_the_shortest_mean():
    """Its certificate: no gradient has an inner product with the mean below the mean's own square."""
    for seed in range(20):
        for grads in (random_grads(5, 4, seed), torch.randn(3, 9, generator=seeded(seed)).double()):
            mean = weigh("mgda", grads @ grads.T) @ grads
            # Weights are good to 1e-8 of the longest gradient, whose square is the scale.
            assert (grads @ mean).min() > mean @ mean - 1e-7 * grads.norm(dim=1).max() ** 2
            assert float(weigh("mgda", grads @ grads.T).sum()) == pytest.approx(1)


def test_nash_mtl_keeps_its_weights_between_bargains():
    first, second = CONFLICT @ CONFLICT.T, torch.tensor([[4.0, 1.0], [1.0, 9.0]])
    options = {"grad_method": "nash_mtl:every=2,max_norm=1000", "grad_reduction": "sum", "num_batches": 2}
    orders, outcomes, state = meetings(first, 0), [], {}
    for gram in (first, second, second):
        weights, state = combination_weights(TaskFacts(gram, orders, state=state), [0, 1], **options)
        outcomes.append(weights)
    assert torch.equal(outcomes[0], outcomes[1]) and not torch.equal(outcomes[1], outcomes[2])


def test_cr_mogm_smooths_by_hand():
    gram = CONFLICT @ CONFLICT.T
    state = {"weights": torch.tensor([1.0, 0.0]).double(), "age": torch.tensor([3.0, 0.0]).double()}
    # MGDA is (0.6, 0.4); the second task had no batch yet.
    expected = torch.tensor([0.9 * 1 + 0.1 * 0.6, 0.4]).double()
    torch.testing.assert_close(weigh("cr_mogm", gram, state=state), expected)


def test_krum_leaves_out_the_gradient_that_stands_apart():
    grads = torch.tensor([[1.0, 0.0], [1.1, 0.0], [-5.0, 3.0], [0.9, 0.1]]).double()
    weights = weigh("krum:f=1,n=3", grads @ grads.T)
    torch.testing.assert_close(weights, torch.tensor([1 / 3, 1 / 3, 0.0, 1 / 3]).double())


def test_no_task_loses_by_upgrad_dualproj_and_mgda():
    for seed in range(20):
        grads = random_grads(4, 6, seed)
        for name in ("upgrad", "dualproj", "mgda"):
            gains = grads @ (weigh(name, grads @ grads.T) @ grads)
            assert (gains > -1e-6 * grads.norm(dim=1) * grads.norm(dim=1).max()).all(), (name, seed)


# --- against TorchJD ----------------------------------------------------------------------------------------

# Its projections normalise and regularise by 1e-4 unless told otherwise. Its MGDA is Frank-Wolfe, which
# nears the end slowly.
TORCHJD = {
    "mgda": ("MGDAWeighting", {"epsilon": 1e-6, "max_iters": 1000}, 0.05),
    "upgrad": ("UPGradWeighting", "exact", 1e-5),
    "dualproj": ("DualProjWeighting", "exact", 1e-5),
    "imtl_g": ("IMTLGWeighting", {}, 1e-5),
    "aligned_mtl": ("AlignedMTLWeighting", {}, 1e-5),
    "krum:f=1,n=2": ("KrumWeighting", {"n_byzantine": 1, "n_selected": 2}, 1e-9),
    "cagrad:c=0.4": ("CAGradWeighting", {"c": 0.4, "norm_eps": 1e-12}, 1e-4),
    "fairgrad:alpha=2": ("FairGradWeighting", {"alpha": 2.0}, 1e-3),
}


@pytest.mark.parametrize("spec", TORCHJD)
def test_weights_equal_those_of_torchjd(spec):
    aggregation = pytest.importorskip("torchjd.aggregation")
    name, options, tolerance = TORCHJD[spec]
    if options == "exact":
        linalg = pytest.importorskip("torchjd.linalg")
        options = {"projector": linalg.QuadprogProjector(norm_eps=0.0, reg_eps=0.0)}
    try:
        peer = getattr(aggregation, name)(**options)
    except (ImportError, NameError) as error:  # of quadprog or cvxpy, which it may do without
        pytest.skip(str(error).splitlines()[0])
    for num_tasks in (4, 6):
        for seed in range(4):
            grads = torch.randn(num_tasks, 12, generator=seeded(seed), dtype=torch.float64)
            grads[0] -= grads[1]  # some conflict
            gram = grads @ grads.T
            torch.testing.assert_close(weigh(spec, gram), peer(gram), rtol=tolerance, atol=tolerance)


def test_config_and_nash_mtl_combine_as_torchjd_does():
    aggregation = pytest.importorskip("torchjd.aggregation")
    for seed in range(10):
        grads = torch.randn(3, 8, generator=seeded(seed), dtype=torch.float64)
        torch.testing.assert_close(weigh("config", grads @ grads.T) @ grads, aggregation.ConFIG()(grads))
        try:
            peer = aggregation.NashMTL(n_tasks=3)
        except (ImportError, NameError):
            continue  # it needs cvxpy and ecos
        # It stops its approximations early.
        torch.testing.assert_close(
            weigh("nash_mtl", grads @ grads.T) @ grads, peer(grads), rtol=0.02, atol=0.02
        )


def test_cr_mogm_smooths_as_torchjd_does():
    aggregation = pytest.importorskip("torchjd.aggregation")
    peer = aggregation.CRMOGMWeighting(aggregation.MGDAWeighting(1e-6, 1000), alpha=0.9)
    options = {"grad_method": "cr_mogm", "grad_reduction": "mean", "num_batches": 3}
    state = {}
    for seed in range(5):
        grads = torch.randn(3, 8, generator=seeded(seed), dtype=torch.float64)
        facts = TaskFacts(grads @ grads.T, meetings(grads, 0), state=state)
        weights, state = combination_weights(facts, [0, 1, 2], **options)
        torch.testing.assert_close(weights, peer(grads @ grads.T), rtol=0, atol=0.05)


# --- what every row promises --------------------------------------------------------------------------------


def awkward_grads() -> dict[str, torch.Tensor]:
    """Gradient matrices that could break a division or a square root."""
    generator = seeded(7)
    one, other = torch.randn(2, 9, generator=generator)
    return {
        "random": torch.randn(4, 9, generator=generator),
        "all zero": torch.zeros(3, 9),
        "one zero": torch.stack([one, torch.zeros(9), -one + 0.1 * other]),
        "identical": torch.stack([one, one, one]),
        "opposite": torch.stack([one, -one, one]),
        "opposite and longer": torch.stack([one, -1000 * one]),
        "nearly opposite": torch.stack([one, -one + 1e-4 * other, other]),
        "huge": 1e17 * torch.randn(3, 9, generator=generator),
        "tiny": 1e-17 * torch.randn(3, 9, generator=generator),
        "tiny beyond float32": 1e-25 * torch.randn(3, 9, generator=generator),  # the inner products are 0
        # Inner products: large, -1e-15 or so, 0.
        "one square underflows": torch.stack([1e10 * one, -1e-25 * one]),
        "huge and tiny": torch.stack([1e15 * one, -1e-15 * one, 1e-15 * other]),
        "single task": one[None],
    }


@pytest.mark.parametrize("case", awkward_grads())
@pytest.mark.parametrize("name", GRAD_METHODS)
def test_weights_are_finite_and_inputs_unmodified(name, case):
    gram = gram_matrix(awkward_grads()[case])
    kept, method = gram.clone(), GRAD_METHODS[name]
    for ema in (None, random_targets(len(gram), 3).float()):
        weights = weigh(name, gram, ema=ema)
        assert weights.shape == (len(gram),) and weights.isfinite().all() and torch.equal(gram, kept)
        assert ema is None or torch.equal(ema, random_targets(len(gram), 3).float())
        if case == "single task":
            # Where weights do not depend on the scale, it is left alone.
            is_constant = method.degree and not method.degree(find_row(name, GRAD_METHODS)[1])
            expected = 1.4 if name == "cagrad" else 1.0 if is_constant else float(weights)
            assert float(weights) == pytest.approx(expected, rel=1e-12)
    options = {"grad_reduction": method.reduction, "num_batches": len(gram)}
    facts = TaskFacts(gram, meetings(gram, 0), generator=seeded(0))
    present = list(range(len(gram)))
    weights, state = combination_weights(facts, present, grad_method=name, **options)
    assert weights.dtype == gram.dtype and weights.isfinite().all()
    assert set(state) == set(method.state) and all(each.isfinite().all() for each in state.values())


@pytest.mark.parametrize("name", [name for name in GRAD_METHODS if name not in RANDOM])
def test_permuting_tasks_permutes_weights(name):
    """But for the order of projections, which is permuted along."""
    for seed in range(10):
        grads = torch.randn(4, 9, generator=seeded(seed), dtype=torch.float64)
        order = torch.randperm(4, generator=seeded(seed))
        orders, place = meetings(grads, seed), order.argsort()
        method, params = find_row(name, GRAD_METHODS)
        state = {each: torch.zeros(4, dtype=torch.float64) for each in method.state}
        gram = grads @ grads.T
        weights = method.weights(TaskFacts(gram, orders, params=params, state=state))
        facts = TaskFacts(gram[order][:, order], place[orders[order]], params=params, state=state)
        # CAGrad's solver stops at 1e-7 or so.
        torch.testing.assert_close(method.weights(facts), weights[order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", GRAD_METHODS)
def test_longer_gradients_change_weights_as_the_row_says(name):
    grads = torch.randn(4, 9, generator=seeded(5), dtype=torch.float64)
    method, params = find_row(name, GRAD_METHODS)
    weights, longer = (weigh(name, scale**2 * grads @ grads.T) for scale in (1.0, 8.0))
    if method.degree is not None:
        torch.testing.assert_close(longer, 8.0 ** method.degree(params) * weights, rtol=1e-5, atol=1e-6)
    combined = [
        weigh(name, each @ each.T) @ each for each in (grads, grads * torch.tensor([[5.0], [1], [1], [1]]))
    ]
    cosine = float(torch.cosine_similarity(*combined, dim=0))
    assert (cosine > 1 - 1e-5) == method.ignores_scale, cosine


@pytest.mark.parametrize("name", GRAD_METHODS)
def test_same_seed_gives_the_same_bits_and_global_random_state_is_untouched(name):
    grads = random_grads(5, 3, seed=11)
    gram, ema = grads @ grads.T, random_targets(5, 4)
    state = torch.get_rng_state()
    weights = weigh(name, gram, 2, ema)
    assert weights.dtype == torch.float64 and torch.equal(torch.get_rng_state(), state)
    torch.rand(3)  # a random call elsewhere changes nothing
    assert torch.equal(weigh(name, gram, 2, ema), weights)
    results = {tuple(weigh(name, gram, seed, ema).tolist()) for seed in range(20)}
    # The seed matters where an order or weights are drawn.
    assert (len(results) > 1) == (name in ORDERED | RANDOM)


@pytest.mark.parametrize("name", GRAD_METHODS)
def test_absent_tasks_have_no_weight_and_keep_their_state(name):
    grads = torch.randn(3, 9, generator=seeded(5), dtype=torch.float64)
    grads[1] = 0.0
    gram, state = (
        grads @ grads.T,
        {name: torch.tensor([1.0, 2.0, 3.0]).double() for name in ("weights", "age")},
    )
    method = GRAD_METHODS[name]
    options = {"grad_reduction": method.reduction, "num_batches": 2}
    facts = TaskFacts(gram, meetings([0, 2], 0), state=state, generator=seeded(0))
    weights, after = combination_weights(facts, [0, 2], grad_method=name, **options)
    assert weights[1] == 0 and all(each[1] == 2.0 for each in after.values())
    few = TaskFacts(gram[::2, ::2], meetings([0, 2], 0), generator=seeded(0))
    few = TaskFacts(
        few.gram, few.orders, state={each: state[each][::2] for each in state}, generator=few.generator
    )
    expected, _ = combination_weights(few, [0, 1], grad_method=name, **options)
    assert torch.equal(weights[[0, 2]], expected)


@pytest.mark.parametrize("name", GRAD_METHODS)
def test_each_group_by_itself(name):
    """With its own gram matrix and its own state, step after step."""
    grams = [grads @ grads.T for grads in torch.randn(2, 3, 9, generator=seeded(1), dtype=torch.float64)]
    options = {"grad_method": name, "grad_reduction": GRAD_METHODS[name].reduction, "num_batches": 3}
    orders, present = meetings(grams[0], 0), [0, 1, 2]
    learned, states = {}, [{}, {}]
    for step in range(3):
        grams = [gram + step * torch.eye(3) for gram in grams]
        facts = TaskFacts(grams[0], orders, state=learned, generator=seeded(step))
        weights, learned = weights_by_group(facts, torch.stack(grams), present, **options)
        generator = seeded(step)
        for n, gram in enumerate(grams):
            facts = TaskFacts(gram, orders, state=states[n], generator=generator)
            alone, states[n] = combination_weights(facts, present, **options)
            assert torch.equal(weights[n], alone)

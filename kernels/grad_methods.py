"""Every gradient method: from the inner products of the task gradients to the weights of their sum.

A method never sees the gradients, see pcgrad.py: the combined gradient is weights @ G, and for K tasks that
is arithmetic on a K x K matrix, in float64. PCGrad and GradVac are in pcgrad.py; here are the others, and the
table. To add one, write a function TaskFacts -> weights (K,) and its row in GRAD_METHODS.

What holds for every method, and is tested for every row: permuting the tasks permutes the weights (but for
random draws, and for ties), and gradients that are zero, equal or opposite give finite weights. What a single
task gets, and what becomes of the weights where all gradients grow by a factor, the rows say.

Shapes: K tasks, P shared parameters, G (K, P) the task gradients, gram = G G^T. 1 is the vector of ones.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from pcgrad import TaskFacts, cosine_matrix, gradvac, pcgrad
from support.command_line import number
from support.specs import Param, find_row

RANK_TOLERANCE = 1e-6  # eigenvalues below this share of the largest are rounding of float32 inner products
FAIR_RIDGE = 1e-6  # added to the squared lengths, relatively, so that opposite gradients have fair weights
FAIR_ITERATIONS = 100


# --- parts that methods share -------------------------------------------------------------------------------


def scaled(gram: Tensor) -> Tensor:
    """The matrix in float64, its largest squared length 1, so that nothing over- or underflows."""
    gram = gram.double()
    largest = gram.diagonal().max()
    return gram / largest if largest > 0 else torch.zeros_like(gram)


def square_root(gram: Tensor) -> np.ndarray:
    """R (K, K) with R^T R = gram: its columns have the inner products of the gradients."""
    values, vectors = torch.linalg.eigh(gram)
    return (values.clamp(min=0).sqrt()[:, None] * vectors.T).numpy()


def least_above(gram: Tensor, floor: Tensor) -> Tensor:
    """The v >= floor, entry by entry, with the shortest gradient: min v^T gram v, (K,).

    With v = floor + x, and R the square root, it is min |R x + R floor| over x >= 0: non-negative least
    squares.
    """
    from scipy.optimize import nnls  # imported late: --help does not wait for it

    root = square_root(gram)
    return floor + torch.from_numpy(nnls(root, -root @ floor.numpy())[0])


def shortest_mean(gram: Tensor) -> Tensor:
    """The convex weights, (K,), of the shortest gradient: min w^T gram w, w >= 0, sum w = 1.

    x >= 0 that minimises |R x|^2 + (sum x - 1)^2 is a multiple of it, as the first term grows with the square
    of such a multiple whatever the direction.
    """
    from scipy.optimize import nnls

    num_tasks = len(gram)
    rows = np.vstack([square_root(gram), np.ones(num_tasks)])
    x = torch.from_numpy(nnls(rows, np.eye(num_tasks + 1)[-1])[0])
    return x / x.sum()


def equal_angles(gram: Tensor) -> tuple[Tensor, Tensor]:
    """A direction with equal cosines to all, as coefficients (K,) of unit gradients; the cosines (K, K).

    C^+ 1, with the pseudo-inverse of the cosine matrix C.
    """
    cosines = cosine_matrix(scaled(gram))
    return torch.linalg.pinv(cosines, hermitian=True, rtol=RANK_TOLERANCE).sum(1), cosines


def divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0."""
    return torch.where(b > 0, a / torch.where(b > 0, b, 1.0), 0.0)


def fair_weights(gram: Tensor, alpha: float) -> Tensor:
    """w > 0 with gram w = w^(-1/alpha), (K,); 0 for a zero gradient.

    The unique minimum of w^T gram w / 2 - sum_i h(w_i), h' = w^(-1/alpha), by Newton's method, with
    shorter steps where w > 0 would be left or it would not go down. A ridge keeps w from infinity where
    gradients cancel.
    """
    present = gram.diagonal() > 0
    if not present.any():
        return torch.zeros(len(gram), dtype=torch.float64)
    largest = float(gram.double().diagonal().max())
    inner = scaled(gram)[present][:, present].numpy()
    inner = inner + FAIR_RIDGE * np.diag(inner.diagonal())
    power = 1 / alpha

    def value(w: np.ndarray) -> float:
        gain = np.log(w) if alpha == 1 else w ** (1 - power) / (1 - power)
        return w @ inner @ w / 2 - gain.sum()

    w = (len(inner) * inner.diagonal()) ** (-1 / (1 + power))
    for _ in range(FAIR_ITERATIONS):
        slope = inner @ w - w**-power
        step = np.linalg.solve(inner + np.diag(power * w ** (-power - 1)), slope)
        size = min(1.0, 0.9 / max(1e-9, float((step / w).max())))  # w stays positive
        limit = value(w) + 1e-14 * abs(value(w))  # rounding, at the end
        while size > 1e-9 and not value(w - size * step) <= limit:
            size /= 2
        w = w - size * step
        if np.abs(step / w).max() < 1e-10:
            break
    weights = torch.zeros(len(gram), dtype=torch.float64)
    weights[present] = torch.from_numpy(w * largest ** (-1 / (1 + power)))  # as it is homogeneous
    return weights


# --- the methods: facts -> weights (K,) ---------------------------------------------------------------------


def sum_grads(facts: TaskFacts) -> Tensor:
    """Plain sum: the gradient of the summed losses."""
    return torch.ones(len(facts.gram), dtype=facts.gram.dtype, device=facts.gram.device)


def mean_grads(facts: TaskFacts) -> Tensor:
    """Plain mean: the gradient of the averaged losses."""
    return sum_grads(facts) / len(facts.gram)


def mgda(facts: TaskFacts) -> Tensor:
    """MGDA (Desideri 2012; Sener and Koltun 2018, https://arxiv.org/abs/1810.04650): the shortest mean.

        min |w G|^2 over w >= 0, sum w = 1

    It goes down for every task, or is zero, where none can gain without another's loss. Exact, not by
    Frank-Wolfe. A zero gradient gets all the weight.
    """
    return shortest_mean(scaled(facts.gram))


def upgrad(facts: TaskFacts) -> Tensor:
    """UPGrad (Quinton and Rey 2024, https://arxiv.org/abs/2406.16232): project each, then average.

    Each gradient is projected onto the cone of directions that are in conflict with none; in weights,

        w = 1/K sum_i argmin |v G|^2 over v >= e_i

    Without conflict it is the mean.
    """
    gram, rows = scaled(facts.gram), torch.eye(len(facts.gram), dtype=torch.float64)
    return torch.stack([least_above(gram, row) for row in rows]).mean(0)


def dualproj(facts: TaskFacts) -> Tensor:
    """DualProj (Lopez-Paz and Ranzato 2017, GEM, https://arxiv.org/abs/1706.08840): average, then project.

    The mean gradient is projected onto the cone of directions in conflict with none: argmin |v G|^2 over
    v >= 1/K.
    """
    return least_above(scaled(facts.gram), mean_grads(facts).double().cpu())


def imtl_g(facts: TaskFacts) -> Tensor:
    """IMTL-G (Liu et al. 2021, https://openreview.net/forum?id=IMPnRXEWpvr): equal projections.

    The combined gradient has the same inner product with each unit gradient g_i / |g_i|, and its weights sum
    to 1: w_i ~ (C^+ 1)_i / |g_i|. The sum may be negative or near 0, where gradients nearly cancel: weights
    are then large; at 0 all of them are 0.
    """
    coefficients, _ = equal_angles(facts.gram)
    weights = divide(coefficients, scaled(facts.gram).diagonal().clamp(min=0).sqrt())
    total = weights.sum()
    return weights / total if total.abs() > 1e-12 * weights.abs().sum() else torch.zeros_like(weights)


def config(facts: TaskFacts) -> Tensor:
    """ConFIG (Liu, Chu and Thuerey 2024, https://arxiv.org/abs/2408.11104): equal cosines to all gradients.

    Direction u ~ sum_i (C^+ 1)_i g_i / |g_i|, length sum_i g_i . u. Of orthogonal gradients of one length it
    is their sum.
    """
    coefficients, cosines = equal_angles(facts.gram)
    norms = scaled(facts.gram).diagonal().clamp(min=0).sqrt()
    square = coefficients @ cosines @ coefficients
    length = divide(norms @ cosines @ coefficients, square)
    return length * divide(coefficients, norms)


def aligned_mtl(facts: TaskFacts) -> Tensor:
    """Aligned-MTL (Senushkin et al. 2023, https://arxiv.org/abs/2305.19000): equal principal components.

    With gram = V diag(s) V^T, weights are sqrt(s_min) V diag(1 / sqrt(s)) V^T 1/K: the matrix of gradients
    with all its singular values replaced by the smallest one that is not 0, averaged.
    """
    values, vectors = torch.linalg.eigh(scaled(facts.gram))
    kept = values > RANK_TOLERANCE * values.max()
    mean = mean_grads(facts).double().cpu()
    if not kept.any():
        return mean
    values, vectors = values[kept], vectors[:, kept]
    return vectors @ ((values.min() / values).sqrt() * (vectors.T @ mean))


def krum(facts: TaskFacts) -> Tensor:
    """Multi-Krum (Blanchard et al. 2017, https://arxiv.org/abs/1703.02757): the mean of those among others.

    A gradient's score is the sum of its distances to its K - f - 2 nearest others, at least one; the n with
    the lowest score are averaged. Made against f liars; of tasks it leaves out those that stand apart.
    """
    gram = scaled(facts.gram)
    num_tasks, num_chosen = len(gram), min(int(facts.params["n"]), len(gram))
    num_nearest = max(min(num_tasks - 1, 1), num_tasks - int(facts.params["f"]) - 2)
    squares = gram.diagonal()[:, None] + gram.diagonal() - 2 * gram
    nearest = squares.clamp(min=0).sqrt().sort(dim=1).values[:, 1 : 1 + num_nearest]  # itself is the first
    chosen = nearest.sum(1).argsort(stable=True)[:num_chosen]
    return torch.zeros(num_tasks, dtype=torch.float64).index_fill(0, chosen, 1 / num_chosen)


def cagrad(facts: TaskFacts) -> Tensor:
    """CAGrad (Liu et al. 2021, https://arxiv.org/abs/2110.14048): the best for the worst task, near the mean.

    With g0 the mean gradient: max_d min_i g_i . d over |d - g0| <= c |g0|, whose dual is

        min g_w . g0 + c |g0| |g_w| over w >= 0, sum w = 1, with g_w = w G
        d = g0 + c |g0| g_w / |g_w|

    c is 0 for the mean, and below 1 for a method that still converges to its minimum.
    """
    from scipy.optimize import minimize

    gram, num_tasks = scaled(facts.gram).numpy(), len(facts.gram)
    mean = np.full(num_tasks, 1 / num_tasks)
    radius = facts.params["c"] * np.sqrt(max(0.0, mean @ gram @ mean))

    def dual(w):
        length = np.sqrt(max(0.0, w @ gram @ w) + 1e-20)
        return w @ gram @ mean + radius * length, gram @ mean + radius * (gram @ w) / length

    sum_is_one = {"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(num_tasks)}
    options = {"jac": True, "bounds": [(0, 1)] * num_tasks, "constraints": [sum_is_one]}
    found = minimize(dual, mean, method="SLSQP", options={"ftol": 1e-14, "maxiter": 200}, **options)
    w = np.clip(found.x, 0, None)
    length = np.sqrt(max(0.0, w @ gram @ w))
    # Where the shortest gradient is zero, no step is good for all: the mean stays.
    return torch.from_numpy(mean + (radius / length * w if length > 1e-9 else 0.0))


def fairgrad(facts: TaskFacts) -> Tensor:
    """FairGrad (Ban and Ji 2024, https://arxiv.org/abs/2402.15638): alpha-fair shares of the decrease.

    The weights solve (G G^T) w = w^(-1/alpha). alpha 1 is Nash-MTL's bargain; the larger, the more equal are
    the tasks' gains. The combined gradient does not grow in proportion to the gradients: all of them s times
    as long have weights s^(-2 alpha / (1 + alpha)) times as large. A single task's is g / |g| for alpha 1.
    """
    return fair_weights(facts.gram.cpu(), facts.params["alpha"])


def nash_mtl(facts: TaskFacts) -> Tensor:
    """Nash-MTL (Navon et al. 2022, https://arxiv.org/abs/2202.01017): the Nash bargain between tasks.

    The weights solve (G G^T) w = 1 / w, with the matrix divided by its norm; the combined gradient is then
    shortened to `max_norm`. They are computed in every `every`-th step, and kept in between. Exact, not by
    the paper's sequence of convex problems.
    """
    kept = facts.state["weights"]
    if bool((kept != 0).any()) and bool((facts.state["age"] % facts.params["every"] != 0).all()):
        weights = kept
    else:
        norm = facts.gram.double().norm().cpu()
        weights = norm.sqrt() * fair_weights(facts.gram.cpu(), 1.0)
    length = (weights @ facts.gram.double().cpu() @ weights).clamp(min=0).sqrt()
    return weights * min(1.0, facts.params["max_norm"] / max(float(length), 1e-300))


def random_weights(facts: TaskFacts) -> Tensor:
    """Random gradient weights (Lin et al. 2022, https://arxiv.org/abs/2111.10603): a random softmax."""
    draws = torch.randn(len(facts.gram), generator=facts.generator, dtype=torch.float64)
    return torch.softmax(draws, 0)


def cr_mogm(facts: TaskFacts) -> Tensor:
    """CR-MOGM (Zhou et al. 2022, https://openreview.net/forum?id=jREvyL8kWB): MGDA's weights, smoothed.

        w_t = alpha w_(t-1) + (1 - alpha) MGDA_t

    A task's first step takes MGDA's weight as it is.
    """
    now, before, alpha = mgda(facts), facts.state["weights"], facts.params["alpha"]
    return torch.where(facts.state["age"] > 0, alpha * before + (1 - alpha) * now, now)


def remember_weights(facts: TaskFacts, weights: Tensor) -> dict[str, Tensor]:
    """The weights and the number of steps that each task had a batch in."""
    return {"weights": weights, "age": facts.state["age"] + 1}


# --- the table ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GradMethod:
    """A row of GRAD_METHODS.

    Args:
        weights: facts -> weights (K,).
        is_mean: it already divides by the number of tasks, so that losses are averaged, not summed.
        changes_gradients: tasks can be kept from it by `TaskFacts.adjusted`; the others weigh all of them.
        on_device: it neither waits for a GPU nor branches on a value, so that a captured step can hold it.
        degree: where all gradients are s times as long, weights are s^degree times as large; None: neither.
        ignores_scale: the direction does not change where one gradient grows, so that loss weights are lost.
        params: its parameters, by name.
        state: names of what it remembers, (K,) each; `update` (facts, weights) -> them after a step.
    """

    weights: Callable[[TaskFacts], Tensor]
    is_mean: bool = False
    changes_gradients: bool = False
    on_device: bool = False
    degree: Callable[[Mapping[str, float]], float] | None = lambda params: 0.0
    ignores_scale: bool = False
    params: Mapping[str, Param] = field(default_factory=dict)
    state: tuple[str, ...] = ()
    update: Callable[[TaskFacts, Tensor], dict[str, Tensor]] | None = None

    @property
    def reduction(self) -> str:
        """The key of GRAD_REDUCTIONS that goes with it."""
        return "mean" if self.is_mean else "sum"


COUNT, SHARE = number(int, 1), number(float, 0, 1, high_open=True)
GRAD_METHODS: dict[str, GradMethod] = {
    "sum": GradMethod(sum_grads, on_device=True),
    "mean": GradMethod(mean_grads, is_mean=True, on_device=True),
    "pcgrad": GradMethod(pcgrad, changes_gradients=True, on_device=True),
    "gradvac": GradMethod(gradvac, changes_gradients=True, on_device=True),
    "mgda": GradMethod(mgda, is_mean=True),
    "upgrad": GradMethod(upgrad, is_mean=True),
    "dualproj": GradMethod(dualproj, is_mean=True),
    "imtl_g": GradMethod(imtl_g, is_mean=True, ignores_scale=True),
    "aligned_mtl": GradMethod(aligned_mtl, is_mean=True),
    "config": GradMethod(config, ignores_scale=True),
    "krum": GradMethod(
        krum,
        is_mean=True,
        params={
            "f": Param(0, number(int, 0), "tasks that may be out of line"),
            "n": Param(1, COUNT, "tasks to average"),
        },
    ),
    "cagrad": GradMethod(cagrad, is_mean=True, params={"c": Param(0.4, SHARE, "distance from the mean")}),
    "fairgrad": GradMethod(
        fairgrad,
        degree=lambda params: -2 * params["alpha"] / (1 + params["alpha"]),
        params={"alpha": Param(2.0, number(float, 0.1, 100), "fairness")},
    ),
    "nash_mtl": GradMethod(
        nash_mtl,
        degree=None,
        ignores_scale=True,
        params={
            "max_norm": Param(
                1.0, number(float, 0, low_open=True), "greatest length of the combined gradient"
            ),
            "every": Param(1, COUNT, "steps between bargains"),
        },
        state=("weights", "age"),
        update=remember_weights,
    ),
    "random": GradMethod(random_weights, is_mean=True),
    "cr_mogm": GradMethod(
        cr_mogm,
        is_mean=True,
        params={"alpha": Param(0.9, SHARE, "share of the last step's weights")},
        state=("weights", "age"),
        update=remember_weights,
    ),
}
# Over the task batches of a step, after the method; value: is the combined gradient divided by their number?
GRAD_REDUCTIONS = {"sum": False, "mean": True}


def choose(matrix: Tensor | None, tasks: Sequence[int]) -> Tensor | None:
    """Of (K,) or (K, K) those of some tasks, without an index that would have to be copied to a GPU."""
    if matrix is None or len(tasks) == len(matrix):
        return matrix
    if matrix.ndim == 1:
        return torch.stack([matrix[i] for i in tasks])
    return torch.stack([torch.stack([matrix[i, j] for j in tasks]) for i in tasks])


def spread(values: Tensor, present: Sequence[int], others: Tensor) -> Tensor:
    """(K,) the values of the tasks that are present, in the places of those of `others`."""
    of_task = dict(zip(present, values.unbind(), strict=True))
    return torch.stack([of_task.get(k, other) for k, other in enumerate(others.unbind())])


def choose_facts(facts: TaskFacts, present: Sequence[int], params: Mapping[str, float]) -> TaskFacts:
    """Of the facts of all tasks (their `orders` excepted) those of some, for a row with these parameters."""
    chosen = {
        name: choose(getattr(facts, name), present) for name in ("gram", "cosine_ema", "adjusted", "losses")
    }
    state = {name: choose(values, present) for name, values in facts.state.items()}
    return replace(facts, **chosen, params=params, state=state)


def combination_weights(
    facts: TaskFacts,
    present: Sequence[int],
    *,
    grad_method: str,
    grad_reduction: str,
    num_batches: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(K,) the weight of each task's gradient in the combined one, and the method's state after the step.

    Tasks without a batch have weight 0, and keep their state.

    Args:
        facts: of all K tasks, but for `orders` (P, P), which are of the P that are present; `params` come
            from `grad_method`.
        present: the numbers of the tasks with a batch.
        grad_method: a key of GRAD_METHODS, maybe with parameters, as in `cagrad:c=0.4`.
        grad_reduction: a key of GRAD_REDUCTIONS.
        num_batches: task batches in the step; a task that was drawn twice has two.
    """
    method, params = find_row(grad_method, GRAD_METHODS)
    zeros = torch.zeros(len(facts.gram), dtype=torch.float64)
    before = {name: facts.state.get(name, zeros) for name in method.state}
    given = choose_facts(replace(facts, state=before), present, params)
    found = method.weights(given)
    new = method.update(given, found) if method.update else {}
    state = {name: spread(values, present, before[name]) for name, values in new.items()}
    weights = found.to(given.gram)
    if GRAD_REDUCTIONS[grad_reduction]:
        # The mean over task batches, not over tasks. A method that is a mean has already divided by the
        # number of tasks: that is undone.
        weights = weights * ((len(present) if method.is_mean else 1) / num_batches)
    return spread(weights, present, torch.zeros_like(facts.gram[0])), state


def weights_by_group(
    facts: TaskFacts, grams: Tensor, present: Sequence[int], **options
) -> tuple[Tensor, dict[str, Tensor]]:
    """`combination_weights` of several gram matrices, each by itself: weights (G, K), state (G, K).

    Args:
        facts: of all of them, but for `gram`.
        grams: (G, K, K) the whole one, or that of each layer group.
        options: as `combination_weights` has them.
    """
    outcomes = []
    for n, gram in enumerate(grams):
        state = {name: values[n] for name, values in facts.state.items()}
        outcomes.append(combination_weights(replace(facts, gram=gram, state=state), present, **options))
    names = outcomes[0][1]
    state = {name: torch.stack([state[name] for _, state in outcomes]) for name in names}
    return torch.stack([weights for weights, _ in outcomes]), state

"""Every loss weighting: factors of the losses, learned or computed, on top of --task_weights.

A factor multiplies a task's loss. It is applied after the backward pass, to the gradient of the task's head
and to its row and column of the gram matrix, before the gradient method. So a weighting may depend on the
step's own losses and gradients, and costs no pass over the encoder. To add one, write a function TaskFacts ->
factors (K,) and its row in LOSS_WEIGHTINGS.

What holds for every row, and is tested: factors are finite and not negative, whatever the losses; permuting
tasks permutes them (but for random draws). `losses` are those before --task_weights, which multiply the
outcome; what is learned starts at 0.

Shapes: K tasks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kernels.grad_methods import choose_facts, divide, random_weights, spread
from pcgrad import TaskFacts
from support.command_line import number
from support.specs import Param, find_row

MIN_LOSS = 1e-8  # a loss of 0 has no logarithm
MAX_LOG = 20.0  # of a learned factor, either way


def positive(losses: Tensor) -> Tensor:
    """In float64, and never 0."""
    return losses.double().clamp(min=MIN_LOSS)


# --- the weightings: facts -> factors (K,), and (facts, factors) -> state after the step --------------------


def fixed(facts: TaskFacts) -> Tensor:
    """--task_weights alone."""
    return torch.ones(len(facts.losses), dtype=torch.float64)


def uncertainty(facts: TaskFacts) -> Tensor:
    """Uncertainty weighting (Kendall et al. 2018, https://arxiv.org/abs/1705.07115).

    The loss is sum_i L_i / (2 s_i^2) + log s_i, with learned variances s_i^2: factors 1 / (2 s_i^2). The
    paper's form for regression, for all tasks.
    """
    return 0.5 * (-facts.state["log_variance"]).exp()


def learn_variances(facts: TaskFacts, factors: Tensor) -> dict[str, Tensor]:
    """A step of gradient descent on log s^2; half of L / s^2 is L times the factor."""
    slope = 0.5 - factors * facts.losses
    log_variance = facts.state["log_variance"] - facts.params["lr"] * slope
    return {"log_variance": log_variance.clamp(-MAX_LOG, MAX_LOG)}


def imtl_l(facts: TaskFacts) -> Tensor:
    """IMTL-L (Liu et al. 2021, https://openreview.net/forum?id=IMPnRXEWpvr): losses of one size.

    The loss is sum_i exp(s_i) L_i - s_i with learned s_i: factors exp(s_i), which tend to 1 / L_i.
    """
    return facts.state["log_factor"].exp()


def learn_factors(facts: TaskFacts, factors: Tensor) -> dict[str, Tensor]:
    """A step of gradient descent on s."""
    log_factor = facts.state["log_factor"] - facts.params["lr"] * (factors * facts.losses - 1)
    return {"log_factor": log_factor.clamp(-MAX_LOG, MAX_LOG)}


def dwa(facts: TaskFacts) -> Tensor:
    """Dynamic weight average (Liu et al. 2019, https://arxiv.org/abs/1803.10704).

    Factors K softmax(r / t), r the mean loss of the last `every` steps (the paper's epoch) over that of those
    before: tasks whose loss falls slowly count more.
    """
    last, before = facts.state["last"], facts.state["before"]
    ratios = torch.where((before > 0) & (last > 0), divide(last, before), 1.0)
    return len(ratios) * torch.softmax(ratios / facts.params["t"], 0)


def average_losses(facts: TaskFacts, factors: Tensor) -> dict[str, Tensor]:
    """Sums of losses, and their means when `every` steps are full; each task counts its own steps."""
    state = facts.state
    total, count = state["total"] + positive(facts.losses), state["count"] + 1
    is_full = count >= facts.params["every"]
    return {
        "total": torch.where(is_full, 0.0, total),
        "count": torch.where(is_full, 0.0, count),
        "last": torch.where(is_full, total / count, state["last"]),
        "before": torch.where(is_full, state["last"], state["before"]),
    }


def famo_logits(facts: TaskFacts) -> Tensor:
    """FAMO's logits after the fall of the losses since the last step."""
    logits, last = facts.state["logits"], facts.state["log_loss"]
    shares = torch.softmax(logits, 0)
    falls = torch.where(facts.state["age"] > 0, last - positive(facts.losses).log(), 0.0)
    slope = shares * (falls - shares @ falls)  # of the softmax
    return logits - facts.params["lr"] * (slope + facts.params["decay"] * logits)


def famo(facts: TaskFacts) -> Tensor:
    """FAMO (Liu et al. 2023, https://arxiv.org/abs/2306.03792): let all losses fall at the same rate.

    Factors ~ z_i / L_i, of sum 1, with z the softmax of logits that grow for tasks whose log-loss falls less.
    A difference from the paper: it measures the fall on the same batch, by a second forward pass; here it is
    that from the last step's batch to this one's, which costs nothing, and has the noise of batches.
    """
    factors = torch.softmax(famo_logits(facts), 0) / positive(facts.losses)
    return factors / factors.sum()


def remember_losses(facts: TaskFacts, factors: Tensor) -> dict[str, Tensor]:
    """FAMO's state: the next step measures the fall from here."""
    age = facts.state["age"] + 1
    return {"logits": famo_logits(facts), "log_loss": positive(facts.losses).log(), "age": age}


def geometric(facts: TaskFacts) -> Tensor:
    """Geometric loss strategy (Chennupati et al. 2019, https://arxiv.org/abs/1904.08492).

    The loss is the geometric mean of the losses, (prod_i L_i)^(1/K): factors mean / (K L_i).
    """
    losses = positive(facts.losses)
    return losses.log().mean().exp() / (len(losses) * losses)


def smooth_tchebycheff(facts: TaskFacts) -> Tensor:
    """Smooth Tchebycheff (Lin et al. 2024, https://arxiv.org/abs/2402.19078): the largest loss, softly.

    The loss is mu log sum_i exp(L_i / mu): factors softmax(L / mu). The ideal point is 0.
    """
    return torch.softmax(facts.losses.double() / facts.params["mu"], 0)


def gradnorm(facts: TaskFacts) -> Tensor:
    """GradNorm (Chen et al. 2018, https://arxiv.org/abs/1711.02257): gradients of one length, or nearly.

    Learned factors w of sum K, by gradient descent on sum_i | w_i |g_i| - mean_j(w_j |g_j|) r_i^alpha |, r_i
    the task's loss over its first one, over the mean of these. Differences from the paper: g_i is the
    gradient of the whole encoder, which the gram matrix holds already, not of its last layer; and descent is
    in units of the mean length, so that `lr` does not depend on it.
    """
    factors = 1 + facts.state["change"]
    return factors * len(factors) / factors.sum()


def balance_lengths(facts: TaskFacts, factors: Tensor) -> dict[str, Tensor]:
    """A step of GradNorm's descent, the targets held fixed, as the paper says; then sum K again."""
    first, losses = facts.state["first"], positive(facts.losses)
    first = torch.where(first > 0, first, losses)
    lengths = facts.gram.double().diagonal().clamp(min=0).sqrt()
    rates = losses / first
    target = (factors * lengths).mean() * (rates / rates.mean()) ** facts.params["alpha"]
    slope = (factors * lengths - target).sign() * divide(lengths, lengths.mean())
    factors = (factors - facts.params["lr"] * slope).clamp(min=1e-3)
    return {"first": first, "change": factors * len(factors) / factors.sum() - 1}


# --- the table ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LossWeighting:
    """A row of LOSS_WEIGHTINGS.

    Args:
        factors: facts -> factors (K,).
        params: its parameters, by name.
        state: names of what it remembers, (K,) each, 0 at the start; `update` gives them after a step.
        needs_gradients: it goes by the encoder's gradients, so that with a frozen one it has nothing to do.
    """

    factors: Callable[[TaskFacts], Tensor]
    params: Mapping[str, Param] = field(default_factory=dict)
    state: tuple[str, ...] = ()
    update: Callable[[TaskFacts, Tensor], dict[str, Tensor]] | None = None
    needs_gradients: bool = False


POSITIVE, NOT_NEGATIVE = number(float, 0, low_open=True), number(float, 0)
LEARNING_RATE = Param(0.025, number(float, 0, 1), "learning rate of the factors")
LOSS_WEIGHTINGS: dict[str, LossWeighting] = {
    "fixed": LossWeighting(fixed),
    "uw": LossWeighting(uncertainty, {"lr": LEARNING_RATE}, ("log_variance",), learn_variances),
    "imtl_l": LossWeighting(imtl_l, {"lr": LEARNING_RATE}, ("log_factor",), learn_factors),
    "dwa": LossWeighting(
        dwa,
        {
            "t": Param(2.0, POSITIVE, "temperature"),
            "every": Param(100, number(int, 1), "steps to average losses over"),
        },
        ("total", "count", "last", "before"),
        average_losses,
    ),
    "famo": LossWeighting(
        famo,
        {"lr": LEARNING_RATE, "decay": Param(0.001, number(float, 0, 1), "decay of its logits")},
        ("logits", "log_loss", "age"),
        remember_losses,
    ),
    "gls": LossWeighting(geometric),
    "stch": LossWeighting(smooth_tchebycheff, {"mu": Param(1.0, number(float, 1e-3), "smoothness")}),
    # Random loss weights: Lin et al. 2022, https://arxiv.org/abs/2111.10603
    "rlw": LossWeighting(random_weights),
    "gradnorm": LossWeighting(
        gradnorm,
        {"alpha": Param(1.5, NOT_NEGATIVE, "strength towards slow tasks"), "lr": LEARNING_RATE},
        ("change", "first"),
        balance_lengths,
        needs_gradients=True,
    ),
}


def loss_factors(
    facts: TaskFacts, present: Sequence[int], loss_weighting: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """(K,) the factor of each task's loss, float64, and the weighting's state after the step.

    Tasks without a batch have factor 1, and keep their state.

    Args:
        facts: of all K tasks.
        present: the numbers of the tasks with a batch.
        loss_weighting: a key of LOSS_WEIGHTINGS, maybe with parameters.
    """
    weighting, params = find_row(loss_weighting, LOSS_WEIGHTINGS)
    zeros = torch.zeros(len(facts.gram), dtype=torch.float64)
    before = {name: facts.state.get(name, zeros) for name in weighting.state}
    given = choose_facts(replace(facts, state=before), present, params)
    found = weighting.factors(given)
    new = weighting.update(given, found) if weighting.update else {}
    state = {name: spread(values, present, before[name]) for name, values in new.items()}
    return spread(found, present, torch.ones_like(zeros)), state

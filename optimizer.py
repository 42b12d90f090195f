"""AdamW and learning-rate schedules.

AdamW: Loshchilov and Hutter, https://arxiv.org/abs/1711.05101, in the form of Kingma and Ba's "efficient"
bias correction, https://arxiv.org/abs/1412.6980, section 2. Rectified warm-up: Liu et al.,
https://arxiv.org/abs/1908.03265.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

# Elements; a block of the six buffers that AdamW touches stays in a core's L2 cache. Torch's default, which
# goes over memory once per operation, takes 2.7 times as long for MiniLM's 23 million parameters
# (results/speed.md).
BLOCK_SIZE = 2**17
# A decay of at least this share is subtracted by itself, as in the course's reference: its numbers, rounding
# included, are met to 2e-7. Of a smaller one float32 would make nothing or far too much; it is subtracted
# together with the step, with one rounding for both.
OWN_DECAY = 8e-8


def adamw_update(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    hyperparameters: torch.Tensor,
) -> None:
    """One AdamW update in place, block by block, so that each block is read from memory once.

    Args:
        hyperparameters: beta1, beta2, step size, eps, and the share of the parameter that decays, together
            with the step and after it; float64 (6,), on the CPU. A tensor, because compiled code would be
            compiled again for each new number, and the learning rate is new in every step.
    """
    beta1, beta2, step_size, eps, early_decay, late_decay = hyperparameters.tolist()
    tensors = (param, grad, exp_avg, exp_avg_sq)
    blocks = [tensors]
    if param.device.type == "cpu" and all(tensor.is_contiguous() for tensor in tensors):
        blocks = zip(*(tensor.view(-1).split(BLOCK_SIZE) for tensor in tensors), strict=True)
    for p, g, m, v in blocks:
        m.lerp_(g, 1 - beta1)  # m = beta1 * m + (1 - beta1) * g
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)  # v = beta2 * v + (1 - beta2) * g * g
        denominator = v.sqrt().add_(eps)  # eps before the bias correction, see AdamW
        if early_decay:  # (p - step) * (1 - decay), as one subtraction
            p.sub_((p * early_decay).addcdiv_(m, denominator, value=step_size * (1 - early_decay)))
        else:
            p.addcdiv_(m, denominator, value=-step_size)
        if late_decay:  # not p * (1 - decay): the factor would be rounded, by up to half of such a decay
            p.add_(p, alpha=-late_decay)


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay.

    Three deliberate differences from `torch.optim.AdamW`, all as in the course's reference: `eps` is added
    before the bias correction of the second moment, not after it; the decay uses the updated parameter;
    bias correction can be switched off. A decay too small for float32 is not lost (OWN_DECAY). On the CPU,
    large tensors are updated block by block, so that each block is read from memory once, whatever the
    number of operations.

    Args:
        params: parameters, or dicts of parameters and options, as for any torch optimizer.
        lr: learning rate, above 0 or 0.
        betas: decay of the first and second moment, each in [0, 1).
        eps: added to the denominator.
        weight_decay: share of a parameter taken off per update, times lr.
        correct_bias: divide the moments by 1 - beta ** step.
        rectify: RAdam's rectified warm-up (needs `correct_bias`): plain momentum while the second moment
            rests on too few gradients, then a growing share of the adaptive step.
        update: does one update of one tensor; `adamw_update` needs no compiler, `kernels.fused` has a
            compiled twin that takes half the time.

    Raises:
        ValueError: if an option is outside its range.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        rectify: bool = False,
        update: Callable = adamw_update,
    ):
        if not 0 <= lr < math.inf:
            raise ValueError(f"lr is {lr}; expected a finite number of at least 0")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas are {betas}; expected two numbers in [0, 1)")
        if not eps >= 0:
            raise ValueError(f"eps is {eps}; expected at least 0")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay is {weight_decay}; expected at least 0")
        if rectify and not correct_bias:
            raise ValueError(
                "rectify is True and correct_bias False; the rectification needs corrected moments"
            )
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        self.update = update
        super().__init__(params, options | {"correct_bias": correct_bias, "rectify": rectify})

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """One update of every parameter that has a gradient; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            ranges = group.get("lr_ranges")  # of a flat parameter: other factors of `lr` in each
            for param in group["params"]:
                if param.grad is None:
                    continue
                if param.grad.is_sparse:
                    raise ValueError("AdamW needs dense gradients; this one is sparse")
                state = self.state[param]
                if not state:
                    # Made at the first update, not in __init__: a head without a batch so far has no moments,
                    # and its bias correction starts when it is first trained.
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(param)
                    state["exp_avg_sq"] = torch.zeros_like(param)
                state["step"] += 1
                tensors = (param, param.grad, state["exp_avg"], state["exp_avg_sq"])
                if ranges is None:
                    self._update(tensors, state["step"], group, group["lr"])
                for where, factor in ranges or ():
                    pieces = tuple(tensor[where] for tensor in tensors)
                    self._update(pieces, state["step"], group, group["lr"] * factor)
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        """As any torch optimizer does; also what `torch.optim.AdamW` has saved, whose moments are the same.

        Options that it does not have, such as `rectify`, keep the values they have here.

        Raises:
            ValueError: naming what AdamW as it is here cannot go on from.
        """
        groups = state_dict["param_groups"]
        shapes = [param.shape for group in self.param_groups for param in group["params"]]
        keys = [key for group in groups for key in group["params"]]
        shapes = dict(zip(keys, shapes, strict=False))  # torch compares their numbers
        defaults = [*self.param_groups, *[{}] * len(groups)]
        taken = [take_options(group, own) for group, own in zip(groups, defaults, strict=False)]
        state = {key: take_state(key, each, shapes.get(key)) for key, each in state_dict["state"].items()}
        super().load_state_dict({"state": state, "param_groups": taken})

    def _update(self, tensors: tuple[torch.Tensor, ...], step: int, group: dict, lr: float) -> None:
        """One update of parameter, gradient and both moments; `step` counts from 1."""
        (beta1, beta2), (param, grad, *moments) = group["betas"], tensors
        step_size, adaptive = lr, True
        if group["correct_bias"]:
            # Both corrections in the step size: two numbers instead of two more passes over the moments.
            step_size = lr * math.sqrt(1 - beta2**step) / (1 - beta1**step)
        if group["rectify"]:
            # While the second moment is made of too few gradients, its share of the step is a matter of
            # chance.
            factor = rectification(beta2, step)
            adaptive = factor is not None
            step_size = step_size * factor if adaptive else lr / (1 - beta1**step)
        decay = lr * group["weight_decay"]
        early_decay, late_decay = (decay, 0.0) if decay < OWN_DECAY else (0.0, decay)
        if adaptive:
            # The order in which `adamw_update` and its twin unpack them.
            hyperparameters = [beta1, beta2, step_size, group["eps"], early_decay, late_decay]
            self.update(param, grad, *moments, torch.tensor(hyperparameters, dtype=torch.float64))
        else:  # RAdam's first steps: momentum alone, while the second moment is only collected
            moments[0].lerp_(grad, 1 - beta1)
            moments[1].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            if early_decay:
                param.sub_((param * early_decay).add_(moments[0], alpha=step_size * (1 - early_decay)))
            else:
                param.add_(moments[0], alpha=-step_size)
            if late_decay:
                param.add_(param, alpha=-late_decay)


# Options of torch's own optimizers: values that ask for what is not done here, and what changes no number.
REFUSED_OPTIONS = {"amsgrad": True, "maximize": True, "decoupled_weight_decay": False}
IGNORED_OPTIONS = {*REFUSED_OPTIONS, "foreach", "capturable", "differentiable", "fused"}


def take_state(key: int, state: dict, shape: torch.Size | None) -> dict:
    """A parameter's saved state as `AdamW` has it; ValueError if it is another optimizer's or parameter's."""
    if set(state) != {"step", "exp_avg", "exp_avg_sq"}:
        raise ValueError(
            f"the saved state of parameter {key} has {', '.join(sorted(state)) or 'nothing'}; expected step,"
            " exp_avg, exp_avg_sq, as of AdamW"
        )
    for name in ("exp_avg", "exp_avg_sq"):
        if shape is not None and state[name].shape != shape:
            raise ValueError(
                f"the saved {name} of parameter {key} has shape {tuple(state[name].shape)}; expected"
                f" {tuple(shape)}"
            )
    return state | {"step": int(state["step"])}  # torch's is a tensor


def take_options(group: dict, own: dict) -> dict:
    """A group's saved options as `AdamW` has them; ValueError if one asks for what it does not do."""
    for name, value in REFUSED_OPTIONS.items():
        # Without decay, Adam's is as good as AdamW's.
        matters = name != "decoupled_weight_decay" or group.get("weight_decay")
        if group.get(name) == value and matters:
            raise ValueError(f"the saved options have {name}={value}, which this AdamW does not do")
    taken = {name: value for name, value in group.items() if name not in IGNORED_OPTIONS}
    if "lr" in taken:
        taken["lr"] = float(taken["lr"])  # torch's may be a tensor
    return own | taken


def rectification(beta2: float, step: int) -> float | None:
    """RAdam's factor in (0, 1) for the adaptive step; None in early steps, while it is undefined."""
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * step * beta2**step / (1 - beta2**step)
    if rho <= 5:  # the paper says 4; torch.optim.RAdam and the authors' code wait until 5
        return None
    return math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))


def device_hyperparameters(
    group: dict,
    lrs: torch.Tensor,
    weight_decays: torch.Tensor,
    counts: torch.Tensor,
    applied: torch.Tensor,
) -> torch.Tensor:
    """What `AdamW._update` works out for each parameter, for several and without looking at a value.

    Args:
        group: an `AdamW`'s options; its learning rate and decay are not read.
        lrs: (B,)
        weight_decays: (B,)
        counts: (B,) float64, updates so far, this one included.
        applied: () bool, whether the update is to be made.

    Returns:
        (B, 8) float64: beta1, beta2, step size, eps, share that decays with the step and after it, whether
        the second moment is used (0: `rectify`'s first steps), `applied`.
    """
    (beta1, beta2), lrs = group["betas"], lrs.double()
    correction1, correction2 = 1 - beta1**counts, 1 - beta2**counts
    step_sizes, adaptive = lrs, torch.ones_like(lrs)
    if group["correct_bias"]:
        step_sizes = lrs * correction2.sqrt() / correction1
    if group["rectify"]:
        rho_inf = 2 / (1 - beta2) - 1
        rho = rho_inf - 2 * counts * beta2**counts / correction2
        factor = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
        adaptive = (rho > 5).double()
        step_sizes = torch.where(rho > 5, step_sizes * factor.clamp(min=0).sqrt(), lrs / correction1)
    decays = lrs * weight_decays
    is_small = decays < OWN_DECAY
    columns = [
        torch.full_like(lrs, beta1),
        torch.full_like(lrs, beta2),
        step_sizes,
        torch.full_like(lrs, group["eps"]),
        torch.where(is_small, decays, 0.0),
        torch.where(is_small, 0.0, decays),
        adaptive,
        applied.double().expand_as(lrs),
    ]
    return torch.stack(columns, dim=1)


def has_weight_decay(param: nn.Parameter) -> bool:
    """Matrices decay; biases and LayerNorm do not."""
    return param.ndim >= 2


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give every group its base learning rate, `initial_lr`, times a factor such as that of `lr_factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def average_weights(average: torch.Tensor, weights: torch.Tensor, decay: float, step: int) -> None:
    """Take a step's weights into their exponential moving average, in place and in one pass.

    Each step's weights count `decay` times as much as those of the step after it, and all counts add up to 1:
    the average is Adam's, corrected for its start at zero (https://arxiv.org/abs/1412.6980, section 3), so
    the first step's average are its weights, whatever `average` held. Averages of weights: Polyak and
    Juditsky 1992, https://doi.org/10.1137/0330046; as a moving average, Tarvainen and Valpola 2017,
    https://arxiv.org/abs/1703.01780.

    Args:
        average, weights: of the same shape.
        decay: in [0, 1).
        step: steps so far, this one included.
    """
    average.lerp_(weights, (1 - decay) / (1 - decay**step))


# --- schedules: factor in [0, 1] as a function of progress, which goes from 0 (warm-up over) to 1 (end) -----


def constant(progress: float) -> float:
    """The base learning rate to the end."""
    return 1.0


def linear(progress: float) -> float:
    return 1.0 - progress


def cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def inverse_sqrt(progress: float) -> float:
    """1 / sqrt(time), on a clock that runs from 1 to 100, so that every run ends at a factor of 0.1."""
    return 1.0 / math.sqrt(1.0 + 99.0 * progress)


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "inverse_sqrt": inverse_sqrt,
}


def lr_factor(schedule: str, step: int, *, warmup_steps: int, total_steps: int) -> float:
    """Multiplier in [0, 1] for the base learning rate: linear warm-up, then the schedule.

    No update is wasted on a learning rate of 0: the first one gets 1 / (warmup_steps + 1), the first after
    warm-up gets 1, and the last one more than where the schedule ends.

    Args:
        schedule: a key of SCHEDULES.
        step: optimizer updates already made; the first update sees 0.
        warmup_steps: updates of linear warm-up; 0 means none.
        total_steps: updates in the whole run; from there on the factor is the schedule's last.

    Raises:
        ValueError: if `schedule` is not a key of SCHEDULES.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule is {schedule!r}; expected one of {', '.join(SCHEDULES)}")
    # The warm-up's slope does not depend on the schedule, so that schedules can be compared.
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return SCHEDULES[schedule](min(1.0, progress))


def points_factor(points: Sequence[tuple[float, float]], progress: float) -> float:
    """The factor at some progress, on straight lines between points (progress, factor).

    Before the first point and after the last one it stays what it is there. At a jump, two points with the
    same progress, the second one counts.
    """
    before = [point for point in points if point[0] <= progress]
    after = points[len(before) :]
    if not before or not after:
        return points[0][1] if not before else points[-1][1]
    (start, low), (stop, high) = before[-1], after[0]
    return low + (high - low) * (progress - start) / (stop - start)

"""AdamW, learning-rate schedules, and the flat memory that parameters and per-task gradients live in.

AdamW: Loshchilov and Hutter, https://arxiv.org/abs/1711.05101, in the form of Kingma and Ba's "efficient"
bias correction, https://arxiv.org/abs/1412.6980, section 2. Rectified warm-up: Liu et al.,
https://arxiv.org/abs/1908.03265.

Shapes: K tasks, P parameters shared by all tasks.
"""

import math
import re
from collections.abc import Callable, Iterable

import torch
from torch import nn

BLOCK_SIZE = 2**16  # elements; a block of the five buffers that AdamW touches stays in a core's L2 cache


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay.

    Three deliberate differences from `torch.optim.AdamW`, all as in the course's reference: `eps` is added
    before the bias correction of the second moment, not after it; the decay uses the updated parameter;
    bias correction can be switched off. On the CPU, large tensors are updated block by block, so that each
    block is read from memory once, whatever the number of operations.

    Args:
        params: parameters, or dicts of parameters and options, as for any torch optimizer.
        lr: learning rate, above 0 or 0.
        betas: decay of the first and second moment, each in [0, 1).
        eps: added to the denominator.
        weight_decay: share of a parameter taken off per update, times lr.
        correct_bias: divide the moments by 1 - beta ** step.
        rectify: RAdam's rectified warm-up (needs `correct_bias`): plain momentum while the second moment rests on too
            few gradients, then a growing share of the adaptive step.

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
        super().__init__(params, options | {"correct_bias": correct_bias, "rectify": rectify})

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """One update of every parameter that has a gradient; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                if param.grad.is_sparse:
                    raise ValueError("AdamW needs dense gradients; this one is sparse")
                state = self.state[param]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(param)
                    state["exp_avg_sq"] = torch.zeros_like(param)
                state["step"] += 1
                self._update(param, param.grad, state, group)
        return loss

    def _update(self, param, grad, state, group):
        (beta1, beta2), lr, step = group["betas"], group["lr"], state["step"]
        step_size, adaptive = lr, True
        if group["correct_bias"]:
            step_size = lr * math.sqrt(1 - beta2**step) / (1 - beta1**step)
        if group["rectify"]:
            factor = rectification(beta2, step)
            adaptive = factor is not None
            step_size = step_size * factor if adaptive else lr / (1 - beta1**step)
        tensors = (param, grad, state["exp_avg"], state["exp_avg_sq"])
        if param.is_contiguous() and grad.is_contiguous() and param.device.type == "cpu":
            blocks = zip(*(tensor.view(-1).split(BLOCK_SIZE) for tensor in tensors), strict=True)
        else:
            blocks = [tensors]
        for p, g, exp_avg, exp_avg_sq in blocks:
            exp_avg.lerp_(g, 1 - beta1)
            exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            if adaptive:
                p.addcdiv_(exp_avg, exp_avg_sq.sqrt().add_(group["eps"]), value=-step_size)
            else:
                p.add_(exp_avg, alpha=-step_size)
            if group["weight_decay"]:
                p.mul_(1 - lr * group["weight_decay"])


def rectification(beta2: float, step: int) -> float | None:
    """RAdam's factor in (0, 1) for the adaptive step, or None while the variance is not tractable (early steps)."""
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * step * beta2**step / (1 - beta2**step)
    if rho <= 5:  # the paper says 4; torch.optim.RAdam and the authors' code wait until 5
        return None
    return math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))


# --- schedules: factor in [0, 1] as a function of progress, which goes from 0 (warm-up over) to 1 (end) ----------


def constant(progress: float) -> float:
    return 1.0


def linear(progress: float) -> float:
    return 1.0 - progress


def cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def inverse_sqrt(progress: float) -> float:
    """1 / sqrt(time), on a clock that runs from 1 to 100 so that the factor ends at 0.1 for any run length."""
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
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return SCHEDULES[schedule](min(1.0, progress))


# --- flat memory -----------------------------------------------------------------------------------------------


def has_weight_decay(param: nn.Parameter) -> bool:
    """Matrices decay; biases and LayerNorm do not."""
    return param.ndim >= 2


def part_name(name: str) -> str:
    """The part of the encoder that a parameter is in: `embeddings`, `layer.0`, `layer.1`, ..., `pooler`."""
    layer = re.match(r"encoder\.(layer\.\d+)\.", name)
    return layer[1] if layer else name.partition(".")[0]


class FlatMemory:
    """The trainable parameters of a multitask model in one buffer, and a gradient row for each task.

    Layout of `data` and `grad`: the shared encoder first (P elements), then each task's head; within each,
    first what decays, then what does not. Every model `Parameter` becomes a view of `data`. Each task's
    backward pass writes its encoder gradient into its own row of `task_grads` (K, P), without a copy, and its
    head's gradient into `grad`. The optimizer sees a few long tensors, the `param_groups`.

    Args:
        shared_params: name -> encoder parameter; frozen ones (no `requires_grad`) are left out.
        head_params: task -> name -> parameter of that task's head.

    Raises:
        ValueError: if a parameter is both shared and a head's, or nothing is trainable.
    """

    def __init__(
        self, shared_params: dict[str, nn.Parameter], head_params: dict[str, dict[str, nn.Parameter]]
    ):
        owners = [("shared", shared_params), *head_params.items()]
        all_params = [id(param) for _, params in owners for param in params.values()]
        if len(set(all_params)) < len(all_params):
            raise ValueError(
                "a parameter belongs to two owners (shared encoder, task heads); they must be disjoint"
            )
        self.tasks = tuple(head_params)
        self.slices: dict[tuple[str, bool], slice] = {}  # (owner, decays) -> where in the buffers
        self.views: list[tuple[str, nn.Parameter, int]] = []  # (owner, parameter, offset)
        self.parts: dict[str, list[slice]] = {}  # part of the encoder -> its columns of `task_grads`
        offset = 0
        for owner, params in owners:
            for decays in (True, False):
                start = offset
                for name, param in params.items():
                    if param.requires_grad and has_weight_decay(param) == decays:
                        self.views.append((owner, param, offset))
                        if owner == "shared":
                            self._add_to_part(part_name(name), offset, offset + param.numel())
                        offset += param.numel()
                self.slices[owner, decays] = slice(start, offset)
        if not self.views:
            raise ValueError("nothing to train: every parameter is frozen")
        device = self.views[0][1].device
        self.num_shared = self.slices["shared", False].stop
        self.data = torch.empty(offset, device=device)
        self.grad = torch.zeros(offset, device=device)
        self.task_grads = torch.zeros(len(self.tasks), self.num_shared, device=device)
        for _, param, start in self.views:
            view = self.data[start : start + param.numel()].view_as(param)
            view.copy_(param.detach())
            param.data = view
        self.flat_params = {
            key: nn.Parameter(self.data[where])
            for key, where in self.slices.items()
            if where.start < where.stop
        }

    def _add_to_part(self, part: str, start: int, stop: int) -> None:
        ranges = self.parts.setdefault(part, [])
        if ranges and ranges[-1].stop == start:  # parameters of a part that lie side by side are one range
            start = ranges.pop().start
        ranges.append(slice(start, stop))

    def param_groups(self, lr: float, head_lr: float, weight_decay: float) -> list[dict]:
        """Groups for AdamW, one flat parameter each."""
        groups = []
        for (owner, decays), param in self.flat_params.items():
            group_lr = lr if owner == "shared" else head_lr
            group = {"params": [param], "lr": group_lr, "initial_lr": group_lr}
            groups.append(group | {"weight_decay": weight_decay if decays else 0.0})
        return groups

    def zero_grad(self) -> None:
        self.task_grads.zero_()
        self.grad[self.num_shared :].zero_()

    def point_grads(self, task: str) -> None:
        """Let the next backward pass add this task's gradients to where they belong."""
        row = self.task_grads[self.tasks.index(task)]
        for owner, param, start in self.views:
            home = row if owner == "shared" else self.grad
            param.grad = home[start : start + param.numel()].view_as(param)

    def show_grads(self, tasks: set[str]) -> None:
        """Show the optimizer the gradients of the encoder and of these tasks' heads; other heads are left alone."""
        for (owner, decays), param in self.flat_params.items():
            param.grad = (
                self.grad[self.slices[owner, decays]] if owner == "shared" or owner in tasks else None
            )

    def head_grad(self, task: str) -> torch.Tensor:
        """The flat gradient of one task's head, a view of `grad`."""
        return self.grad[self.slices[task, True].start : self.slices[task, False].stop]

    def combine(self, weights: torch.Tensor) -> None:
        """Write the weighted sum of the task gradients, weights (K,), to the shared part of `grad`."""
        if self.num_shared:
            torch.mv(self.task_grads.T, weights, out=self.grad[: self.num_shared])

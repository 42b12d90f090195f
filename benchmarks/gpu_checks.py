"""Is a captured step right? The first part of benchmarks.gpu.

A captured step is held against the plain one in float32 on the CPU; and its replays, with dropout, against
the same operations started one by one, of which every bit must be equal.

Shapes: K tasks, n trainable parameters.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from benchmarks.contenders import HEAD_LR, LR, WEIGHT_DECAY, captured_ops
from bert import BertModel
from config import TASKS
from datasets import TaskData
from heads import HEADS, PAIR_HEADS, MultitaskBERT
from kernels.grad_methods import GRAD_METHODS
from multitask_classifier import TaskBatch, train_step
from optimizer import AdamW
from support.device import make_autocast
from training.captured_step import CapturedStep
from training.settings import StepSettings
from training.step_result import StepResult

# Largest errors allowed over all steps, relative to the norm of what is right; of encoder and heads, relative
# to what the steps have changed. Float32: sums in another order; 7e-6 is the most that was seen with plain
# twins on a CPU. bfloat16: three digits, of which sums keep two; seen were 9e-3, and 0.06 of updates.
TOLERANCES = {
    "fp32": {"losses": 1e-4, "gradient norms": 1e-3, "gram matrix": 1e-3, "weights": 1e-3, "updates": 2e-3},
    "bf16": {"losses": 2e-2, "gradient norms": 5e-2, "gram matrix": 5e-2, "weights": 5e-2, "updates": 0.2},
}
# Large: Adam would blow rounding up where a gradient is 0, as that of a key's bias always is.
EPS = 1e-2
NUM_BATCHES = 2  # that take turns: each is made as it is, captured, and then replayed
OVERFLOW = 1e30  # of a task's weight: the squares of its gradients are beyond float32


@dataclass(frozen=True)
class Case:
    """What is compared: the default head of pairs, the gradient method, and so on."""

    encoder: str  # a key of `Lab.encoders`
    head: str = "diff"
    method: str = "pcgrad"
    precision: str = "fp32"
    task_weights: tuple[tuple[str, float], ...] = ()

    @property
    def name(self) -> str:
        return f"{self.encoder}, {self.head}, {self.method}, {self.precision}"


# The most important first; then every gradient method and every head once; then all pairs of them.
CASES = [Case("tiny"), Case("tiny", precision="bf16"), Case("pretrained", precision="bf16")]
CASES += [Case("tiny", "diff", "gradvac"), Case("tiny", "cross", "pcgrad")]
CASES += [Case("tiny", "concat", "sum"), Case("tiny", "cosine", "mean")]
NUM_FIRST = len(CASES)
CASES += [
    Case("tiny", head, method)
    for head in PAIR_HEADS  # those of two parts are made of the others
    for method in (name for name, row in GRAD_METHODS.items() if row.on_device)
    if not HEADS[head].parts and Case("tiny", head, method) not in CASES
]


@dataclass(frozen=True)
class Lab:
    """What all checks share.

    Args:
        encoders: name -> folder, or whatever `BertModel.from_pretrained` takes.
        data: from whether pairs are encoded as one sequence to task -> examples.
    """

    encoders: dict[str, str]
    data: Callable[[bool], dict[str, TaskData]]
    pad_token_id: int
    device: str
    seed: int
    num_steps: int
    batch_size: int


class AsItIs(CapturedStep):
    """The same operations, but each started by the host in every step."""

    def _run(self, key, function):
        function()


class Training:
    """A model and its optimizer, whose steps are plain ones on the CPU, or of a kind of `CapturedStep`."""

    def __init__(self, lab: Lab, case: Case, kind: type[CapturedStep] | None = None):
        self.lab, self.data = lab, lab.data(HEADS[case.head].joint)
        device, precision = (lab.device, case.precision) if kind else ("cpu", "fp32")
        torch.manual_seed(lab.seed)
        bert = BertModel.from_pretrained(lab.encoders[case.encoder])
        heads = {task: case.head if TASKS[task].is_pair else "single" for task in self.data}
        tasks = {task: TASKS[task] for task in self.data}
        self.model = MultitaskBERT(bert, tasks, heads).to(device).train()
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.memory = self.model.move_to_flat_memory(dtype, dtype)
        groups = self.memory.param_groups(LR, HEAD_LR, WEIGHT_DECAY)
        self.optimizer = AdamW(groups, lr=LR, eps=EPS)
        self.settings = StepSettings(
            lab.seed,
            grad_method=case.method,
            task_weights=dict(case.task_weights),
            autocast=make_autocast(device, precision),
        )
        self.captured, self.cosine_ema = None, None
        if kind:
            self.captured = kind(
                self.model, self.memory, self.optimizer, self.data, self.settings, captured_ops(device)
            )

    def step(self, number: int, with_dropout: bool = True) -> StepResult:
        size, first = self.lab.batch_size, number % NUM_BATCHES * self.lab.batch_size
        chosen = np.arange(first, first + size)
        if self.captured:
            examples = [(task, [chosen]) for task in self.data]
            result = self.captured(examples, number, with_dropout=with_dropout)()
        else:
            self.model.train(with_dropout)
            batches = [
                TaskBatch(task, [data.batch(chosen, self.lab.pad_token_id)])
                for task, data in self.data.items()
            ]
            result = train_step(
                self.model,
                *(self.memory, self.optimizer, batches, self.settings),
                step=number,
                cosine_ema=self.cosine_ema,
            )
        self.cosine_ema = result.cosine_ema
        return result

    def steps(self, start: int, stop: int) -> "Training":
        for number in range(start, stop):
            self.step(number)
        return self

    def reload(self, other: "Training") -> "Training":
        """Start from the weights, moments and counters of another one, as a resumed run does."""
        self.memory.data.copy_(other.memory.data)
        self.optimizer.load_state_dict(copy.deepcopy(other.optimizer.state_dict()))
        self.captured.leave(other.cosine_ema)
        return self

    def tensors(self) -> list[torch.Tensor]:
        """Parameters and moments."""
        states = self.optimizer.state_dict()["state"].values()
        return [self.memory.data, *(state[name] for state in states for name in ("exp_avg", "exp_avg_sq"))]

    def equals(self, other: "Training") -> bool:
        """Whether all bits are the same."""
        return all(torch.equal(a, b) for a, b in zip(self.tensors(), other.tensors(), strict=True))

    @property
    def num_graphs(self) -> int:
        return sum(graph is not None for graph in self.captured.graphs.values())


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.cpu() - expected).norm() / expected.norm().clamp(min=1e-30))


def outcome(result: StepResult) -> dict[str, torch.Tensor]:
    """What is compared after each step; gram matrices of unit vectors, or one task would hide the others."""
    norms = result.gram.diagonal().clamp(min=1e-30).sqrt()
    return {
        "losses": result.losses,
        "gram matrix": result.gram / (norms[:, None] * norms),
        "gradient norms": norms,
        "weights": result.weights,
    }


def compare_with_plain(lab: Lab, case: Case) -> dict:
    """Largest errors of captured steps, without dropout, against plain ones in float32 on the CPU."""
    plain, captured = Training(lab, case), Training(lab, case, CapturedStep)
    start = plain.memory.data.clone()
    tolerances, errors = TOLERANCES[case.precision], {name: [] for name in TOLERANCES[case.precision]}
    for number in range(lab.num_steps):
        found, expected = (outcome(each.step(number, with_dropout=False)) for each in (captured, plain))
        for name, tensor in expected.items():
            errors[name].append(relative_error(found[name], tensor))
    # Apart, or the heads with their larger learning rate would hide the encoder.
    num_shared = plain.memory.layout.num_shared
    for part in (slice(0, num_shared), slice(num_shared, None)):
        changed = (plain.memory.data - start)[part]
        errors["updates"].append(relative_error((captured.memory.data.cpu() - start)[part], changed))
    largest = {name: float(torch.tensor(values).max()) for name, values in errors.items()}  # keeps a NaN
    ok = all(largest[name] <= limit for name, limit in tolerances.items())
    return {"errors": largest, "tolerances": tolerances, "graphs": captured.num_graphs, "ok": ok}


def check_replay(lab: Lab, case: Case) -> dict:
    """With dropout, replays against the same operations as they are: equal bits."""
    kinds = (CapturedStep, AsItIs)
    replayed, as_it_is = (Training(lab, case, kind).steps(0, lab.num_steps) for kind in kinds)
    return {"ok": replayed.equals(as_it_is), "graphs": replayed.num_graphs}


def check_resume(lab: Lab, case: Case) -> dict:
    """Half the steps, and after reloading the other half, against all of them: equal bits."""
    half = lab.num_steps // 2
    whole = Training(lab, case, CapturedStep).steps(0, 2 * half)
    first = Training(lab, case, CapturedStep).steps(0, half)
    second = Training(lab, case, CapturedStep).reload(first).steps(half, 2 * half)
    return {"ok": whole.equals(second), "graphs": second.num_graphs}


def check_skipped(lab: Lab, case: Case) -> dict:
    """Steps whose gradient overflows, as they are, captured and replayed, change nothing."""
    training = Training(lab, replace(case, task_weights=(("para", OVERFLOW),)), CapturedStep)
    before = training.memory.data.clone()
    applied = [training.step(0).applied for _ in range(4)]
    unchanged = torch.equal(training.memory.data, before) and not training.optimizer.state
    return {"ok": unchanged and not any(applied), "graphs": training.num_graphs}


# Name -> what is found of a case. All cases go through the first two, the first case through all.
CHECKS = {
    "plain float32 on the CPU": compare_with_plain,
    "replayed = one by one, with dropout": check_replay,
    "resumed = not stopped": check_resume,
    "a step that is skipped": check_skipped,
}
CHECKS_OF_ALL = 2

"""The competitors of benchmarks.speed and .gpu: our code and its peers, on the same model and examples.

The tables at the end say how each is built; to add one, add a row. PCGrad: https://arxiv.org/abs/2001.06782.
Peers: Hugging Face `transformers`, and TorchJD, https://arxiv.org/abs/2406.16232 (requirements/bench.txt).

Shapes: B examples, R sequences in a batch (R = 2 * B for pairs), T padded length, H hidden_size, K tasks, P
shared parameters.
"""

import importlib
import importlib.util
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from base_bert import resolve_pretrained
from bert import BertModel
from config import TaskSpec
from datasets import BatchOrder, TaskData
from evaluation import TASK_KINDS, evaluate
from heads import MultitaskBERT, pool_mean
from kernels.flat_memory import FlatMemory
from kernels.fused import PLAIN, Kernels, compile_kernels, find_compiler
from kernels.static_packing import StaticPacking, static_dropout
from multitask_classifier import MAX_WAITING, TaskBatch, train_step
from optimizer import AdamW
from pcgrad import TaskFacts, draw_orders, pcgrad
from support.device import keep_freed_memory, make_autocast, to_device
from support.errors import UserError
from support.files import ROOT
from support.seeds import seed_of
from training.captured_step import CapturedStep
from training.settings import StepSettings

LR, HEAD_LR, WEIGHT_DECAY = 1e-4, 1e-3, 0.01  # no time depends on them
HF_EVAL_BATCH = 64  # examples
WARM_UP_EXAMPLES = 128  # per task, before an evaluation is timed
CATEGORIES = {  # of a profile: what the names of its operations start with; the first that fits counts
    "matrix products": ("addmm", "mm", "linear", "mkldnn"),
    "attention products (and the gram matrix)": ("bmm", "baddbmm", "_scaled_dot"),
    "softmax, GELU, LayerNorm, dropout": (
        *("_softmax", "gelu", "native_layer_norm", "random_", "ge", "mul", "masked_fill"),
    ),
    "gradients: zeroing and adding up": ("zero_", "fill_", "mv", "embedding_dense_backward"),
    "passes over gradients, compiled": ("## Call CompiledFxGraph",),
    "copies and casts": ("copy_", "cat", "index", "clone"),
}


# --- what is trained on -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pool:
    """The same examples in several orders; each order is a list of steps, each step task -> examples (B,)."""

    tasks: dict[str, TaskSpec]
    data: dict[str, TaskData]
    orders: dict[str, list[dict[str, np.ndarray]]]
    pad_token_id: int

    def batches(self, order: str, step: int, device: str) -> dict[str, dict[str, torch.Tensor]]:
        """The padded batches of a step: task -> batch."""
        padded = {
            task: self.data[task].batch(chosen, self.pad_token_id)
            for task, chosen in self.orders[order][step].items()
        }
        return {
            task: {key: value.to(device) for key, value in batch.items()} for task, batch in padded.items()
        }

    def lengths(self, order: str, step: int) -> list[np.ndarray]:
        """Word pieces of each sequence of a step: one array (R,) for each task."""
        return [
            self.data[task].sequences.lengths[self.data[task].index[chosen]].ravel()
            for task, chosen in self.orders[order][step].items()
        ]

    def num_tokens(self, order: str) -> int:
        """Real word pieces in one pass."""
        return sum(int(lengths.sum()) for i in range(self.num_steps) for lengths in self.lengths(order, i))

    def num_places(self, order: str) -> int:
        """The same with padding to the longest sequence of each batch."""
        return sum(
            int(lengths.max()) * len(lengths)
            for i in range(self.num_steps)
            for lengths in self.lengths(order, i)
        )

    @property
    def num_steps(self) -> int:
        return len(next(iter(self.orders.values()))) if self.orders else 1


def make_pool(
    tasks: dict[str, TaskSpec],
    data: dict[str, TaskData],
    pad_token_id: int,
    *,
    batch_size: int,
    num_batches: int,
    seed: int,
) -> Pool:
    """Draw examples for `num_batches` steps; order them as our training does (bucketed), and at random.

    Raises:
        UserError: if a task has too few examples.
    """
    size, chosen, bucketed, shuffled = batch_size * num_batches, {}, {}, {}
    for task in tasks:
        if len(data[task]) < size:
            raise UserError(
                f"--num_batches {num_batches}: {task} has {len(data[task])} examples, too few for as many"
                f" batches of --batch_size {batch_size}"
            )
        chosen[task] = data[task].sample(size, seed)
        order = BatchOrder(chosen[task].lengths, batch_size, seed, task)
        bucketed[task] = [order[i] for i in range(num_batches)]
        rng = np.random.default_rng([seed, seed_of(task)])
        shuffled[task] = np.split(rng.permutation(size), num_batches)
    orders = {
        name: [{task: batches[task][i] for task in tasks} for i in range(num_batches)]
        for name, batches in (("bucketed", bucketed), ("random", shuffled))
    }
    return Pool(tasks, chosen, orders, pad_token_id)


def longest_steps(
    tasks: dict[str, TaskSpec],
    data: dict[str, TaskData],
    pad_token_id: int,
    *,
    batch_sizes: Mapping[str, int],
    num_steps: int,
    seed: int,
) -> Pool:
    """The steps of an epoch that have the most attention scores, R * T**2, in ascending order.

    The epoch is that of the task with the most batches; the others' go round, as in training.
    """
    lengths = {task: data[task].lengths for task in tasks}
    orders = {task: BatchOrder(lengths[task], batch_sizes[task], seed, task) for task in tasks}
    steps = [
        {task: order[i] for task, order in orders.items()}
        for i in range(max(order.batches_per_epoch for order in orders.values()))
    ]

    def num_scores(step: dict[str, np.ndarray]) -> int:
        return sum(
            data[task].index[chosen].size * int(lengths[task][chosen].max()) ** 2
            for task, chosen in step.items()
        )

    longest = sorted(steps, key=num_scores)[-num_steps:]
    return Pool(tasks, data, {"longest": longest}, pad_token_id)


@dataclass(frozen=True)
class Setting:
    """What every contender of a race is built with."""

    pool: Pool
    pretrained: str
    device: str
    num_threads: int
    seed: int
    heads: Mapping[str, str] = field(default_factory=dict)  # task -> head, where it is not the default


# --- contenders ---------------------------------------------------------------------------------------------


def import_peer(package: str):
    """Import a package that would take our `datasets.py` and `tokenizer.py` for packages it knows."""
    path = sys.path[:]
    sys.path[:] = [folder for folder in path if Path(folder or ".").resolve() != ROOT]
    try:
        return importlib.import_module(package)
    finally:
        sys.path[:] = path


def memory_mib(key: str) -> float:
    """Resident memory of this process, MiB; `key` is VmRSS (now) or VmHWM (its peak)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    # Not ru_maxrss: a new process starts with what its parent had.
    lines = status.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 2**10


class Contender:
    """Something that does numbered steps; what it `needs` is imported before its memory is measured."""

    needs: tuple[str, ...] = ()
    model_class = MultitaskBERT

    def __init__(self, setting: Setting):
        for package in self.needs:
            import_peer(package)
        self.setting, self.pool, self.device = setting, setting.pool, setting.device
        self.memory_before = memory_mib("VmRSS")
        torch.manual_seed(setting.seed)

    def make_model(self) -> MultitaskBERT:
        """Our model; the heads' first weights depend on the seed only."""
        bert, tasks = BertModel.from_pretrained(self.setting.pretrained), self.pool.tasks
        torch.manual_seed(self.setting.seed)
        heads = {task: spec.default_head for task, spec in tasks.items()} | dict(self.setting.heads)
        return self.model_class(bert, tasks, heads).to(self.device)

    def step(self, i: int) -> None:
        raise NotImplementedError

    def warm_up(self) -> None:
        for i in range(self.pool.num_steps):
            self.step(i)

    def run(self, i: int) -> float:
        """Seconds of a step."""
        self.synchronize()
        started = time.perf_counter()
        self.step(i)
        self.synchronize()
        return time.perf_counter() - started

    def run_all(self) -> float:
        """Seconds of one pass over the steps, without a pause."""
        started = time.perf_counter()
        for i in range(self.pool.num_steps):
            self.step(i)
        self.synchronize()
        return time.perf_counter() - started

    def synchronize(self) -> None:
        if torch.device(self.device).type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak_memory(self) -> float:
        """MiB: the peak so far, less what the process held before anything was built."""
        if torch.device(self.device).type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        return memory_mib("VmHWM") - self.memory_before


class StepContender(Contender):
    """A way to train: `make_model`, `prepare` its optimizer, `train` on one batch of each task."""

    def __init__(self, setting: Setting, precision: str, order: str = "bucketed", **options):
        super().__init__(setting)
        self.model = self.make_model().train()
        self.autocast = make_autocast(self.device, precision)
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.steps = [self.draw(order, i) for i in range(self.pool.num_steps)]
        self.prepare(**options)

    def draw(self, order: str, i: int) -> dict[str, dict[str, torch.Tensor]]:
        """What `train` takes in step i."""
        return self.pool.batches(order, i, self.device)

    def prepare(self) -> None:
        raise NotImplementedError

    def train(self, batches: dict[str, dict[str, torch.Tensor]], step: int) -> None:
        raise NotImplementedError

    def forward(self, task: str, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Pooled vectors (R, H) and loss of a batch."""
        model = self.model
        with self.autocast():
            pooled = model.embed(task, batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
            return pooled, self.loss(task, pooled, batch)

    def loss(self, task: str, pooled: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return TASK_KINDS[self.pool.tasks[task].kind].loss(self.model.logits(task, pooled), batch["labels"])

    def step(self, i: int) -> None:
        self.train(self.steps[i], i)

    @torch.no_grad()
    def losses(self) -> dict[str, float]:
        """Task losses of the first bucketed step, in float32, without dropout, before any update."""
        self.model.eval()
        autocast, self.autocast = self.autocast, nullcontext
        batches = self.pool.batches("bucketed", 0, self.device)
        losses = {task: float(self.forward(task, batch)[1]) for task, batch in batches.items()}
        self.autocast = autocast
        self.model.train()
        return losses

    def sizes(self) -> dict[str, int]:
        """Trainable parameters: all of them, and the encoder's."""
        modules = {"all": self.model, "shared": self.model.bert}
        return {
            name: sum(param.numel() for param in module.parameters() if param.requires_grad)
            for name, module in modules.items()
        }

    def profile(self, num_steps: int) -> dict[str, float]:
        """Seconds a step in each of CATEGORIES, in the optimizer, elsewhere in torch, and outside it."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            started = time.perf_counter()
            for i in range(num_steps):
                self.step(i % self.pool.num_steps)
            wall = time.perf_counter() - started
        seconds = dict.fromkeys((*CATEGORIES, "optimizer", "other operations"), 0.0)
        for event in profiler.events():
            seconds[event_category(event)] += event.self_cpu_time_total / 1e6
        seconds["outside of operations"] = max(0.0, wall - sum(seconds.values()))
        return {name: value / num_steps for name, value in seconds.items()}


def event_category(event) -> str:
    """The category of a profiled operation: the optimizer's if it runs within its step, else by its name."""
    outer = event
    while outer is not None:
        if outer.name.startswith("Optimizer.step"):
            return "optimizer"
        if "AccumulateGrad" in outer.name:
            return "gradients: zeroing and adding up"
        outer = outer.cpu_parent
    name = event.name.removeprefix("aten::")
    fitting = (category for category, starts in CATEGORIES.items() if name.startswith(starts))
    return next(fitting, "other operations")


class Ours(StepContender):
    """Our training step, as multitask_classifier.py runs it; only it and OneRow know its interface."""

    def prepare(self, grad_method: str = "sum", compiled: bool = True):
        keep_freed_memory()
        self.grad_method = grad_method
        self.kernels = compile_kernels() if compiled and find_compiler() else PLAIN
        self.memory = self.make_memory()
        groups = self.memory.param_groups(LR, HEAD_LR, WEIGHT_DECAY)
        self.optimizer = AdamW(groups, lr=LR, update=self.kernels.adamw_update)

    def draw(self, order, i):
        padded = self.pool.batches(order, i, "cpu")
        return {task: to_device(batch, self.device) for task, batch in padded.items()}

    def make_memory(self) -> FlatMemory:
        return self.model.move_to_flat_memory(self.dtype, self.dtype, self.kernels)

    def train(self, batches, step):
        task_batches = [TaskBatch(task, [batch]) for task, batch in batches.items()]
        settings = StepSettings(self.setting.seed, grad_method=self.grad_method, autocast=self.autocast)
        result = train_step(self.model, self.memory, self.optimizer, task_batches, settings, step=step)
        if not result.applied:
            raise RuntimeError("a step was skipped: its loss or gradient is not finite")


class OneRow(Ours):
    """Our model and optimizer without anything that surgery needs: one gradient, of the sum of the losses."""

    def make_memory(self):
        heads = {"all": self.model.heads}
        return FlatMemory(
            self.model.bert, heads, dtype=self.dtype, grad_dtype=self.dtype, kernels=self.kernels
        )

    def train(self, batches, step):
        self.memory.start_step([batch["input_ids"] for batch in batches.values()])
        inputs = [
            (batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
            for batch in batches.values()
        ]
        with self.autocast():
            outputs = self.model.bert.encode(inputs, [0] * len(inputs), self.memory.targets)
            losses = [
                self.loss(task, pool_mean(output, batch["attention_mask"].to(self.device)), batch)
                for (task, batch), output in zip(batches.items(), outputs, strict=True)
            ]
        sum(losses).backward()
        self.memory.combine(torch.ones(1, device=self.device))
        self.memory.show_grads({"all"})
        self.optimizer.step()


def captured_ops(device: str) -> ModuleType:
    """The kernels of captured steps; without a GPU their twins: slow, but all around them can be tried."""
    if torch.device(device).type == "cuda":
        from kernels import triton_kernels  # only on a GPU is Triton to be had

        return triton_kernels
    from tests.kernels import plain_kernels

    return plain_kernels


class OursCaptured(Ours):
    """Our training step as a GPU makes it. It packs its batches itself, while the device works."""

    def draw(self, order, i):
        return [(task, [chosen]) for task, chosen in self.pool.orders[order][i].items()]

    def prepare(self, grad_method: str = "sum"):
        super().prepare(grad_method, compiled=False)
        settings = StepSettings(self.setting.seed, grad_method=grad_method, autocast=self.autocast)
        self.captured = CapturedStep(
            self.model, self.memory, self.optimizer, self.data(), settings, captured_ops(self.device)
        )
        self.num_steps, self.waiting = 0, deque()

    def data(self):
        return self.pool.data

    def warm_up(self):
        super().warm_up()  # each shape as it is, which compiles
        super().warm_up()  # and once more, which captures it
        self.finish()

    def train(self, batches, step):
        self.waiting.append(self.captured(batches, self.num_steps))
        self.num_steps += 1
        self.finish(MAX_WAITING)

    def finish(self, num_waiting: int = 0) -> None:
        """Read the results of steps, but for those of the last few, which the device may still be at."""
        while len(self.waiting) > num_waiting:
            if not self.waiting.popleft()().applied:
                raise RuntimeError("a step was skipped: its loss or gradient is not finite")

    @property
    def num_graphs(self) -> int:
        return sum(graph is not None for graph in self.captured.graphs.values())


class OneTaskData:
    """The examples of all tasks as if of one, numbered end to end."""

    def __init__(self, data: dict[str, TaskData]):
        self.parts = list(data.values())
        self.lengths = np.concatenate([part.lengths for part in self.parts])
        self.firsts = np.cumsum([0, *map(len, self.parts)])

    def packed_batch(self, examples: np.ndarray, number: int, seed: int = 0):
        """`TaskData.packed_batch` of examples of one task."""
        n = int(np.searchsorted(self.firsts, examples[0], "right")) - 1
        return self.parts[n].packed_batch(examples - self.firsts[n], number, seed)


class OneTaskBERT(MultitaskBERT):
    """In steps of static shape all draws are of one task; the n-th still goes to the n-th head."""

    def static_losses(self, packing: StaticPacking) -> list[torch.Tensor]:
        with static_dropout(packing):
            outputs = self.bert.encode_static(packing)
            return [
                self.head_loss(task, output, mask, labels)
                for task, (output, mask), labels in zip(self.tasks, outputs, packing.labels, strict=True)
            ]


class OneRowCaptured(OursCaptured):
    """`OneRow` as a GPU makes it: one gradient, of the sum of the losses."""

    model_class, make_memory = OneTaskBERT, OneRow.make_memory

    def data(self):
        return {"all": OneTaskData(self.pool.data)}

    def draw(self, order, i):
        firsts = OneTaskData(self.pool.data).firsts[:-1]
        chosen = self.pool.orders[order][i].values()
        return [("all", [examples + first]) for examples, first in zip(chosen, firsts, strict=True)]


class HuggingFace(StepContender):
    """Hugging Face's encoder under our heads, torch's fused AdamW, one backward pass for all losses."""

    needs = ("transformers",)

    def make_model(self):
        return use_hugging_face(super().make_model(), self.setting.pretrained)

    def prepare(self, keep_memory: bool = False):
        if keep_memory:
            keep_freed_memory()
        self.shared = list(self.model.bert.parameters())
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, fused=True
        )

    def train(self, batches, step):
        sum(self.forward(task, batch)[1] for task, batch in batches.items()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def use_hugging_face(model: MultitaskBERT, pretrained: str) -> MultitaskBERT:
    """Put Hugging Face's encoder, with the same weights, in the place of ours; the heads stay."""
    transformers = import_peer("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    bert = transformers.BertModel.from_pretrained(
        resolve_pretrained(pretrained), add_pooling_layer=False, attn_implementation="sdpa"
    )
    model.bert = bert.to(next(model.parameters()).device)
    return model


class HuggingFaceCompiled(HuggingFace):
    """The same with its encoder compiled once for all lengths."""

    def warm_up(self):
        self.model.bert.compile(
            dynamic=True
        )  # not before: its losses without dropout would take another code
        super().warm_up()


def textbook_pcgrad(task_grads: list[torch.Tensor], generator: torch.Generator | None = None) -> torch.Tensor:
    """Algorithm 1 of the PCGrad paper as written, on the gradient vectors: K times (P,) -> (P,)."""
    projected = [grad.clone() for grad in task_grads]
    for i, grad in enumerate(projected):
        for j in torch.randperm(len(task_grads), generator=generator).tolist():
            if j == i:
                continue
            product = torch.dot(grad, task_grads[j])
            if product < 0:
                grad -= product / torch.dot(task_grads[j], task_grads[j]) * task_grads[j]
    return torch.stack(projected).sum(0)


def torchjd_pcgrad(task_grads: list[torch.Tensor]) -> torch.Tensor:
    """TorchJD's aggregator on the same vectors."""
    return import_peer("torchjd.aggregation").PCGrad()(torch.stack(task_grads))


class TextbookPCGrad(HuggingFace):
    """One backward pass for each task, concatenated gradient vectors, projections, and back into `.grad`.

    Leaner than the usual public code, which also projects the heads' gradients and keeps all graphs.
    """

    combine = staticmethod(textbook_pcgrad)

    def train(self, batches, step):
        task_grads = []
        for task, batch in batches.items():
            for param in self.shared:
                param.grad = None
            self.forward(task, batch)[1].backward()  # a head's own gradient stays where it is
            task_grads.append(torch.cat([param.grad.flatten() for param in self.shared]))
        combined = self.combine(task_grads)
        pieces = combined.split([param.numel() for param in self.shared])
        for param, piece in zip(self.shared, pieces, strict=True):
            param.grad = piece.view_as(param)
        self.optimizer.step()
        self.optimizer.zero_grad()


class TorchJDVectors(TextbookPCGrad):
    """The textbook's way with TorchJD's aggregator.

    Its documentation does not do so, but it is faster here: no task's graph sees another's zeros.
    """

    needs = ("transformers", "torchjd")
    combine = staticmethod(torchjd_pcgrad)


class TorchJD(HuggingFace):
    """TorchJD as its documentation recommends for several tasks: `mtl_backward`, then `jac_to_grad`."""

    needs = ("transformers", "torchjd")

    def prepare(self):
        super().prepare()
        self.autojac = import_peer("torchjd.autojac")
        self.aggregator = import_peer("torchjd.aggregation").PCGrad()

    def train(self, batches, step):
        features, losses = zip(*(self.forward(task, batch) for task, batch in batches.items()), strict=True)
        self.autojac.mtl_backward(losses, features=features)
        self.autojac.jac_to_grad(self.shared, self.aggregator)
        self.optimizer.step()
        self.optimizer.zero_grad()


class TorchJDAutogram(HuggingFace):
    """TorchJD's newer engine: the Gramian first, then one backward pass of the weighted losses.

    The weights reach the heads as well. Batches are not split by example (`batch_dim`): its documentation
    asks for modules without random numbers of their own, which this encoder is not.
    """

    needs = ("transformers", "torchjd")

    def prepare(self):
        super().prepare()
        self.engine = import_peer("torchjd.autogram").Engine(self.model.bert, batch_dim=None)
        self.weighting = import_peer("torchjd.aggregation").PCGradWeighting()

    def train(self, batches, step):
        losses = torch.stack([self.forward(task, batch)[1] for task, batch in batches.items()])
        losses.backward(self.weighting(self.engine.compute_gramian(losses)))
        self.optimizer.step()
        self.optimizer.zero_grad()


class OptimizerContender(Contender):
    """One optimizer on random gradients of the model's own sizes."""

    def __init__(
        self, setting: Setting, fused: bool | None = None, kernels: Callable[[], Kernels] | None = None
    ):
        super().__init__(setting)
        model = self.make_model()
        if kernels:
            memory = model.move_to_flat_memory()
            memory.grad.normal_(std=1e-3)
            memory.show_grads(set(model.tasks))
            groups = memory.param_groups(LR, HEAD_LR, WEIGHT_DECAY)
            self.optimizer = AdamW(groups, lr=LR, update=kernels().adamw_update)
        else:
            params = [param for param in model.parameters() if param.requires_grad]
            for param in params:
                param.grad = torch.randn_like(param) * 1e-3
            self.optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=WEIGHT_DECAY, fused=fused)

    def step(self, i):
        self.optimizer.step()


class SurgeryContender(Contender):
    """PCGrad alone, on random gradients (K, P) that are in conflict."""

    def __init__(self, setting: Setting):
        super().__init__(setting)
        num_shared = sum(
            param.numel() for name, param in self.make_model().bert.named_parameters() if param.requires_grad
        )
        common = torch.randn(num_shared, device=self.device)
        signs = torch.tensor([(-1.0) ** k for k in range(len(self.pool.tasks))], device=self.device)
        self.task_grads = torch.randn(len(signs), num_shared, device=self.device) + signs[:, None] * common
        self.combined = torch.empty(num_shared, device=self.device)


class OurSurgery(SurgeryContender):
    """On the gram matrix; `dtype` is that of the gradients, which are bfloat16 in bfloat16 training."""

    def __init__(self, setting: Setting, kernels: Callable[[], Kernels], dtype: torch.dtype = torch.float32):
        super().__init__(setting)
        self.task_grads, self.kernels = self.task_grads.to(dtype), kernels()

    def step(self, i):
        gram = self.kernels.gram_matrix(self.task_grads).cpu()
        weights = pcgrad(TaskFacts(gram, draw_orders(len(gram)))).to(self.device)
        self.kernels.weighted_sum(self.task_grads, weights, self.combined)


class TextbookSurgery(SurgeryContender):
    def step(self, i):
        self.combined = textbook_pcgrad(list(self.task_grads))


class TorchJDSurgery(SurgeryContender):
    needs = ("torchjd",)

    def __init__(self, setting: Setting):
        super().__init__(setting)
        self.aggregator = import_peer("torchjd.aggregation").PCGrad()

    def step(self, i):
        self.combined = self.aggregator(self.task_grads)


class Evaluation(Contender):
    """Our evaluation of all examples of the pool."""

    def __init__(self, setting: Setting, precision: str):
        super().__init__(setting)
        self.model = self.make_model().eval()
        self.precision = precision
        if type(self) is Evaluation:  # ours, as our scripts run it
            keep_freed_memory()

    def warm_up(self):
        self.predictions(WARM_UP_EXAMPLES, self.precision)

    def step(self, i):
        self.found = self.predict(self.pool.data, make_autocast(self.device, self.precision))

    def predictions(self, limit: int | None = None, precision: str = "fp32") -> dict[str, np.ndarray]:
        """Task -> predictions: those of the last step, or of `limit` examples."""
        if limit is None:
            return self.found
        data = {task: data.sample(limit, self.setting.seed) for task, data in self.pool.data.items()}
        return self.predict(data, make_autocast(self.device, precision))

    def predict(self, data: dict[str, TaskData], autocast) -> dict[str, np.ndarray]:
        return evaluate(self.model, data, self.pool.pad_token_id, autocast)[1]


class HuggingFaceEvaluation(Evaluation):
    """Batches as the file has them, both sentences of a pair in one forward pass."""

    needs = ("transformers",)

    def make_model(self):
        return use_hugging_face(super().make_model(), self.setting.pretrained)

    @torch.no_grad()
    def predict(self, data, autocast):
        return {task: self.predict_task(task, task_data, autocast) for task, task_data in data.items()}

    def predict_task(self, task: str, data: TaskData, autocast) -> np.ndarray:
        logits = []
        for start in range(0, len(data), HF_EVAL_BATCH):
            examples = np.arange(start, min(start + HF_EVAL_BATCH, len(data)))
            batch = data.batch(examples, self.pool.pad_token_id)
            with autocast():
                logits.append(self.model(task, {key: value.to(self.device) for key, value in batch.items()}))
        return TASK_KINDS[self.pool.tasks[task].kind].decode(torch.cat(logits)).cpu().numpy()


# --- tables: name -> how to build it; in `step` and `evaluate` each row is built once for each precision ----

STEP = {
    "ours sum": partial(Ours, grad_method="sum"),
    "ours pcgrad": partial(Ours, grad_method="pcgrad"),
    "ours sum, one row": partial(OneRow),
    "ours pcgrad, nothing compiled": partial(Ours, grad_method="pcgrad", compiled=False),
    "Hugging Face sum, random batches": partial(HuggingFace, order="random"),
    "Hugging Face sum, random batches, freed memory kept": partial(
        HuggingFace, order="random", keep_memory=True
    ),
    "Hugging Face sum, our batches": partial(HuggingFace),
    "Hugging Face + textbook PCGrad": partial(TextbookPCGrad, order="random"),
    "Hugging Face + TorchJD mtl_backward": partial(TorchJD, order="random"),
    "Hugging Face + TorchJD on vectors": partial(TorchJDVectors, order="random"),
}
GPU_STEP = {  # each takes `precision`
    "ours pcgrad": partial(OursCaptured, grad_method="pcgrad"),
    "ours sum": partial(OursCaptured, grad_method="sum"),
    "ours sum, one row": partial(OneRowCaptured),
    "ours pcgrad, plain path": partial(Ours, grad_method="pcgrad", compiled=False),
    "Hugging Face sum": partial(HuggingFace),
    "Hugging Face + textbook PCGrad": partial(TextbookPCGrad),
    "Hugging Face + TorchJD mtl_backward": partial(TorchJD),
    "Hugging Face + TorchJD autogram": partial(TorchJDAutogram),
    "Hugging Face sum, torch.compile": partial(HuggingFaceCompiled),
}
OPTIMIZER = {
    "ours, compiled": partial(OptimizerContender, kernels=compile_kernels),
    "ours, plain operations": partial(OptimizerContender, kernels=Kernels),
    "torch.optim.AdamW, fused": partial(OptimizerContender, fused=True),
    "torch.optim.AdamW, default": partial(OptimizerContender),
}
SURGERY = {
    "ours, compiled, bf16 gradients": partial(OurSurgery, kernels=compile_kernels, dtype=torch.bfloat16),
    "ours, compiled": partial(OurSurgery, kernels=compile_kernels),
    "ours, plain operations": partial(OurSurgery, kernels=Kernels),
    "textbook, vectors": partial(TextbookSurgery),
    "TorchJD aggregator": partial(TorchJDSurgery),
}
MEMORY = {
    "ours": partial(Ours, grad_method="pcgrad", order="longest"),
    "Hugging Face (SDPA)": partial(HuggingFace, order="longest"),
    "Hugging Face (SDPA), freed memory kept": partial(HuggingFace, order="longest", keep_memory=True),
}
EVALUATE = {"ours": partial(Evaluation), "Hugging Face": partial(HuggingFaceEvaluation)}


def with_precisions(table: dict[str, partial], precisions: list[str]) -> dict[str, partial]:
    """Each row once for each precision, which its name then ends in."""
    return {
        f"{name} {precision}": partial(build, precision=precision)
        for precision in precisions
        for name, build in table.items()
    }


def installed(table: dict[str, partial]) -> tuple[dict[str, partial], dict[str, str]]:
    """The rows whose packages are there; and of the others, name -> what is missing."""
    skipped = {}
    for name, build in table.items():
        missing = [package for package in build.func.needs if importlib.util.find_spec(package) is None]
        if missing:
            skipped[name] = f"{' and '.join(missing)} not installed (requirements/bench.txt)"
    return {name: build for name, build in table.items() if name not in skipped}, skipped

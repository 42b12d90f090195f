"""A training step for one GPU: no wait for the device, and one captured CUDA graph for each shape of batch.

The same mathematics as `multitask_classifier.train_step`, which stays the reference: the first step is made
both ways, without dropout, and compared (`check`). What differs is how the device is told. A small model's
step is thousands of short operations; started one by one, they leave a GPU idle for 19 of 20 ms. Here the
host makes a buffer of integers (kernels/static.py), copies it, and replays two graphs:

    backward    forward and backward of all tasks; for each `StepShape`, and once per micro-batch
                (several ranks sum their gradients here, outside of the graphs)
    update      gram matrix, weights, clipping, AdamW; for each set of tasks that a step draws

Nothing of a step is read back before it is logged: whether it was applied is a number on the device, which
AdamW multiplies by, and results come to the host by themselves, some steps later.

A shape's first step runs its operations one by one, and is captured when it comes again: shapes that come
once cost nothing, and a run that is resumed has the same bits, since a replay repeats the same kernels.

Shapes: K tasks, L layer groups of the encoder, B blocks of flat memory.
"""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from datasets import TaskData, batch_seed
from heads import MultitaskBERT
from kernels.flat_memory import FlatMemory
from kernels.grad_methods import GRAD_METHODS, combination_weights
from kernels.layout import SHARED
from kernels.static import TABLES, StepShape, fill_buffer, pack_step
from kernels.static_packing import StaticPacking
from optimizer import AdamW, device_hyperparameters
from pcgrad import TaskFacts, draw_step_orders, update_cosine_ema
from support.seeds import make_seed
from support.specs import find_row
from training.settings import StepSettings
from training.step_result import StepResult

MAX_GRAPHS = 24  # beyond, rare shapes are not captured
# Relative errors (of norms) allowed between the plain step and this one; with bfloat16 or TF32: False, True.
# Adam's first updates have the size of the learning rate whatever the gradient's, so noise in small gradients
# shows there.
TOLERANCES = {
    False: {"losses": 1e-4, "gram matrix": 1e-3, "weights": 1e-3, "update": 0.05},
    True: {"losses": 2e-2, "gram matrix": 5e-2, "weights": 5e-2, "update": 0.5},
}


@dataclass(frozen=True)
class Block:
    """A flat parameter as AdamW sees it: which owner's, and where in memory.

    Args:
        pieces: ranges that each lie in one section of the gradients, with factors of their learning rate.
        group: of the optimizer.
    """

    owner: str
    param: torch.nn.Parameter
    where: slice
    pieces: list[tuple[slice, float]]
    group: dict


def check_capturable(settings: StepSettings, model: MultitaskBERT, data: dict[str, TaskData]) -> None:
    """Refuse what a step cannot do without a look at a value.

    Raises:
        ValueError: naming the flag.
    """
    if not find_row(settings.grad_method, GRAD_METHODS)[0].on_device:
        raise ValueError(f"--grad_method {settings.grad_method} is solved on the host")
    if settings.loss_weighting != "fixed":
        raise ValueError(f"--loss_weighting {settings.loss_weighting} is for plain steps only")
    if settings.gram != "step":
        raise ValueError(f"--gram {settings.gram} is for plain steps only")
    if settings.surgery_scope != "model":
        raise ValueError(f"--surgery_scope {settings.surgery_scope} is for plain steps only")
    if settings.fgm:
        raise ValueError(f"--fgm {settings.fgm:g} is for plain steps only")
    if settings.ranks.size > 1:
        is_drawn = any(each.symmetric or each.phrases is not None for each in data.values())
        if is_drawn or any(model.objective.rdrop.values()):  # what is drawn of a batch, or holds together
            raise ValueError("--symmetric, --phrase_weight and --rdrop take plain steps with several ranks")


class CapturedStep:
    """Makes the steps of a run; the learning rates are already in the optimizer's groups.

    Args:
        data: task -> training examples.
        ops: the module `kernels.triton_kernels`, or a twin of it in plain operations.

    Raises:
        ValueError: if a setting needs what a captured step cannot do; it names the flag.
    """

    def __init__(
        self,
        model: MultitaskBERT,
        memory: FlatMemory,
        optimizer: AdamW,
        data: dict[str, TaskData],
        settings: StepSettings,
        ops: ModuleType,
    ):
        check_capturable(settings, model, data)
        self.model, self.memory, self.optimizer = model, memory, optimizer
        self.data, self.settings, self.ops = data, settings, ops
        self.lengths = {task: each.lengths for task, each in data.items()}
        self.max_length = ops.MAX_TILE
        self.device = memory.data.device
        self.is_cuda = self.device.type == "cuda"
        if self.is_cuda:
            card = torch.cuda.get_device_properties(self.device)
            self.max_length = ops.max_tile(memory.compute_dtype, card.shared_memory_per_block_optin)
        self.stream = torch.cuda.Stream(self.device) if self.is_cuda else None
        self.pool = torch.cuda.graph_pool_handle() if self.is_cuda else None
        self.graphs: dict[tuple, torch.cuda.CUDAGraph | None] = {}  # None: made once, not captured yet
        self.buffers: dict[tuple, Tensor] = {}  # of each graph, where its input lies
        self._lay_out()

        num_tasks, zeros = len(memory.tasks), torch.zeros
        self.losses = zeros(num_tasks, device=self.device)
        self.cosine_ema = zeros(num_tasks, num_tasks, device=self.device)
        self.counts = zeros(len(self.blocks), dtype=torch.float64, device=self.device)  # updates so far
        self.moments: list[tuple[Tensor, Tensor]] = []
        self.is_current = False  # whether moments and counts are those of the optimizer
        self.result = zeros(self.result_size, device=self.device)
        self.adjusted = settings.adjusted(memory.tasks).to(self.device)
        decays = [block.group["weight_decay"] for block in self.blocks]
        self.weight_decays = torch.tensor(decays, dtype=torch.float64, device=self.device)

    def _lay_out(self) -> None:
        """What depends on the model alone: blocks, embedding tables, pieces of the gram matrix."""
        memory, layout = self.memory, self.memory.layout
        groups = {id(group["params"][0]): group for group in self.optimizer.param_groups}
        self.blocks = [
            Block(owner, param, where, lr_pieces(memory, owner, where, groups[id(param)]), groups[id(param)])
            for (owner, decays), param in memory.flat_params.items()
            for where in [layout.blocks[owner, decays]]
        ]
        self.tables = self.model.bert.table_params()
        columns = {name: memory.grad_column(param) for name, param in zip(TABLES, self.tables, strict=True)}
        self.table_starts = {name: column for name, column in columns.items() if column is not None}
        self.gram_pieces = [
            (matrix, *split_ranges(ranges, self.ops.BLOCK_COLUMNS, len(layout.layer_groups), self.device))
            for matrix, ranges in memory.group_columns()
        ]
        num_groups, num_tasks = len(layout.layer_groups), len(memory.tasks)
        self.result_parts = {
            "losses": (num_tasks,),
            "group_grams": (num_groups, num_tasks, num_tasks),
            "gram": (num_tasks, num_tasks),
            "weights": (num_tasks,),
            "head_squares": (num_tasks,),
            "cosine_ema": (num_tasks, num_tasks),
            "grad_norm": (),
            "applied": (),
        }
        self.result_size = sum(int(np.prod(shape)) for shape in self.result_parts.values())

    # --- a step, as the host sees it ------------------------------------------------------------------------

    def fits(self, examples: Sequence[tuple[str, list[np.ndarray]]]) -> bool:
        """Whether all sequences of a step fit into an attention tile; the others take the plain path."""
        return all(
            self.lengths[task][chosen].max() <= self.max_length
            for task, batches in examples
            for chosen in batches
        )

    def __call__(
        self, examples: Sequence[tuple[str, list[np.ndarray]]], step: int, *, with_dropout: bool = True
    ) -> Callable[[], StepResult]:
        """Start one update; returns a function that waits for its result.

        Args:
            examples: for each draw its task and the examples of its micro-batches.
            step: steps so far; with the seed it fixes dropout and the order of projections.
        """
        self.memory.touched = None  # what a replay writes, the host does not see
        drawn_tasks = {task for task, _ in examples}
        drawn = tuple(k for k, task in enumerate(self.memory.tasks) if task in drawn_tasks)
        num_tokens, ranks = 0, self.settings.ranks
        with self._on_stream():
            self._take_over()
            is_first = True
            for micro_step in range(len(examples[0][1])):
                own = self._own(examples, micro_step)
                if not own:  # more ranks than examples
                    continue
                shape, arrays = self._pack(examples, own, step, micro_step)
                num_tokens += int(arrays["lengths"].sum())
                seed = make_seed(self.settings.seed, step, micro_step, *ranks.own_numbers)
                arrays["rng"] = np.array([seed, with_dropout], dtype=np.int64)
                key = (shape, is_first)
                buffer = self._upload(key, shape.size, partial(fill_buffer, shape, arrays))
                self._run(key, partial(self._backward, shape, buffer, is_first))
                is_first = False
            if ranks.size > 1:
                num_tokens = self._sum_over_ranks(examples, drawn, is_empty=is_first)
            orders = draw_step_orders(self.settings.seed, step, len(drawn)).numpy().ravel()
            key, size = (drawn, len(examples)), orders.size + len(self.blocks)
            numbers = self._upload(key, size, partial(self._write_numbers, orders))
            self._run(key, partial(self._update, *key, numbers))
            return self._pending(drawn, num_tokens)

    def _own(self, examples: Sequence, micro_step: int) -> list[tuple[int, str, np.ndarray]]:
        """This rank's examples of each draw that it has any of, with the draw's number."""
        share = self.settings.ranks.share
        own = [(n, task, share(batches[micro_step], n)) for n, (task, batches) in enumerate(examples)]
        return [(n, task, chosen) for n, task, chosen in own if len(chosen)]

    def _sum_over_ranks(self, examples: Sequence, drawn: Sequence[int], is_empty: bool) -> int:
        """Between the graphs: sum what the backward passes of all ranks have left, words as few as occur.

        Returns:
            the word pieces of all ranks.
        """
        memory = self.memory
        if is_empty:  # this rank had no example
            memory.start_step()
            memory.finish_grads()
            self.losses.zero_()
        batches = [self.data[task].packed_batch(chosen, 0) for task, each in examples for chosen in each]
        words = torch.from_numpy(np.unique(np.concatenate([batch.input_ids for batch in batches])))
        touched = words.long().to(self.device)
        self.losses.copy_(memory.sum_grads(self.settings.ranks.sum, drawn, self.losses, touched))
        return sum(int(batch.lengths.sum()) for batch in batches)

    def _pack(
        self, examples: Sequence, own: Sequence[tuple[int, str, np.ndarray]], step: int, micro_step: int
    ) -> tuple[StepShape, dict[str, np.ndarray]]:
        tasks, settings = self.memory.tasks, self.settings
        own = sorted(own, key=lambda each: tasks.index(each[1]))
        chosen = [(task, batch) for _, task, batch in own]
        seeds = [batch_seed(settings.seed, step, n, micro_step) for n, _, _ in own]
        drawn = [(task, sum(map(len, batches))) for task, batches in examples]
        sizes = [(task, len(batch)) for task, batch in chosen]
        shares, weights = settings.shares_and_weights(drawn, sizes, step)
        shape, arrays = pack_step(
            [
                self.data[task].packed_batch(batch, tasks.index(task), seed)
                for (task, batch), seed in zip(chosen, seeds, strict=True)
            ],
            len(tasks),
            self.memory.other_grads.shape[1],
            self.table_starts,
            self.model.bert.config.hidden_size,
        )
        arrays["shares"] = np.array(shares, dtype=np.float32)
        arrays["loss_weights"] = np.array(weights, dtype=np.float32)
        return shape, arrays

    def _write_numbers(self, orders: np.ndarray, host: np.ndarray) -> None:
        host[: orders.size] = orders
        host[orders.size :].view(np.float32)[:] = [block.group["lr"] for block in self.blocks]

    def _upload(self, key: tuple, size: int, fill: Callable[[np.ndarray], None]) -> Tensor:
        """Fill a buffer on the host and start its copy to the graph's own on the device."""
        if key not in self.buffers:
            self.buffers[key] = torch.empty(size, dtype=torch.int32, device=self.device)
        host = torch.zeros(size, dtype=torch.int32, pin_memory=self.is_cuda)
        fill(host.numpy())
        self.buffers[key].copy_(host, non_blocking=True)
        return self.buffers[key]

    def _run(self, key: tuple, function: Callable[[], None]) -> None:
        """Call a function of static shapes: the first time as it is, then as a captured graph."""
        if key not in self.graphs:
            self.graphs[key] = None
            function()
            return
        captured = sum(graph is not None for graph in self.graphs.values())
        if self.graphs[key] is None and self.is_cuda and captured < MAX_GRAPHS:
            graph = torch.cuda.CUDAGraph()
            # Of other threads, that of NCCL asks for its events meanwhile.
            mode = "global" if self.settings.ranks.size == 1 else "thread_local"
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode=mode):
                function()
            self.graphs[key] = graph
        if self.graphs[key] is None:
            function()
        else:
            self.graphs[key].replay()

    @contextmanager
    def _on_stream(self):
        """Work on a stream of our own, which graphs are captured on, after what the others have started."""
        if not self.is_cuda:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream().wait_stream(self.stream)

    def _pending(self, drawn: tuple[int, ...], num_tokens: int) -> Callable[[], StepResult]:
        host = torch.empty(self.result_size, pin_memory=self.is_cuda)
        host.copy_(self.result, non_blocking=True)
        event = torch.cuda.Event() if self.is_cuda else None
        if event:
            event.record(self.stream)

        def wait() -> StepResult:
            if event:
                event.synchronize()
            result = self._read_result(host, drawn, num_tokens)
            if result.applied:
                self._count(drawn)
            return result

        return wait

    def _read_result(self, host: Tensor, drawn: tuple[int, ...], num_tokens: int) -> StepResult:
        sizes = [int(np.prod(shape)) for shape in self.result_parts.values()]
        parts = dict(zip(self.result_parts, host.split(sizes), strict=True))
        parts = {name: parts[name].view(shape) for name, shape in self.result_parts.items()}
        parts["losses"][[k not in drawn for k in range(len(parts["losses"]))]] = torch.nan
        applied = bool(parts.pop("applied"))
        return StepResult(
            **parts | {"grad_norm": float(parts["grad_norm"])}, num_tokens=num_tokens, applied=applied
        )

    # --- the first step, made both ways ---------------------------------------------------------------------

    def check(self, examples: Sequence, step: int, plain_step: Callable[[], StepResult]) -> None:
        """Make a step on the plain path, as it is, and captured, without dropout; then undo all three.

        Args:
            plain_step: makes the step and returns its result.

        Raises:
            ValueError: naming what differs by more than TOLERANCES.
        """
        memory = self.memory
        is_coarse = memory.weight_copy is not None or torch.get_float32_matmul_precision() != "highest"
        tolerances = TOLERANCES[is_coarse]
        before = memory.data.clone(), self.cosine_ema.clone()
        states = {param: dict(state) for param, state in self.optimizer.state.items()}
        moments = {param: clone_tensors(state) for param, state in states.items()}

        def undo():
            memory.data.copy_(before[0])
            self.optimizer.state.clear()
            for param, state in states.items():
                for name, value in moments[param].items():
                    state[name].copy_(value)
                self.optimizer.state[param] = dict(state)
            for tensors in self.moments:
                for tensor in tensors:
                    tensor.zero_()  # what is the optimizer's is copied again
            self.leave(before[1])

        def outcome(result: StepResult) -> dict[str, Tensor]:
            norms = result.gram.diagonal().clamp(min=1e-30).sqrt()
            return {
                "losses": result.losses.nan_to_num(),
                "gram matrix": result.gram / (norms[:, None] * norms),
                "weights": result.weights,
                "update": (memory.data - before[0]).cpu(),
            }

        self.model.eval()
        try:
            plain = outcome(plain_step())
        finally:
            self.model.train()
            undo()
        for _ in ("as it is", "captured"):
            static = outcome(self(examples, step, with_dropout=False)())
            undo()
            for name, expected in plain.items():
                error = float((static[name] - expected).norm() / expected.norm().clamp(min=1e-30))
                if not error <= tolerances[name]:
                    raise ValueError(f"{name} of the first step differ by {error:.1e}, relatively")

    # --- the optimizer's state, which the plain path and checkpoints share ----------------------------------

    def _is_updated(self, block: Block, drawn: Sequence[int]) -> bool:
        return block.owner == SHARED or self.memory.tasks.index(block.owner) in drawn

    def _count(self, drawn: Sequence[int]) -> None:
        """Let the optimizer know of an update."""
        for block, (exp_avg, exp_avg_sq) in zip(self.blocks, self.moments, strict=True):
            if self._is_updated(block, drawn):
                state = self.optimizer.state[block.param]
                state.setdefault("step", 0)
                state["step"] += 1
                state["exp_avg"], state["exp_avg_sq"] = exp_avg, exp_avg_sq

    def _take_over(self) -> None:
        """Start from the optimizer's moments and counters, where another has changed them."""
        if self.is_current:
            return
        states = [self.optimizer.state.get(block.param, {}) for block in self.blocks]
        if not self.moments:  # captured graphs know their addresses: from here on they stay
            self.moments = [
                (torch.zeros_like(block.param), torch.zeros_like(block.param)) for block in self.blocks
            ]
        for moments, state in zip(self.moments, states, strict=True):
            for own, name in zip(moments, ("exp_avg", "exp_avg_sq"), strict=True):
                if name in state and state[name] is not own:
                    own.copy_(state[name])
                    state[name] = own
        self.counts.copy_(torch.tensor([state.get("step", 0) for state in states]))
        self.is_current = True

    def leave(self, cosine_ema: Tensor | None) -> None:
        """Something else is about to change weights or moments: take its state over next time."""
        self.is_current = False
        self.cosine_ema.zero_()
        if cosine_ema is not None:
            self.cosine_ema.copy_(cosine_ema)

    # --- a step, as the device sees it: captured, so nothing here may look at a value -----------------------

    def _backward(self, shape: StepShape, buffer: Tensor, is_first: bool) -> None:
        """Forward and backward of a micro-batch; its gradients are written, or added, to flat memory."""
        memory = self.memory
        packing = StaticPacking(
            shape,
            buffer,
            None if self.model.freeze_encoder else memory.targets,
            self.tables,
            memory.other_grads.view(-1),
            self.ops,
        )
        if is_first:
            memory.start_step()
            self.losses.zero_()
        else:
            memory.continue_step()
        with self.settings.autocast(), no_autocast_cache():
            losses = torch.stack(self.model.static_losses(packing))  # (draws,)
        (losses * packing.loss_weights).sum().backward()
        memory.finish_grads()
        for draw, loss in zip(shape.draws, (losses.detach() * packing.shares).unbind(), strict=True):
            self.losses[draw.task] += loss

    def _group_grams(self) -> Tensor:
        """(L, K, K), as `FlatMemory.group_grams`."""
        num_tasks = len(self.memory.tasks)
        total = self.losses.new_zeros(len(self.memory.layout.layer_groups), num_tasks, num_tasks)
        for matrix, starts, stops, of_group in self.gram_pieces:
            pieces = self.ops.gram_by_block(matrix, starts, stops)  # (pieces, K, K)
            total = total + (of_group @ pieces.flatten(1).double()).float().view_as(total)
        return total

    def _update(self, drawn: tuple[int, ...], num_batches: int, numbers: Tensor) -> None:
        """Gram matrix, weights, clipping and AdamW; a step with anything not finite changes nothing."""
        memory, settings, num_present = self.memory, self.settings, len(drawn)
        orders = numbers[: num_present**2].view(num_present, num_present).long()
        lrs = numbers[num_present**2 :].view(torch.float32)

        group_grams = self._group_grams()
        gram = group_grams.sum(0)
        weights, _ = combination_weights(
            TaskFacts(gram, orders, self.cosine_ema, self.adjusted),
            drawn,
            grad_method=settings.grad_method,
            grad_reduction=settings.grad_reduction,
            num_batches=num_batches,
        )
        head_squares = torch.stack([memory.head_grad(task).square().sum() for task in memory.tasks])
        shared_square = (weights @ gram @ weights).clamp(min=0)
        grad_norm = (shared_square + head_squares.sum()).sqrt()
        is_finite = [gram.isfinite().all(), grad_norm.isfinite(), *(self.losses[k].isfinite() for k in drawn)]
        applied = torch.stack(is_finite).all()
        scale = torch.ones_like(grad_norm)
        if settings.clip_norm:
            scale = (settings.clip_norm / grad_norm).clamp(max=1.0)

        self._apply(drawn, weights * scale, scale, lrs, applied)
        ema = update_cosine_ema(self.cosine_ema, gram)
        self.cosine_ema.copy_(torch.where(applied, ema, self.cosine_ema))
        parts = (self.losses, group_grams, gram, weights, head_squares, self.cosine_ema, grad_norm, applied)
        self.result.copy_(torch.cat([part.flatten().float() for part in parts]))

    def _apply(self, drawn: tuple[int, ...], weights: Tensor, scale: Tensor, lrs: Tensor, applied: Tensor):
        """AdamW on the encoder and on the heads of the drawn tasks."""
        is_updated = [self._is_updated(block, drawn) for block in self.blocks]
        for n, updated in enumerate(is_updated):
            if updated:
                self.counts[n] += applied
        group = self.blocks[0].group  # what is not a learning rate or decay is the same in all
        options = (self.weight_decays, self.counts, applied)
        factors = sorted({factor for block in self.blocks for _, factor in block.pieces})
        numbers = {factor: device_hyperparameters(group, lrs * factor, *options) for factor in factors}
        for n, (block, updated) in enumerate(zip(self.blocks, is_updated, strict=True)):
            if not updated:
                continue
            for section, factor in block.pieces:
                if block.owner == SHARED:
                    grads, row_weights = self.memory.stored_grads(section), weights
                else:
                    grads, row_weights = self.memory.grad[section].unsqueeze(0), scale.view(1)
                own = slice(section.start - block.where.start, section.stop - block.where.start)
                tensors = (self.memory.data[section], *(moment[own] for moment in self.moments[n]))
                self.ops.combine_adamw(grads, row_weights, *tensors, numbers[factor][n])


@contextmanager
def no_autocast_cache():
    """Autocast keeps the copies that it has cast, which must not outlive a captured graph."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def clone_tensors(values: dict) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in values.items() if isinstance(value, Tensor)}


def lr_pieces(memory: FlatMemory, owner: str, where: slice, group: dict) -> list[tuple[slice, float]]:
    """A block cut into ranges that each lie in one section, with factors of the optimizer's learning rate."""
    if "lr_ranges" not in group:
        return [(section, 1.0) for section in memory.sections_of(owner, where)]
    return [
        (slice(where.start + piece.start, where.start + piece.stop), factor)
        for piece, factor in group["lr_ranges"]
    ]


def split_ranges(
    ranges: Sequence[tuple[int, slice]], size: int, num_groups: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Cut ranges of columns into pieces of at most `size`.

    Args:
        ranges: layer group and columns of each.

    Returns:
        start and stop of each piece, int64 (pieces,), and (num_groups, pieces) 1 where a piece is a group's.
    """
    pieces = [
        (group, start, min(start + size, where.stop))
        for group, where in ranges
        for start in range(where.start, where.stop, size)
    ]
    groups, starts, stops = (torch.tensor(column, device=device) for column in zip(*pieces, strict=True))
    of_group = (groups == torch.arange(num_groups, device=device)[:, None]).double()
    return starts, stops, of_group

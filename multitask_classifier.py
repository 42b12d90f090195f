"""Train one BERT on several tasks at once, evaluate it, and write prediction files.

    python multitask_classifier.py --data_dir data/sample --max_steps 150 --batch_size 16

A step is one optimizer update. In a step the batches of all tasks go forward and backward together; each
task's encoder gradient lands in its own row of the gradient matrices (kernels/layout.py has a picture of
them); a gradient method weighs the rows; and AdamW makes one pass over flat memory. Gradient surgery
(PCGrad): https://arxiv.org/abs/2001.06782.

Shapes: K tasks.
"""

import sys

if __name__ == "__main__":
    from support.interrupts import end_quietly
    from support.threads import share_cores

    end_quietly()
    share_cores()  # before torch is imported
    if {"-h", "--help"} & set(sys.argv):  # does not wait for the model's imports
        from training.flags import make_parser

        make_parser().parse_args()

import json
import math
import sys
import time
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from base_bert import resolve_pretrained, weights_digest
from config import DEFAULT_TASKS, OFFLINE_ENCODER, TASKS
from datasets import (
    BatchOrder,
    Rows,
    TaskData,
    batch_seed,
    draw_batches,
    draw_tasks,
    plan_tasks,
    update_sampler,
)
from evaluation import (
    TASK_KINDS,
    evaluate,
    format_predictions,
    overall_titles,
    predict,
    score_warnings,
    select_score,
)
from heads import MultitaskBERT
from kernels.adversarial import AdversarialNoise
from kernels.flat_memory import FlatMemory
from kernels.grad_methods import weights_by_group
from kernels.grad_noise import grams_to_act_on, known_share, moments_of, sketch_grads
from kernels.loss_weightings import loss_factors
from optimizer import lr_factor, set_lr
from pcgrad import TaskFacts, draw_step_orders, update_cosine_ema
from reporting.report import plot_run
from reporting.submission import FORBIDDEN
from support.command_line import Stopped, StopRequest, catch_signals, run_script
from support.device import out_of_memory_hint, to_device
from support.errors import RankError, UserError
from support.files import lock_folder, write_text
from support.ranks import ONE, Ranks, join_ranks
from support.seeds import make_seed, seed_of
from tokenizer import BertTokenizer
from training.args_file import comes_from
from training.captured_step import CapturedStep
from training.checkpoint import load_model, load_state, need_checkpoint
from training.flags import get_args, may_change
from training.loss_scale import scale_of
from training.metrics import average, noise_record, step_record
from training.progress import (
    Progress,
    describe_step,
    format_scores,
    print_end,
    print_plan,
    warn_of_new_length,
)
from training.resolve import (
    check_outputs,
    check_own_predictions,
    data_settings,
    describe_recipe,
    fit_to_encoder,
    flags_without_effect,
    make_settings,
    output_folder,
    resolve_args,
    resolve_machine,
)
from training.run_data import (
    add_phrases,
    fingerprints,
    load_encoder,
    make_model,
    read_data,
    read_split,
    read_test_rows,
    read_trees,
    tokenize_split,
)
from training.run_folder import (
    Run,
    begin_run,
    check_free,
    check_same_run,
    find_last,
    read_args_file,
    write_args,
)
from training.settings import LoopSettings, OutputSettings, RunSettings, StepSettings
from training.skipped_steps import log_skipped_step
from training.step_result import StepResult
from training.task_schedule import draw_shares
from training.teacher import add_soft_targets, describe_teacher, find_answers, find_teacher
from training.trackers import Trackers, check_trackers

# --- a step ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskBatch:
    """What one draw of a task gives to a step: a batch, in several pieces if gradients are accumulated.

    Every rank has the whole batch, and takes its own rows of it.
    """

    task: str
    micro_batches: list[dict[str, Tensor]]  # each as `MultitaskBERT.losses` takes it


# For each draw of a step its task and the examples of its micro-batches, by number.
Examples = list[tuple[str, list[np.ndarray]]]
MAX_WAITING = 16  # steps that a GPU may be behind with its results
CURVES_SHARE = 0.05  # of a run's time, for drawing its curves on the way
CURVES_SECONDS = 1.0  # what drawing takes, until it is measured


def train_step(
    model: MultitaskBERT,
    memory: FlatMemory,
    optimizer: torch.optim.Optimizer,
    task_batches: Sequence[TaskBatch],
    settings: StepSettings,
    *,
    step: int,
    cosine_ema: Tensor | None = None,
    learned: Mapping[str, Tensor] | None = None,
) -> StepResult:
    """One optimizer update; the learning rates are already in the optimizer's groups.

    Sets torch's global seed, from which the kernels draw dropout: a resumed run gives the same bits only if
    dropout depends on nothing but `settings.seed` and `step`.

    Args:
        task_batches: what was drawn for this step; a task may occur several times, or not at all.
        step: steps so far, skipped ones included; with the seed it fixes dropout and the order of
            projections.
        cosine_ema: (K, K) running mean of the cosines, for gradient methods that aim at it.
        learned: what gradient method and loss weighting remember, as `StepResult.learned` has it.
    """
    # 1. Backward for all tasks in one pass: each task's gradient ends up in its own row of the flat memory,
    #    summed over all ranks. From here on all of them do the same.
    losses, num_tokens = backward_all(model, memory, task_batches, settings, step)

    # 2. Inner products of the task gradients, which are all that a gradient method needs to know of them. By
    #    layer group, for the log; their sum is the whole gram matrix. They are freed of the loss scale; the
    #    gradients keep it, so that memory need not be gone over once more.
    loss_scale = settings.loss_scale
    group_grams = memory.group_grams().cpu() / loss_scale**2  # (layer groups, K, K)
    gram = group_grams.sum(0)
    drawn = [task for task in memory.tasks if any(batch.task == task for batch in task_batches)]
    present = [memory.tasks.index(task) for task in drawn]
    facts = TaskFacts(
        gram,
        orders=draw_step_orders(settings.seed, step, len(present)),
        cosine_ema=cosine_ema,
        adjusted=settings.adjusted(memory.tasks),
        losses=losses,
        generator=torch.Generator().manual_seed(make_seed(settings.seed, step, seed_of("weights"))),
    )

    # 3. Factors of the losses, then weights from the gram matrix. A step with anything not finite is skipped
    #    for all tasks: once a NaN is in the optimizer's moments, it stays there.
    weighed, grad_norm, learned = None, math.nan, learned or {}
    has_losses = bool(losses[present].isfinite().all())
    if has_losses and gram.isfinite().all():
        weighed = weigh(facts, group_grams, present, settings, len(task_batches), learned)
        group_grams, gram = weighed.group_grams, weighed.group_grams.sum(0)
        for task, factor in zip(memory.tasks, weighed.factors.tolist(), strict=True):
            memory.head_grad(task).mul_(factor)
    head_squares = torch.stack([memory.head_grad(task).square().sum() for task in memory.tasks]).cpu()
    head_squares /= loss_scale**2
    if weighed:
        grad_norm = combined_norm(weighed.grams, weighed.weights, head_squares)

    # 4. Update: weighted sum of the task gradients, clipping, AdamW.
    applied = math.isfinite(grad_norm)
    if applied:
        clip = settings.clip_norm / grad_norm if 0 < settings.clip_norm < grad_norm else 1.0
        row_weights = weighed.weights * weighed.factors  # of the gradients as they are stored
        apply_update(memory, optimizer, row_weights, drawn, clip / loss_scale)
        cosine_ema, learned = update_cosine_ema(cosine_ema, gram), weighed.learned
    overflow = has_losses and not applied and loss_scale > 1
    weights = weighed.weights.mean(0) if weighed else torch.zeros(len(memory.tasks))
    factors = weighed.factors if weighed and settings.loss_weighting != "fixed" else None
    gains = torch.einsum("gij,gj->i", weighed.grams, weighed.weights) if weighed else None
    scalars = {"grad_norm": grad_norm, "num_tokens": num_tokens, "applied": applied, "overflow": overflow}
    tensors = (losses, gram, group_grams, weights, head_squares, cosine_ema)
    return StepResult(*tensors, **scalars, learned=learned, gains=gains, loss_weights=factors)


@dataclass(frozen=True)
class Weighed:
    """How the gradients of a step are to be combined; L layer groups, G gram matrices: one, or L.

    Args:
        factors: (K,) of the losses.
        group_grams: (L, K, K) with these factors.
        grams: (G, K, K) the whole one, or by layer group.
        weights: (G, K) what the gradient method made of them, or of their running means.
        learned: what loss weighting, running means and gradient method remember.
    """

    factors: Tensor
    group_grams: Tensor
    grams: Tensor
    weights: Tensor
    learned: dict[str, Tensor]


def weigh(
    facts: TaskFacts,
    group_grams: Tensor,
    present: Sequence[int],
    settings: StepSettings,
    num_batches: int,
    learned: Mapping[str, Tensor],
) -> Weighed:
    """Loss weighting, then gradient method, from inner products alone; arguments as in `train_step`."""
    factors, of_losses = loss_factors(
        replace(facts, state=part(learned, "loss_weighting")), present, settings.loss_weighting
    )
    factors = factors.to(facts.gram)
    products = factors[:, None] * factors  # (K, K)
    group_grams, gram = group_grams * products, facts.gram * products
    grams = group_grams if settings.surgery_scope == "layer" and len(group_grams) else gram[None]
    acted_on, of_gram = grams_to_act_on(grams, present, part(learned, "gram"), settings.gram)
    weights, of_method = weights_by_group(
        replace(facts, gram=gram, state=part(learned, "grad_method")),
        acted_on,
        present,
        grad_method=settings.grad_method,
        grad_reduction=settings.grad_reduction,
        num_batches=num_batches,
    )
    new = {f"loss_weighting.{name}": values for name, values in of_losses.items()}
    new |= {f"gram.{name}": values for name, values in of_gram.items()}
    new |= {f"grad_method.{name}": values for name, values in of_method.items()}
    return Weighed(factors, group_grams, grams, weights, new)


def part(learned: Mapping[str, Tensor], owner: str) -> dict[str, Tensor]:
    """What belongs to one of them."""
    prefix = f"{owner}."
    return {name.removeprefix(prefix): values for name, values in learned.items() if name.startswith(prefix)}


def backward_all(
    model: MultitaskBERT,
    memory: FlatMemory,
    task_batches: Sequence[TaskBatch],
    settings: StepSettings,
    step: int,
) -> tuple[Tensor, int]:
    """Forward and backward for all tasks; leaves the gradient of each, times the loss scale, in `memory`.

    Returns:
        losses (K,), as in `StepResult`, and the number of real word pieces.
    """
    memory.start_step([piece["input_ids"] for batch in task_batches for piece in batch.micro_batches])
    drawn = [
        (batch.task, sum(len(piece["labels"]) for piece in batch.micro_batches)) for batch in task_batches
    ]
    noise = AdversarialNoise(settings.fgm) if settings.fgm else None
    # Of each micro-batch; read at the end, so that a GPU need not wait.
    tasks, shares, losses, num_tokens, ranks = [], [], [], [], settings.ranks
    for micro_step in range(max(len(batch.micro_batches) for batch in task_batches)):
        # All tasks go through the encoder together: large products, and a weight is read once for all.
        chosen = [batch for batch in task_batches if micro_step < len(batch.micro_batches)]
        pieces = [(batch.task, batch.micro_batches[micro_step]) for batch in chosen]
        num_tokens += [piece["attention_mask"].sum() for _, piece in pieces]
        copies = model.objective.rdrop
        pieces = [
            (task, own_rows(piece, ranks, turn, 2 if copies.get(task) else 1))
            for turn, (task, piece) in enumerate(pieces)
        ]
        pieces = [(task, piece) for task, piece in pieces if len(piece["labels"])]
        if not pieces:  # more ranks than examples
            continue
        sizes = [(task, len(piece["labels"])) for task, piece in pieces]
        micro_shares, weights = settings.shares_and_weights(drawn, sizes, step)
        weights = [weight * settings.loss_scale for weight in weights]
        seed = make_seed(settings.seed, step, micro_step, *ranks.own_numbers)
        micro_losses = backward(model, memory, pieces, weights, settings.autocast, seed, noise)
        if noise:  # once more, with the same dropout: what the noise was found to be worst for
            noise.turn_adversarial()
            backward(model, memory, pieces, weights, settings.autocast, seed, noise)
            noise.clear()
        tasks += [memory.tasks.index(task) for task, _ in pieces]
        shares += micro_shares
        losses += [loss.detach() for loss in micro_losses]
    memory.finish_grads()

    means = torch.zeros(len(memory.tasks))  # (K,)
    if losses:
        means.index_add_(0, torch.tensor(tasks), torch.stack(losses).cpu() * torch.tensor(shares))
    present = sorted({memory.tasks.index(task) for task, _ in drawn})
    if ranks.size > 1:
        means = memory.sum_grads(ranks.sum, present, means)
    means[[k not in present for k in range(len(memory.tasks))]] = math.nan
    return means, int(torch.stack(num_tokens).sum())


def backward(
    model: MultitaskBERT,
    memory: FlatMemory,
    pieces: Sequence[tuple[str, dict[str, Tensor]]],
    weights: Sequence[float],
    autocast: Callable,
    seed: int,
    noise: AdversarialNoise | None,
) -> list[Tensor]:
    """One pass forward and back for a micro-batch of each task; returns their losses."""
    torch.manual_seed(seed)
    with autocast():
        losses = model.losses(pieces, memory, noise)
    # One backward pass of the sum: the layers tell the tasks apart by token, see kernels/task_grads.py.
    sum(loss * weight for loss, weight in zip(losses, weights, strict=True)).backward()
    return losses


def own_rows(batch: dict[str, Tensor], ranks: Ranks, turn: int, copies: int = 1) -> dict[str, Tensor]:
    """This rank's examples of a batch, maybe none; first sentences stay before second ones.

    Args:
        copies: how often the batch holds each example: all of them, then all of them again.
    """
    if ranks.size == 1:
        return batch
    num_examples = len(batch["labels"])
    own = {
        name: torch.cat([ranks.share(part, turn) for part in tensor.split(num_examples // copies)])
        for name, tensor in batch.items()
    }
    if "phrase_weights" in own:  # the loss will have this rank's share of the batch as its factor; undo that
        own["phrase_weights"] = own["phrase_weights"] * (num_examples / max(1, len(own["labels"])))
    return own


def combined_norm(grams: Tensor, weights: Tensor, head_squares: Tensor) -> float:
    """Length of the combined gradient, encoder and heads together; of grams (G, K, K), weights (G, K)."""
    # The encoder's share follows from the gram matrix: |w G|^2 = w (G G^T) w^T. No other pass over memory.
    squares = [float(w @ gram @ w) for w, gram in zip(weights, grams, strict=True)]
    shared_square = max(0.0, sum(squares))  # rounding may leave it just below 0
    return math.sqrt(shared_square + sum(head_squares.tolist()))


def apply_update(
    memory: FlatMemory,
    optimizer: torch.optim.Optimizer,
    weights: Tensor,
    drawn: Sequence[str],
    scale: float,
) -> None:
    """Combine the task gradients, scale encoder and heads together, and update all that has a gradient.

    Weights are (1, K), or by layer group, (G, K).
    """
    weights = weights[0] if len(weights) == 1 else weights
    memory.combine((weights * scale).to(memory.grad.device))  # scaled on the way, at no cost
    if scale != 1:
        memory.grad[memory.layout.num_shared :] *= scale  # the heads
    memory.show_grads(drawn)
    optimizer.step()


# --- the training loop ----------------------------------------------------------------------------


def train(
    run: Run, train_data: dict[str, TaskData], dev_data: dict[str, TaskData], stop: StopRequest | None = None
) -> None:
    """Train from `run.state` to --max_steps, or until patience runs out or a signal ends the process."""
    model, state, loop, ranks = run.model, run.state, run.settings.loop, run.ranks
    stop = StopRequest() if stop is None else stop
    orders = {
        task: BatchOrder(data.lengths, loop.batch_sizes[task], loop.seed, task)
        for task, data in train_data.items()
    }
    dev_part = {task: data.sample(loop.eval_max_examples, loop.seed) for task, data in dev_data.items()}
    shares = draw_shares(loop.tasks, loop.loss_schedule, loop.draw_schedule, loop.max_steps)
    sizes = [len(data) for data in train_data.values()]
    plan = plan_tasks(loop.sampler, sizes, loop.max_steps, loop.seed, shares)
    print_plan(loop, plan, orders)

    steps = Steps(run, train_data)
    progress, curves = Progress(state.step, loop.max_steps), FreshCurves(run.folder)
    model.train()
    while not ranks.any(stop.requested):
        # 1. Evaluate, and keep the model if it is the best yet. This comes before the step, so that a run
        #    that was stopped in an evaluation starts with it when it goes on.
        is_last = state.step >= loop.max_steps
        if state.step > state.evaluated and (is_last or state.step % loop.eval_every == 0):
            with run.averaged():
                evaluation = evaluate_run(run, dev_part, stop)
                if evaluation is None:
                    break
                log_evaluation(run, dev_part, *evaluation)
            if run.measured_step != state.step:
                log_noise(run, train_data)
            run.save_last()
            if ranks.is_first:
                curves.refresh()
        out_of_patience = loop.patience and state.evals_without_gain >= loop.patience
        if is_last or out_of_patience:
            break

        # 2. Draw the step's batches, and set the learning rate. Both depend on counters alone, so there is no
        #    iterator or scheduler to save; but for samplers that go by what was measured of the gradients.
        if state.step == 0 and not state.log_lines:
            log_noise(run, train_data)
        started = time.perf_counter()
        if plan is None:
            place = state.step, loop.max_steps
            options = {"state": state.sampler, "shares": None if shares is None else shares[state.step]}
            tasks = draw_tasks(loop.sampler, sizes, place, loop.seed, **options)
        else:
            tasks = plan[state.step]
        examples = draw_examples(loop, tasks, orders, state.batches_drawn)
        lr_options = {"warmup_steps": loop.warmup_steps, "total_steps": loop.max_steps}
        factor = lr_factor(loop.schedule, state.step, **lr_options)
        set_lr(run.optimizer, factor)

        # 3. Update.
        with out_of_memory_hint(partial(describe_step, run, examples, train_data)):
            steps.start(examples)

        # 4. Record what is finished; all of it where a line of the log or an evaluation comes next.
        is_logged = state.step % loop.log_every == 0 or state.step == loop.max_steps
        num_tokens = steps.record(is_logged or state.step % loop.eval_every == 0)
        progress.add_step(time.perf_counter() - started, num_tokens)

        # 5. Log the average of the steps since the last line.
        if state.window and is_logged:
            log_window(run, progress, factor)
    steps.record(wait=True)
    progress.close()
    stop.signal_number = ranks.largest(stop.signal_number or 0) or None
    if stop.requested:
        stop_run(run, stop)
    print_end(run)


def draw_examples(
    loop: LoopSettings, tasks: Iterable[int], orders: dict[str, BatchOrder], batches_drawn: dict[str, int]
) -> Examples:
    """For each draw of a step, its task and the examples of its micro-batches; counts in `batches_drawn`.

    Args:
        tasks: their numbers; -1 is no draw.
    """
    drawn = []
    for task in (loop.tasks[k] for k in tasks if k >= 0):
        first = batches_drawn[task]
        batches_drawn[task] += loop.grad_accum
        batches = [orders[task][i] for i in range(first, first + loop.grad_accum)]
        drawn.append((task, [rows_for(loop, task, batch) for batch in batches]))
    return drawn


def rows_for(loop: LoopSettings, task: str, examples: np.ndarray) -> np.ndarray:
    """The examples of a batch as its loss takes them: both passes of R-Drop, with dropout each, are rows."""
    return np.tile(examples, 2) if loop.rdrop.get(task) else examples


class Steps:
    """A run's steps: those that are started, and the record of those that are finished.

    On the CPU a step is finished when it is started. A GPU makes it while the host prepares the next ones,
    and its result is read some steps later.
    """

    def __init__(self, run: Run, train_data: dict[str, TaskData]):
        self.run, self.train_data = run, train_data
        self.waiting: deque[tuple[int, Examples, Callable[[], StepResult]]] = deque()
        self.captured = None
        if run.settings.captured:
            try:
                self.captured = CapturedStep(
                    run.model, run.memory, run.optimizer, train_data, run.settings.step, triton_kernels()
                )
                self.captured.leave(run.state.cosine_ema)
            except ValueError as error:  # naming the flag that it cannot carry out
                tqdm.write(f"warning: no captured steps, going on with plain operations ({error})")
        self.is_checked = False

    def start(self, examples: Examples) -> None:
        """Start the update from `run.state`, and count it."""
        state = self.run.state
        if self.captured and self.captured.fits(examples):
            result = self._start_captured(examples)
        else:
            result = self._plain(examples)
        state.step += 1
        self.run.average_step()
        self.waiting.append((state.step, examples, result))

    def _plain(self, examples: Examples) -> Callable[[], StepResult]:
        run, state = self.run, self.run.state
        self.record(wait=True)
        task_batches = make_task_batches(run, examples, self.train_data)
        result = train_step(
            run.model,
            run.memory,
            run.optimizer,
            task_batches,
            replace(run.settings.step, loss_scale=scale_of(state.loss_scale)),
            step=state.step,
            cosine_ema=state.cosine_ema,
            learned=state.learned,
        )
        if self.captured:
            self.captured.leave(result.cosine_ema)
        return lambda: result

    def _start_captured(self, examples: Examples) -> Callable[[], StepResult]:
        """A step as captured graphs; the plain path, for good, where that fails or gives other numbers."""
        try:
            if not self.is_checked:
                self.is_checked = True
                self.captured.check(examples, self.run.state.step, lambda: self._plain(examples)())
            return self.captured(examples, self.run.state.step)
        except RankError:
            raise
        except Exception as error:  # noqa: BLE001 (compilers and drivers fail in many ways)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            # Where numbers differ, they do so on all ranks; anything else may be the trouble of one.
            if self.run.ranks.size > 1 and type(error) is not ValueError:
                raise UserError(f"--compile on: captured steps have failed ({reason}); try off") from None
            tqdm.write(f"warning: no captured steps, going on with plain operations ({reason})")
            self.captured = None
            return self._plain(examples)

    def record(self, wait: bool) -> int:
        """Record the steps that are finished, or, to wait for them, all; returns their word pieces."""
        state, num_tokens = self.run.state, 0
        while len(self.waiting) > (0 if wait or not self.captured else MAX_WAITING):
            step, examples, get_result = self.waiting.popleft()
            result = get_result()
            num_tokens += result.num_tokens
            state.cosine_ema, state.learned = result.cosine_ema, dict(result.learned)
            if result.applied:
                state.bad_steps = 0
                state.window.append(step_record(result, self.run.memory))
            elif not result.overflow:  # the examples to blame must be named
                log_skipped_step(self.run, result, step, examples, self.train_data)
            if state.loss_scale is not None:
                state.loss_scale.count(applied=result.applied, overflow=result.overflow)
        state.tokens += num_tokens
        return num_tokens


def triton_kernels() -> ModuleType:
    from kernels import triton_kernels  # only on a GPU is Triton to be had

    return triton_kernels


def make_task_batches(run: Run, examples: Examples, train_data: dict[str, TaskData]) -> list[TaskBatch]:
    """What `draw_examples` drew, as padded tensors on the run's device."""
    pad_token_id, device, step = run.tokenizer.pad_token_id, run.settings.device, run.state.step
    task_batches = []
    for n, (task, drawn) in enumerate(examples):
        seeds = [batch_seed(run.settings.step.seed, step, n, micro_step) for micro_step in range(len(drawn))]
        pieces = map(train_data[task].batch, drawn, repeat(pad_token_id), seeds)
        task_batches.append(TaskBatch(task, [to_device(piece, device) for piece in pieces]))
    return task_batches


def evaluate_run(
    run: Run, dev_data: dict[str, TaskData], stop: StopRequest
) -> tuple[dict, dict[str, np.ndarray]] | None:
    """What `evaluate` returns; None if a stop is requested before or meanwhile.

    Raises:
        UserError: if weights or predictions are not finite, which no later step would mend.
    """
    run.check_weights()
    settings, model, pad_token_id = run.settings.step, run.model, run.tokenizer.pad_token_id
    ranks = replace(run.ranks, stopping=lambda: stop.requested)
    work = partial(evaluate, model, dev_data, pad_token_id, settings.autocast, ranks)
    try:
        # One of several ranks must not leave the others alone with it.
        summary_and_predictions = stop.interruptible(work) if ranks.size == 1 else work()
        return ranks.from_first(lambda: summary_and_predictions)  # all decide by the same bits
    except Stopped:
        return None
    except UserError as error:
        raise UserError(f"step {run.state.step}: {error}; {run.last_saved_text()}") from None


def log_noise(run: Run, train_data: dict[str, TaskData]) -> None:
    """Measure how much of the gradients is signal, log it, and let know who goes by it.

    Backward passes of random batches, as training makes them, dropout included, but without an update: not a
    bit of the run depends on them, unless it has such a sampler or --gram. (kernels/grad_noise.py says why.)
    """
    state, loop, memory = run.state, run.settings.loop, run.memory
    if not loop.noise_batches or not memory.layout.layer_groups:
        return
    drawn = {
        task: draw_batches(
            len(data), loop.batch_sizes[task], loop.noise_batches, (loop.seed, task, state.step)
        )
        for task, data in train_data.items()
    }
    sketches = []
    for number in range(loop.noise_batches):
        examples = [(task, [rows_for(loop, task, batches[number])]) for task, batches in drawn.items()]
        seed = make_seed(loop.seed, seed_of("noise"), number)
        settings = replace(run.settings.step, seed=seed, loss_scale=scale_of(state.loss_scale))
        with out_of_memory_hint(partial(describe_step, run, examples, train_data)):
            task_batches = make_task_batches(run, examples, train_data)
            backward_all(run.model, memory, task_batches, settings, state.step)
        sketches.append(sketch_grads(memory))
    groups = [moments_of(torch.stack(batches)) for batches in zip(*sketches, strict=True)]
    whole = sum(groups[1:], groups[0])
    if not whole.expected.isfinite().all():
        tqdm.write(f"warning: step {state.step}: a gradient is not finite; its noise was not measured")
        return
    run.log({"step": state.step, **noise_record(whole, groups, memory)})
    state.sampler = update_sampler(
        loop.sampler, whole.squares[0], whole.expected[0].diagonal(), state.sampler
    )
    if run.settings.step.gram != "step":
        grams = groups if run.settings.step.surgery_scope == "layer" else [whole]
        signal = torch.stack([known_share(each, loop.grad_accum) for each in grams])
        state.learned = state.learned | {"gram.signal": signal}


def log_window(run: Run, progress: Progress, factor: float) -> None:
    """Log and show the average of the steps since the last line, at the learning rates of the last one."""
    state, optimizer = run.state, run.settings.optimizer
    line = {"step": state.step, "lr": optimizer.lr * factor, "head_lr": optimizer.head_lr * factor}
    line |= average(state.window)
    line |= {"tokens": state.tokens, "tokens_per_second": progress.tokens_per_second}
    if state.loss_scale is not None:
        line |= {"loss_scale": state.loss_scale.scale, "overflow_steps": state.loss_scale.overflow_steps}
    run.log(line)
    progress.show(line)
    state.window = []


def log_evaluation(
    run: Run, dev_data: dict[str, TaskData], summary: dict, predictions: dict[str, np.ndarray]
) -> None:
    """Print and log an evaluation, and keep the model if it is the best yet by --select_by."""
    state, loop = run.state, run.settings.loop
    score = select_score(summary, loop.select_by, run.model.tasks)
    is_better = state.best_score is None or score > state.best_score
    text = format_scores(summary, run.model.tasks)
    tqdm.write(f"step {state.step}/{loop.max_steps}  dev {text}{'  best' if is_better else ''}")
    warnings = find_warnings(summary, dev_data, predictions)
    for warning in warnings:
        tqdm.write(f"       warning: {warning}")
    chosen = {"select_by": loop.select_by, "score": score, "warnings": warnings}
    pictures = draw_predictions(dev_data, predictions) if run.trackers else None
    run.log({"step": state.step, "dev": summary, **chosen}, pictures)
    state.evaluated = state.step
    if is_better:
        state.best_score, state.best_step, state.evals_without_gain = score, state.step, 0
        run.save_best(summary)
    else:
        state.evals_without_gain += 1


def draw_predictions(
    dev_data: dict[str, TaskData], predictions: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """For each task a picture (height, width, 3) of predictions (N,) beside the truth, for the trackers."""
    from reporting import figures  # it takes a second to import

    return {
        f"predictions/{task}": figures.pixels(
            figures.plot_predictions(task, predictions[task], data.rows.labels)
        )
        for task, data in dev_data.items()
    }


def find_warnings(
    summary: dict, dev_data: dict[str, TaskData], predictions: dict[str, np.ndarray]
) -> list[str]:
    """What looks wrong with an evaluation, a sentence each."""
    return [
        warning
        for task, data in dev_data.items()
        for warning in score_warnings(
            task, TASKS[task], summary["tasks"][task], predictions[task], data.rows.labels
        )
    ]


def stop_run(run: Run, stop: StopRequest) -> None:
    """Save what is not saved yet, say how to go on, and end the process."""
    step = run.state.step
    if run.saved_step != step:
        run.save_last()
    print(
        f"stopped by a signal at step {step}, saved; to go on: --output_dir {run.folder} --resume", flush=True
    )
    run.ranks.any(False)  # not before rank 0 has saved: torchrun ends all when one leaves
    sys.exit(stop.exit_code)


# --- the best checkpoint: scores and predictions --------------------------------------------------


def evaluate_best(
    settings: RunSettings,
    model: MultitaskBERT,
    tokenizer: BertTokenizer,
    dev_data: dict[str, TaskData],
    *,
    test_rows: dict[str, Rows] | None,
    write_scores: bool = True,
) -> None:
    """Score the best checkpoint as --final_eval says, and write its scores and the predictions asked for.

    Args:
        test_rows: what to predict besides dev; None: write no prediction files.
        write_scores: also write the run's `scores.json`.
    """
    output, loop, pad_token_id = settings.output, settings.loop, tokenizer.pad_token_id
    ranks = settings.step.ranks
    checkpoint = ranks.from_first(lambda: need_checkpoint(output.folder / "best"))
    step = ranks.from_first(lambda: load_state(checkpoint)["step"])
    ranks.from_first(lambda: load_model(checkpoint, model))
    for tensor in model.state_dict().values():
        ranks.copy_first(tensor)
    scored, predictions = {}, {}  # of whole splits only where --final_eval is full
    if output.final_eval != "none":
        limit = loop.eval_max_examples if output.final_eval == "part" else None
        scored = {task: data.sample(limit, loop.seed) for task, data in dev_data.items()}
        summary, predictions = evaluate(model, scored, pad_token_id, settings.step.autocast, ranks)
        if write_scores and ranks.is_first:
            part = {"final_eval": "part"} if output.final_eval == "part" else {}
            text = json.dumps({"step": step, **part, "dev": summary}, indent=2)
            write_text(output.folder / "scores.json", text + "\n")
        print(f"\ndev scores of the best checkpoint by {output.select_by}, step {step}")
        print_scores(summary, scored, predictions)
    if test_rows is None or not output.asked_files:
        return
    splits = {"dev": dev_data, "test": tokenize_split(settings.tokens, test_rows, tokenizer)}
    written = {}
    for task, split in output.asked_files:
        data = splits[split].get(task)
        if data is scored.get(task, ()):  # predicted already
            written[task, split] = data, predictions[task]
        elif data is not None:  # else it has no test file
            values = predict(model, task, data, pad_token_id, settings.step.autocast, ranks)
            written[task, split] = data, values
    if ranks.is_first:
        write_predictions(output, written)


def write_predictions(
    output: OutputSettings, predicted: dict[tuple[str, str], tuple[TaskData, np.ndarray]]
) -> None:
    """Write prediction files: of each (task, split) its data and predictions."""
    print("predictions")
    for (task, split), (data, values) in predicted.items():
        path, ids = output.prediction_files[task, split], data.rows.ids
        write_text(path, format_predictions(TASKS[task], ids, values.tolist(), output.prediction_style))
        print(f"  {path}  ({len(ids)} rows)")


def print_scores(summary: dict, dev_data: dict[str, TaskData], predictions: dict[str, np.ndarray]) -> None:
    """Print what `evaluate` returned, with baselines and warnings."""
    for task, scores in summary["tasks"].items():
        spec, labels = TASKS[task], dev_data[task].rows.labels
        named = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
        kind = TASK_KINDS[spec.kind]
        baseline = f"{kind.baseline_name}: {kind.baseline(labels):.4f}"
        print(f"  {task:6s} {named}  ({baseline}; {len(labels)} examples; {spec.title})")
        for warning in score_warnings(task, spec, scores, predictions[task], labels):
            print(f"         warning: {warning}")
    for name, title in overall_titles({task: TASKS[task] for task in summary["tasks"]}).items():
        print(f"  {title}: {summary[name]:.4f}")


# --- a run from the command line ------------------------------------------------------------------


def start(args: Namespace, ranks: Ranks = ONE) -> None:
    """Train from --pretrained, or go on from where --resume finds the run; then evaluate and predict."""
    # 1. Read the data and the encoder, then settle every flag that depends on them. What needs neither comes
    #    first, so that an error does not cost the time to read them.
    folder = output_folder(args)
    check_trackers(args.report_to)
    if not args.resume:
        ranks.from_first(lambda: check_free(folder, args.overwrite, args.pretrained))
    for line in filter(None, [describe_recipe(args), *resolve_machine(args)]):
        print(f"chosen: {line}")
    ranks.check_device(args.device)
    last = ranks.from_first(lambda: find_last(folder, args.eval_every)) if args.resume else None
    rows, report = read_data(data_settings(args))
    source = str(last or args.pretrained)
    bert, tokenizer = load_encoder(source, args.hidden_dropout_prob)
    for line in resolve_args(
        args, bert.config, {task: len(each.ids) for task, each in rows["train"].items()}
    ):
        print(f"chosen: {line}")
    for line in flags_without_effect(args):
        print(f"no effect: {line}")
    settings = make_settings(args, ranks)
    check_outputs(settings.output)
    trees = read_trees(settings)
    train_data, dev_data = (
        tokenize_split(settings.tokens, rows[split], tokenizer) for split in ("train", "dev")
    )
    phrases = add_phrases(settings, trees, train_data, tokenizer, report)

    # 2. Open the run folder: a new one, or one that was started with the same data, settings and encoder.
    facts = {
        "data": {split: fingerprints(rows[split]) for split in ("train", "dev")} | phrases,
        "data_files": report["files"],
        "encoder": bert.load_report,
        "encoder_sha256": weights_digest(resolve_pretrained(source)),
    }
    for name in ("data", "encoder_sha256"):
        ranks.check_same(name, facts[name])
    run = Run(settings, make_model(settings.model, bert).to(settings.device), tokenizer)
    teacher = ranks.from_first(lambda: open_folder(run, last, facts, report, rows["dev"]))
    run.follow_first()

    # 3. Train, then evaluate the best checkpoint on all of dev and predict.
    answers = ranks.from_first(lambda: find_answers(settings, train_data, rows["dev"], teacher))
    train_data = add_soft_targets(settings.teacher, train_data, answers)
    report_to = settings.output.report_to if ranks.is_first else ()
    run.trackers = Trackers(report_to, folder, settings.flags, run.state.step)
    with closing(run.trackers), catch_signals() as stop:
        train(run, train_data, dev_data, stop)
    try:
        evaluate_best(settings, run.model, tokenizer, dev_data, test_rows=rows["test"])
    except KeyboardInterrupt:
        print(
            f"training is finished and saved; for scores and predictions: --output_dir {folder} --resume",
            flush=True,
        )
        raise
    if ranks.is_first:
        print(f"run folder: {folder}" + draw_curves(folder))


def open_folder(
    run: Run, last: Path | None, facts: dict, data_report: dict, dev_rows: dict[str, Rows]
) -> list[dict] | None:
    """Begin a run's folder, or take up what it holds: rank 0's part of `start`.

    Args:
        last: the checkpoint to go on from, if there is one.
        facts: for `args.json`.

    Returns:
        who the teacher is, if there is one.
    """
    settings, folder, flags = run.settings, run.folder, run.settings.flags
    if flags["resume"]:
        stored = check_same_run(settings, last, facts, may_change())
        facts = facts | {name: stored.get(name) for name in ("encoder", "encoder_sha256")}
        if settings.teacher:
            facts["teacher"] = stored.get("teacher")
        if last:
            run.load_last(last)
        run.args_text = write_args(folder, flags, facts, device=settings.device, before=stored)
        run.cut_log()
        print(f"continuing {folder} at step {run.state.step}")
        warn_of_new_length(run, stored["args"])
    else:
        if settings.teacher:
            facts["teacher"] = describe_teacher(find_teacher(settings, dev_rows))
        run.args_text = begin_run(settings, facts)
        print(f"encoder {flags['pretrained']}: {facts['encoder']}")
    write_text(folder / "data_report.json", json.dumps(data_report, indent=2) + "\n")
    return facts.get("teacher")


def evaluate_again(args: Namespace, ranks: Ranks = ONE) -> None:
    """--eval_only and --predict_only: the best checkpoint of a run, on its own or other data."""
    folder = output_folder(args)
    best = ranks.from_first(lambda: need_checkpoint(folder / "best"))
    data = data_settings(args)
    predicted = data.predict_tasks if "dev" in data.predict_splits else ()
    dev_rows = read_split(data, "dev", predicted if args.final_eval == "none" else data.tasks)
    test_rows = read_test_rows(data) if args.predict_only else None
    bert, tokenizer = load_encoder(best, args.hidden_dropout_prob)
    for line in [*resolve_machine(args), *fit_to_encoder(args, bert.config)]:
        print(f"chosen: {line}")
    ranks.check_device(args.device)
    settings = make_settings(args, ranks)
    check_outputs(settings.output)
    stored = read_args_file(folder)
    check_own_predictions(args, stored, {"dev": dev_rows, "test": test_rows} if args.predict_only else {})
    dev_data = tokenize_split(settings.tokens, dev_rows, tokenizer)
    same_data = stored["data"].get("dev") == fingerprints(dev_rows)
    same_way = all(
        stored["args"].get(name) == settings.flags[name] for name in ("max_length", "precision", "device")
    )
    # Scores of part of dev do not take the place of those of all of it.
    same_way = same_way and args.final_eval in ("full", stored["args"].get("final_eval", "full"))
    # Scores from other data, in another precision or on another machine would not fit the run's predictions.
    write_scores = same_data and same_way and (args.eval_only or "dev" in args.predict_splits)
    if not write_scores:
        print(f"{folder / 'scores.json'} stays as it is")
    model = make_model(settings.model, bert).to(settings.device)
    evaluate_best(settings, model, tokenizer, dev_data, test_rows=test_rows, write_scores=write_scores)


def draw_curves(folder: Path) -> str:
    """Draw a run's curves and say where they are; errors are only warned about."""
    try:
        plot = plot_run(folder)
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        tqdm.write(f"warning: no curves ({error})")
        return ""
    return f"  (curves: {plot})" if plot else ""


class FreshCurves:
    """`curves.png`, drawn anew after an evaluation if CURVES_SHARE of the time since the last one pays it."""

    def __init__(self, folder: Path):
        self.folder, self.seconds, self.drawn_at = folder, CURVES_SECONDS, time.perf_counter()

    def refresh(self) -> None:
        started = time.perf_counter()
        if self.seconds > CURVES_SHARE * (started - self.drawn_at):
            return
        draw_curves(self.folder)
        self.drawn_at = time.perf_counter()
        self.seconds = self.drawn_at - started


def run(argv: list[str] | None) -> None:
    with join_ranks("multitask_classifier.py") as ranks:
        with ranks.quiet():
            args = get_args(argv)
        with lock_folder(output_folder(args)) if ranks.is_first else nullcontext():
            if args.eval_only or args.predict_only:
                evaluate_again(args, ranks)
            else:
                start(args, ranks)
    if set(args.tasks) == set(DEFAULT_TASKS) and comes_from(args.pretrained, OFFLINE_ENCODER):
        print(f"note: {FORBIDDEN}")


def main(argv: list[str] | None = None) -> int:
    return run_script("multitask_classifier.py", partial(run, argv))


if __name__ == "__main__":
    sys.exit(main())

"""Train one BERT on several tasks at once, evaluate it, and write prediction files.

    python multitask_classifier.py --data_dir data/sample --max_steps 150 --batch_size 16

A step is one optimizer update. In a step every slot draws one mini-batch of one task, all go forward and backward
together, each task's encoder gradient lands in its own row of one matrix, a gradient method weighs the rows, and AdamW
makes one pass over flat memory. Gradient surgery: https://arxiv.org/abs/2001.06782.

Shapes: B examples, R sequences in a batch, T padded length, H hidden_size, C outputs of a task, K tasks.
"""

import json
import math
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from base_bert import check_vocab_size, find_weights, resolve_pretrained
from bert import BertModel
from config import TASKS, TaskSpec
from datasets import BatchOrder, Rows, TaskData, limit_examples, plan_slots
from evaluation import (
    OVERALLS,
    TASK_KINDS,
    evaluate,
    format_predictions,
    predict,
    score_warnings,
    select_score,
)
from heads import MultitaskBERT
from kernels.flat_memory import FlatMemory
from optimizer import lr_factor, set_lr
from pcgrad import GRAD_METHODS, GRAD_REDUCTIONS, cosine_matrix, update_cosine_ema
from reporting.report import plot_run
from support.command_line import Signals, Stopped, catch_signals, run_script
from support.device import explain_memory, make_autocast, to_device
from support.errors import UserError
from support.files import file_digest, lock_folder, write_text
from support.seeds import make_seed
from tokenizer import BertTokenizer
from training.checkpoint import SUMS_FILE, find_damage, load_model, load_state, need_checkpoint
from training.flags import RESUME_MAY_CHANGE, get_args
from training.resolve import (
    check_outputs,
    default_output_dir,
    head_name,
    idle_flags,
    prediction_file,
    resolve_args,
    resolve_machine,
)
from training.run_data import fingerprint, read_data, read_split, read_test_rows, tokenize_split
from training.run_folder import (
    Run,
    begin_run,
    check_free,
    find_changed,
    find_last,
    read_args_file,
    say_circumstances,
    write_args,
)
from training.settings import HEAD_DROPOUT_PROB, StepSettings

# --- a step -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskBatch:
    """What one draw of a task gives to a step: a batch, in several pieces if gradients are accumulated."""

    task: str
    micro_batches: list[dict[str, Tensor]]  # each as `MultitaskBERT.losses` takes it


@dataclass(frozen=True)
class StepResult:
    """What one update did. Tasks without a batch have loss nan, and zeros elsewhere."""

    losses: Tensor  # (K,) mean over the task's micro-batches, before task weights
    gram: Tensor  # (K, K) inner products of the task gradients, each with its task weight
    group_grams: Tensor  # (layer groups, K, K) the same within each group of `memory.layout.layer_groups`
    weights: Tensor  # (K,) of the task gradients in the combined one, before clipping
    grad_norm: float  # of the combined gradient, encoder and heads, before clipping
    num_tokens: int  # real word pieces
    applied: bool  # False: something was not finite and nothing was updated


def train_step(
    model: MultitaskBERT,
    memory: FlatMemory,
    optimizer: torch.optim.Optimizer,
    task_batches: Sequence[TaskBatch],
    settings: StepSettings,
    *,
    step: int,
    cosine_ema: Tensor | None = None,
) -> StepResult:
    """One optimizer update; the learning rates are already in the optimizer's groups.

    Sets torch's global seed, from which the kernels draw dropout: a resumed run gives the same bits only if
    dropout depends on nothing but `settings.seed` and `step`.

    Args:
        task_batches: what was drawn for this step; a task may occur several times, or not at all.
        step: updates already made; with the seed it fixes dropout and the order of projections.
        cosine_ema: (K, K) running mean of the cosines, for gradient methods that aim at it.
    """
    # 1. Backward for all tasks in one pass: each task's gradient ends up in its own row of the flat memory.
    losses, num_tokens = backward_all(model, memory, task_batches, settings, step)

    # 2. Inner products of the task gradients, which are all that a gradient method needs to know of them. By
    #    layer group, for the log; their sum is the whole gram matrix.
    group_grams = memory.group_grams().cpu()  # (layer groups, K, K)
    gram = group_grams.sum(0)
    drawn = [task for task in memory.tasks if any(batch.task == task for batch in task_batches)]
    present = [memory.tasks.index(task) for task in drawn]

    # 3. Weights from the gram matrix. A step with anything not finite is skipped for all tasks: once a NaN is
    #    in the optimizer's moments, it stays there.
    weights, grad_norm = torch.zeros(len(memory.tasks)), math.nan
    if losses[present].isfinite().all() and gram.isfinite().all():
        weights = combination_weights(
            gram, present, memory.tasks, len(task_batches), settings, step, cosine_ema
        )
        grad_norm = combined_norm(gram, weights, [memory.head_grad(task) for task in drawn])

    # 4. Update: weighted sum of the task gradients, clipping, AdamW.
    applied = math.isfinite(grad_norm)
    if applied:
        apply_update(memory, optimizer, weights, drawn, grad_norm, settings.clip_norm)
    return StepResult(losses, gram, group_grams, weights, grad_norm, num_tokens, applied)


def backward_all(
    model: MultitaskBERT,
    memory: FlatMemory,
    task_batches: Sequence[TaskBatch],
    settings: StepSettings,
    step: int,
) -> tuple[Tensor, int]:
    """Forward and backward for all tasks; leaves the gradient of each in `memory`.

    Returns:
        losses (K,), as in `StepResult`, and the number of real word pieces.
    """
    memory.start_step([piece["input_ids"] for batch in task_batches for piece in batch.micro_batches])
    # Of each micro-batch; read at the end, so that a GPU need not wait.
    tasks, losses, num_tokens = [], [], []
    for micro_step in range(max(len(batch.micro_batches) for batch in task_batches)):
        # All tasks go through the encoder together: large products, and a weight is read once for all.
        chosen = [batch for batch in task_batches if micro_step < len(batch.micro_batches)]
        pieces = [(batch.task, batch.micro_batches[micro_step]) for batch in chosen]
        torch.manual_seed(make_seed(settings.seed, step, micro_step))
        with settings.autocast():
            micro_losses = model.losses(pieces, memory)
        # One backward pass of the sum: the layers tell the tasks apart by token, see kernels/task_grads.py.
        total = sum(
            loss * (settings.task_weights.get(batch.task, 1.0) / len(batch.micro_batches))
            for loss, batch in zip(micro_losses, chosen, strict=True)
        )
        total.backward()
        tasks += [memory.tasks.index(task) for task, _ in pieces]
        losses += [loss.detach() for loss in micro_losses]
        num_tokens += [piece["attention_mask"].sum() for _, piece in pieces]
    memory.finish_grads()

    task_numbers, num_tasks = torch.tensor(tasks), len(memory.tasks)
    sums = torch.zeros(num_tasks).index_add(0, task_numbers, torch.stack(losses).cpu())  # (K,)
    return sums / task_numbers.bincount(minlength=num_tasks), int(torch.stack(num_tokens).sum())


def combination_weights(
    gram: Tensor,
    present: list[int],
    tasks: Sequence[str],
    num_batches: int,
    settings: StepSettings,
    step: int,
    cosine_ema: Tensor | None,
) -> Tensor:
    """(K,) the weight of each task's gradient in the combined one; `present` are the tasks with a batch."""
    method = GRAD_METHODS[settings.grad_method]
    # A generator of its own: nothing else that a run draws may change the order of projections.
    generator = torch.Generator().manual_seed(make_seed(settings.seed, step))
    ema = None if cosine_ema is None else cosine_ema[present][:, present]
    adjusted = [settings.surgery_tasks is None or tasks[k] in settings.surgery_tasks for k in present]
    weights = torch.zeros(len(tasks))
    weights[present] = method.weights(gram[present][:, present], generator, ema, adjusted)
    if GRAD_REDUCTIONS[settings.grad_reduction]:
        # The mean over task batches, not over tasks: a task that was drawn twice counts twice.
        weights *= (len(present) if method.is_mean else 1) / num_batches
    return weights


def combined_norm(gram: Tensor, weights: Tensor, head_grads: Iterable[Tensor]) -> float:
    """Length of the combined gradient, encoder and heads together."""
    # The encoder's share follows from the gram matrix: |w G|^2 = w (G G^T) w^T. No other pass over memory.
    shared_square = max(0.0, float(weights @ gram @ weights))  # rounding may leave it just below 0
    return math.sqrt(shared_square + sum(float(grad.square().sum()) for grad in head_grads))


def apply_update(
    memory: FlatMemory,
    optimizer: torch.optim.Optimizer,
    weights: Tensor,
    drawn: Sequence[str],
    grad_norm: float,
    clip_norm: float,
) -> None:
    """Combine the task gradients, clip encoder and heads together, and update all that has a gradient."""
    scale = clip_norm / grad_norm if clip_norm and grad_norm > clip_norm else 1.0
    memory.combine((weights * scale).to(memory.grad.device))  # clipped on the way, at no cost
    if scale < 1:
        memory.grad[memory.layout.num_shared :] *= scale  # the heads
    memory.show_grads(drawn)
    optimizer.step()


# --- a run --------------------------------------------------------------------------------------------------


def make_model(args: Namespace, bert: BertModel) -> MultitaskBERT:
    """The model that the flags describe, on --device; the heads' first weights depend on --seed only."""
    torch.manual_seed(make_seed(args.seed))
    return MultitaskBERT(
        bert,
        {task: TASKS[task] for task in args.tasks},
        {task: head_name(args, task) for task in args.tasks},
        pooling=args.pooling,
        head_layers=args.head_layers,
        head_dropout_prob=HEAD_DROPOUT_PROB if args.hidden_dropout_prob is None else args.hidden_dropout_prob,
        freeze_encoder=args.freeze_encoder,
    ).to(args.device)


def pair_values(matrix: torch.Tensor, tasks: tuple[str, ...]) -> dict[str, float]:
    """The entries above the diagonal, named `first-second`."""
    values = matrix.tolist()
    return {f"{a}-{b}": values[i][j] for i, a in enumerate(tasks) for j, b in enumerate(tasks) if i < j}


def step_record(result: StepResult, memory: FlatMemory) -> dict:
    """A `StepResult` as plain numbers; tasks without a batch are left out."""
    tasks = memory.tasks
    present = [k for k, loss in enumerate(result.losses.tolist()) if not math.isnan(loss)]
    names = tuple(tasks[k] for k in present)
    gram = result.gram[present][:, present]
    group_cosines = cosine_matrix(result.group_grams[:, present][:, :, present])
    return {
        "loss": dict(zip(names, result.losses[present].tolist(), strict=True)),
        "task_grad_norm": dict(zip(names, gram.diagonal().clamp(min=0).sqrt().tolist(), strict=True)),
        "grad_weight": dict(zip(names, result.weights[present].tolist(), strict=True)),
        "cosine": pair_values(cosine_matrix(gram), names),
        "layer_cosine": {
            group: pair_values(cosines, names)
            for group, cosines in zip(memory.layout.layer_groups, group_cosines, strict=True)
        },
        "grad_norm": result.grad_norm,
    }


def average(records: list[dict]) -> dict:
    """Mean of each number over the records that have it, and how often each pair of tasks was in conflict."""

    def mean(values):
        values = [value for value in values if value is not None]
        return sum(values) / len(values)

    def mean_of_each(dicts):
        names = dict.fromkeys(name for values in dicts for name in values)
        return {name: mean(values.get(name) for values in dicts) for name in names}

    def share_below_zero(dicts):
        return mean_of_each([{name: float(value < 0) for name, value in values.items()} for values in dicts])

    averaged = {"grad_norm": mean(record["grad_norm"] for record in records)}
    for key in ("loss", "task_grad_norm", "grad_weight", "cosine"):
        averaged[key] = mean_of_each([record[key] for record in records])
    averaged["conflict"] = share_below_zero([record["cosine"] for record in records])
    layers = {
        part: [record["layer_cosine"][part] for record in records] for part in records[0]["layer_cosine"]
    }
    averaged["layer_cosine"] = {part: mean_of_each(cosines) for part, cosines in layers.items()}
    averaged["layer_conflict"] = {part: share_below_zero(cosines) for part, cosines in layers.items()}
    return averaged


def draw_slots(
    args: Namespace, tasks: Iterable[str], orders: dict[str, BatchOrder], task_batches: dict[str, int]
) -> list[tuple[str, list[np.ndarray]]]:
    """The task of each slot and the examples of its batches; counts them in `task_batches`."""
    slots = []
    for task in tasks:
        first = task_batches[task]
        task_batches[task] += args.grad_accum
        slots.append((task, [orders[task][i] for i in range(first, first + args.grad_accum)]))
    return slots


def train(
    args: Namespace,
    run: Run,
    train_data: dict[str, TaskData],
    dev_data: dict[str, TaskData],
    signals: Signals | None = None,
) -> None:
    """The training loop: from `run.state` to --max_steps, or until patience or a signal ends it."""
    model, memory, optimizer, state = run.model, run.memory, run.optimizer, run.state
    signals = Signals() if signals is None else signals
    pad_token_id, autocast = run.tokenizer.pad_token_id, make_autocast(args.device, args.precision)
    step_settings = StepSettings(
        seed=args.seed,
        grad_method=args.grad_method,
        grad_reduction=args.grad_reduction,
        task_weights=args.task_weights,
        clip_norm=args.clip_norm,
        surgery_tasks=args.surgery_tasks,
        autocast=autocast,
    )
    orders = {
        task: BatchOrder(data.lengths, getattr(args, f"{task}_batch_size"), args.seed, task)
        for task, data in train_data.items()
    }
    dev_part = {
        task: limit_examples(data, args.eval_max_examples, args.seed) for task, data in dev_data.items()
    }
    plan = plan_slots(args.sampler, [len(data) for data in train_data.values()], args.max_steps, args.seed)
    print_plan(args, plan, orders)

    interactive = sys.stdout.isatty() and sys.stderr.isatty()
    bar = tqdm(
        total=args.max_steps, initial=state["step"], unit="step", disable=not interactive, dynamic_ncols=True
    )
    model.train()
    seconds, steps, tokens = 0.0, 0, 0  # of training, since the last line of the log
    while True:
        step = state["step"]
        if step > state["evaluated"] and (step % args.eval_every == 0 or step >= args.max_steps):
            run.check_weights()
            try:
                with signals.stop_at_once():
                    summary, predictions = evaluate(model, dev_part, pad_token_id, autocast)
            except (Exception, Stopped):  # a library may make another exception of it
                if not signals:
                    raise
                # It comes first when the run goes on.
            else:
                log_evaluation(args, run, summary, find_warnings(args, summary, dev_part, predictions))
                run.save_last()
        if signals:
            bar.close()
            stop_run(run, signals)
        out_of_patience = args.patience and state["evals_without_gain"] >= args.patience
        if step >= args.max_steps or out_of_patience:
            break

        started = time.perf_counter()
        drawn = draw_slots(args, [args.tasks[k] for k in plan[step]], orders, state["task_batches"])
        task_batches = [
            TaskBatch(
                task,
                [to_device(train_data[task].batch(part, pad_token_id), args.device) for part in parts],
            )
            for task, parts in drawn
        ]
        factor = lr_factor(args.schedule, step, warmup_steps=args.warmup_steps, total_steps=args.max_steps)
        set_lr(optimizer, factor)
        ema = None if state["cosine_ema"] is None else torch.tensor(state["cosine_ema"])
        with explain_memory(
            lambda task_batches=task_batches: describe_batches(task_batches) + f"; {run.say_saved()}"
        ):
            result = train_step(
                model, memory, optimizer, task_batches, step_settings, step=step, cosine_ema=ema
            )
        state["step"] = step = step + 1
        if result.applied:
            state["bad_steps"] = 0
            state["window"].append(step_record(result, memory))
            state["cosine_ema"] = update_cosine_ema(ema, result.gram).tolist()
        else:
            state["bad_steps"] += 1
            state["skipped_steps"] += 1
            culprits = find_culprits(run, result, drawn, train_data, autocast)
            run.log({"step": step, "skipped": culprits})
            tqdm.write(f"warning: step {step} skipped for all tasks: {say_culprits(culprits)}")
            if state["bad_steps"] >= args.max_bad_steps:
                raise UserError(
                    f"{args.max_bad_steps} steps in a row without a finite loss and gradient (--max_bad_steps);"
                    f" try a smaller --lr, or look at the examples named above; {run.say_saved()}"
                )
        state["tokens"] += result.num_tokens
        tokens, steps = tokens + result.num_tokens, steps + 1
        seconds += time.perf_counter() - started

        bar.update()
        if state["window"] and (step % args.log_every == 0 or step == args.max_steps):
            tokens_per_second = round(tokens / seconds)
            line = {"step": step, "lr": args.lr * factor, "head_lr": args.head_lr * factor}
            line |= average(state["window"])
            line |= {"tokens": state["tokens"], "tokens_per_second": tokens_per_second}
            run.log(line)
            losses = " ".join(f"{task} {loss:.3f}" for task, loss in line["loss"].items())
            text = f"loss {losses}  lr {line['lr']:.2e}  {tokens_per_second} tokens/s"
            if interactive:
                bar.set_postfix_str(text, refresh=False)
            else:
                left = (args.max_steps - step) * seconds / steps
                print(f"step {step}/{args.max_steps}  {text}  {left:.0f} s left", flush=True)
            state["window"], seconds, steps, tokens = [], 0.0, 0, 0
    bar.close()
    if state["step"] > args.max_steps:
        print(f"nothing to train: the run is at step {state['step']}, beyond --max_steps {args.max_steps}")
    elif out_of_patience:
        print(f"stopped at step {step}: {args.patience} evaluations without a better {args.select_by}")
    if state["skipped_steps"]:
        print(
            f"warning: {state['skipped_steps']} of {step} steps were skipped; metrics.jsonl names the examples"
        )
    if signals:  # since it was looked at last
        stop_run(run, signals)


def stop_run(run: Run, signals: Signals) -> None:
    """Save what is not saved yet, say how to go on, and end the process."""
    step = run.state["step"]
    if run.saved_step != step:
        run.save_last()
    print(
        f"stopped by a signal at step {step}, saved; to go on: --output_dir {run.args.output_dir} --resume",
        flush=True,
    )
    sys.exit(128 + signals[0])


def describe_batches(task_batches: Sequence[TaskBatch]) -> str:
    """The batches of a step by task and shape, and the flags that make the largest one smaller."""
    shapes = [
        (batch.task, tuple(piece["input_ids"].shape))
        for batch in task_batches
        for piece in batch.micro_batches
    ]
    largest = max(shapes, key=lambda item: math.prod(item[1]))[0]
    listed = ", ".join(f"{task} {shape}" for task, shape in shapes[:8])
    return (
        f"in a step with batches (sequences, word pieces) {listed}; try a smaller --{largest}_batch_size or --batch_size"
        " (with --grad_accum for as many examples a step), or a smaller --max_length"
    )


def find_culprits(
    run: Run,
    result: StepResult,
    drawn: list[tuple[str, list[np.ndarray]]],
    train_data: dict[str, TaskData],
    autocast,
) -> dict[str, dict]:
    """The tasks whose loss or gradient was not finite in a step, each with the ids of the examples to blame.

    Those are the ones whose loss is not finite by itself, without dropout; all of the task's batches if there are none.
    """
    culprits = {}
    drawn_of = {
        task: [n for name, parts in drawn if name == task for part in parts for n in part]
        for task in train_data
    }
    present = [(k, task) for k, task in enumerate(run.memory.tasks) if drawn_of[task]]
    squares = {
        task: result.gram[k, k] + run.memory.head_grad(task).square().sum().cpu() for k, task in present
    }
    bad = [(k, task) for k, task in present if not (result.losses[k] + squares[task]).isfinite()]
    for k, task in bad or present:  # where only all of them together are too large, each has its part in it
        examples = drawn_of[task]
        data, device = train_data[task], run.args.device
        run.model.eval()
        with torch.no_grad(), autocast():
            losses = [
                run.model.loss(task, to_device(data.batch(np.array([n]), run.tokenizer.pad_token_id), device))
                for n in examples
            ]
        run.model.train()
        alone = [n for n, loss in zip(examples, losses, strict=True) if not loss.isfinite()]
        what = "gradient" if result.losses[k].isfinite() else "loss"
        culprits[task] = {"not_finite": what, "examples": [data.rows.ids[n] for n in alone or examples]}
    return culprits


def say_culprits(culprits: dict[str, dict]) -> str:
    return "; ".join(
        f"{task} {found['not_finite']} is not finite, examples {', '.join(found['examples'])}"
        for task, found in culprits.items()
    )


def find_warnings(
    args: Namespace, summary: dict, dev_data: dict[str, TaskData], predictions: dict[str, np.ndarray]
) -> list[str]:
    """What looks wrong with an evaluation, a sentence each."""
    return [
        warning
        for task, data in dev_data.items()
        for warning in score_warnings(
            task, TASKS[task], summary["tasks"][task], predictions[task], data.rows.labels
        )
    ]


def log_evaluation(args: Namespace, run: Run, summary: dict, warnings: list[str]) -> None:
    """Print and log an evaluation, and keep the model if it is the best yet by --select_by."""
    state, step = run.state, run.state["step"]
    score = select_score(summary, args.select_by, run.model.tasks)
    better = state["best_score"] is None or score > state["best_score"]
    line = say_scores(summary, run.model.tasks)
    tqdm.write(f"step {step}/{args.max_steps}  dev {line}{'  best' if better else ''}")
    for warning in warnings:
        tqdm.write(f"       warning: {warning}")
    run.log({"step": step, "dev": summary, "select_by": args.select_by, "score": score, "warnings": warnings})
    state["evaluated"] = step
    if better:
        state.update(best_score=score, best_step=step, evals_without_gain=0)
        run.save_best(summary)
    else:
        state["evals_without_gain"] += 1


def print_plan(args: Namespace, plan: np.ndarray, orders: dict[str, BatchOrder]) -> None:
    """Say how long the run is and how often it sees each task."""
    counts = np.bincount(plan.ravel(), minlength=len(args.tasks)) * args.grad_accum
    seen = ", ".join(
        f"{task} {count / orders[task].batches_per_epoch:.2f} times"
        for task, count in zip(args.tasks, counts, strict=True)
    )
    print(
        f"{args.max_steps} steps with sampler {args.sampler}; each task's data will be seen: {seen}",
        flush=True,
    )


def say_scores(summary: dict, tasks: dict[str, TaskSpec]) -> str:
    scores = [f"{task} {select_score(summary, task, tasks):.3f}" for task in summary["tasks"]]
    return "  ".join(scores + [f"{name} {summary[name]:.3f}" for name in OVERALLS])


def finish(
    args: Namespace,
    model: MultitaskBERT,
    tokenizer: BertTokenizer,
    dev_data: dict[str, TaskData],
    *,
    test_rows: dict[str, Rows] | None,
    write_scores: bool = True,
) -> None:
    """Evaluate the best checkpoint on all of dev, and print what there is.

    Args:
        test_rows: what to predict besides dev; None: write no prediction files.
        write_scores: also write the run's `scores.json`.
    """
    folder = Path(args.output_dir)
    checkpoint = need_checkpoint(folder / "best")
    best = load_state(checkpoint)
    load_model(checkpoint, model)
    autocast = make_autocast(args.device, args.precision)
    summary, predictions = evaluate(model, dev_data, tokenizer.pad_token_id, autocast)
    if write_scores:
        write_text(
            folder / "scores.json", json.dumps({"step": best["step"], "dev": summary}, indent=2) + "\n"
        )
    print(f"\ndev scores of the best checkpoint by {args.select_by}, step {best['step']}")
    for task, scores in summary["tasks"].items():
        spec, labels = TASKS[task], dev_data[task].rows.labels
        kind = TASK_KINDS[spec.kind]
        named = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
        floor = kind.floor(labels)
        print(f"  {task:6s} {named}  (answering blindly: {floor:.4f}; {len(labels)} examples; {spec.title})")
        for warning in score_warnings(task, spec, scores, predictions[task], labels):
            print(f"         warning: {warning}")
    print(f"  overall, plain mean (poster, class of 2023): {summary['mean']:.4f}")
    print(f"  overall, similarity as (r + 1) / 2 (class of 2024): {summary['mean_2024']:.4f}")
    if test_rows is not None:
        test_data = tokenize_split(args, test_rows, tokenizer)
        write_predictions(args, model, tokenizer, dev_data, predictions, test_data)


def write_predictions(
    args: Namespace,
    model: MultitaskBERT,
    tokenizer: BertTokenizer,
    dev_data: dict[str, TaskData],
    dev_predictions: dict[str, np.ndarray],
    test_data: dict[str, TaskData],
) -> None:
    """Write the prediction files of every task and of each of --predict_splits."""
    autocast = make_autocast(args.device, args.precision)
    print("predictions")
    for task in args.tasks:
        outputs = {"dev": (dev_data[task], dev_predictions[task])} if "dev" in args.predict_splits else {}
        if task in test_data:
            outputs["test"] = (
                test_data[task],
                predict(model, task, test_data[task], tokenizer.pad_token_id, autocast),
            )
        for split, (data, predictions) in outputs.items():
            path = prediction_file(args, task, split)
            text = format_predictions(TASKS[task], data.rows.ids, predictions.tolist(), args.prediction_style)
            write_text(path, text)
            print(f"  {path}  ({len(data)} rows)")


def load_encoder(args: Namespace, source: str | Path) -> tuple[BertModel, BertTokenizer]:
    """The encoder and tokenizer to start from, or those of a checkpoint."""
    damage = find_damage(Path(source)) if (Path(source) / SUMS_FILE).is_file() else None
    if damage:
        raise UserError(f"--pretrained {source}: {damage}")
    tokenizer = BertTokenizer.from_pretrained(source)
    overrides = {} if args.hidden_dropout_prob is None else {"hidden_dropout_prob": args.hidden_dropout_prob}
    bert = BertModel.from_pretrained(source, **overrides)
    check_vocab_size(len(tokenizer), bert.config.vocab_size, source)
    return bert, tokenizer


def read_again(args: Namespace) -> None:
    """--eval_only and --predict_only: the best checkpoint of a run, on its own or other data."""
    folder = Path(args.output_dir)
    best = need_checkpoint(folder / "best")
    dev_rows = read_split(args, "dev", args.tasks)
    test_rows = read_test_rows(args) if args.predict_only else None
    bert, tokenizer = load_encoder(args, best)
    for line in resolve_machine(args, bert.config):
        print(f"chosen: {line}")
    check_outputs(args)
    dev_data = tokenize_split(args, dev_rows, tokenizer)
    stored = read_args_file(folder)
    same_data = stored["data"].get("dev") == {task: fingerprint(rows) for task, rows in dev_rows.items()}
    same_way = all(
        stored["args"].get(name) == getattr(args, name) for name in ("max_length", "precision", "device")
    )
    # Evaluated as in the run, scores are the same; in another way or on another machine they would not fit its predictions.
    own = same_data and same_way and (args.eval_only or "dev" in args.predict_splits)
    if not own:
        print(f"{folder / 'scores.json'} stays as it is")
    finish(args, make_model(args, bert), tokenizer, dev_data, test_rows=test_rows, write_scores=own)


def check_same_run(args: Namespace, last: Path | None, facts: dict, folder: Path) -> dict:
    """Refuse to go on with other data, settings or encoder; returns what the run's `args.json` holds."""
    stored = read_args_file(folder)
    if stored["data"] != facts["data"]:
        raise UserError(f"--resume: the train or dev data are not those that {folder} was started with")
    changed = find_changed(last, args, facts["data"], RESUME_MAY_CHANGE) if last else []
    if changed:
        raise UserError(
            f"{folder / 'args.json'}: is not that of {last}: {', '.join(changed)}; put back its copy, which is there,"
            " or start anew with --overwrite"
        )
    if not last and stored.get("encoder_sha256") != facts["encoder_sha256"]:
        raise UserError(f"--resume: --pretrained {args.pretrained} is not what {folder} was started with")
    warning = say_circumstances(stored, args.device)
    if warning:
        print(f"warning: {warning}")
    return stored


def start(args: Namespace) -> None:
    """Train from --pretrained, or go on from where --resume finds the run; then evaluate and predict."""
    folder = Path(args.output_dir or default_output_dir(args))
    last = find_last(folder, args.eval_every) if args.resume else None
    rows, report = read_data(args)
    bert, tokenizer = load_encoder(args, last or args.pretrained)
    sizes = {task: len(found.ids) for task, found in rows["train"].items()}
    for line in resolve_args(args, bert.config, sizes):
        print(f"chosen: {line}")
    for line in idle_flags(args):
        print(f"no effect: {line}")
    check_outputs(args)
    facts = {
        "data": {
            split: {task: fingerprint(found) for task, found in rows[split].items()}
            for split in ("train", "dev")
        },
        "data_files": report["files"],
        "encoder": bert.load_report,
        "encoder_sha256": file_digest(find_weights(resolve_pretrained(str(last or args.pretrained)))),
    }
    stored = None
    if args.resume:
        stored = check_same_run(args, last, facts, folder)
        facts |= {name: stored.get(name) for name in ("encoder", "encoder_sha256")}
    else:
        check_free(args)
    run = Run(args, make_model(args, bert), tokenizer)
    if last:
        run.load_last(last)
    if stored:
        run.args_text = write_args(args, facts, stored)
        run.cut_log()
        print(f"continuing {folder} at step {run.state['step']}")
    else:
        run.args_text = begin_run(args, facts)
        print(f"encoder {args.pretrained}: {bert.load_report}")
    write_text(folder / "data_report.json", json.dumps(report, indent=2) + "\n")
    train_data, dev_data = (tokenize_split(args, rows[split], tokenizer) for split in ("train", "dev"))
    with catch_signals() as signals:
        train(args, run, train_data, dev_data, signals)
    try:
        finish(args, run.model, tokenizer, dev_data, test_rows=rows["test"])
    except KeyboardInterrupt:
        print(
            f"training is finished and saved; for scores and predictions: --output_dir {folder} --resume",
            flush=True,
        )
        raise
    print(f"run folder: {folder}" + draw_curves(folder))


def draw_curves(folder: Path) -> str:
    """Draw a finished run's curves; says where they are. By then nothing may make the run fail."""
    try:
        plot = plot_run(folder)
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        print(f"warning: no curves ({error})")
        return ""
    return f"  (curves: {plot})" if plot else ""


def work(argv: list[str] | None) -> None:
    args = get_args(argv)
    with lock_folder(Path(args.output_dir or default_output_dir(args))):
        read_again(args) if args.eval_only or args.predict_only else start(args)


def main(argv: list[str] | None = None) -> int:
    return run_script("multitask_classifier.py", partial(work, argv))


if __name__ == "__main__":
    sys.exit(main())

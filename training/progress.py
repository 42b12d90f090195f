"""What the terminal shows of a run: its plan, its speed, its scores, and why it ended."""

import math
import sys
from collections.abc import Mapping, Sequence

import numpy as np
from tqdm import tqdm

from config import TaskSpec
from datasets import BatchOrder, TaskData
from evaluation import OVERALLS, select_score
from optimizer import lr_factor
from support.bars import Bar
from training.run_folder import Run
from training.settings import LoopSettings
from training.task_schedule import describe_schedules


def print_plan(loop: LoopSettings, plan: np.ndarray | None, orders: dict[str, BatchOrder]) -> None:
    """Say how long the run is and how often it sees each task, if that is known beforehand."""
    if plan is None:
        print(f"{loop.max_steps} steps; sampler {loop.sampler} goes by the gradients", flush=True)
    else:
        counts = np.bincount(plan[plan >= 0], minlength=len(loop.tasks)) * loop.grad_accum
        seen = ", ".join(
            f"{task} {count / orders[task].batches_per_epoch:.2f} times"
            for task, count in zip(loop.tasks, counts, strict=True)
        )
        print(
            f"{loop.max_steps} steps with sampler {loop.sampler}; each task's data will be seen: {seen}",
            flush=True,
        )
    for flag in ("loss_schedule", "draw_schedule"):
        for line in describe_schedules(flag, getattr(loop, flag), loop.max_steps):
            print(f"  {line}")


def warn_of_new_length(run: Run, stored: dict) -> None:
    """If a run goes on with another --max_steps than before, say what that does to the learning rate."""
    loop, before, step = run.settings.loop, stored["max_steps"], run.state.step
    if loop.max_steps == before:
        return
    old, new = (
        run.settings.optimizer.lr
        * lr_factor(loop.schedule, step, warmup_steps=loop.warmup_steps, total_steps=total)
        for total in (before, loop.max_steps)
    )
    print(
        f"warning: the run ends at step {loop.max_steps} now, before it was {before}: by --schedule"
        f" {loop.schedule} its next learning rate is {new:.2e} instead of {old:.2e}"
    )


class Progress:
    """The speed since the last line of the log, and what the terminal shows: a bar, or the log's lines.

    Args:
        step: where the run starts or goes on.
    """

    def __init__(self, step: int, max_steps: int):
        self.max_steps = max_steps
        self.bar = Bar(max_steps, "step", initial=step, stays=True)
        self._start_anew()

    def _start_anew(self) -> None:
        self.seconds, self.num_steps, self.num_tokens = 0.0, 0, 0

    def add_step(self, seconds: float, num_tokens: int) -> None:
        self.seconds += seconds
        self.num_steps += 1
        self.num_tokens += num_tokens
        self.bar.update()

    @property
    def tokens_per_second(self) -> int:
        return round(self.num_tokens / self.seconds)

    def show(self, line: dict) -> None:
        """Show a line of the log, and measure the speed anew from here on."""
        losses = " ".join(f"{task} {loss:.3f}" for task, loss in line["loss"].items())
        text = f"loss {losses}  lr {line['lr']:.2e}  {line['tokens_per_second']} tokens/s"
        if not self.bar.disable and sys.stdout.isatty():
            if self.bar.has_room(text):
                self.bar.set_postfix_str(text, refresh=False)
            else:  # whole, above the bar, rather than cut off
                tqdm.write(f"step {line['step']}/{self.max_steps}  {text}")
        else:
            seconds_left = (self.max_steps - line["step"]) * self.seconds / self.num_steps
            print(f"step {line['step']}/{self.max_steps}  {text}  {seconds_left:.0f} s left", flush=True)
        self._start_anew()

    def close(self) -> None:
        self.bar.close()


def format_scores(summary: dict, tasks: dict[str, TaskSpec]) -> str:
    scores = [f"{task} {select_score(summary, task, tasks):.3f}" for task in summary["tasks"]]
    return "  ".join(scores + [f"{name} {summary[name]:.3f}" for name in OVERALLS])


def describe_step(
    run: Run, examples: Sequence[tuple[str, Sequence[np.ndarray]]], train_data: Mapping[str, TaskData]
) -> str:
    """The batches of a step by task and shape, and the flags that make the largest one smaller.

    Args:
        examples: for each draw of the step its task and the examples of its micro-batches.
    """
    shapes = [
        (task, (train_data[task].index[chosen].size, int(train_data[task].lengths[chosen].max())))
        for task, batches in examples
        for chosen in batches
    ]
    largest = max(shapes, key=lambda item: math.prod(item[1]))[0]
    listed = ", ".join(f"{task} {shape}" for task, shape in shapes[:8])
    return (
        f"in a step with batches (sequences, word pieces) {listed}; try a smaller --{largest}_batch_size or"
        " --batch_size (with --grad_accum for as many examples a step), or a smaller --max_length;"
        f" {run.last_saved_text()}"
    )


def print_end(run: Run) -> None:
    """Say why training ended, unless it simply reached --max_steps."""
    state, loop = run.state, run.settings.loop
    if state.step > loop.max_steps:
        print(f"nothing to train: the run is at step {state.step}, beyond --max_steps {loop.max_steps}")
    elif state.step < loop.max_steps:
        print(f"stopped at step {state.step}: {loop.patience} evaluations without a better {loop.select_by}")
    if state.loss_scale is not None and state.loss_scale.overflow_steps:
        print(state.loss_scale.overflow_text(state.step))
    if state.skipped_steps:
        print(
            f"warning: {state.skipped_steps} of {state.step} steps were skipped; metrics.jsonl names the"
            " examples"
        )

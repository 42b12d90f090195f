"""What a run says of its steps: records and their averages for the log, lines and a bar for the terminal."""

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from kernels.flat_memory import FlatMemory
from pcgrad import cosine_matrix

if TYPE_CHECKING:
    from multitask_classifier import StepResult


def pair_values(matrix: torch.Tensor, tasks: Sequence[str]) -> dict[str, float]:
    """The entries of a (K, K) matrix above the diagonal, named `first-second`."""
    values = matrix.tolist()
    return {f"{a}-{b}": values[i][j] for i, a in enumerate(tasks) for j, b in enumerate(tasks) if i < j}


def step_record(result: "StepResult", memory: FlatMemory) -> dict:
    """A `StepResult` as plain numbers; tasks without a batch are left out."""
    present = [k for k, loss in enumerate(result.losses.tolist()) if not math.isnan(loss)]
    names = [memory.tasks[k] for k in present]
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
    averaged = {"grad_norm": mean([record["grad_norm"] for record in records])}
    for key in ("loss", "task_grad_norm", "grad_weight", "cosine"):
        averaged[key] = mean_of_each([record[key] for record in records])
    averaged["conflict"] = share_below_zero([record["cosine"] for record in records])
    layers = {
        group: [record["layer_cosine"][group] for record in records] for group in records[0]["layer_cosine"]
    }
    averaged["layer_cosine"] = {group: mean_of_each(cosines) for group, cosines in layers.items()}
    averaged["layer_conflict"] = {group: share_below_zero(cosines) for group, cosines in layers.items()}
    return averaged


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def mean_of_each(dicts: list[dict[str, float]]) -> dict[str, float]:
    """For each name the mean over the dictionaries that have it."""
    names = dict.fromkeys(name for values in dicts for name in values)
    return {name: mean([values[name] for values in dicts if name in values]) for name in names}


def share_below_zero(dicts: list[dict[str, float]]) -> dict[str, float]:
    return mean_of_each([{name: float(value < 0) for name, value in values.items()} for values in dicts])


class Progress:
    """The speed since the last line of the log, and what the terminal shows: a bar, or the log's lines.

    Args:
        step: where the run starts or goes on.
    """

    def __init__(self, step: int, max_steps: int):
        self.max_steps = max_steps
        self.is_interactive = sys.stdout.isatty() and sys.stderr.isatty()
        self.bar = tqdm(
            total=max_steps,
            initial=step,
            unit="step",
            disable=not self.is_interactive,
            dynamic_ncols=True,
        )
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
        if self.is_interactive:
            self.bar.set_postfix_str(text, refresh=False)
        else:
            seconds_left = (self.max_steps - line["step"]) * self.seconds / self.num_steps
            print(f"step {line['step']}/{self.max_steps}  {text}  {seconds_left:.0f} s left", flush=True)
        self._start_anew()

    def close(self) -> None:
        self.bar.close()

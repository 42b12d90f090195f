"""Which examples are to blame when a step's loss or gradient is not finite, so that nothing was updated."""

from collections.abc import Callable, Mapping

import numpy as np
import torch

from datasets import TaskData
from heads import MultitaskBERT
from kernels.flat_memory import FlatMemory
from support.device import to_device


def find_bad_examples(
    model: MultitaskBERT,
    memory: FlatMemory,
    result,
    drawn: Mapping[str, list[int]],
    train_data: Mapping[str, TaskData],
    *,
    pad_token_id: int,
    autocast: Callable,
) -> dict[str, dict]:
    """The tasks whose loss or gradient was not finite in a step, each with the ids of the examples to blame.

    Those are the ones whose loss is not finite by itself, without dropout; all of the task's examples if there are none.

    Args:
        result: the step's `multitask_classifier.StepResult`.
        drawn: task -> its examples in the step.
    """
    present = [(k, task) for k, task in enumerate(memory.tasks) if task in drawn]
    squares = {task: result.gram[k, k] + memory.head_grad(task).square().sum().cpu() for k, task in present}
    bad = [(k, task) for k, task in present if not (result.losses[k] + squares[task]).isfinite()]
    device = memory.data.device
    found = {}
    for k, task in bad or present:  # where only all of them together are too large, each has its part in it
        data = train_data[task]
        model.eval()
        with torch.no_grad(), autocast():
            losses = [
                model.loss(task, to_device(data.batch(np.array([n]), pad_token_id), device))
                for n in drawn[task]
            ]
        model.train()
        alone = [n for n, loss in zip(drawn[task], losses, strict=True) if not loss.isfinite()]
        what = "gradient" if result.losses[k].isfinite() else "loss"
        found[task] = {"not_finite": what, "examples": [data.rows.ids[n] for n in alone or drawn[task]]}
    return found


def format_bad_examples(found: dict[str, dict]) -> str:
    return "; ".join(
        f"{task} {blame['not_finite']} is not finite, examples {', '.join(blame['examples'])}"
        for task, blame in found.items()
    )

"""Which examples are to blame when a step's loss or gradient is not finite, so that nothing was updated."""

from collections.abc import Mapping

import numpy as np
import torch
from tqdm import tqdm

from datasets import TaskData
from support.device import to_device
from support.errors import UserError
from training.run_folder import Run
from training.step_result import StepResult


def find_bad_examples(
    run: Run, result: StepResult, drawn: Mapping[str, list[int]], train_data: Mapping[str, TaskData]
) -> dict[str, dict]:
    """The tasks whose loss or gradient was not finite in a step, each with the ids of the examples to blame.

    Those are the ones whose loss is not finite by itself, without dropout; all of the task's examples if
    there are none.

    Args:
        drawn: task -> its examples in the step.
    """
    model, memory, pad_token_id = run.model, run.memory, run.tokenizer.pad_token_id
    present = [(k, task) for k, task in enumerate(memory.tasks) if task in drawn]
    squares = result.gram.diagonal() + result.head_squares  # (K,)
    bad = [(k, task) for k, task in present if not (result.losses[k] + squares[k]).isfinite()]
    found = {}
    for k, task in bad or present:  # where only all of them together are too large, each has its part in it
        data = train_data[task]
        model.eval()
        with torch.no_grad(), run.settings.step.autocast():
            batches = (data.batch(np.array([n]), pad_token_id) for n in drawn[task])
            losses = [model.loss(task, to_device(batch, run.settings.device)) for batch in batches]
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


def log_skipped_step(
    run: Run,
    result: StepResult,
    step: int,
    examples: list[tuple[str, list[np.ndarray]]],
    train_data: Mapping[str, TaskData],
) -> None:
    """Count, print and log a step that was skipped because something was not finite.

    Args:
        step: its number, the first being 1.
        examples: for each draw of the step its task and the examples of its micro-batches.

    Raises:
        UserError: after --max_bad_steps of them in a row.
    """
    state, max_bad_steps = run.state, run.settings.loop.max_bad_steps
    state.bad_steps += 1
    state.skipped_steps += 1
    drawn: dict[str, list[int]] = {}
    for task, batches in examples:
        drawn.setdefault(task, []).extend(n for batch in batches for n in batch)
    drawn = {task: list(dict.fromkeys(examples)) for task, examples in drawn.items()}  # R-Drop has all twice
    bad = find_bad_examples(run, result, drawn, train_data)
    run.log({"step": step, "skipped": bad})
    tqdm.write(f"warning: step {step} skipped for all tasks: {format_bad_examples(bad)}")
    if state.bad_steps >= max_bad_steps:
        raise UserError(
            f"{max_bad_steps} steps in a row without a finite loss and gradient (--max_bad_steps);"
            f" try a smaller --lr, or look at the examples named above; {run.last_saved_text()}"
        )

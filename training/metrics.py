"""What a run says of its steps: records and their averages for the log, lines and a bar for the terminal."""

import math
from collections.abc import Sequence
from itertools import combinations

import torch

from kernels.flat_memory import FlatMemory
from kernels.grad_noise import Moments
from pcgrad import cosine_matrix
from training.step_result import StepResult


def pair_values(matrix: torch.Tensor, tasks: Sequence[str]) -> dict[str, float]:
    """The entries of a (K, K) matrix above the diagonal, named `first-second`."""
    values = matrix.tolist()
    return {f"{a}-{b}": values[i][j] for i, a in enumerate(tasks) for j, b in enumerate(tasks) if i < j}


def step_record(result: StepResult, memory: FlatMemory) -> dict:
    """A `StepResult` as plain numbers; tasks without a batch are left out."""
    present = [k for k, loss in enumerate(result.losses.tolist()) if not math.isnan(loss)]
    names = [memory.tasks[k] for k in present]
    gram = result.gram[present][:, present]
    gains = result.gram @ result.weights if result.gains is None else result.gains
    group_cosines = cosine_matrix(result.group_grams[:, present][:, :, present])
    loss_weights = {}
    if result.loss_weights is not None:
        loss_weights = {"loss_weight": dict(zip(names, result.loss_weights[present].tolist(), strict=True))}
    return {
        "loss": dict(zip(names, result.losses[present].tolist(), strict=True)),
        "task_grad_norm": dict(zip(names, gram.diagonal().clamp(min=0).sqrt().tolist(), strict=True)),
        "grad_weight": dict(zip(names, result.weights[present].tolist(), strict=True)),
        **loss_weights,
        # Does the combined gradient go against the task's own? Would the plain sum?
        "opposed": dict(zip(names, (gains[present] < 0).float().tolist(), strict=True)),
        "opposed_by_sum": dict(zip(names, (gram.sum(1) < 0).float().tolist(), strict=True)),
        "cosine": pair_values(cosine_matrix(gram), names),
        "layer_cosine": {
            group: pair_values(cosines, names)
            for group, cosines in zip(memory.layout.layer_groups, group_cosines, strict=True)
        },
        "grad_norm": result.grad_norm,
    }


def noise_record(whole: Moments, groups: Sequence[Moments], memory: FlatMemory) -> dict:
    """What the log says of signal and noise: the estimates, and all that intervals are made of.

    `signal` is each task's share of the expected gradient in a batch's, `expected_cosine` the cosines of the
    expected gradients, where they are known to have a length. In `noise` and, by layer group, `layer_noise`,
    entries `TASK` are such shares, entries `FIRST-SECOND` the inner products of two tasks over the roots of
    their mean squares: with all batches, then leaving out each in turn.
    """

    def listed(moments):
        shares = moments.shares  # (1 + n, K, K)
        tasks = {task: shares[:, k, k] for k, task in enumerate(memory.tasks)}
        pairs = {
            f"{a}-{b}": shares[:, i, j]
            for i, a in enumerate(memory.tasks)
            for j, b in enumerate(memory.tasks)
            if i < j
        }
        return {
            name: [float(f"{x:.5g}") for x in values.tolist()] for name, values in (tasks | pairs).items()
        }

    noise = listed(whole)
    signal = {task: noise[task][0] for task in memory.tasks}
    lengths = {task: math.sqrt(share) for task, share in signal.items() if share > 0}
    cosines = {
        f"{a}-{b}": noise[f"{a}-{b}"][0] / (lengths[a] * lengths[b]) for a, b in combinations(lengths, 2)
    }
    layers = dict(zip(memory.layout.layer_groups, map(listed, groups), strict=True))
    return {"signal": signal, "expected_cosine": cosines, "noise": noise, "layer_noise": layers}


def average(records: list[dict]) -> dict:
    """Mean of each number over the records that have it, and how often each pair of tasks was in conflict."""
    averaged = {"grad_norm": mean([record["grad_norm"] for record in records])}
    for key in ("loss", "task_grad_norm", "grad_weight", "cosine"):
        averaged[key] = mean_of_each([record[key] for record in records])
    for key in ("loss_weight", "opposed", "opposed_by_sum"):  # not in all runs
        if any(key in record for record in records):
            averaged[key] = mean_of_each([record.get(key, {}) for record in records])
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

"""What a run says of its steps: records and their averages for the log, lines and a bar for the terminal."""

import math
from collections.abc import Sequence

import torch

from kernels.flat_memory import FlatMemory
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
    group_cosines = cosine_matrix(result.group_grams[:, present][:, :, present])
    loss_weights = {}
    if result.loss_weights is not None:
        loss_weights = {"loss_weight": dict(zip(names, result.loss_weights[present].tolist(), strict=True))}
    return {
        "loss": dict(zip(names, result.losses[present].tolist(), strict=True)),
        "task_grad_norm": dict(zip(names, gram.diagonal().clamp(min=0).sqrt().tolist(), strict=True)),
        "grad_weight": dict(zip(names, result.weights[present].tolist(), strict=True)),
        **loss_weights,
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
    if any("loss_weight" in record for record in records):
        averaged["loss_weight"] = mean_of_each([record.get("loss_weight", {}) for record in records])
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

"""Schedules of tasks over a run: what a task's loss, or its share of the draws, is multiplied by, and when.

The tasks want different lengths of training: small ones are learnt by heart while a large one still gains. A
schedule lets a task fade, end, or enter late, in one model. It is given by points, with straight lines
between them:

    sst=0.4:1/0.7:0     sst counts fully up to 40 % of the run, then less, and from 70 % on not at all
    sts=0.3:0/0.3:1     sts enters after 30 %

A schedule depends on the step and the length of the run alone, so a resumed run need not know it. A task
whose factor is 0 is not drawn: its examples cost no time, and its head stays as it is, without decay or
momentum.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from config import TASKS
from optimizer import points_factor
from support.command_line import FlagType, values_by_name
from support.errors import UserError

TaskSchedule = Sequence[Sequence[float]]  # points (progress, factor), by progress


def parse_schedules(text: str) -> dict[str, list[list[float]]]:
    if text.strip() == "none":
        return {}
    return {
        task: [[float(number) for number in point.split(":")] for point in points.split("/")]
        for task, points in values_by_name(text).items()
    }


def is_schedule(points, highest: float) -> bool:
    """Whether points are (progress, factor) in order, from 0 to 1, with factors from 0 to `highest`."""
    try:
        table = np.array(points, dtype=np.float64)
    except (TypeError, ValueError):
        return False
    if table.ndim != 2 or table.shape[1] != 2 or not np.isfinite(table).all():
        return False
    progress, factors = table.T
    in_order = progress[0] >= 0 and progress[-1] <= 1 and (np.diff(progress) >= 0).all()
    return bool(in_order and (factors >= 0).all() and (factors <= highest).all())


def schedule_type(highest: float, factors: str) -> FlagType:
    """The type of a flag with a schedule for some tasks."""

    def is_valid(value) -> bool:
        return isinstance(value, dict) and all(
            task in TASKS and is_schedule(points, highest) for task, points in value.items()
        )

    expected = "TASK=PROGRESS:FACTOR/PROGRESS:FACTOR/...,... as in sst=0.4:1/0.7:0, progress rising in [0, 1]"
    return FlagType(parse_schedules, is_valid, f"{expected}, factors {factors}; or none", "TASK=POINTS,...")


LOSS_SCHEDULES = schedule_type(1e6, "of at least 0")
DRAW_SCHEDULES = schedule_type(1.0, "in [0, 1]")


def factor_in_step(schedules: Mapping[str, TaskSchedule], task: str, step: int, total_steps: int) -> float:
    """A task's factor in a step, counted from 0; progress is 0 in the first step and 1 in the last."""
    if task not in schedules:
        return 1.0
    return points_factor(schedules[task], min(1.0, step / max(1, total_steps - 1)))


def draw_shares(
    tasks: Sequence[str],
    losses: Mapping[str, TaskSchedule],
    draws: Mapping[str, TaskSchedule],
    total_steps: int,
) -> np.ndarray | None:
    """What `plan_tasks` needs to know of the schedules: (total_steps, K), or None if there are none.

    Raises:
        UserError: if a step is left without any task.
    """
    if not losses and not draws:
        return None
    shares = np.ones((total_steps, len(tasks)))
    for k, task in enumerate(tasks):
        for step in range(total_steps):
            counts = factor_in_step(losses, task, step, total_steps) > 0
            shares[step, k] = counts * factor_in_step(draws, task, step, total_steps)
    empty = np.flatnonzero(~shares.any(axis=1))
    if len(empty):
        raise UserError(
            f"--loss_schedule and --draw_schedule leave step {empty[0] + 1} of {total_steps} without any"
            f" task; expected one of {','.join(tasks)} above 0 in every step"
        )
    return shares


def describe_schedules(flag: str, schedules: Mapping[str, TaskSchedule], total_steps: int) -> list[str]:
    """A line for each schedule: its factors, and the steps that have them, counted from 1."""
    lines = []
    for task, points in schedules.items():
        steps = [(round(progress * (total_steps - 1)) + 1, factor) for progress, factor in points]
        listed = ", ".join(f"{factor:g} at step {step}" for step, factor in steps)
        lines.append(f"--{flag} {task}: {listed}, straight lines between them")
    return lines

"""Several finished runs that answer together: the mean of their probabilities, or of their similarities.

They may differ in everything, tasks included, as long as their dev data are the same: what one of them was
trained on may be held out for another. A task is answered by those that have it.

Shapes: N examples of a task, M members; answers (N, C) are those of `evaluation.soft_answers`.
"""

import math
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config import DEFAULT_TASKS, TASKS, TaskSpec
from datasets import Rows
from evaluation import TASK_KINDS, decide
from support.errors import UserError
from support.files import file_digest
from training.args_file import ENSEMBLE_FILE, read_args_file
from training.flags import read_run
from training.predictor import Predictor, find_best
from training.resolve import data_settings
from training.run_data import fingerprint

SELECTION_ROUNDS = 20  # of choosing weights: each adds 1/20 to one member


@dataclass(frozen=True)
class Member:
    """A checkpoint that answers with others.

    Args:
        run: its folder as given, a run's or a checkpoint's.
        digest: sha256 of its weights.
        specs: task -> its row of `config.TASKS`; a run may have tasks of its own.
        files: (task, split) -> the data file it was told of.
        stored: its `args.json`.
    """

    run: Path
    digest: str
    specs: Mapping[str, TaskSpec]
    files: Mapping[tuple[str, str], Path]
    stored: Mapping


@contextmanager
def kept_tasks() -> Iterator[None]:
    """Leave `config.TASKS` as it is: to read a run makes the run's own tasks known."""
    before = dict(TASKS)
    try:
        yield
    finally:
        TASKS.clear()
        TASKS.update(before)


def find_member(run: Path) -> Member:
    """A run's best checkpoint, or a checkpoint.

    Raises:
        UserError: if there is none, it is damaged, or its run is not finished.
    """
    if (run / ENSEMBLE_FILE).exists():
        raise UserError(f"{run}: is an ensemble; expected a run")
    checkpoint = find_best(run)
    stored = read_args_file(checkpoint)
    if (
        checkpoint != run
        and not (run / "scores.json").exists()
        and stored["args"].get("final_eval") != "none"
    ):
        raise UserError(f"{run}: the run is not finished; expected one that is, see --resume")
    with kept_tasks():
        flags = read_run(checkpoint)[0]
        files = data_settings(Namespace(**flags)).files
        specs = {task: TASKS[task] for task in flags["tasks"]}
    return Member(run, file_digest(checkpoint / "model.safetensors"), specs, files, stored)


def find_members(runs: Sequence[Path]) -> list[Member]:
    """The members of an ensemble, in an order that does not depend on that of `runs`.

    Raises:
        UserError: as `find_member`; and if two are the same, or mean other things by a task.
    """
    members: dict[str, Member] = {}
    for run in runs:
        member = find_member(run)
        other = members.setdefault(member.digest, member)
        if other is not member:
            raise UserError(f"{run}: has the same weights as {other.run}; expected each member once")
    known: dict[str, Member] = {}
    for member in members.values():
        for task, spec in member.specs.items():
            other = known.setdefault(task, member)
            if meaning(spec) != meaning(other.specs[task]):
                raise UserError(f"{member.run}: its task {task} is another one than that of {other.run}")
    return [members[digest] for digest in sorted(members)]


def meaning(spec: TaskSpec) -> tuple:
    """What has to be equal for answers to be averaged."""
    return spec.kind, spec.label_range, spec.class_names, len(spec.text_columns)


def tasks_of(members: Sequence[Member]) -> dict[str, TaskSpec]:
    """All tasks of the members, the course's first."""
    specs = {task: spec for member in reversed(members) for task, spec in member.specs.items()}
    order = (*DEFAULT_TASKS, *sorted(specs.keys() - set(DEFAULT_TASKS)))
    return {task: specs[task] for task in order if task in specs}


def check_data(members: Sequence[Member], dev: Mapping[str, Rows], test: Mapping[str, Rows]) -> None:
    """Refuse members that had other dev data, or other test data if they have predicted any.

    Args:
        dev, test: task -> rows.
    """
    for member in members:
        for task in member.specs:
            if task in dev and member.stored["data"].get("dev", {}).get(task) != fingerprint(dev[task]):
                raise UserError(f"{member.run}: its {task} dev data are not those in {dev[task].path}")
            digest = member.stored.get("data_files", {}).get(str(member.files[task, "test"]))
            if task in test and digest not in (None, test[task].sha256):
                raise UserError(f"{member.run}: its {task} test data are not those in {test[task].path}")


def ask(
    member: Member, rows: Mapping[tuple[str, str], Rows], device: str, precision: str | None
) -> dict[tuple[str, str], np.ndarray]:
    """A member's answers (N, C) for rows by (task, split), of those tasks that it has.

    Args:
        device, precision: as `Predictor.from_run` has them.
    """
    with kept_tasks():
        predictor = Predictor.from_run(member.run, device, precision)
    return {
        (task, split): predictor.answers(task, found)
        for (task, split), found in rows.items()
        if task in member.specs
    }


def average(answers: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Weighted mean (N, C) of answers."""
    total = math.fsum(weights)
    return sum(answer * (weight / total) for answer, weight in zip(answers, weights, strict=True))


# --- weights ------------------------------------------------------------------------------------------------


def equal_weights(spec: TaskSpec, answers: Sequence[np.ndarray], labels: np.ndarray) -> list[float]:
    """The same for all."""
    return [1.0] * len(answers)


def dev_weights(spec: TaskSpec, answers: Sequence[np.ndarray], labels: np.ndarray) -> list[float]:
    """Chosen on dev, whose score is then a little too good.

    Greedy selection with replacement: each round adds the member with which the mean scores best (Caruana et
    al. 2004, Ensemble Selection from Libraries of Models); of the rounds, the best one counts.
    """
    kind = TASK_KINDS[spec.kind]
    counts = best_counts = np.zeros(len(answers))
    best = -math.inf
    for _ in range(SELECTION_ROUNDS):
        candidates = [counts + added for added in np.eye(len(answers))]
        scores = [
            kind.scores(decide(spec, average(answers, each)), labels)[kind.main_score] for each in candidates
        ]
        counts = candidates[int(np.argmax(scores))]
        if max(scores) > best:
            best, best_counts = max(scores), counts
    return (best_counts / best_counts.sum()).tolist()


WEIGHTS = {"equal": equal_weights, "dev": dev_weights}

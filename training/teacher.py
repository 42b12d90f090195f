"""Distillation: what trained models say about the training examples, mixed into what is trained for.

Hinton et al. 2015, https://arxiv.org/abs/1503.02531; for several tasks in one BERT: Clark et al. 2019,
https://arxiv.org/abs/1907.04829. Cross-entropy is linear in its target, and so is a squared difference but
for a constant. So labels and answers are mixed once, before training, and no loss, gradient method or
captured step knows of it:

    target = (1 - weight) * label + weight * answer          an example without a label has the answer alone

Other than in Hinton et al. there is no temperature, which would end that: Clark et al. do without one, and
the mean over an ensemble is soft as it is.

Shapes: N training examples of a task, C classes; answers are those of `evaluation.soft_answers`.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from config import TASKS, TaskSpec
from datasets import Rows, TaskData
from evaluation import TASK_KINDS
from support.errors import UserError
from training.args_file import ENSEMBLE_FILE, EnsembleMember, read_ensemble
from training.ensemble import Member, ask, average, check_data, find_members, meaning
from training.run_data import fingerprints
from training.run_folder import is_runs_own
from training.settings import RunSettings, TeacherSettings
from training.token_cache import cache_arrays, load_arrays, write_arrays

SOFT_TARGETS_FILE = "soft_targets.npz"


@dataclass(frozen=True)
class Voice:
    """One model of a teacher, and the weight of its answers in each task."""

    member: Member
    weight: Mapping[str, float]


def mix_targets(spec: TaskSpec, labels: np.ndarray, answers: np.ndarray, weight: float) -> np.ndarray:
    """What is trained for: float32 (N, C) of several classes, else (N,).

    Args:
        labels: (N,), NaN where there is none.
        answers: of the teacher.
        weight: of the answers, in [0, 1].
    """
    num_outputs = TASK_KINDS[spec.kind].num_outputs(spec)
    share = np.where(np.isnan(labels), 1.0, weight)
    labels = np.nan_to_num(labels)
    if num_outputs == 1:  # a value, or the probability of a yes
        return ((1 - share) * labels + share * answers[:, -1]).astype(np.float32)
    one_hot, share = np.eye(num_outputs)[labels.astype(np.int64)], share[:, None]
    return ((1 - share) * one_hot + share * answers).astype(np.float32)


# --- who the teacher is -------------------------------------------------------------------------------------


def runs_of(folder: Path) -> dict[Path, EnsembleMember | None]:
    """The run in a folder, or the members of an ensemble, their weights in each task adding up to 1."""
    if not (folder / ENSEMBLE_FILE).exists():
        return {folder: None}
    members = read_ensemble(folder)
    tasks = {task for each in members for task in each.weight}
    totals = {task: math.fsum(each.weight.get(task, 0.0) for each in members) or 1.0 for task in tasks}
    return {
        each.run: replace(each, weight={task: own / totals[task] for task, own in each.weight.items()})
        for each in members
    }


def find_teacher(settings: RunSettings, dev: Mapping[str, Rows]) -> list[Voice]:
    """The models of the teacher; each of --teacher's folders, a run or an ensemble, counts the same.

    Args:
        dev: task -> rows of this run.

    Raises:
        UserError: if there is no such run, if it had other dev data, so that it may have been trained on what
            is held out here, or if it lacks a task.
    """
    folders, output_dir = settings.teacher.folders, settings.output.folder
    runs = [pair for folder in folders for pair in runs_of(folder).items()]
    for place in (*folders, *(run for run, _ in runs)):
        if place.resolve() == output_dir.resolve() or is_runs_own(place, output_dir):
            raise UserError(f"--teacher {place}: is the run itself; expected another one")
    try:
        members = find_members([run for run, _ in runs])
        check_data(members, dev, {})
    except UserError as error:
        raise UserError(f"--teacher: {error}") from None
    voices, of_ensembles = [], dict(runs)
    for member in members:
        listed = of_ensembles[member.run]
        if listed and listed.sha256 != member.digest:
            raise UserError(f"--teacher: {member.run} has other weights than when its ensemble was made")
        for task in member.specs.keys() & dev.keys():
            if meaning(member.specs[task]) != meaning(TASKS[task]):
                raise UserError(f"--teacher: {task} of {member.run} is another task than this run's")
        weight = {task: listed.weight.get(task, 0.0) if listed else 1.0 for task in member.specs}
        voices.append(Voice(member, weight))
    taught = {task for voice in voices for task, weight in voice.weight.items() if weight}
    for task, flag in settings.data.needs_teacher.items():
        if task not in taught:
            raise UserError(f"{flag}: the teacher has no {task}, so it cannot answer examples without labels")
    if not taught & dev.keys():
        raise UserError(f"--teacher: has none of the tasks {', '.join(dev)}")
    return voices


def describe_teacher(voices: Sequence[Voice]) -> list[dict]:
    """What a run's `args.json` says of its teacher."""
    return [
        {"run": str(each.member.run), "sha256": each.member.digest, "weight": dict(each.weight)}
        for each in voices
    ]


# --- what it says -------------------------------------------------------------------------------------------


def ask_teacher(
    voices: Sequence[Voice], rows: Mapping[str, Rows], settings: TeacherSettings
) -> dict[str, np.ndarray]:
    """Mean answers (N, C) float32 for the training rows of those tasks that the teacher has."""
    answers: dict[str, list[np.ndarray]] = {}
    weights: dict[str, list[float]] = {}
    for voice in voices:
        wanted = {(task, "train"): found for task, found in rows.items() if voice.weight.get(task)}
        if not wanted:
            continue
        tasks = ", ".join(task for task, _ in wanted)
        print(f"asking {voice.member.run} about the training examples of {tasks}")
        for (task, _), found in ask(voice.member, wanted, settings.device, settings.precision).items():
            answers.setdefault(task, []).append(found)
            weights.setdefault(task, []).append(voice.weight[task])
    return {task: average(found, weights[task]).astype(np.float32) for task, found in answers.items()}


def describe_answers(
    rows: Mapping[str, Rows], teacher: Sequence[dict] | None, settings: TeacherSettings
) -> str:
    """Everything that answers depend on: the rows' content, the teacher's weights, and the machine."""
    voices = [(each["sha256"], each["weight"]) for each in teacher or ()]
    about = {"rows": fingerprints(rows), "teacher": voices}
    return json.dumps(about | {"device": settings.device, "precision": settings.precision}, sort_keys=True)


def load_answers(path: Path, about: str) -> dict[str, np.ndarray] | None:
    """What `pack_answers` gave; None if the file is missing, damaged, or about something else."""
    stored = load_arrays(path)
    if stored is None or str(stored.pop("about", "")) != about:
        return None
    return stored


def pack_answers(answers: Mapping[str, np.ndarray], about: str) -> dict[str, np.ndarray]:
    return {"about": np.array(about), **answers}


def find_answers(
    settings: RunSettings,
    train_data: Mapping[str, TaskData],
    dev: Mapping[str, Rows],
    teacher: Sequence[dict] | None,
) -> dict[str, np.ndarray]:
    """The teacher's answers about the training data, (N, C) a task; nothing if there is none.

    They are kept in the run's folder, so that a resumed run needs no teacher and has the same bits; and in
    the cache, so that a run with another seed need not ask again.

    Args:
        dev: task -> rows of this run.
        teacher: as `describe_teacher` gave it when the run was started.
    """
    if settings.teacher is None:
        return {}
    rows = {task: each.rows for task, each in train_data.items()}
    about = describe_answers(rows, teacher, settings.teacher)
    path, cache_dir = settings.output.folder / SOFT_TARGETS_FILE, settings.tokens.cache_dir
    answers = load_answers(path, about)
    if answers is None:
        cached = cache_dir and cache_dir / f"teacher-{hashlib.sha256(about.encode()).hexdigest()[:32]}.npz"
        answers = load_answers(cached, about) if cached else None
        if answers is None:
            voices = find_teacher(settings, dev)
            if describe_teacher(voices) != teacher:
                raise UserError(f"{path}: is missing, and --teacher is not what the run was started with")
            answers = ask_teacher(voices, rows, settings.teacher)
            if cached:
                cache_arrays(cached, pack_answers(answers, about), "a teacher's answers")
        write_arrays(path, pack_answers(answers, about))
    print(f"the teacher's answers have a weight of {settings.teacher.weight:g} in {', '.join(answers)}")
    return answers


def add_soft_targets(
    settings: TeacherSettings | None, train_data: dict[str, TaskData], answers: Mapping[str, np.ndarray]
) -> dict[str, TaskData]:
    """Training data with the teacher's answers mixed in."""
    mixed = {
        task: mix_targets(TASKS[task], train_data[task].rows.labels, found, settings.weight)
        for task, found in answers.items()
    }
    return {task: replace(each, targets=mixed.get(task)) for task, each in train_data.items()}

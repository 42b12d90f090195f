"""Reading what a run wrote: settings, log and scores, each checked against the types below.

Only what is read here is declared; other keys are left alone, since a newer version may have written them.
"""

import json
import sys
from collections.abc import Collection
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import (
    Literal,
    NewType,
    NotRequired,
    Required,
    TypedDict,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from config import TASKS
from evaluation import OVERALLS, PREDICTION_STYLES, TASK_KINDS
from support.errors import UserError, one_line, quote
from support.files import read_bytes, read_json
from training.flags import read_run
from training.run_folder import ARGS_FILE, MAX_LOG_BYTES, read_args_file

Task, Pair = NewType("Task", str), NewType("Pair", str)  # of the tasks known now, a run's own included
ByTask, ByPair = dict[Task, float], dict[Pair, float]
# A task or pair -> what `training.metrics.noise_record` says: an estimate, and those without each batch.
Estimates = dict[str, list[float]]
Summary = TypedDict("Summary", {"tasks": dict[Task, dict[str, float]]} | dict.fromkeys(OVERALLS, float))


class Scores(TypedDict):
    step: int
    dev: Summary
    final_eval: NotRequired[str]  # "part": not all of dev was scored


class LogLine(TypedDict, total=False):
    """A line of the log: a stretch of training, or an evaluation, which has `dev` and `score`."""

    step: Required[int]
    tokens: int
    lr: float
    head_lr: float
    grad_norm: float
    tokens_per_second: float
    loss: ByTask
    task_grad_norm: ByTask
    grad_weight: ByTask
    loss_weight: ByTask
    opposed: ByTask
    opposed_by_sum: ByTask
    signal: ByTask
    expected_cosine: ByPair
    noise: Estimates
    layer_noise: dict[str, Estimates]
    cosine: ByPair
    conflict: ByPair
    layer_cosine: dict[str, ByPair]
    layer_conflict: dict[str, ByPair]
    dev: Summary
    score: float


class Settings(TypedDict):
    prediction_style: Literal[tuple(PREDICTION_STYLES)]
    precision: str
    pretrained: str
    extra_data: dict


class Fingerprints(TypedDict):
    train: dict[str, str]
    dev: dict[str, str]


class Facts(TypedDict):
    args: Settings
    data: Fingerprints
    versions: dict[str, str]


EXPECTED = {int: "a whole number", float: "a number", str: "text", list: "a list", dict: "names and values"}
hints_of = cache(get_type_hints)


def known_names(kind) -> Collection[str]:
    if kind is Pair:
        return {"-".join(pair) for pair in permutations(TASKS, 2)}
    return TASKS if kind is Task else get_args(kind)


def check(value, kind, name: str = "it") -> None:
    """Check a value from a JSON file against a type; a whole number passes for a float.

    Raises:
        UserError: saying what is wrong with which part of it.
    """
    if get_origin(kind) is Literal or kind in (Task, Pair):
        if value not in known_names(kind):
            raise UserError(f"{one_line(name, 60)} has {quote(value)}, which is not known")
        return
    plain = list if get_origin(kind) is list else kind if kind in EXPECTED else dict
    if isinstance(value, bool) or not isinstance(value, int | float if plain is float else plain):
        raise UserError(f"{one_line(name, 60)} is {quote(str(value))}; expected {EXPECTED[plain]}")
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        raise UserError(f"{one_line(name, 60)} is a number of hundreds of digits")
    if kind in EXPECTED:
        return
    if plain is list:
        for inner in value:
            check(inner, *get_args(kind), name)
    elif is_typeddict(kind):
        for key, inner_kind in hints_of(kind).items():
            if key in value:
                check(value[key], inner_kind, key)
            elif key in kind.__required_keys__:
                raise UserError(f"{name} lacks {key}")
    else:
        key_kind, inner_kind = get_args(kind)
        for key, inner in value.items():
            check(key, key_kind, name)
            check(inner, inner_kind, key)
    if kind is Summary:
        for task, scores in value["tasks"].items():
            if TASK_KINDS[TASKS[task].kind].main_score not in scores:
                raise UserError(f"{task} lacks {TASK_KINDS[TASKS[task].kind].main_score}")
    if kind is LogLine and "dev" in value and "score" not in value:
        raise UserError("it has dev and lacks score")


def read_metrics(run_dir: Path) -> list[LogLine]:
    """The lines of a run's `metrics.jsonl`; a last one that was cut off when the run was killed is left out.

    Raises:
        UserError: if the file is missing, or a line is not what a run writes.
    """
    path = Path(run_dir) / "metrics.jsonl"
    text = read_bytes(path, MAX_LOG_BYTES).decode("utf-8", "replace")
    metrics, lines = [], text.splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            check(values, LogLine)
            metrics.append(values)
        except (ValueError, RecursionError) as error:
            if number < len(lines) or text.endswith("\n"):
                raise UserError(f"{path}:{number}: not a line of a run's log: {one_line(error)}") from None
    return metrics


def read_scores(run_dir: Path) -> Scores:
    """A finished run's `scores.json`, or a UserError if it is missing or damaged."""
    return check_file(Path(run_dir) / "scores.json", read_json(Path(run_dir) / "scores.json"), Scores)


def read_facts(run_dir: Path) -> Facts:
    """What a finished run's `args.json` says about it, or a UserError if it is missing or damaged."""
    return check_file(run_dir / ARGS_FILE, read_args_file(run_dir), Facts)


def read_settings(run_dir: Path) -> tuple[dict, dict]:
    """A run's flags and the whole of its `args.json`; flags that are newer than the run have their defaults.

    Raises:
        UserError: if there is no run, or the file is damaged.
    """
    flags = read_run(run_dir)[0] | {"output_dir": str(run_dir)}  # the folder may have been moved since
    stored = read_args_file(run_dir)
    for name in ("versions", "machine", "data"):
        if not isinstance(stored.setdefault(name, {}), dict):
            raise UserError(f"{run_dir / ARGS_FILE}: damaged ({name} is not a table of names and values)")
    for split, values in stored["data"].items():
        if not isinstance(values, dict):
            raise UserError(
                f"{run_dir / ARGS_FILE}: damaged (data of {split!r} is not a table of names and values)"
            )
    for name in ("lr", "head_lr", "max_steps", "warmup_steps"):
        if flags[name] is None:
            raise UserError(f"{run_dir / ARGS_FILE}: damaged ({name} was never resolved)")
    return flags, stored


def read_summary(run_dir: Path, metrics: list[LogLine]) -> dict | None:
    """Dev scores of a run's best checkpoint: the last evaluation's, or the best so far; None without any.

    Returns:
        A `Summary` with `step`, `finished`, and `is_part`: not all of dev was scored, or it is not known.
    """
    if (run_dir / "scores.json").exists():
        scores = read_scores(run_dir)
        is_part = scores.get("final_eval") == "part"
        return scores["dev"] | {"step": scores["step"], "finished": True, "is_part": is_part}
    evaluated = [line for line in metrics if "dev" in line]
    if not evaluated:
        return None
    best = max(evaluated, key=lambda line: line["score"])
    return best["dev"] | {"step": best["step"], "finished": False, "is_part": True}


def training_seconds(metrics: list[dict]) -> float:
    """Time spent in training steps, evaluations not counted; 0 if it was not logged."""
    seconds, before = 0.0, 0
    for line in metrics:
        if line.get("tokens_per_second"):
            seconds += (line["tokens"] - before) / line["tokens_per_second"]
            before = line["tokens"]
    return seconds


def check_file(path: Path, values: dict, kind) -> dict:
    try:
        check(values, kind)
    except UserError as error:
        raise UserError(f"{path}: damaged, or from another version: {error}") from None
    return values

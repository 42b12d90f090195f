"""Reading what a run wrote, for reports and tables: settings, log and scores, each value where it is expected.

Forms are written down as data: a type, `Keys`, a dictionary of known keys, or `Each`, one whose values are all alike.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

from config import TASKS
from evaluation import OVERALLS, PREDICTION_STYLES, TASK_KINDS
from support.errors import UserError, one_line, quote
from support.files import read_bytes, read_json
from training.run_folder import ARGS_FILE, MAX_LOG_BYTES, read_args_file


@dataclass(frozen=True)
class Each:
    """A dictionary: any of `names` (None: whatever it likes) -> a value of a form."""

    form: object
    names: Collection[str] | None = None


@dataclass(frozen=True)
class Keys:
    """A dictionary with a form for each known key; the `needed` ones have to be there, others may be."""

    forms: Mapping[str, object]
    needed: Collection[str] = ()


PAIRS = {"-".join(pair) for pair in permutations(TASKS, 2)}
BY_TASK, BY_PAIR = Each(float, TASKS), Each(float, PAIRS)
SUMMARY = Keys({"tasks": Each(Each(float), TASKS)} | dict.fromkeys(OVERALLS, float), ("tasks", *OVERALLS))
SCORES = Keys({"step": int, "dev": SUMMARY}, ("step", "dev"))
LINE = Keys(
    {
        "step": int,
        "tokens": int,
        "dev": SUMMARY,
        **dict.fromkeys(("lr", "head_lr", "grad_norm", "tokens_per_second", "score"), float),
        **dict.fromkeys(("loss", "task_grad_norm", "grad_weight"), BY_TASK),
        **dict.fromkeys(("cosine", "conflict"), BY_PAIR),
        **dict.fromkeys(("layer_cosine", "layer_conflict"), Each(BY_PAIR)),
    },
    ("step",),
)
SETTINGS = Keys(
    {"prediction_style": str, "precision": str, "pretrained": str},
    ("prediction_style", "precision", "pretrained", "extra_data"),
)
FACTS = Keys(
    {
        "args": SETTINGS,
        "data": Keys({"train": Each(str), "dev": Each(str)}, ("train", "dev")),
        "versions": Each(str),
    },
    ("args", "data", "versions"),
)
EXPECTED = {int: "a whole number", float: "a number", str: "text"}


def find_misfit(value, form, where: str = "it") -> str | None:
    """What is not of a form, in a few words; None if all is. Float also takes whole numbers."""
    if isinstance(form, type):
        fits = isinstance(value, int | float if form is float else form) and not isinstance(value, bool)
        return None if fits else f"{where} is {quote(str(value))}; expected {EXPECTED[form]}"
    if not isinstance(value, dict):
        return f"{where} is {quote(str(value))}; expected names and values"
    for name in form.needed if isinstance(form, Keys) else ():
        if name not in value:
            return f"{where} lacks {name}"
    for name, inner in value.items():
        if isinstance(form, Keys):
            inner_form = form.forms.get(name)
        elif form.names is None or name in form.names:
            inner_form = form.form
        else:
            return f"{where} has {quote(name)}, which is not known"
        misfit = inner_form and find_misfit(inner, inner_form, one_line(name, 60))
        if misfit:
            return misfit
    for task, scores in value["tasks"].items() if form is SUMMARY else ():
        if TASK_KINDS[TASKS[task].kind].main_score not in scores:
            return f"{task} lacks {TASK_KINDS[TASKS[task].kind].main_score}"
    return None


def read_metrics(run_dir: Path) -> list[dict]:
    """The lines of a run's `metrics.jsonl`; one that was cut off at the end when the run was killed is left out.

    Raises:
        UserError: if there are none, or one is not what a run writes.
    """
    path = Path(run_dir) / "metrics.jsonl"
    text = read_bytes(path, MAX_LOG_BYTES).decode("utf-8", "replace")
    metrics = []
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            misfit = find_misfit(values, LINE)
            if misfit is None and "dev" in values and "score" not in values:
                misfit = "it has dev and lacks score"
        except (ValueError, RecursionError) as error:
            misfit = f"not JSON ({one_line(error)})"
        if misfit is None:
            metrics.append(values)
        elif number < len(lines) or text.endswith("\n"):
            raise UserError(f"{path}:{number}: not a line of a run's log: {misfit}")
    return metrics


def read_scores(run_dir: Path) -> dict:
    """A finished run's `scores.json`.

    Raises:
        UserError: if it is missing, or not what a run writes.
    """
    path = Path(run_dir) / "scores.json"
    values = read_json(path)
    misfit = find_misfit(values, SCORES)
    if misfit:
        raise UserError(f"{path}: damaged, or from another version: {misfit}")
    return values


def read_facts(run_dir: Path) -> dict:
    """What a finished run's `args.json` says of it.

    Raises:
        UserError: if it is missing, or not what a run writes.
    """
    facts = read_args_file(run_dir)
    misfit = find_misfit(facts, FACTS)
    if misfit is None and facts["args"]["prediction_style"] not in PREDICTION_STYLES:
        misfit = f"prediction_style is {quote(facts['args']['prediction_style'])}"
    if misfit:
        raise UserError(f"{run_dir / ARGS_FILE}: damaged, or from another version: {misfit}")
    return facts

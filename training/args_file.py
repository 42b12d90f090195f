"""What a folder says of itself: a run's `args.json`, with its settings, commands and data, as it is read; an
ensemble's `ensemble.json`, with its members.
"""

from dataclasses import dataclass
from pathlib import Path

from support.command_line import number
from support.errors import UserError, one_line, quote
from support.files import read_json

ARGS_FILE = "args.json"
ENSEMBLE_FILE = "ensemble.json"
WEIGHT = number(float, 0)


def comes_from(pretrained: str, encoder: str) -> bool:
    """Whether --pretrained is this encoder, or a folder of ours whose training started from it."""
    seen = set()
    while pretrained != encoder:
        if pretrained in seen or not (Path(pretrained) / ARGS_FILE).exists():
            return False
        seen.add(pretrained)
        try:
            pretrained = str(read_args_file(Path(pretrained))["args"].get("pretrained"))
        except UserError:
            return False
    return True


def read_args_file(folder: Path) -> dict:
    """A run's `args.json`, as `run_folder.write_args` wrote it.

    Raises:
        UserError: if there is none, or it is damaged; the copy in its last checkpoint is named then.
    """
    path = folder / ARGS_FILE
    try:
        if not path.exists():
            raise UserError(f"--output_dir {folder}: no run there (no {ARGS_FILE})")
        stored = read_json(path)
        if not isinstance(stored.get("args"), dict):
            raise UserError(f"{path}: damaged (it holds no settings)")
        commands = stored.get("commands")
        if not isinstance(commands, list) or not all(
            isinstance(command, list) and all(isinstance(word, str) for word in command)
            for command in commands
        ):
            raise UserError(f"{path}: damaged (it holds no commands)")
        if not isinstance(stored.get("data"), dict | str):
            raise UserError(f"{path}: damaged (it holds no data)")
    except UserError as error:
        # The checkpoint's own listing of its versions is not used here, as it would import the model.
        copies = [*folder.glob(f"last/{ARGS_FILE}"), *sorted(folder.glob(f"last.[0-9]*/{ARGS_FILE}"))]
        hint = f"; {copies[0]} is a copy, made with its last checkpoint" if copies else ""
        raise UserError(f"{error}{hint}") from None
    return stored


def check_weight(value: object) -> float:
    if not WEIGHT.is_valid(value):
        raise ValueError(f"weight is {quote(value)}; expected {WEIGHT.expected}")
    return float(value)


@dataclass(frozen=True)
class EnsembleMember:
    """A member as `ensemble.json` has it.

    Args:
        run: its folder.
        sha256: of its weights.
        pretrained: the encoder that it started from.
        weight: task -> its weight in the mean.
    """

    run: Path
    sha256: str
    pretrained: str
    weight: dict[str, float]


def read_ensemble(folder: Path) -> list[EnsembleMember]:
    """The members of the ensemble in a folder.

    Raises:
        UserError: if `ensemble.json` is missing or not as `reporting.ensemble` writes it.
    """
    path = folder / ENSEMBLE_FILE
    members = read_json(path).get("members")
    try:
        return [
            EnsembleMember(
                Path(member["run"]),
                str(member["sha256"]),
                str(member["pretrained"]),
                {task: check_weight(weight) for task, weight in member["weight"].items()},
            )
            for member in members
        ]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: damaged ({one_line(error, 60)})") from None

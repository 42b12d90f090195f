"""What the command lines of training share: types of flags, and a parser that knows what each flag changes.

From the marks follows which flags may have another value when a run is taken up again.
"""

import argparse
from collections.abc import Callable

from config import TASKS
from support.command_line import FlagType, OneLineParser, number, values_by_name
from support.device import PRECISIONS
from training.sources import EXTRA_SOURCES
from training.task_file import read_task_files

PRECISION_NAMES = ("auto", *PRECISIONS)
PRECISION_HELP = (
    "number format of matrix products, not of the weights; auto: bf16 where the processor is fast at it, else"
    " fp16 on an NVIDIA GPU, fp32 elsewhere; tf32: fp32 with coarser, faster products on such a GPU"
)
DEVICE_HELP = "auto (an NVIDIA GPU if there is one), cpu, cuda, cuda:1, ..., or mps (Apple; untested)"

# What a flag changes about a run: every flag has one of these marks.
MARKS = {
    "result": "what the run computes: weights, scores, which checkpoint is the best",
    "mode": "what is done, with which run folder",
    "place": "where files are read from and written to",
    "predictions": "what is scored and predicted at the end, and in what form",
    "length": "when the run ends",
    "upkeep": "what is logged and kept on the way, and how much trouble is tolerated",
    "machine": "which processor computes, and how precisely",
    "text": "how much of a text the encoder sees",
}
# What may change when a run is resumed, and when its best checkpoint is read again. Whether a file in another
# place holds the same data is checked by the data's fingerprint.
RESUME_MARKS = ("mode", "place", "predictions", "length", "upkeep")
READING_MARKS = ("mode", "place", "predictions", "machine", "text")


# --- types of flags -----------------------------------------------------------------------------------------


COUNT = number(int, 1)
COUNT_OR_NONE = number(int, 0)
PROBABILITY = number(float, 0, 1, high_open=True)
POSITIVE = number(float, 0, low_open=True)
NOT_NEGATIVE = number(float, 0)
SEED = number(int, 0, 2**32 - 1)


def text_type(metavar: str) -> FlagType:
    return FlagType(str, lambda value: isinstance(value, str), "text", metavar)


DIR, FILE, DEVICE, ENCODER = map(text_type, ("DIR", "FILE", "DEVICE", "NAME|DIR"))
OUTPUT_DIR = FlagType(str, lambda value: isinstance(value, str) and value != "", "a folder", "DIR")


def name_list(names: tuple[str, ...], expected: str, metavar: str) -> FlagType:
    """Some of `names`, each once, separated by commas; a tuple."""

    return FlagType(
        split_names, lambda value: are_names(value) and set(value) <= set(names), expected, metavar
    )


def task_list() -> FlagType:
    """Some of the tasks that there are now, those of --task_file included."""
    return name_list(tuple(TASKS), f"some of {','.join(TASKS)}, each once", "TASK,...")


def split_names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def are_names(value) -> bool:
    is_tuple = isinstance(value, tuple) and all(isinstance(name, str) for name in value)
    return is_tuple and 0 < len(value) == len(set(value))


folder_list = FlagType(split_names, are_names, "folders, each once, separated by commas", "DIR,...")
# Where it turns out later, when the run is read, which tasks it has.
run_tasks = FlagType(split_names, are_names, "tasks of the run, each once", "TASK,...")
task_files = FlagType(
    read_task_files,
    lambda value: isinstance(value, dict),  # what is in it was checked by set_own_tasks
    "TOML files, separated by commas",
    "FILE,...",
)


def find_task_files(argv: list[str] | None) -> dict[str, dict]:
    """The tasks of --task_file on a command line; to be known before the parser of all flags is made."""
    parser = OneLineParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--task_file")
    text = parser.parse_known_args(argv)[0].task_file
    return {} if text is None else read_task_files(text)


def by_task(each: FlagType) -> FlagType:
    """A number for all tasks, for some, or both; a dictionary by task, with `*` for those not named.

    `resolve_args` knows the tasks, and makes one of the run's tasks of it.
    """

    def parse(text: str) -> dict:
        pairs = [part.rpartition("=") for part in text.split(",")]
        values = {task.strip() or "*": each.convert(value) for task, _, value in pairs}
        if len(values) < len(pairs):
            raise ValueError("a task is named twice")
        return values

    def is_valid(value) -> bool:
        return isinstance(value, dict) and all(
            (task == "*" or task in TASKS) and each.is_valid(number) for task, number in value.items()
        )

    expected = f"{each.expected}, for all tasks, or by task: X, TASK=X,... or X,TASK=X,..."
    return FlagType(parse, is_valid, expected, "X[,TASK=X,...]")


def value_of_task(values: dict, task: str):
    """A task's own value of a flag `by_task`, or that of all; None if there is none."""
    return values.get(task, values.get("*"))


def parse_sources(text: str) -> dict[str, int | None]:
    if text.strip() == "none":
        return {}
    return {name: int(count) if count else None for name, count in values_by_name(text).items()}


def are_sources(value) -> bool:
    return isinstance(value, dict) and all(
        name in EXTRA_SOURCES and (count is None or COUNT.is_valid(count)) for name, count in value.items()
    )


source_list = FlagType(
    parse_sources,
    are_sources,
    f"NAME or NAME=COUNT,... with names out of {','.join(EXTRA_SOURCES)}, each once, or none",
    metavar="NAME[=COUNT],...",
)


# --- declaring flags ----------------------------------------------------------------------------------------


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds a flag's default to its help text, unless that depends on others and the text says how."""

    def _get_help_string(self, action: argparse.Action) -> str:
        depends = action.default is None or isinstance(action.default, bool | dict)
        return action.help if depends else super()._get_help_string(action)


class RunParser(OneLineParser):
    """A command line whose every flag is marked with what it changes about a run (see MARKS)."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **options)
        self.flags: dict[str, argparse.Action] = {}  # by the name of their attribute
        self.marks: dict[str, str] = {}

    def adder(self, group) -> Callable:
        """`add_argument` of an argument group, with a flag's mark as its second argument."""

        def add(flag: str, mark: str, **options) -> None:
            if mark not in MARKS:
                raise ValueError(f"{flag} has the mark {mark!r}; expected one of {', '.join(MARKS)}")
            if isinstance(options.get("type"), FlagType):
                options["metavar"] = options["type"].metavar
            action = group.add_argument(flag, **options)
            self.flags[action.dest], self.marks[action.dest] = action, mark

        return add

    def marked(self, *marks: str) -> frozenset[str]:
        """The flags that have one of these marks."""
        return frozenset(name for name, mark in self.marks.items() if mark in marks)


def is_valid_value(flag: argparse.Action, value) -> bool:
    """Whether a value from a file is one that the flag can have."""
    if value is None:
        return flag.default is None
    if isinstance(flag.default, bool):
        return isinstance(value, bool)
    if flag.choices:
        return isinstance(value, str) and value in flag.choices
    return flag.type.is_valid(value)


def check_sources(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with an error if additional data belong to no task of the run."""
    for name in args.extra_data:
        task = EXTRA_SOURCES[name].task
        if task not in args.tasks:
            parser.error(
                f"--extra_data {name} feeds {task}, which is not among --tasks {','.join(args.tasks)}"
            )

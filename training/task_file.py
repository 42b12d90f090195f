"""Tasks of your own, each from a TOML file (`--task_file mytask.toml`) instead of a row of `config.TASKS`.

    name = "nli"
    title = "entailment"                     # may be left out
    kind = "classification"                  # a row of evaluation.TASK_KINDS
    texts = ["premise", "hypothesis"]        # one or two columns
    label = "label"                          # column of the labels
    classes = ["no", "maybe", "yes"]         # in the order of their numbers; of a regression: range = [0, 5]
    ordered = true                           # may be left out: neighbours are alike (the flag --nli_loss)
    files = { train = "train.csv", dev = "dev.jsonl", test = "test.tsv" }     # beside the TOML file

A run keeps the content in its `args.json`, so it is resumed, evaluated and asked without the file.
"""

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

from config import SPLITS, TASKS, TaskSpec
from datasets import FORMS
from evaluation import OVERALLS, TASK_KINDS
from heads import PAIR_HEADS
from support.command_line import printable
from support.errors import UserError, one_line, quote
from support.files import read_bytes
from support.text_files import decode

BUILT_IN = tuple(TASKS)
NAME = re.compile("[a-z][a-z0-9_]{0,29}")
MAX_BYTES = 2**20
MAX_LABEL = 1e6  # of a regression: labels are float32, and a loss of their squares has to be finite
NEEDED = {"name": str, "kind": str, "texts": list, "label": str, "files": dict}
OPTIONAL = {
    "title": str,
    "classes": list,
    "labels": str,
    "range": list,
    "id": str,
    "head": str,
    "format": str,
    "ordered": bool,
}
LABELS = ("names", "numbers")  # what stands in the label's column: names of classes, or their numbers from 0


def read_task_files(text: str) -> dict[str, dict]:
    """Read the TOML files of a --task_file.

    Args:
        text: their paths, separated by commas.

    Returns:
        task -> its file's content, as plain JSON; the files that it names are absolute paths.

    Raises:
        UserError: for a file that cannot be read, or does not describe a task; naming it.
    """
    contents = {}
    for part in filter(None, map(str.strip, text.split(","))):
        path = Path(part)
        try:
            content = tomllib.loads(decode(read_bytes(path, MAX_BYTES), path))
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise UserError(printable(f"--task_file {path}: not TOML ({one_line(error)})")) from None
        except UserError as error:
            raise UserError(printable(f"--task_file {error}")) from None
        make_task(content, f"--task_file {path}")
        if content["name"] in contents:
            raise UserError(f"--task_file {path}: name is {content['name']!r}, as in an earlier file")
        files = {split: str((path.parent / name).absolute()) for split, name in content["files"].items()}
        contents[content["name"]] = content | {"files": files}
    if not contents:
        raise UserError(f"--task_file {text!r}: expected the path of a TOML file")
    return contents


def set_own_tasks(contents: Mapping[str, dict], place: str = "--task_file") -> None:
    """Put these tasks, and no others of one's own, beside the built-in ones in `config.TASKS`.

    Args:
        contents: as `read_task_files` returns it.
        place: that messages name.

    Raises:
        UserError: if a content, which may come from a damaged file, describes no task.
    """
    if not isinstance(contents, Mapping):
        raise UserError(f"{place}: damaged; task_file is {quote(str(contents))}")
    specs = {name: make_task(content, place) for name, content in contents.items()}
    for name in TASKS.keys() - set(BUILT_IN):
        del TASKS[name]
    TASKS.update(specs)


def make_task(content: object, place: str) -> TaskSpec:
    """The row of `config.TASKS` that a TOML file describes; `place` is what a UserError names."""
    check_keys(content, place)
    name, kind, texts = content["name"], content["kind"], content["texts"]

    def refuse(key: str, expected: str):
        raise UserError(f"{place}: {key} is {quote(str(content.get(key, 'missing')))}; expected {expected}")

    if not NAME.fullmatch(name) or name in BUILT_IN or name in OVERALLS:
        refuse("name", f"small letters, digits and _, but none of {', '.join([*BUILT_IN, *OVERALLS])}")
    if kind not in TASK_KINDS:
        refuse("kind", f"one of {', '.join(TASK_KINDS)}")
    if not 1 <= len(set(texts)) == len(texts) <= 2 or not all(is_name(column) for column in texts):
        refuse("texts", "the names of one or two columns")
    if not is_name(content.get("title", name)) or not is_name(content.get("id", "id")):
        refuse("title" if "title" in content else "id", "a line of text")
    if not is_name(content["label"]) or content["label"] in texts:
        refuse("label", "the name of a column other than those of the texts")
    files = content["files"]
    if not {"train", "dev"} <= set(files) <= set(SPLITS) or not all(map(is_file_name, files.values())):
        refuse("files", "train, dev and perhaps test, each with the name of a file")
    head = content.get("head", "diff")
    if head not in PAIR_HEADS or ("head" in content and len(texts) == 1):
        refuse("head", f"one of {', '.join(PAIR_HEADS)}, and two columns of text")
    if content.get("labels", "names") not in LABELS:
        refuse("labels", " or ".join(LABELS))
    if content.get("format", "csv") not in FORMS:
        refuse("format", f"one of {', '.join(FORMS)}; without it, the ending of a file's name tells")
    if content.get("ordered") and kind != "classification":
        refuse("ordered", 'it with kind = "classification" only')
    classes = find_classes(content, refuse)
    return TaskSpec(
        title=content.get("title", name),
        kind=kind,
        # Without one, a test file may still turn up, or be named by a flag.
        files={"test": str(Path(files["dev"]).with_name(f"{name}-test{Path(files['dev']).suffix}"))} | files,
        text_columns=tuple(texts),
        label_column=content["label"],
        label_range=(0, len(classes) - 1) if classes else tuple(content["range"]),
        prediction_column=f"predicted_{name}",
        handout_column=f"predicted_{name}",
        default_head="single" if len(texts) == 1 else head,
        class_names=classes,
        is_ordered=content.get("ordered", False),
        label_texts=classes if content.get("labels", "names") == "names" else (),
        id_column=content.get("id"),
        lower_ids=False,
        form=content.get("format"),
    )


def is_name(value: object) -> bool:
    return isinstance(value, str) and value == value.strip() != "" and value.isprintable()


def is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < MAX_LABEL


def is_file_name(value: object) -> bool:
    return is_name(value) and Path(value).name != ""


def check_keys(content: object, place: str) -> None:
    """Raise a UserError unless a content has all keys that it needs, no others, and values of their types."""
    known = NEEDED | OPTIONAL
    if not isinstance(content, dict):
        raise UserError(f"{place}: damaged; a task is {quote(str(content))}")
    for key, value in content.items():
        if key not in known:
            raise UserError(f"{place}: key {one_line(key, 60)!r} is not known; expected {', '.join(known)}")
        if not isinstance(value, known[key]):
            types = {
                str: "text in quotation marks",
                list: "a list",
                dict: "a table",
                bool: "true or false",
            }
            raise UserError(f"{place}: {key} is {quote(str(value))}; expected {types[known[key]]}")
    for key in NEEDED:
        if key not in content:
            raise UserError(f"{place}: key {key!r} is missing")


def find_classes(content: dict, refuse) -> tuple[str, ...]:
    """Names of a task's classes; none if it has a range, which is checked."""
    if not TASK_KINDS[content["kind"]].is_discrete:
        limits = content.get("range", [])
        if len(limits) != 2 or not all(map(is_number, limits)) or not limits[0] < limits[1]:
            refuse("range", "[LEAST, GREATEST], which the labels may have")
        if "classes" in content or "labels" in content:
            refuse("kind", "another one, since the task has classes or labels")
        return ()
    if "range" in content:
        refuse("range", "no such key: the labels are classes")
    names = content.get("classes", [])
    is_binary = content["kind"] == "binary"
    if len(set(map(str, names))) != len(names) or not all(map(is_name, names)) or len(names) < 2:
        refuse("classes", "the names of at least two classes, each once")
    if is_binary and len(names) != 2:
        refuse("classes", "two names, no and yes in this order")
    return tuple(names)

"""The class's submission: prediction files checked against the data, then zipped together with the code.

Every id of each dev and test file must have exactly one prediction, of a legal value; rows without a label,
which are left out of dev, have none. Predictions that are (nearly) the same for every row are warned about.
The zip holds the prediction files and all of the project's code, as the course asks for, and nothing else.
"""

import sys
import zipfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from config import DEFAULT_TASKS, OFFLINE_ENCODER, TASKS
from datasets import data_file, read_rows
from evaluation import PREDICTION_STYLES, check_predictions, part1_name, prediction_name
from support.command_line import OneLineParser, run_script
from support.errors import UserError
from support.files import ROOT, check_replaceable, whole_file
from training.args_file import ARGS_FILE, ENSEMBLE_FILE, comes_from, read_args_file, read_ensemble
from training.flags import FINE_TUNE_MODES
from training.run_parser import task_list

PART1_TASKS = ("sst", "cfimdb")
FORBIDDEN = "the class's leaderboard forbids MiniLM; hand in a run with --pretrained bert-base-uncased"
ZIP_NAME = "cs224n_default_final_project_submission.zip"


def find_prediction_file(folder: Path, task: str, split: str) -> Path:
    """The prediction file of a task, under the starter's name or the handout's.

    Raises:
        UserError: if there is none, or both are there.
    """
    names = [prediction_name(task, split, style) for style in PREDICTION_STYLES]
    found = [folder / name for name in names if (folder / name).is_file()]
    if len(found) != 1:
        there = "both {} and {}" if found else "neither {} nor {}"
        raise UserError(f"{folder}: holds {there.format(*names)}; expected one of them")
    return found[0]


def check_folder(
    folder: Path, data_dir: Path, tasks: tuple[str, ...]
) -> tuple[list[Path], list[str], list[str]]:
    """Check every prediction file of some tasks.

    Args:
        folder: where the prediction files are.
        data_dir: where the data files are.

    Returns:
        the files, the errors and the warnings found, one line each.
    """
    wanted = [
        (task, split, partial(find_prediction_file, folder, task, split))
        for task in tasks
        for split in ("dev", "test")
    ]
    return check_files(wanted, data_dir)


def check_part1(folder: Path, data_dir: Path) -> tuple[list[Path], list[str], list[str]]:
    """Check the eight prediction files of Part 1; arguments and results as for `check_folder`."""
    wanted = [
        (task, split, partial(folder.joinpath, part1_name(mode, task, split)))
        for mode in FINE_TUNE_MODES
        for task in PART1_TASKS
        for split in ("dev", "test")
    ]
    return check_files(wanted, data_dir)


def check_files(
    wanted: Iterable[tuple[str, str, Callable[[], Path]]], data_dir: Path
) -> tuple[list[Path], list[str], list[str]]:
    """Check prediction files, each given by its task, its split and how it is found."""
    files, errors, warnings = [], [], []
    for task, split, find in wanted:
        try:
            path = find()
            rows = read_rows(data_file(data_dir, TASKS[task], split), TASKS[task], split)
            warning = check_predictions(path, TASKS[task], rows.ids)
        except UserError as error:
            errors.append(str(error))
            continue
        files.append(path)
        if warning:
            warnings.append(f"{path}: {warning}")
    return files, errors, warnings


def forbidden_encoder(run_dir: Path) -> list[str]:
    """A warning if a run or a member of an ensemble started from MiniLM.

    Args:
        run_dir: its folder, or that of its predictions.
    """
    for folder in (run_dir, run_dir.parent):
        encoders = []
        if (folder / ARGS_FILE).exists():
            encoders = [str(read_args_file(folder)["args"].get("pretrained"))]
        elif (folder / ENSEMBLE_FILE).exists():
            encoders = [member.pretrained for member in read_ensemble(folder)]
        if encoders:
            forbidden = any(comes_from(encoder, OFFLINE_ENCODER) for encoder in encoders)
            return [f"{folder}: {FORBIDDEN}"] if forbidden else []
    return []


def find_code() -> list[Path]:
    """The project's code: Python files at the top and in the packages, and the templates of pages."""
    found = {*ROOT.glob("*.py"), *ROOT.glob("reporting/templates/*.jinja")}
    for package in ROOT.glob("*/__init__.py"):
        found |= set(package.parent.rglob("*.py"))
    return sorted(path for path in found if path.is_file())  # no pipes


def is_submission(path: Path) -> bool:
    """Whether a file is a zip of script and predictions, as this command or the course's makes."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = list(map(Path, archive.namelist()))
    except (zipfile.BadZipFile, NotImplementedError, UnicodeError):  # no zip, or an odd one
        return False
    # A copy of the project, perhaps with somebody's work in it, has the script, too.
    has_predictions = any(name.parent.name == "predictions" and name.suffix == ".csv" for name in names)
    return has_predictions and any(name.name == "multitask_classifier.py" for name in names)


def write_zip(path: Path, predictions: list[Path], code: list[Path]) -> None:
    """Write the zip whole or not at all; names inside are fixed, whatever the folders are called."""
    # strict_timestamps: a file from before 1980, as some package managers date all of theirs, is no error.
    form = {"compression": zipfile.ZIP_DEFLATED, "strict_timestamps": False}
    with whole_file(path) as temporary, zipfile.ZipFile(temporary, "w", **form) as archive:
        for file in code:
            archive.write(file, file.relative_to(ROOT))
        for file in predictions:
            archive.write(file, f"predictions/{file.name}")


def submit(argv: list[str] | None) -> None:
    parser = OneLineParser(
        prog="prepare_submit.py", description="Check prediction files and zip them.", allow_abbrev=False
    )
    parser.add_argument(
        "run_dir", type=Path, help="run folder, an ensemble's, or a folder of prediction files"
    )
    parser.add_argument(
        "--data_dir", type=Path, default=Path("data"), help="folder with the data files (default: data)"
    )
    parser.add_argument(
        "--tasks", type=task_list(), default=DEFAULT_TASKS, help="tasks to hand in (default: sst,para,sts)"
    )
    text = "also hand in Part 1: the folder with the eight files that reporting.part1 wrote"
    parser.add_argument("--part1", type=Path, metavar="DIR", help=text)
    parser.add_argument("--output", type=Path, default=Path(ZIP_NAME), help=f"the zip (default: {ZIP_NAME})")
    parser.add_argument("--check_only", action="store_true", help="check, write no zip")
    args = parser.parse_args(argv)
    if not args.check_only:
        check_replaceable(args.output, "submission", is_submission, "--output")
    folder = args.run_dir / "predictions" if (args.run_dir / "predictions").is_dir() else args.run_dir
    files, errors, warnings = check_folder(folder, args.data_dir, args.tasks)
    warnings += forbidden_encoder(args.run_dir)
    if args.part1:
        for found, more in zip(
            (files, errors, warnings), check_part1(args.part1, args.data_dir), strict=True
        ):
            found += more
    for warning in warnings:
        print(f"warning: {warning}")
    for error in errors[:-1]:
        print(f"prepare_submit.py: error: {error}", file=sys.stderr)
    if errors:
        raise UserError(errors[-1])
    print(f"{len(files)} prediction files are complete and legal")
    if not args.check_only:
        code = find_code()
        write_zip(args.output, files, code)
        print(f"wrote {args.output}: {len(files)} prediction files, {len(code)} files of code")


def main(argv: list[str] | None = None) -> int:
    return run_script("prepare_submit.py", partial(submit, argv))

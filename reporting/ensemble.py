"""Let several finished runs answer together: mean probabilities or similarities, scored and ready to hand in.

    python -m reporting.ensemble runs/a runs/b runs/c --output_dir runs/ensemble
    python prepare_submit.py runs/ensemble

Writes `predictions/` as a run does, `scores.json` with the dev scores of the ensemble and of each member, and
`ensemble.json`: members, weights, command. The members' folders are only read.
"""

if __name__ == "__main__":
    from support.interrupts import end_quietly

    end_quietly()

import json
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from config import TASKS, TaskSpec
from datasets import Rows, data_file, read_rows, warning_lines
from evaluation import (
    PREDICTION_STYLES,
    TASK_KINDS,
    decide,
    format_predictions,
    prediction_name,
    summarise,
)
from support.command_line import OneLineParser, run_script
from support.errors import UserError
from support.files import LOCK_FILE, lock_folder, write_text
from training.args_file import ENSEMBLE_FILE
from training.ensemble import (
    WEIGHTS,
    Member,
    ask,
    average,
    check_data,
    find_members,
    tasks_of,
)
from training.progress import format_scores
from training.run_data import fingerprints
from training.run_folder import describe_code, describe_versions, own_prediction_files
from training.run_parser import PRECISION_NAMES

SPLITS = ("dev", "test")
Answers = dict[tuple[str, str], np.ndarray]  # (task, split) -> (N, C), of `soft_answers`


def make_parser() -> OneLineParser:
    parser = OneLineParser(
        prog="reporting.ensemble",
        description="Average what the best checkpoints of several runs say: probabilities of classes, and"
        " similarities on their scale. A task is averaged over the runs that have it.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, or a checkpoint")
    text = "a new folder, or an earlier ensemble's, which is replaced"
    parser.add_argument("--output_dir", type=Path, required=True, metavar="DIR", help=text)
    text = "equal; or dev: chosen on dev by task, which makes the dev scores a little too good"
    parser.add_argument("--weights", choices=WEIGHTS, default="equal", help=text + " (default: %(default)s)")
    text = "folder with the data files (default: where the members had theirs)"
    parser.add_argument("--data_dir", type=Path, metavar="DIR", help=text)
    text = "whose form prediction files have, the starter's or the handout's (default: %(default)s)"
    parser.add_argument("--prediction_style", choices=PREDICTION_STYLES, default="starter", help=text)
    text = "auto (a GPU if there is one), cpu, cuda, cuda:1, ... (default: %(default)s)"
    parser.add_argument("--device", default="auto", help=text)
    text = "number format of matrix products (default: that of each member's training)"
    parser.add_argument("--precision", choices=PRECISION_NAMES, help=text)
    return parser


def check_output(folder: Path, runs: Sequence[Path]) -> None:
    """Make sure that nothing but an earlier ensemble is replaced.

    Raises:
        UserError: if the folder is, or is in, one of the runs, or holds something else.
    """
    place = folder.resolve()
    for run in runs:
        if run.resolve() in (place, *place.parents):
            raise UserError(f"--output_dir {folder}: is in {run}, one of the runs; expected another folder")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder}: is a file; expected a folder")
    is_new = not folder.is_dir() or {path.name for path in folder.iterdir()} <= {LOCK_FILE}
    if not is_new and not (folder / ENSEMBLE_FILE).exists():
        raise UserError(f"--output_dir {folder}: holds something else; expected a new folder")


def read_split(
    members: Sequence[Member], specs: Mapping[str, TaskSpec], split: str, data_dir: Path | None
) -> dict[str, Rows]:
    """Rows of each task: of a member's own file, or of one in --data_dir. A test file may be missing."""
    found = {}
    for task, spec in specs.items():
        paths = [member.files[task, split] for member in members if task in member.specs]
        paths = paths if data_dir is None else [data_file(data_dir, spec, split)]
        path = next((path for path in paths if path.exists()), paths[0])
        if split == "test" and not path.exists():
            print(f"warning: no test predictions for {task}: {path} does not exist")
            continue
        rows = found[task] = read_rows(path, spec, split)
        print(f"{task:6s} {split:5s} {len(rows.ids):6d} examples from {path}")
        for line in warning_lines(rows):
            print(f"       warning: {line}")
    return found


def score(
    specs: Mapping[str, TaskSpec], dev: Mapping[str, Rows], predictions: Mapping[str, np.ndarray]
) -> dict:
    """What `summarise` returns, of predictions (N,) by task."""
    scores = {
        task: TASK_KINDS[specs[task].kind].scores(values, dev[task].labels)
        for task, values in predictions.items()
    }
    return summarise(scores, dict(specs))


def ensemble(argv: list[str] | None) -> None:
    args = make_parser().parse_args(argv)
    check_output(args.output_dir, args.runs)
    members = find_members(args.runs)
    specs = tasks_of(members)
    dev, test = (read_split(members, specs, split, args.data_dir) for split in SPLITS)
    check_data(members, dev, test)
    rows = {
        (task, split): found[task] for split, found in zip(SPLITS, (dev, test), strict=True) for task in found
    }

    # 1. Ask each member, one at a time, since together they may not fit into memory.
    answers: list[Answers] = []
    for member in members:
        print(f"asking {member.run}")
        answers.append(ask(member, rows, args.device, args.precision))

    # 2. Weigh and average, task by task.
    weights: list[dict[str, float]] = [{} for _ in members]
    means: Answers = {}
    for task, spec in specs.items():
        own = [n for n, member in enumerate(members) if task in member.specs]
        chosen = WEIGHTS[args.weights](spec, [answers[n][task, "dev"] for n in own], dev[task].labels)
        for n, weight in zip(own, chosen, strict=True):
            weights[n][task] = weight
        for split in SPLITS:
            if (task, split) in rows:
                means[task, split] = average([answers[n][task, split] for n in own], chosen)
    predictions = {key: decide(specs[key[0]], mean) for key, mean in means.items()}

    # 3. Score on dev.
    summaries = [
        score(specs, dev, {task: decide(specs[task], each[task, "dev"]) for task in member.specs})
        for member, each in zip(members, answers, strict=True)
    ]
    summary = score(specs, dev, {task: predictions[task, "dev"] for task in specs})
    listed = sorted(
        zip(members, weights, summaries, strict=True), key=lambda each: args.runs.index(each[0].run)
    )
    for member, _, each in listed:
        print(f"dev {format_scores(each, member.specs)}  {member.run}")
    note = ", which are chosen on dev: its own score is a little too good" if args.weights == "dev" else ""
    print(f"dev {format_scores(summary, specs)}  ensemble of {len(members)}, weights {args.weights}{note}")

    content = {
        "members": [
            {
                "run": str(member.run),
                "sha256": member.digest,
                "pretrained": member.stored["args"].get("pretrained"),
                "weight": weight,
                "dev": each,
            }
            for member, weight, each in listed
        ],
        "dev": summary,
    }
    write(args, content, {"dev": dev, "test": test}, specs, predictions)


def write(
    args: Namespace,
    content: dict,
    rows: Mapping[str, Mapping[str, Rows]],
    specs: Mapping[str, TaskSpec],
    predictions: Mapping[tuple[str, str], np.ndarray],
) -> None:
    """Write an ensemble's folder; `scores.json`, which comes last, says that it is complete.

    Args:
        content: its members and dev scores.
        rows: split -> task -> rows.
        predictions: (task, split) -> (N,)
    """
    folder, style = args.output_dir, args.prediction_style
    with lock_folder(folder):
        for pattern in ("scores.json", *own_prediction_files(TASKS.keys() | specs.keys())):
            (folder / pattern).unlink(missing_ok=True)
        about = {
            "weights": args.weights,
            "command": sys.argv,
            "data": {split: fingerprints(found) for split, found in rows.items()},
            "versions": describe_versions(),
            "git": describe_code(),
        }
        members = [{key: each[key] for key in each if key != "dev"} for each in content["members"]]
        write_text(folder / ENSEMBLE_FILE, json.dumps({"members": members, **about}, indent=2) + "\n")
        print("predictions")
        for (task, split), values in predictions.items():
            path, ids = folder / "predictions" / prediction_name(task, split, style), rows[split][task].ids
            write_text(path, format_predictions(specs[task], ids, values.tolist(), style))
            print(f"  {path}  ({len(ids)} rows)")
        scores = {
            "dev": content["dev"],
            "weights": args.weights,
            "members": [{"run": each["run"], "dev": each["dev"]} for each in content["members"]],
        }
        write_text(folder / "scores.json", json.dumps(scores, indent=2) + "\n")


def main(argv: list[str] | None = None) -> int:
    return run_script("reporting.ensemble", partial(ensemble, argv))


if __name__ == "__main__":
    sys.exit(main())

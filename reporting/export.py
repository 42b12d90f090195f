"""Export a trained model for other libraries, a folder per task with its model card.

    python -m reporting.export runs/NAME --to hf DIR --tasks sst
    python -m reporting.export runs/NAME --to sentence-transformers DIR
    python -m reporting.export runs/NAME --to onnx DIR --push_to_hub USER/NAME

The forms are rows of `export_formats.FORMATS`; what one cannot hold exactly is refused.
"""

if __name__ == "__main__":
    from support.interrupts import end_quietly

    end_quietly()

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from base_bert import first_line, is_repo_id
from reporting.export_formats import FORMATS, TaskModel, check_packages, write_json
from reporting.model_card import Source, make_card
from reporting.report import read_settings
from support.command_line import OneLineParser, run_script
from support.errors import UserError
from support.files import sync
from training.checkpoint import load_model, need_checkpoint, remove
from training.resolve import fit_to_encoder, model_settings, token_settings
from training.run_data import load_encoder, make_model
from training.run_parser import run_tasks

MARK = "export.json"  # a folder that holds it is an export, and may be replaced by another


# --- what is exported ---------------------------------------------------------------------------------------


def load_run(run_dir: Path) -> tuple[Source, list[TaskModel]]:
    """The best checkpoint of a run, task by task.

    Raises:
        UserError: if there is no run, no checkpoint, or it is damaged.
    """
    flags, stored = read_settings(run_dir)
    args = argparse.Namespace(**flags)
    checkpoint = need_checkpoint(run_dir / "best")
    bert, tokenizer = load_encoder(checkpoint, args.hidden_dropout_prob)
    fit_to_encoder(args, bert.config)
    settings = model_settings(args)
    model = make_model(settings, bert)
    load_model(checkpoint, model)
    model.eval()
    tokens = token_settings(args)
    chosen = [
        TaskModel(task, model, head, tokenizer, args.max_length, both_orders=tokens.pairs(task)["symmetric"])
        for task, head in settings.heads.items()
    ]
    return Source(run_dir, args, stored, checkpoint), chosen


def choose(models: list[TaskModel], tasks: Sequence[str] | None, format_name: str) -> list[TaskModel]:
    """The tasks asked for, all of which the format has to hold.

    Raises:
        UserError: naming a task that the run has not, or the first that does not fit, and what would.
    """
    known = [each.task for each in models]
    for task in tasks or ():
        if task not in known:
            raise UserError(f"--tasks {task}: not a task of this run; expected one of {', '.join(known)}")
    chosen = [each for each in models if each.task in (tasks or known)]
    refuse = FORMATS[format_name].refuse
    for each in chosen:
        reason = refuse(each)
        if reason:
            fitting = [other.task for other in models if not refuse(other)]
            others = [name for name, form in FORMATS.items() if not form.refuse(each)]
            hint = f"; here --tasks {','.join(fitting)} fits" if fitting else ""
            raise UserError(
                f"--to {format_name}: {each.task} has {reason}; it fits --to {' or '.join(others)}{hint}"
            )
    return chosen


# --- folders ------------------------------------------------------------------------------------------------


def check_folder(folder: Path) -> None:
    """Make sure that an export replaces nothing but another one.

    Raises:
        UserError: if the path is taken by anything else.
    """
    if folder.is_symlink() and not folder.exists():
        raise UserError(f"{folder}: is a link to {os.readlink(folder)}, which does not exist")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; expected a folder")
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).is_file():
        raise UserError(f"{folder}: exists and is no export; expected a new folder, or an earlier export")


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let a folder appear whole or not at all, in place of an earlier export."""
    folder = folder.resolve()  # where a link leads
    new, old = (folder.with_name(folder.name + ending) for ending in (".new", ".old"))
    for path in (new, old):
        if path.exists():
            check_folder(path)  # one that a kill left has a mark
            remove(path)
    new.mkdir(parents=True)
    try:
        write_json(new / MARK, {})  # first, so that what a kill leaves is known
        write(new)
        for path in new.rglob("*"):
            sync(path)
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
        remove(old)
    finally:
        remove(new)  # there only if something failed


def export_task(folder: Path, source: Source, chosen: TaskModel, format_name: str) -> None:
    """Write one task's folder: model, tokenizer, card, and a few facts for programs."""
    facts = {
        "format": format_name,
        "task": chosen.task,
        "labels": chosen.labels,
        "head": chosen.head_name,
        "head_layers": chosen.num_layers,
        "pooling": chosen.model.pooling,
        "max_length": chosen.max_length,
    }

    def write(new: Path) -> None:
        with torch.no_grad():
            FORMATS[format_name].write(new, chosen)
        (new / "README.md").write_text(make_card(source, chosen, format_name), encoding="utf-8")
        write_json(new / MARK, facts)

    write_folder(folder, write)


# --- the hub ------------------------------------------------------------------------------------------------


def check_hub(repo: str) -> None:
    """Refuse a name that the hub has not, and to begin without a token."""
    from huggingface_hub import get_token

    if not is_repo_id(repo):
        raise UserError(f"--push_to_hub {repo}: no name of a repository; expected USER/NAME")
    if not get_token():
        raise UserError(f"--push_to_hub {repo}: no token; run 'hf auth login', or set HF_TOKEN")


def push(folder: Path, repo: str) -> None:
    """Upload a folder; a repository that is made for it is private."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        repo_id = api.create_repo(repo, private=True, exist_ok=True).repo_id
        done = api.upload_folder(folder_path=folder, repo_id=repo_id, commit_message="Exported model")
    except Exception as error:  # noqa: BLE001 (no network, no right, a broken connection: many types)
        raise UserError(f"--push_to_hub {repo}: {first_line(error)}; {folder} is written") from None
    print(f"pushed {folder} to {repo_id} ({done})")


# --- the command --------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="reporting.export",
        description="Export the best checkpoint of a run for other libraries, with a model card.",
        allow_abbrev=False,
    )
    parser.add_argument("run_dir", type=Path, help="run folder")
    parser.add_argument(
        "folder", type=Path, metavar="dir", help="for one task; for several, DIR/TASK of each"
    )
    parser.add_argument("--to", choices=FORMATS, required=True, help="what should be able to open it")
    text = "tasks to export (default: all that the run has)"
    parser.add_argument("--tasks", type=run_tasks, metavar=run_tasks.metavar, help=text)
    text = "also upload to this repository of the Hugging Face hub (for several tasks, REPO-TASK of each)"
    parser.add_argument("--push_to_hub", metavar="REPO", help=text)
    return parser


def export(argv: list[str] | None) -> None:
    args = make_parser().parse_args(argv)
    check_packages(args.to)
    source, models = load_run(args.run_dir)
    chosen = choose(models, args.tasks, args.to)
    places = {each.task: (args.folder, args.push_to_hub) for each in chosen}
    if len(chosen) > 1:
        places = {task: (folder / task, repo and f"{repo}-{task}") for task, (folder, repo) in places.items()}
    for folder, repo in places.values():
        check_folder(folder)
        if repo:
            check_hub(repo)
    for each in chosen:
        folder, repo = places[each.task]
        export_task(folder, source, each, args.to)
        print(f"{each.task}: wrote {folder}; how to use it is in its README.md")
        if repo:
            push(folder, repo)


def main(argv: list[str] | None = None) -> int:
    return run_script("reporting.export", partial(export, argv))


if __name__ == "__main__":
    sys.exit(main())

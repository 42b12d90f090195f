"""The folder of a run: one process at a time, its settings in `args.json`, its log, and what `--resume` goes on from."""

import json
import platform
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors
import tokenizers
import torch

from config import TASKS
from evaluation import PREDICTION_STYLES, prediction_name
from heads import MultitaskBERT
from kernels.fused import PLAIN, compile_passes
from optimizer import AdamW
from support.device import describe_machine
from support.errors import UserError
from support.files import ROOT, read_bytes, sync, write_text
from tokenizer import BertTokenizer
from training.args_file import ARGS_FILE, read_args_file
from training.checkpoint import (
    STATE_FILE,
    copy_tensors,
    find_checkpoint,
    load_model,
    load_state,
    load_tensors,
    remove_checkpoints,
    remove_leftovers,
    remove_newer,
    remove_versions,
    save_tensors,
    versions,
    write_checkpoint,
    write_model,
)

MAX_LOG_BYTES = 2**30


# --- one process at a time ---------------------------------------------------------------------------------------


# --- args.json ---------------------------------------------------------------------------------------------------


def describe_code(folder: Path = ROOT) -> dict | None:
    """The git commit of the code and the files changed since; None where it is no repository, or there is no git."""

    def git(*arguments):
        command = ["git", "-C", str(folder), "-c", "core.fsmonitor=false", *arguments]
        done = subprocess.run(command, capture_output=True, timeout=10, check=True)
        return done.stdout.decode("utf-8", "replace").strip("\n")

    try:
        if not Path(git("rev-parse", "--show-toplevel")).samefile(folder):
            return None
        changed = git("status", "--porcelain", "--untracked-files=no").splitlines()
        return {"commit": git("rev-parse", "HEAD"), "changed": [line[3:] for line in changed]}
    except (OSError, subprocess.SubprocessError):
        return None


def describe_versions() -> dict[str, str]:
    modules = (np, safetensors, tokenizers, torch)
    return {"python": platform.python_version()} | {
        module.__name__: str(module.__version__) for module in modules
    }


def write_args(args: Namespace, facts: dict, before: dict | None = None) -> str:
    """Write a run's `args.json`: all settings, the commands that started and resumed it, versions, code, machine.

    Args:
        facts: what else should be known about the run, as JSON.
        before: what it held, if the run goes on; where versions, code or machine have changed since, it keeps the
            earlier ones, too.

    Returns:
        the file's text.
    """
    circumstances = {"versions": describe_versions(), "git": describe_code()}
    circumstances["machine"] = describe_machine(args.device)
    content = {"args": vars(args), "commands": [sys.argv], **circumstances, **facts}
    if before:
        content["commands"] = [*before["commands"], sys.argv]
        earlier = {name: before.get(name) for name in circumstances}
        content["earlier"] = before.get("earlier", []) + ([earlier] if earlier != circumstances else [])
    text = json.dumps(content, indent=2) + "\n"
    write_text(Path(args.output_dir) / ARGS_FILE, text)
    return text


def say_circumstances(stored: dict, device: str) -> str | None:
    """A sentence of warning if a run goes on with other versions or on another machine, where bits may differ."""
    now = {"versions": describe_versions(), "machine": describe_machine(device)}
    changed = [
        f"{name} was {stored[kind].get(name)}, is {value}"
        for kind, values in now.items()
        for name, value in values.items()
        if isinstance(stored.get(kind), dict) and stored[kind].get(name) != value
    ]
    return (
        f"the run's bits may not be those of one that never stopped: {', '.join(changed)}"
        if changed
        else None
    )


# --- starting anew -----------------------------------------------------------------------------------------------


def check_free(args: Namespace) -> None:
    """Make sure that a new run may have its folder. One that ended before its first checkpoint has nothing to lose.

    Raises:
        UserError: if it holds a checkpoint, without --overwrite, or belongs to another script.
    """
    folder = Path(args.output_dir)
    try:
        settings = read_args_file(folder)["args"]
    except UserError:  # none there, or damaged
        settings = {"given": {}}
    if "given" not in settings:
        raise UserError(
            f"--output_dir {folder}: {ARGS_FILE} there is another script's; expected another folder"
        )
    if not args.overwrite and any(versions(folder / name) for name in ("last", "best")):
        raise UserError(
            f"--output_dir {folder}: holds a run already; continue it with --resume, or start anew with --overwrite"
        )


def begin_run(args: Namespace, facts: dict) -> str:
    """Write a new run's `args.json`, then remove what an earlier run left in its folder; for the text see `write_args`.

    In this order, a kill on the way leaves a folder that --resume either takes for the new run's or refuses.
    """
    folder = Path(args.output_dir)
    had_run = (folder / ARGS_FILE).exists() or any(versions(folder / name) for name in ("last", "best"))
    text = write_args(args, facts)
    if had_run:
        for name in ("last", "best"):
            remove_checkpoints(folder / name)
        names = [
            "predictions/" + prediction_name(task, split, style)
            for task in TASKS
            for split in ("dev", "test")
            for style in PREDICTION_STYLES
        ]
        names += [
            "curves.png",
            "report.md",
            "report.html",
            "data_report.json",
            "metrics.jsonl",
            "scores.json",
        ]
        for path in [*folder.glob("report/*.png"), *(folder / name for name in names)]:
            path.unlink(missing_ok=True)
    return text


def find_last(folder: Path, eval_every: int | None) -> Path | None:
    """The checkpoint that --resume goes on from; None: the run was stopped before its first, and starts from step 0.

    Args:
        eval_every: steps to the run's first checkpoint, if known.

    Raises:
        UserError: if a checkpoint was there that is not any more, or all are damaged.
    """
    last = find_checkpoint(folder / "last")
    if last is None:
        # Of an unfinished run, best/ alone is what a kill leaves between its first best/ and its first last/.
        best = find_checkpoint(folder / "best")
        if (folder / "scores.json").exists() or (
            best and load_state(best).get("step") not in range((eval_every or 0) + 1)
        ):
            raise UserError(f"{folder / 'last'}: no checkpoint there")
    return last


# --- a run -------------------------------------------------------------------------------------------------------


class Run:
    """A run folder: settings, log, checkpoints, and the numbers that a resumed run needs besides the weights."""

    def __init__(self, args: Namespace, model: MultitaskBERT, tokenizer: BertTokenizer):
        self.args, self.model, self.tokenizer = args, model, tokenizer
        self.folder = Path(args.output_dir)
        dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
        passes = compile_passes() if args.compile == "on" else PLAIN
        self.memory = model.make_memory(dtype, dtype if args.grad_accum == 1 else torch.float32, passes)
        groups = self.memory.param_groups(args.lr, args.head_lr, args.weight_decay)
        self.optimizer = AdamW(groups, lr=args.lr, rectify=args.rectify, update=passes.adamw_update)
        self.args_text = ""  # of `args.json`, once it is written
        self.saved_step = None  # of the last good checkpoint
        self.state = {
            "step": 0,
            "evaluated": 0,  # the step of the last evaluation
            "task_batches": dict.fromkeys(args.tasks, 0),  # drawn so far
            "tokens": 0,
            "bad_steps": 0,  # skipped since the last good one
            "skipped_steps": 0,  # in all
            "cosine_ema": None,
            "best_score": None,
            "best_step": None,
            "evals_without_gain": 0,
            "optimizer_steps": [],
            "log_lines": 0,
            "window": [],  # what the next line of the log averages
        }

    @property
    def log_file(self) -> Path:
        return self.folder / "metrics.jsonl"

    def optimizer_tensors(self) -> dict[str, torch.Tensor]:
        """The optimizer's moments by name; `state["optimizer_steps"]` has its counters."""
        return {
            f"{owner}.{'decay' if decays else 'no_decay'}.{key}": self.optimizer.state[param][key]
            for (owner, decays), param in self.memory.flat_params.items()
            for key in ("exp_avg", "exp_avg_sq")
            if param in self.optimizer.state
        }

    def check_weights(self) -> None:
        """Refuse to go on with, or to save, weights that a step has made useless.

        Raises:
            UserError: if one is not finite.
        """
        if not self.memory.data.isfinite().all():
            raise UserError(
                f"step {self.state['step']}: the weights are not finite any more; try a smaller --lr; {self.say_saved()}"
            )

    def say_saved(self) -> str:
        if self.saved_step is None:
            return "there is no checkpoint yet"
        return f"{self.folder / 'last'} still holds step {self.saved_step}"

    def save_last(self) -> None:
        self.check_weights()
        moments = self.optimizer.state  # has no entry for what was not updated yet, and would make one
        counters = [moments.get(param, {}).get("step", 0) for param in self.memory.flat_params.values()]
        self.state["optimizer_steps"] = counters

        def write(folder):
            self._write_model(folder, self.state)
            save_tensors(self.optimizer_tensors(), folder / "optimizer.safetensors")

        if self.log_file.exists():
            sync(self.log_file)  # its lines up to here are not written again
        write_checkpoint(self.folder / "last", write, self.args.keep_last)
        self.saved_step = self.state["step"]

    def save_best(self, summary: dict) -> None:
        state = {"step": self.state["step"], "dev": summary}
        write_checkpoint(self.folder / "best", lambda folder: self._write_model(folder, state))

    def _write_model(self, folder: Path, state: dict) -> None:
        write_model(folder, self.model, self.tokenizer, state)
        if self.args_text:
            (folder / ARGS_FILE).write_text(self.args_text, encoding="utf-8")
            if not (self.folder / ARGS_FILE).exists():  # without it, the checkpoint could not be found again
                write_text(self.folder / ARGS_FILE, self.args_text)

    def load_last(self, folder: Path) -> None:
        """Continue from a checkpoint: weights, moments, counters.

        Raises:
            UserError: if its content does not fit this run.
        """
        load_model(folder, self.model)
        state = load_state(folder)
        try:
            check_state(state, self.state)
            for param, step in zip(self.memory.flat_params.values(), state["optimizer_steps"], strict=True):
                if step:
                    moments = {"exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}
                    self.optimizer.state[param].update(step=step, **moments)
        except (ValueError, TypeError) as error:
            raise UserError(f"{folder / STATE_FILE}: does not fit this run ({error})") from None
        path = folder / "optimizer.safetensors"
        copy_tensors(load_tensors(path), self.optimizer_tensors(), path)
        for name in ("last", "best"):
            remove_leftovers(self.folder / name)
        remove_newer(self.folder / "last", folder)  # damaged ones
        remove_versions(
            self.folder / "last", self.args.keep_last
        )  # a kill may have come before they were removed
        self.state, self.saved_step = state, state["step"]
        self._check_best()

    def _check_best(self) -> None:
        """Without the best checkpoint that the state speaks of, the best one from here on will have to do."""
        try:
            found = find_checkpoint(self.folder / "best")
            problem = f"{self.folder / 'best'}: missing"
        except UserError as error:
            found, problem = None, error
        if found is not None:
            remove_newer(self.folder / "best", found)
            remove_versions(self.folder / "best", 1)
        elif self.state["best_step"] is not None:
            print(
                f"warning: {problem}; the best checkpoint from step {self.state['step']} on will take its place"
            )
            # Where this step is one that is evaluated, it is so again.
            self.state.update(best_score=None, best_step=None, evaluated=self.state["step"] - 1)

    def cut_log(self) -> None:
        """Drop the lines of the log that were written after the state was."""
        lines = []
        if self.log_file.exists():
            lines = read_bytes(self.log_file, MAX_LOG_BYTES).splitlines(keepends=True)
        kept = [line for line in lines[: self.state["log_lines"]] if line.endswith(b"\n")]
        if len(kept) < self.state["log_lines"]:
            print(f"warning: {self.log_file}: {self.state['log_lines'] - len(kept)} lines have been lost")
            self.state["log_lines"] = len(kept)
        write_text(self.log_file, b"".join(kept).decode("utf-8", "replace"))

    def log(self, line: dict) -> None:
        with open(self.log_file, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.state["log_lines"] += 1


def check_state(state: dict, fresh: dict) -> None:
    """Hold a stored state against that of a run that has not begun.

    Raises:
        ValueError: naming what is missing or of another kind.
    """

    def is_count(value):
        return type(value) is int and 0 <= value < 2**53

    numbers = (int, float, type(None))
    tasks = list(fresh["task_batches"])
    kinds = {
        "task_batches": lambda value: list(value) == tasks and all(map(is_count, value.values())),
        "optimizer_steps": lambda value: all(map(is_count, value)),
        "cosine_ema": lambda value: value is None or torch.tensor(value).shape == (len(tasks), len(tasks)),
        "best_score": lambda value: type(value) in numbers,
        "best_step": lambda value: value is None or is_count(value),
        "window": lambda value: all(isinstance(record, dict) for record in value),
    }
    for name in fresh:
        try:
            fits = kinds.get(name, is_count)(state[name])
        except (KeyError, TypeError, AttributeError):
            fits = False
        if not fits:
            raise ValueError(f"{name!r} is missing or of another kind")


def find_changed(folder: Path, args: Namespace, data: dict, may_change: Sequence[str]) -> list[str]:
    """Settings in a checkpoint's copy of `args.json` that are not those of the run any more, and its data."""
    copy = read_args_file(folder)
    stored, now = copy["args"], json.loads(json.dumps(vars(args)))
    changed = ["the data"] if copy["data"] != data else []
    return changed + [
        f"--{name} was {stored[name]}, is {now[name]}"
        for name in sorted(set(stored) & set(now) - set(may_change) - {"given"})
        if stored[name] != now[name]
    ]

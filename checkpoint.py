"""Saving and loading a run: a checkpoint is a folder of safetensors and JSON, whole or not there at all.

`best/` holds a model; `last/` also holds what training needs to go on. Both read as a Hugging Face BERT folder,
so `--pretrained RUN/best` starts from the encoder of another run.
"""

import json
import os
import platform
import shutil
import sys
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from compiled import PLAIN, compile_passes
from config import TASKS, UserError
from evaluation import PREDICTION_STYLES, prediction_name
from multitask_bert import MultitaskBERT
from optimizer import AdamW
from tokenizer import BertTokenizer

STATE_FILE = "state.json"  # written last: a folder that holds it is complete


@contextmanager
def whole_file(path: Path):
    """Let a file appear whole or not at all: yields another name beside it to write to, then renames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # there only if something failed


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with whole_file(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def save_checkpoint(
    folder: Path,
    model: MultitaskBERT,
    tokenizer: BertTokenizer,
    optimizer_tensors: dict[str, torch.Tensor],
    state: dict,
) -> None:
    """Write a checkpoint folder so that a kill at any moment leaves the previous one or the new one.

    Args:
        optimizer_tensors: name -> tensor; empty for a checkpoint that is not meant to be resumed.
        state: anything that JSON holds exactly.
    """
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    model.bert.config.to_json(new / "config.json")
    tokenizer.save_pretrained(new)
    save_file(cpu_tensors(model.state_dict()), new / "model.safetensors", metadata={"format": "pt"})
    if optimizer_tensors:
        save_file(cpu_tensors(optimizer_tensors), new / "optimizer.safetensors")
    (new / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    for path in new.iterdir():
        sync(path)
    recover(folder)
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def cpu_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def sync(path: Path) -> None:
    """Ask the system to put a file or folder on disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def recover(folder: Path) -> None:
    """Finish a replacement that was cut off between its two renames."""
    old = folder.with_name(folder.name + ".old")
    if old.exists():
        if folder.exists():
            shutil.rmtree(old)
        else:
            os.replace(old, folder)


def load_state(folder: Path) -> dict:
    """The JSON part of a checkpoint.

    Raises:
        UserError: if there is no complete checkpoint.
    """
    recover(folder)
    try:
        return json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: no checkpoint there") from None
    except ValueError as error:
        raise UserError(f"{folder / STATE_FILE}: damaged ({error})") from None


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, FileNotFoundError) as error:
        raise UserError(f"{path}: missing or damaged ({error})") from None


def copy_tensors(source: dict[str, torch.Tensor], target: dict[str, torch.Tensor], path: Path) -> None:
    """Copy stored values into existing tensors, in place, so that views of flat memory stay views.

    Raises:
        UserError: if names or shapes differ.
    """
    different = sorted(set(source) ^ set(target)) or [
        name for name in target if source[name].shape != target[name].shape
    ]
    if different:
        raise UserError(
            f"{path}: does not fit this model; {different[0]} is missing, unknown or of another shape"
        )
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(source[name])


def load_model(folder: Path, model: MultitaskBERT) -> None:
    """Load a checkpoint's weights into a model of the same shape."""
    copy_tensors(load_tensors(folder / "model.safetensors"), model.state_dict(), folder / "model.safetensors")


def prepare_folder(args: Namespace) -> None:
    """Make the run folder; one that holds a checkpoint is only emptied, of its run's files, with --overwrite.

    A run that ended before its first checkpoint has nothing to lose: its command can simply be given again.
    """
    folder = Path(args.output_dir)
    if (folder / "args.json").exists():
        started = any((folder / name).exists() for name in ("last", "last.old", "best", "best.old"))
        if started and not args.overwrite:
            raise UserError(
                f"--output_dir {folder}: holds a run already; continue it with --resume, or start anew with --overwrite"
            )
        for name in ("last", "best"):
            for ending in ("", ".old", ".new"):
                shutil.rmtree(folder / (name + ending), ignore_errors=True)
        names = [
            "predictions/" + prediction_name(task, split, style)
            for task in TASKS
            for split in ("dev", "test")
            for style in PREDICTION_STYLES
        ]
        page = [
            *folder.glob("report/*.png"),
            folder / "curves.png",
            folder / "report.md",
            folder / "report.html",
        ]
        for path in [
            *page,
            *(folder / name for name in (*names, "metrics.jsonl", "scores.json", "args.json")),
        ]:
            path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)


def describe_machine(device: str) -> dict:
    """What a run's time depends on: processor, cores, threads of tensor operations, GPU."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")  # Linux: platform.processor() says little or nothing there
    for line in cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
    machine = {"processor": processor, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.device(device).type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine


def write_args(args: Namespace, facts: dict) -> None:
    """Write a run's `args.json`: every setting, the commands that started and resumed it, versions, the machine.

    Args:
        facts: what else should be known about the run, as JSON.
    """
    path = Path(args.output_dir) / "args.json"
    commands = json.loads(path.read_text(encoding="utf-8"))["commands"] if path.exists() else []
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    content = {"args": vars(args), "commands": [*commands, sys.argv], "versions": versions}
    content |= {"machine": describe_machine(args.device), **facts}
    write_text(path, json.dumps(content, indent=2) + "\n")


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
        self.state = {
            "step": 0,
            "task_batches": dict.fromkeys(args.tasks, 0),  # drawn so far
            "tokens": 0,
            "bad_steps": 0,  # skipped since the last good one
            "skipped_steps": 0,  # in all
            "cosine_ema": None,
            "best_score": None,
            "best_step": None,
            "evals_without_gain": 0,
            "optimizer_steps": [],
            "window": [],  # what the next line of the log averages
        }

    def optimizer_tensors(self) -> dict[str, torch.Tensor]:
        """The optimizer's moments by name; `state["optimizer_steps"]` has its counters."""
        return {
            f"{owner}.{'decay' if decays else 'no_decay'}.{key}": self.optimizer.state[param][key]
            for (owner, decays), param in self.memory.flat_params.items()
            for key in ("exp_avg", "exp_avg_sq")
            if param in self.optimizer.state
        }

    def save_last(self) -> None:
        counters = [self.optimizer.state[param].get("step", 0) for param in self.memory.flat_params.values()]
        self.state["optimizer_steps"] = counters
        save_checkpoint(
            self.folder / "last", self.model, self.tokenizer, self.optimizer_tensors(), self.state
        )

    def save_best(self, summary: dict) -> None:
        state = {"step": self.state["step"], "dev": summary}
        save_checkpoint(self.folder / "best", self.model, self.tokenizer, {}, state)

    def load_last(self) -> None:
        """Continue from `last/`: weights, moments, counters; lines of the log that were written after it go."""
        folder = self.folder / "last"
        self.state = load_state(folder)
        load_model(folder, self.model)
        for param, step in zip(self.memory.flat_params.values(), self.state["optimizer_steps"], strict=True):
            if step:
                moments = {"exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}
                self.optimizer.state[param].update(step=step, **moments)
        path = folder / "optimizer.safetensors"
        copy_tensors(load_tensors(path), self.optimizer_tensors(), path)
        log = self.folder / "metrics.jsonl"
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else []
        write_text(log, "".join(line for line in lines if self.is_past(line)))

    def is_past(self, line: str) -> bool:
        """Whether a line of the log is whole and not from after the checkpoint."""
        try:
            return json.loads(line)["step"] <= self.state["step"]
        except (ValueError, KeyError, TypeError):  # cut off when the run was killed
            return False

    def log(self, line: dict) -> None:
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

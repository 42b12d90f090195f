"""Saving and loading a run: a checkpoint is a folder of safetensors and JSON, whole or not there at all.

`best/` holds a model; `last/` also holds what training needs to go on. Both read as a Hugging Face BERT folder,
so `--pretrained RUN/best` starts from the encoder of another run.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from config import UserError

STATE_FILE = "state.json"  # written last: a folder that holds it is complete


def save_checkpoint(
    folder: Path, model, tokenizer, optimizer_tensors: dict[str, torch.Tensor], state: dict
) -> None:
    """Write a checkpoint folder so that a kill at any moment leaves the previous one or the new one.

    Args:
        model: a `MultitaskBERT`.
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


def load_model(folder: Path, model) -> None:
    """Load a checkpoint's weights into a `MultitaskBERT` of the same shape."""
    copy_tensors(load_tensors(folder / "model.safetensors"), model.state_dict(), folder / "model.safetensors")

"""Checkpoints: folders of safetensors and JSON that are whole or not there at all, and carry checksums.

A checkpoint is written beside the one before it, put on disk, then given its name by a rename. The one before
moves on from `last/` to `last.1/`, and so on. `SHA256SUMS`, written last, is in the form that `sha256sum -c`
reads. Every checkpoint is also a Hugging Face BERT folder, so `--pretrained RUN/best` starts from the encoder
of another run.
"""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from itertools import count
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from config import BertConfig
from heads import MultitaskBERT
from support.errors import UserError
from support.files import default_mode, file_digest, is_regular, naming, read_bytes, read_json, sync
from tokenizer import BertTokenizer

SUMS_FILE = "SHA256SUMS"  # written last: a folder that holds it is complete
STATE_FILE = "state.json"
# A label of answers that come from no head of ours.
UNTRAINED = "this folder is an encoder without trained heads; see reporting.export"
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, for each parameter


# --- checkpoint folders ---------------------------------------------------------------------------


def numbered(folder: Path, number: int) -> Path:
    """Where a checkpoint is after `number` newer ones: `last`, `last.1`, `last.2`, ..."""
    return folder.with_name(f"{folder.name}.{number}") if number else folder


def temporary(folder: Path, ending: str) -> Path:
    """Where a checkpoint is made or taken apart: hidden, as `best.old` may be somebody's copy of it."""
    return folder.with_name(f".{folder.name}.{ending}")


def versions(folder: Path) -> list[Path]:
    """A checkpoint and those before it, newest first; a kill between two renames may leave a gap."""
    endings = (path.name.removeprefix(folder.name + ".") for path in folder.parent.glob(folder.name + ".*"))
    numbers = sorted(int(ending) for ending in endings if ending.isascii() and ending.isdecimal())
    return [path for path in (numbered(folder, number) for number in [0, *numbers]) if path.is_dir()]


def write_checkpoint(folder: Path, write: Callable[[Path], None], keep: int = 1) -> None:
    """Write a checkpoint: a kill, a power cut or a full disk at any moment leaves it or the one before.

    Args:
        write: fills an empty folder with files.
        keep: how many to keep, this one included.
    """
    remove_leftovers(folder)
    new = temporary(folder, "new")
    try:
        new.mkdir(parents=True)
        with naming(new):
            write(new)
            sums = {path.name: file_digest(path) for path in sorted(new.iterdir())}
            (new / SUMS_FILE).write_text(sums_text(sums), encoding="utf-8")
            for path in [*new.iterdir(), new]:
                sync(path)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)  # on a full disk, give back what it took
        raise
    gap = next(number for number in count() if not numbered(folder, number).exists())
    for number in range(gap, 0, -1):
        os.replace(numbered(folder, number - 1), numbered(folder, number))
    os.replace(new, folder)
    sync(folder.parent)
    remove_versions(folder, keep)


def remove_versions(folder: Path, keep: int) -> None:
    """Remove all but the newest checkpoints."""
    for path in reversed(versions(folder)[keep:]):
        remove_checkpoint(path, folder)


def remove_newer(folder: Path, good: Path) -> None:
    """Remove the checkpoints that are newer than one of `versions(folder)`."""
    found = versions(folder)
    for path in found[: found.index(good)]:
        remove_checkpoint(path, folder)


def remove_checkpoint(path: Path, folder: Path) -> None:
    """Remove one version of a checkpoint. It loses its name first, so that no half of it can keep that.

    A run does not end because something old cannot be removed: that is a warning.
    """
    old = temporary(folder, "old")
    try:
        remove(old)
        os.replace(path, old)
        remove(old)
    except OSError as error:
        print(f"warning: {path}: cannot be removed ({error.strerror})", flush=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what a kill left of a checkpoint that was being written or removed."""
    for ending in ("new", "old"):
        with suppress(OSError):
            remove(temporary(folder, ending))


def remove(path: Path) -> None:
    """Remove a folder, file or link, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_checkpoints(folder: Path) -> None:
    """Remove a checkpoint, those before it, and what a kill left of one."""
    remove_leftovers(folder)
    remove_versions(folder, 0)


def sums_text(sums: dict[str, str]) -> str:
    """Digests by file name, as `sha256sum` writes them."""
    return "".join(f"{digest}  {name}\n" for name, digest in sums.items())


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, in a few words; None if all are as they were written."""
    path = folder / SUMS_FILE
    try:
        text = read_bytes(path).decode("utf-8")
        sums = {name: digest for digest, _, name in (line.partition("  ") for line in text.splitlines())}
        if text != sums_text(sums):
            return f"{path}: damaged"
        present = {file.name for file in folder.iterdir() if file.suffix in (".json", ".safetensors", ".txt")}
        for name in sorted(present | set(sums)):
            if name not in sums or name != Path(name).name:
                return f"{path}: damaged, or {name!r} is not of this checkpoint"
            if not is_regular(folder / name) or file_digest(folder / name) != sums[name]:
                return f"{folder / name}: damaged (its checksum is not that in {SUMS_FILE})"
    except FileNotFoundError as error:
        return f"{error.filename}: missing"
    except UserError as error:
        return str(error)
    except (OSError, ValueError) as error:
        return f"{path}: cannot be read ({error})"
    return None


def find_checkpoint(folder: Path) -> Path | None:
    """The newest undamaged version of a checkpoint; None if there is none at all. Warns of damage.

    Raises:
        UserError: if there are some, all damaged.
    """
    damages = []
    for path in versions(folder):
        damage = find_damage(path)
        if damage is None:
            for text in damages:
                print(f"warning: {text}; going on with {path} instead", flush=True)
            return path
        damages.append(damage)
    if damages:
        raise UserError(f"{'; '.join(damages)}; no undamaged checkpoint is left there")
    return None


def need_checkpoint(folder: Path) -> Path:
    """As `find_checkpoint`, but there has to be one."""
    path = find_checkpoint(folder)
    if path is None:
        raise UserError(f"{folder}: no checkpoint there")
    return path


# --- what is in them ------------------------------------------------------------------------------


def encoder_config(config: BertConfig) -> dict:
    """A `config.json` for an encoder without the heads that were trained on it.

    A library that puts a classifier of its own on top starts that at random. It warns, but its answers look
    like any others, so their labels say it, too.
    """
    labels = {number: f"UNTRAINED {number}: {UNTRAINED}" for number in range(2)}
    return {"model_type": "bert", "architectures": ["BertModel"], **asdict(config), "id2label": labels}


def write_model(folder: Path, model: MultitaskBERT, tokenizer: BertTokenizer, state: dict) -> None:
    """Write a model's weights, sizes and vocabulary.

    Args:
        state: anything that JSON holds exactly.
    """
    text = json.dumps(encoder_config(model.bert.config), indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    tokenizer.save_pretrained(folder)
    save_tensors(model.state_dict(), folder / "model.safetensors")
    (folder / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


def load_model(folder: Path, model: MultitaskBERT) -> None:
    """Load a checkpoint's weights into a model of the same shape."""
    path = folder / "model.safetensors"
    copy_tensors(load_tensors(path), model.state_dict(), path)


def load_state(folder: Path) -> dict:
    """The JSON part of a checkpoint.

    Raises:
        UserError: if it is missing or damaged.
    """
    return read_json(folder / STATE_FILE)


def add_moments(optimizer: torch.optim.Optimizer, param: torch.Tensor, step: int) -> None:
    """Make room for the moments of a parameter that was updated `step` times, to be loaded into."""
    optimizer.state[param] = {"step": step, **{name: torch.zeros_like(param) for name in MOMENTS}}


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(default_mode())  # the library makes files that only their owner can read
    except SafetensorError as error:  # a full disk, for one
        raise UserError(f"{path}: cannot be written ({error})") from None


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
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

"""Word pieces on disk, so that a large file is tokenized once: an `.npz` file for each set of sequences.

A file is named after everything that its content depends on: the texts, the tokenizer, the length limit. So
it is never out of date, and may be deleted at any time. One that is damaged is made again.
"""

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import tokenizers

from datasets import Rows, TaskData, TokenArrays, tokenize
from support.errors import one_line
from support.files import is_regular, whole_file
from tokenizer import BertTokenizer

MIN_EXAMPLES = 5000  # fewer are tokenized in less than half a second
FORMAT = "2"  # to be counted up when the meaning of the arrays changes


def default_cache_dir() -> Path | None:
    """Where programs keep what they can make again (XDG base directories); None for a user without a home."""
    with suppress(RuntimeError):
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minbert-multitask"
    return None


def tokenize_cached(
    rows: Rows,
    tokenizer: BertTokenizer,
    *,
    joint: bool,
    max_length: int,
    cache_dir: Path | None,
    **pairs: bool,
) -> TaskData:
    """As `datasets.tokenize`, from the cache if it is there; None means without a cache."""
    options = {"joint": joint, "max_length": max_length, **pairs}
    if cache_dir is None or len(rows.texts) < MIN_EXAMPLES:
        return tokenize(rows, tokenizer, **options)
    digest = hashlib.blake2b(digest_size=16)
    wanted = [name for name, value in pairs.items() if value]
    for part in (
        *(FORMAT, tokenizers.__version__, tokenizer.settings(), joint, max_length, rows.texts),
        *wanted,  # none by default: files written before keep their names
    ):
        digest.update(repr(part).encode("utf-8", "surrogatepass"))
    path = cache_dir / f"{digest.hexdigest()}.npz"
    data = load_tokens(path, rows)
    if data is None:
        data = tokenize(rows, tokenizer, **options)
        save_tokens(path, data)
    return replace(data, symmetric=pairs.get("symmetric", False))


def load_tokens(path: Path, rows: Rows) -> TaskData | None:
    """What a file of the cache holds; None if it is missing or damaged."""
    stored = load_arrays(path)
    if stored is None or not {"input_ids", "token_type_ids", "offsets", "index"} <= stored.keys():
        return None
    sequences = TokenArrays(stored["input_ids"], stored["token_type_ids"], stored["offsets"])
    index = stored["index"]
    # Another program's file under this name, for all we know.
    fits = sequences.input_ids.ndim == 1 and len(index) == len(rows.texts) and len(sequences.offsets) > 1
    if not fits or not len(sequences.input_ids) == len(sequences.token_type_ids) == sequences.offsets[-1]:
        return None
    return TaskData(rows, sequences, index)


def save_tokens(path: Path, data: TaskData) -> None:
    cache_arrays(path, {"index": data.index, **asdict(data.sequences)}, "tokens")


# --- files of arrays ----------------------------------------------------------------------------------------


def load_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of an `.npz` file by name; None if it is missing or damaged."""
    try:
        if not is_regular(path):
            return None
        with np.load(path, allow_pickle=False) as stored:  # a zip archive: it checks the CRC of each array
            return dict(stored)
    except Exception:  # noqa: BLE001 (a damaged archive may raise anything: BadZipFile, zlib.error, KeyError, ...)
        return None


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an `.npz` file whole or not at all."""
    with (
        whole_file(path) as temporary,
        open(temporary, "wb") as file,
    ):  # given a name, numpy adds its own ending
        np.savez(file, **arrays)


def cache_arrays(path: Path, arrays: Mapping[str, np.ndarray], what: str) -> None:
    """Keep arrays; a disk that is full or read-only is no reason to stop."""
    try:
        write_arrays(path, arrays)
    except OSError as error:
        print(f"warning: {path}: {what} are not cached ({error.strerror or one_line(error)})")

"""Word pieces on disk, so that a large file is tokenized once: one safetensors file for each set of sequences.

A file is named after everything that its content depends on: the texts, the tokenizer, the length limit. So it is never
out of date, and may be deleted at any time. One that is damaged is made again.
"""

import hashlib
import os
import zlib
from pathlib import Path

import numpy as np
import tokenizers
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from checkpoint import whole_file
from datasets import Rows, TaskData, TokenArrays, tokenize
from tokenizer import BertTokenizer

MIN_EXAMPLES = 5000  # fewer are tokenized in less than half a second
FORMAT = "1"  # to be counted up when the meaning of the arrays changes


def default_cache_dir() -> Path:
    """Where programs keep what they can make again (XDG base directories)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minbert-multitask"


def tokenize_cached(
    rows: Rows, tokenizer: BertTokenizer, *, joint: bool, max_length: int, cache_dir: Path | None
) -> TaskData:
    """As `datasets.tokenize`, from the cache if it is there; None means without a cache."""
    if cache_dir is None or len(rows.texts) < MIN_EXAMPLES:
        return tokenize(rows, tokenizer, joint=joint, max_length=max_length)
    digest = hashlib.blake2b(digest_size=16)
    for part in (FORMAT, tokenizers.__version__, tokenizer.settings(), joint, max_length, rows.texts):
        digest.update(repr(part).encode("utf-8", "surrogatepass"))
    path = cache_dir / f"{digest.hexdigest()}.safetensors"
    data = read(path, rows)
    if data is None:
        data = tokenize(rows, tokenizer, joint=joint, max_length=max_length)
        write(path, data)
    return data


def checksum(arrays: dict[str, np.ndarray]) -> str:
    return f"{zlib.crc32(b''.join(arrays[name].tobytes() for name in sorted(arrays))):08x}"


def read(path: Path, rows: Rows) -> TaskData | None:
    """What the file holds; None if it is missing or damaged."""
    try:
        with safe_open(path, "numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dictionary: it has no other iteration)
            if (file.metadata() or {}).get("checksum") != checksum(arrays):
                return None
        sequences = TokenArrays(arrays["input_ids"], arrays["token_type_ids"], arrays["offsets"])
        return TaskData(rows, sequences, arrays["index"])
    except (SafetensorError, OSError, KeyError):
        return None


def write(path: Path, data: TaskData) -> None:
    """Keep the tokens; a disk that is full or read-only is no reason to stop."""
    arrays = {
        "input_ids": data.sequences.input_ids,
        "token_type_ids": data.sequences.token_type_ids,
        "offsets": data.sequences.offsets,
        "index": data.index,
    }
    try:
        with whole_file(path) as temporary:
            save_file(arrays, temporary, metadata={"checksum": checksum(arrays)})
    except (SafetensorError, OSError) as error:
        print(f"warning: {path}: tokens are not cached ({error})")

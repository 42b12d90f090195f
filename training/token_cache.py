"""Word pieces on disk, so that a large file is tokenized once: one safetensors file for each set of sequences.

A file is named after everything that its content depends on: the texts, the tokenizer, the length limit. So it is never
out of date, and may be deleted at any time. One that is damaged, or is not what these texts can have become, is made
again.
"""

import hashlib
import math
import os
import zlib
from pathlib import Path

import numpy as np
import tokenizers
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from datasets import Rows, TaskData, TokenArrays, tokenize
from support.errors import one_line
from support.files import is_regular, whole_file
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
    limits = {
        "width": 1 if joint else len(rows.texts[0]),
        "max_length": max_length,
        "num_pieces": len(tokenizer),
    }
    data = read(path, rows, **limits)
    if data is None:
        data = tokenize(rows, tokenizer, joint=joint, max_length=max_length)
        write(path, data)
    return data


def checksum(arrays: dict[str, np.ndarray]) -> str:
    return f"{zlib.crc32(b''.join(arrays[name].tobytes() for name in sorted(arrays))):08x}"


def read(path: Path, rows: Rows, *, width: int, max_length: int, num_pieces: int) -> TaskData | None:
    """What the file holds; None if it is missing, damaged, or does not fit the rows.

    Args:
        width: sequences of each example, 1 or 2.
        max_length: of a sequence.
        num_pieces: word pieces of the tokenizer.
    """
    num_rows = len(rows.texts)
    most = {"index": num_rows * width, "offsets": num_rows * width + 1}  # numbers that there can be
    most["input_ids"] = most["token_type_ids"] = num_rows * width * max_length
    try:
        if not is_regular(path):
            return None
        with safe_open(path, "numpy") as file:
            # Looked at before they are read: a file may claim any size.
            if any(math.prod(file.get_slice(name).get_shape()) > most[name] for name in most):
                return None
            arrays = {name: file.get_tensor(name) for name in most}
            if (file.metadata() or {}).get("checksum") != checksum(arrays):
                return None
    except (
        SafetensorError,
        OSError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
    ):  # odd dtypes raise the last
        return None
    if not fit(arrays, num_rows, width=width, max_length=max_length, num_pieces=num_pieces):
        return None
    sequences = TokenArrays(arrays["input_ids"], arrays["token_type_ids"], arrays["offsets"])
    return TaskData(rows, sequences, arrays["index"])


def fit(
    arrays: dict[str, np.ndarray], num_rows: int, *, width: int, max_length: int, num_pieces: int
) -> bool:
    """Whether arrays can be the tokens of so many rows: a file with a right checksum may still be anybody's."""
    dtypes = {"input_ids": np.int32, "token_type_ids": np.int8, "offsets": np.int64, "index": np.int64}
    if any(arrays[name].dtype != dtype for name, dtype in dtypes.items()):
        return False
    input_ids, token_type_ids, offsets, index = (arrays[name] for name in dtypes)
    if offsets.ndim != 1 or len(offsets) < 2 or input_ids.ndim != 1 or index.shape != (num_rows, width):
        return False
    lengths = np.diff(offsets)
    return bool(
        input_ids.shape == token_type_ids.shape == (offsets[-1],)
        and offsets[0] == 0
        and 2 <= lengths.min()
        and lengths.max() <= max_length
        and 0 <= input_ids.min()
        and input_ids.max() < num_pieces
        and 0 <= token_type_ids.min()
        and token_type_ids.max() <= 1
        and 0 <= index.min()
        and index.max() < len(lengths)
    )


def write(path: Path, data: TaskData) -> None:
    """Keep the tokens; a disk that is full or read-only is no reason to stop."""
    arrays = {
        "input_ids": data.sequences.input_ids,
        "token_type_ids": data.sequences.token_type_ids,
        "offsets": data.sequences.offsets,
        "index": data.index,
    }
    own = path.with_name(f"{path.name}.{os.getpid()}")  # another process may be writing the same tokens
    try:
        try:
            with whole_file(own) as temporary:
                save_file(arrays, temporary, metadata={"checksum": checksum(arrays)})
            os.replace(own, path)
        finally:
            own.unlink(missing_ok=True)  # there only if something failed
    except (SafetensorError, OSError) as error:
        print(f"warning: {path}: tokens are not cached ({one_line(error)})")

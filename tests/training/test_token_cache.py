"""Cached tokens are the tokens; whatever is wrong with the cache, the tokens are right."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from config import TASKS
from datasets import read_rows, tokenize
from support.files import ROOT
from tests.tiny import make_data, make_encoder
from tokenizer import BertTokenizer
from training import token_cache
from training.token_cache import tokenize_cached


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "MIN_EXAMPLES", 1)
    make_encoder(tmp_path / "encoder")
    make_data(tmp_path / "data")
    return tmp_path


def rows_of(place, task="para"):
    spec = TASKS[task]
    return read_rows(place / "data" / spec.files["train"], spec, "train")


def assert_same(a, b):
    for x, y in (
        (a.sequences.input_ids, b.sequences.input_ids),
        (a.sequences.token_type_ids, b.sequences.token_type_ids),
        (a.sequences.offsets, b.sequences.offsets),
        (a.index, b.index),
    ):
        assert x.dtype == y.dtype and np.array_equal(x, y)
    assert a.rows is b.rows


@pytest.mark.parametrize("joint", [False, True])
def test_written_and_read_back(place, monkeypatch, joint):
    rows, tokenizer = rows_of(place), BertTokenizer.from_pretrained(place / "encoder")
    options = {"joint": joint, "max_length": 9}
    expected = tokenize(rows, tokenizer, **options)
    assert_same(tokenize_cached(rows, tokenizer, **options, cache_dir=place / "cache"), expected)
    assert len(list((place / "cache").iterdir())) == 1
    monkeypatch.setattr(token_cache, "tokenize", None)  # not needed any more
    assert_same(tokenize_cached(rows, tokenizer, **options, cache_dir=place / "cache"), expected)


def test_everything_that_changes_tokens_has_a_file_of_its_own(place):
    rows, tokenizer = rows_of(place), BertTokenizer.from_pretrained(place / "encoder")
    cased = BertTokenizer(tokenizer._tokenizer.get_vocab(), do_lower_case=False)
    calls = [
        (rows, tokenizer, False, 9),
        (rows, tokenizer, True, 9),
        (rows, tokenizer, False, 8),
        (rows, cased, False, 9),
        (rows_of(place, "sts"), tokenizer, False, 9),
    ]
    for n, (some, which, joint, max_length) in enumerate(calls, start=1):
        tokenize_cached(some, which, joint=joint, max_length=max_length, cache_dir=place / "cache")
        assert len(list((place / "cache").iterdir())) == n


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "foreign", "folder", "pipe"])
def test_damaged_file_is_made_again(place, damage):
    rows, tokenizer = rows_of(place), BertTokenizer.from_pretrained(place / "encoder")
    options = {"joint": False, "max_length": 9, "cache_dir": place / "cache"}
    expected = tokenize_cached(rows, tokenizer, **options)
    (path,) = (place / "cache").iterdir()
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-1] ^= 1
    damaged = {"truncated": content[:-3], "flipped": content, "empty": b"", "foreign": b"id,text"}
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage == "pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(damaged[damage])
    assert_same(tokenize_cached(rows, tokenizer, **options), expected)
    if damage != "folder":
        limits = {"width": 2, "max_length": 9, "num_pieces": len(tokenizer)}
        assert token_cache.read(path, rows, **limits) is not None


def change(name, edit):
    """Change one array, which may return another one, or be changed in place."""

    def apply(arrays):
        edited = edit(arrays[name])
        return arrays | ({} if edited is None else {name: edited})

    return apply


def put(place, value):
    def edit(array):
        array[place] = value

    return edit


# What a file with a right checksum may yet hold; each would end in an error far from here, or in wrong tokens.
UNFIT = {
    "id_of_no_piece": change("input_ids", put(3, 9999)),
    "negative_id": change("input_ids", put(3, -1)),
    "segment_2": change("token_type_ids", put(3, 2)),
    "offsets_fall": change("offsets", put(1, 10**6)),
    "empty_sequence": change("offsets", put(1, 0)),
    "sequence_backwards": change("offsets", lambda offsets: offsets[[0, 2, 1, *range(3, len(offsets))]]),
    "offsets_start_late": change("offsets", put(0, 1)),
    "offsets_end_late": change("offsets", put(-1, 10**6)),
    "offsets_overflow": change("offsets", put(1, 2**63 - 1)),
    "sequence_too_long": change("offsets", lambda offsets: offsets[[0, -1]]),
    "index_beyond": change("index", put((0, 0), 10**6)),
    "negative_index": change("index", put((0, 0), -1)),
    "row_missing": change("index", lambda index: index[1:]),
    "row_too_many": change("index", lambda index: np.concatenate([index, index[:1]])),
    "one_column": change("index", lambda index: index[:, :1]),
    "flat_index": change("index", np.ravel),
    "no_sequence": lambda arrays: arrays | {name: arrays[name][:0] for name in ("input_ids", "offsets")},
    "types": change("token_type_ids", lambda array: array[:-1]),
    "wide_ids": change("input_ids", lambda array: array.astype(np.int64)),
    "floats": change("index", lambda array: array.astype(np.float64)),
    "array_missing": lambda arrays: {name: arrays[name] for name in arrays if name != "index"},
    "very_large": change("input_ids", lambda array: np.resize(array, 10**6)),
}


@pytest.mark.parametrize("damage", UNFIT)
def test_file_of_other_tokens_is_made_again(place, damage):
    rows, tokenizer = rows_of(place), BertTokenizer.from_pretrained(place / "encoder")
    options = {"joint": False, "max_length": 9, "cache_dir": place / "cache"}
    expected = tokenize_cached(rows, tokenizer, **options)
    (path,) = (place / "cache").iterdir()
    before = path.read_bytes()
    arrays = UNFIT[damage](load_file(path))
    save_file(arrays, path, metadata={"checksum": token_cache.checksum(arrays)})
    assert_same(tokenize_cached(rows, tokenizer, **options), expected)
    assert path.read_bytes() == before


def test_header_that_claims_terabytes_is_not_believed(place):
    rows, tokenizer = rows_of(place), BertTokenizer.from_pretrained(place / "encoder")
    options = {"joint": False, "max_length": 9, "cache_dir": place / "cache"}
    expected = tokenize_cached(rows, tokenizer, **options)
    (path,) = (place / "cache").iterdir()
    names = {"input_ids": 4, "token_type_ids": 1, "offsets": 8, "index": 8}
    kinds = {"input_ids": "I32", "token_type_ids": "I8", "offsets": "I64", "index": "I64"}
    header, end = {}, 0
    for name, width in names.items():
        header[name] = {
            "dtype": kinds[name],
            "shape": [2**37],
            "data_offsets": [end, end := end + width * 2**37],
        }
    header = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, 8 + len(header) + end)  # takes no place
    assert_same(tokenize_cached(rows, tokenizer, **options), expected)


def test_two_processes_that_write_at_once(place, capsys):
    """Each has a name of its own until its file is whole."""
    rows, tokenizer = rows_of(place), BertTokenizer.from_pretrained(place / "encoder")
    options = {"joint": False, "max_length": 9, "cache_dir": place / "cache"}
    expected = tokenize_cached(rows, tokenizer, **options)
    (path,) = (place / "cache").iterdir()
    code = f"from tests.training import test_token_cache as other; other.write_again({str(path)!r})"
    done = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    while done.poll() is None:
        token_cache.write(path, expected)
        assert_same(tokenize_cached(rows, tokenizer, **options), expected)
    assert done.returncode == 0
    assert capsys.readouterr().out == ""  # no warning
    assert list((place / "cache").iterdir()) == [path]


def write_again(path):
    """What the other process does."""
    place = Path(path).parent.parent
    data = tokenize(
        rows_of(place), BertTokenizer.from_pretrained(place / "encoder"), joint=False, max_length=9
    )
    for _ in range(30):
        token_cache.write(Path(path), data)


def test_cache_that_cannot_be_written_is_a_warning(place, capsys):
    rows, tokenizer = rows_of(place), BertTokenizer.from_pretrained(place / "encoder")
    (place / "cache").write_text("a file")
    options = {"joint": False, "max_length": 9}
    found = tokenize_cached(rows, tokenizer, **options, cache_dir=place / "cache")
    assert_same(found, tokenize(rows, tokenizer, **options))
    assert capsys.readouterr().out.startswith("warning: ")


def test_small_data_and_no_folder_leave_nothing(place, monkeypatch):
    rows, tokenizer = rows_of(place), BertTokenizer.from_pretrained(place / "encoder")
    tokenize_cached(rows, tokenizer, joint=False, max_length=9, cache_dir=None)
    monkeypatch.setattr(token_cache, "MIN_EXAMPLES", len(rows.texts) + 1)
    tokenize_cached(rows, tokenizer, joint=False, max_length=9, cache_dir=place / "cache")
    assert not (place / "cache").exists()

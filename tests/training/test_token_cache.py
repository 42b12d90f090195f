"""Cached tokens are the tokens; whatever is wrong with the cache, the tokens are right."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from config import TASKS
from datasets import read_rows, tokenize
from support.files import ROOT
from tests.tiny import make_data, make_encoder
from tokenizer import BertTokenizer
from training import token_cache
from training.token_cache import load_tokens, save_tokens, tokenize_cached


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
    cased = BertTokenizer(
        {piece: n for n, piece in enumerate((place / "encoder" / "vocab.txt").read_text().split())},
        do_lower_case=False,
    )
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


@pytest.mark.parametrize(
    "damage", ["truncated", "flipped", "empty", "foreign", "other_rows", "array_missing", "folder", "pipe"]
)
def test_damaged_file_is_made_again(place, damage):
    rows, tokenizer = rows_of(place), BertTokenizer.from_pretrained(place / "encoder")
    options = {"joint": False, "max_length": 9, "cache_dir": place / "cache"}
    expected = tokenize_cached(rows, tokenizer, **options)
    (path,) = (place / "cache").iterdir()
    content = bytearray(path.read_bytes())
    arrays = dict(np.load(path))
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage == "pipe":
        os.mkfifo(path)
    elif damage == "other_rows":
        np.savez(path, **arrays | {"index": arrays["index"][1:]})
    elif damage == "array_missing":
        np.savez(path, **{name: array for name, array in arrays.items() if name != "index"})
    else:
        content[content.index(arrays["input_ids"].tobytes()) + 5] ^= damage == "flipped"
        path.write_bytes(
            {"truncated": content[:-3], "empty": b"", "foreign": b"id,text"}.get(damage, content)
        )
    assert_same(tokenize_cached(rows, tokenizer, **options), expected)
    if damage != "folder":
        assert_same(load_tokens(path, rows), expected)


def test_two_processes_that_write_at_once(place, capsys):
    """Each has a name of its own until its file is whole."""
    rows, tokenizer = rows_of(place), BertTokenizer.from_pretrained(place / "encoder")
    options = {"joint": False, "max_length": 9, "cache_dir": place / "cache"}
    expected = tokenize_cached(rows, tokenizer, **options)
    (path,) = (place / "cache").iterdir()
    code = f"from tests.training import test_token_cache as other; other.write_again({str(path)!r})"
    done = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    while done.poll() is None:
        save_tokens(path, expected)
        assert_same(tokenize_cached(rows, tokenizer, **options), expected)
    assert done.returncode == 0
    assert capsys.readouterr().out == ""  # no warning
    assert list((place / "cache").iterdir()) == [path]


def write_again(path):
    """What the other process does."""
    place = Path(path).parent.parent
    tokenizer = BertTokenizer.from_pretrained(place / "encoder")
    data = tokenize(rows_of(place), tokenizer, joint=False, max_length=9)
    for _ in range(30):
        save_tokens(Path(path), data)


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

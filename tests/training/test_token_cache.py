"""Cached tokens are the tokens; whatever is wrong with the cache, the tokens are right."""

import multiprocessing
import os
from dataclasses import astuple
from functools import partial

import numpy as np
import pytest

from config import TASKS
from datasets import read_rows, tokenize
from tests.tiny import SAMPLE
from tokenizer import BertTokenizer
from training import token_cache
from training.token_cache import load_tokens, save_tokens, tokenize_cached

OPTIONS = {"joint": False, "max_length": 9}


@pytest.fixture(scope="module")
def rows():
    return rows_of("para")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A folder for the cache, which takes the smallest data, too."""
    monkeypatch.setattr(token_cache, "MIN_EXAMPLES", 1)
    return tmp_path / "cache"


def rows_of(task):
    return read_rows(SAMPLE / TASKS[task].files["dev"], TASKS[task], "dev")


def assert_same(a, b):
    for x, y in zip((*astuple(a.sequences), a.index), (*astuple(b.sequences), b.index), strict=True):
        assert x.dtype == y.dtype and np.array_equal(x, y)
    assert a.rows is b.rows


@pytest.mark.parametrize("joint", [False, True])
def test_written_and_read_back(rows, tokenizer, cache, monkeypatch, joint):
    options = OPTIONS | {"joint": joint}
    expected = tokenize(rows, tokenizer, **options)
    assert_same(tokenize_cached(rows, tokenizer, **options, cache_dir=cache), expected)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(token_cache, "tokenize", None)  # not needed any more
    assert_same(tokenize_cached(rows, tokenizer, **options, cache_dir=cache), expected)


def test_everything_that_changes_tokens_has_a_file_of_its_own(rows, tokenizer, cache, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    pieces = (tmp_path / "vocab.txt").read_text().split()
    cased = BertTokenizer({piece: number for number, piece in enumerate(pieces)}, do_lower_case=False)
    calls = [
        (rows, tokenizer, False, 9),
        (rows, tokenizer, True, 9),
        (rows, tokenizer, False, 8),
        (rows, cased, False, 9),
        (rows_of("sts"), tokenizer, False, 9),
    ]
    for n, (some, which, joint, max_length) in enumerate(calls, start=1):
        tokenize_cached(some, which, joint=joint, max_length=max_length, cache_dir=cache)
        assert len(list(cache.iterdir())) == n


@pytest.mark.parametrize(
    "damage", ["truncated", "flipped", "empty", "foreign", "other_rows", "array_missing", "folder", "pipe"]
)
def test_damaged_file_is_made_again(rows, tokenizer, cache, damage):
    again = partial(tokenize_cached, rows, tokenizer, **OPTIONS, cache_dir=cache)
    expected = again()
    (path,) = cache.iterdir()
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
    assert_same(again(), expected)
    if damage != "folder":
        assert_same(load_tokens(path, rows), expected)


def test_two_processes_that_write_at_once(rows, tokenizer, cache, capsys):
    """Each has a name of its own until its file is whole."""
    again = partial(tokenize_cached, rows, tokenizer, **OPTIONS, cache_dir=cache)
    expected = again()
    (path,) = cache.iterdir()

    def write():
        for _ in range(30):
            save_tokens(path, expected)

    other = multiprocessing.get_context("fork").Process(target=write)
    other.start()
    while other.is_alive():
        save_tokens(path, expected)
        assert_same(again(), expected)
    other.join()
    assert other.exitcode == 0 and capsys.readouterr().out == ""  # no warning
    assert list(cache.iterdir()) == [path]


def test_cache_that_cannot_be_written_is_a_warning(rows, tokenizer, cache, capsys):
    cache.write_text("a file")
    found = tokenize_cached(rows, tokenizer, **OPTIONS, cache_dir=cache)
    assert_same(found, tokenize(rows, tokenizer, **OPTIONS))
    assert capsys.readouterr().out.startswith("warning: ")


def test_small_data_and_no_folder_leave_nothing(rows, tokenizer, cache, monkeypatch):
    tokenize_cached(rows, tokenizer, **OPTIONS, cache_dir=None)
    monkeypatch.setattr(token_cache, "MIN_EXAMPLES", len(rows.texts) + 1)
    tokenize_cached(rows, tokenizer, **OPTIONS, cache_dir=cache)
    assert not cache.exists()


def test_a_user_without_a_home_has_no_cache(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(token_cache.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert token_cache.default_cache_dir() is None

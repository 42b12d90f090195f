"""Cached tokens are the tokens; whatever is wrong with the cache, the tokens are right."""

import numpy as np
import pytest

import token_cache
from config import TASKS
from datasets import read_rows, tokenize
from tests.tiny import make_data, make_encoder
from token_cache import tokenize_cached
from tokenizer import BertTokenizer


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


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "foreign", "folder"])
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
    else:
        path.write_bytes(damaged[damage])
    assert_same(tokenize_cached(rows, tokenizer, **options), expected)
    if damage != "folder":
        assert token_cache.read(path, rows) is not None


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

"""Labelled phrases inside sentences, aligned and weighed with numbers worked by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from datasets import Rows, tokenize
from tests.tiny import refusal
from training.phrases import PHRASE_WEIGHTINGS, Tree, make_phrases, read_tree_file
from training.settings import PhraseSettings
from training.sources import text_key

# The tokenizer of these tests knows letters: a word has as many pieces as letters. The sentence in a row has
# what the tree file escapes.
TREE = "(3 (2 ab) (4 (1 -LRB-) (0 (2 c) (3 de))))\n"
SETTINGS = PhraseSettings(weight=2.0, min_words=2, limit=None, weighting="equal")


@pytest.fixture
def trees(tmp_path):
    path = tmp_path / "trees.txt"
    path.write_text("(1 (2 no) (2 row))\n" + TREE)
    return read_tree_file(path, "sst")


def align(trees, tokenizer, max_length=64, held_out=(), label=0.0, **settings):
    rows = Rows(Path(), ["1", "2"], [("x",), ("Ab ( c de",)], np.array([0, label], dtype=np.float32))
    data = tokenize(rows, tokenizer, joint=False, max_length=max_length)
    phrases, line = make_phrases(data, trees, tokenizer, replace(SETTINGS, **settings), held_out)
    assert phrases.offsets.tolist() == [0, 0, len(phrases.labels)]  # the first sentence has no tree
    return list(zip(phrases.starts, phrases.stops, phrases.labels, strict=True)), line


def test_phrases_are_found_by_the_word_pieces_of_their_words(trees, tokenizer):
    assert trees[1] == Tree(
        ["ab", "-LRB-", "c", "de"],
        [(0, 1, 2), (1, 2, 1), (2, 3, 2), (3, 4, 3), (2, 4, 0), (1, 4, 4), (0, 4, 3)],
    )
    # [CLS] a ##b ( c d ##e [SEP]; the whole sentence is the example itself.
    found, line = align(trees, tokenizer)
    assert found == [(4, 7, 0), (3, 7, 4)]
    assert line == "2 in 1 of 2 training sentences; 0 that stand in a dev or test file are left out"
    words = [(1, 3, 2), (3, 4, 1), (4, 5, 2), (5, 7, 3)]
    assert align(trees, tokenizer, min_words=1)[0] == [*words, *found]
    # An example of a dev or test file, whatever its case and marks; and a sentence that was cut.
    found, line = align(trees, tokenizer, held_out={text_key(("C, de!",))})
    assert not found and "; 2 that stand" in line  # `( c de` counts as the same
    assert align(trees, tokenizer, max_length=6, min_words=1)[0] == words[:3]
    assert align(trees, tokenizer, label=np.nan)[0] == []  # a test sentence, for a teacher to label


def test_weightings_by_hand():
    lengths, labels = np.array([2, 3, 7]), np.array([2, 2, 0])
    expected = {"equal": [1, 1, 1], "length": [2, 3, 7], "label": [0.5, 0.5, 1]}
    assert expected == {name: weigh(lengths, labels).tolist() for name, weigh in PHRASE_WEIGHTINGS.items()}


def test_missing_and_bad_files_are_named_with_the_flag(tmp_path):
    path = tmp_path / "none.txt"
    assert refusal(read_tree_file, path, "sst").startswith(f"--phrase_weight: {path}")
    path.write_text(TREE + "(7 (2 a) (2 b))\n")
    assert f"{path}:2: label is '7'; expected" in refusal(read_tree_file, path, "sst")

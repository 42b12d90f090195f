"""What is said of data that are read and tokenized."""

import re
from pathlib import Path

import pytest

from datasets import Rows
from tests.tiny import make_encoder
from tokenizer import BertTokenizer
from training.run_data import tokenize_split
from training.settings import TokenSettings


@pytest.mark.parametrize("joint", [False, True])
def test_sentences_of_unknown_words_are_counted_and_named(tmp_path, capsys, joint):
    tokenizer = BertTokenizer.from_pretrained(make_encoder(tmp_path / "encoder"))  # knows letters a to z
    texts = [("a", "b"), ("\u03b1\u03b2 \u03b3", "b"), ("a", "\u4e2d"), ("\u03b1 a", "b"), ("", "b")]
    rows = Rows(Path("x.csv"), ["p", "q", "r", "s", "t"], texts, None)
    settings = TokenSettings(joint={"para": joint}, max_length=9, cache_dir=None)
    tokenize_split(settings, {"para": rows}, tokenizer)
    out = capsys.readouterr().out
    assert re.findall("warning.*", out) == [
        "warning: x.csv: 2 rows with a sentence of unknown words only ([UNK]), kept (ids q, r)"
    ]

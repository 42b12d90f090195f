"""What is said of data that are read and tokenized."""

import re
from pathlib import Path

import pytest
import torch

from bert import BertModel
from datasets import Rows
from evaluation import NOTHING_ADDED
from tests.tiny import make_config, make_encoder
from tokenizer import BertTokenizer
from training.run_data import make_model, tokenize_split
from training.settings import ModelSettings, TokenSettings


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


def test_redrawn_layers_are_the_last_ones_and_the_pooler():
    """By the seed alone; all else, heads too, is as without."""

    def weights(num_layers, seed=3):
        torch.manual_seed(0)
        bert = BertModel(make_config(50))
        for param in bert.parameters():
            param.data += 0.5  # as if trained, LayerNorm and biases included
        more = (NOTHING_ADDED, seed, num_layers)
        settings = ModelSettings({"sst": "single"}, {}, "pooler", 1, 0.1, False, *more)
        return make_model(settings, bert).state_dict()

    plain, redrawn, again, other = weights(0), weights(1), weights(1), weights(1, seed=4)
    for name, weight in redrawn.items():
        is_new = name.startswith(("bert.encoder.layer.1.", "bert.pooler."))
        assert torch.equal(weight, again[name]) and torch.equal(weight, plain[name]) != is_new, name
        is_matrix = is_new and weight.ndim == 2
        assert torch.equal(weight, other[name]) != (
            is_matrix or (name.startswith("heads") and weight.ndim == 2)
        )
        if is_new:
            values = weight.mean(), weight.std()
            expected = (1, 0) if name.endswith("LayerNorm.weight") else (0, 0.02 * is_matrix)
            assert [float(value) for value in values] == pytest.approx(expected, abs=3e-3), name

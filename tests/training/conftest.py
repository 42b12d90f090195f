"""What the tests of runs and checkpoints share."""

import pytest

from tests.tiny import make_encoder
from tokenizer import BertTokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return BertTokenizer.from_pretrained(make_encoder(tmp_path_factory.mktemp("encoder")))

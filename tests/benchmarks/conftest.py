"""What every benchmark starts from: a small encoder, and small data."""

import pytest

from tests.tiny import make_data, make_encoder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return make_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("tiny") / "data")

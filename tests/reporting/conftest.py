"""What the tests of this folder share: tiny data files, which nobody changes, and errors of one line."""

import pytest

from tests import tiny


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return tiny.make_data(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture
def one_line(capsys):
    """Reads what was printed as an error since the last look, which has to be one line."""
    return lambda: tiny.one_line(capsys)

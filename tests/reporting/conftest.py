"""What the tests of this folder share: tiny data files, which nobody changes, and errors of one line."""

import pytest

from tests.tiny import make_data


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture
def one_line(capsys):
    """Reads what was printed as an error since the last look, which has to be one line."""

    def read():
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        return error

    return read

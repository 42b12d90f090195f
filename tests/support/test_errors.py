"""support.errors: text from files is shown in messages cut, printable and in one line."""

import pytest

from support.errors import UserError, one_line, quote


def test_user_error_is_a_value_error():
    assert issubclass(UserError, ValueError)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("ab", "'ab'"),
        ("\x1b[2J\n\u202e\ud800", r"'\x1b[2J\n\u202e\ud800'"),
        ("a" * 10**7, "'" + "a" * 27 + "..." + "a" * 28 + "'"),
        ([1] * 10**6, "[1, 1, 1, 1, 1, 1, ...]"),
    ],
)
def test_quote(value, shown):
    assert quote(value) == shown


def test_quote_of_deep_nesting_and_of_endless_digits():
    nested = []
    for _ in range(100_000):
        nested = [nested]
    assert len(quote(nested)) < 20
    assert len(quote(10**4000)) < 80


def test_one_line():
    assert one_line("a  b\r\nc\x1b[2J\u202e\ud800") == "a b c?[2J??"
    assert one_line("a" * 10**7, 60) == "a" * 57 + "..."
    assert one_line(OSError("x")) == "x"

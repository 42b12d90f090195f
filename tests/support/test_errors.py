"""support.errors: text from files is shown in messages cut, printable and in one line."""

from support.errors import one_line, quote


def test_quote():
    for value, shown in (
        ("ab", "'ab'"),
        ("\x1b[2J\n\u202e\ud800", r"'\x1b[2J\n\u202e\ud800'"),
        ("a" * 10**7, "'" + "a" * 27 + "..." + "a" * 28 + "'"),
        ([1] * 10**6, "[1, 1, 1, 1, 1, 1, ...]"),
    ):
        assert quote(value) == shown
    nested = []
    for _ in range(100_000):
        nested = [nested]
    assert len(quote(nested)) < 20 and len(quote(10**4000)) < 80


def test_one_line():
    assert one_line("a  b\r\nc\x1b[2J\u202e\ud800") == "a b c?[2J??"
    assert one_line("a" * 10**7, 60) == "a" * 57 + "..."
    assert one_line(OSError("x")) == "x"

"""support.files: JSON and bytes are read or refused in one line; text is written whole or not at all."""

import os
from pathlib import Path

import pytest

from support.errors import UserError
from support.files import read_bytes, read_json, write_text

NO_FILES = {
    "absent": (lambda path: None, "No such file or directory"),
    "folder": (Path.mkdir, "not a regular file"),
    "pipe": (os.mkfifo, "not a regular file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "link to itself": (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
}


@pytest.mark.parametrize("case", NO_FILES)
def test_what_is_no_file_is_refused_at_once(tmp_path, case):
    make, reason = NO_FILES[case]
    path = tmp_path / "file.json"
    make(path)
    for read in (read_json, read_bytes):
        with pytest.raises(UserError) as caught:
            read(path)
        assert str(caught.value) == f"{path}: cannot be read ({reason})"


BAD_JSON = {
    "empty": (b"", "not a JSON file"),
    "cut off": (b'{"a": 24', "not a JSON file"),
    "not UTF-8": (b'\xff{"a": 24}', "not a JSON file"),
    "deeply nested": (b"[" * 100_000, "not a JSON file"),
    "number of 5000 digits": (b'{"a": ' + b"9" * 5000 + b"}", "not a JSON file (Exceeds the limit"),
    "list": (b"[]", "expected a JSON object, found list"),
    "key twice": (b'{"a": 1, "b": 2, "a": 1}', "not a JSON file (the key 'a' stands there twice)"),
    "inner key twice": (b'{"a": [{"b": 1, "b": 1}]}', "not a JSON file (the key 'b' stands there twice)"),
    "huge": (b" " * 2**24 + b"{}", "too large; expected at most 16 MiB"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_bad_json(tmp_path, case):
    contents, message = BAD_JSON[case]
    path = tmp_path / "file.json"
    path.write_bytes(contents)
    with pytest.raises(UserError) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


def test_write_text_makes_folders_and_keeps_line_ends(tmp_path):
    path = tmp_path / "deep" / "deeper" / "file.csv"
    write_text(path, "a\nna\u00efve\r\n")
    assert path.read_bytes() == b"a\nna\xc3\xafve\r\n"
    assert [file.name for file in path.parent.iterdir()] == ["file.csv"]


def test_write_text_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "file.csv"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half of the text \ud800")  # a lone surrogate: no UTF-8 can hold it
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_write_text_leaves_the_old_file_when_the_disk_fails(tmp_path, monkeypatch, function):
    path = tmp_path / "file.csv"
    write_text(path, "old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match="disk full"):
        write_text(path, "next")
    assert path.read_text() == "old"

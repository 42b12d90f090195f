"""Bad data: each case is one line of error or a counted warning, from `read_rows` and from the command.

Also checks across files, the record for the run folder, and the command itself.
"""

import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import DEFAULT_TASKS, TASKS
from datasets import (
    MAX_ERRORS,
    MAX_FIELD_SIZE,
    WARNINGS,
    DataError,
    Rows,
    name_some,
    read_rows,
    warning_lines,
)
from support.errors import UserError
from support.files import ROOT
from tests.tiny import SAMPLE, make_data
from training.check_data import MAX_SHOWN, CrossCheck, check_folder, cross_checks, main, make_report
from training.sources import EXTRA_SOURCES

SST = TASKS["sst"]
HEADER, TEST_HEADER = "\tid\tsentence\tsentiment\n", "0\t\tid\tsentence\n"
GOOD = HEADER + "0\ta1\tone\t1\n1\ta2\ttwo\t2\n"  # lines 1 to 3
GOOD_FILES = {
    "train": HEADER + "0\tt1\talpha\t0\n1\tt2\tbeta\t4\n",
    "dev": HEADER + "0\td1\tgamma\t1\n1\td2\tdelta\t3\n",
    "test": TEST_HEADER + "0\t0.0\tu1\tepsilon\n1\t1.0\tu2\tzeta\n",
}
COLUMNS = "expected the tab-separated columns id, sentence, sentiment"
TEST_COLUMNS = "expected the tab-separated columns id, sentence"
QUOTES = 'write a quotation mark inside a quoted field as "", or quote no field'
SWALLOWS = f"a quotation mark in this row is closed only in line 5 and swallows the rows between; {QUOTES}"
TOO_LONG = f"a field of more than {MAX_FIELD_SIZE} characters; expected a sentence"
BAD_ID = "expected no comma, tab, quotation mark or line break, which would break the prediction file"
LABEL = "expected a number from 0 to 4, without fraction"
UTF_16 = ": looks like UTF-16; save it as UTF-8"
NO_FILE = (
    ": no such file; 'make data' downloads the course's files into data/, and '--data_dir data/sample' takes"
    " the sample that comes with the project"
)
NUL = "a NUL byte; expected text, so the file may be damaged"


class Case(NamedTuple):
    """A file's split and contents (None: no file; a function makes it), and what is said after its path."""

    split: str
    contents: str | bytes | Callable | None
    message: str
    outcome: str = "error"


def warning(split: str, contents: str | bytes, message: str) -> Case:
    return Case(split, contents, message, "warning")


def row(text: str, message: str, split: str = "train") -> Case:
    """A bad row in line 4 of a train or dev file."""
    return Case(split, GOOD + text + "\n", f":4: {message}")


def link_to_device(path: Path) -> None:
    path.symlink_to("/dev/null")


BAD_DATA = {
    # The file as such.
    "missing file": Case("train", None, NO_FILE),
    "missing test file": Case("test", None, NO_FILE),
    "folder": Case("train", Path.mkdir, ": is a folder; expected a file"),
    "pipe": Case("dev", os.mkfifo, ": is a pipe or device; expected a file"),
    "device": Case("train", link_to_device, ": is a pipe or device; expected a file"),
    "UTF-16": Case("train", GOOD.encode("utf-16"), UTF_16),
    "UTF-16 without a mark": Case("train", GOOD.encode("utf-16-be"), UTF_16),
    "gzip": Case("train", gzip.compress(GOOD.encode()), ": looks like a gzip archive; unpack it"),
    "zip": Case(
        "train",
        b"PK\x03\x04rest",
        ": looks like a zip archive or a spreadsheet; unpack it, or export it as tab-separated text",
    ),
    "pointer of Git LFS": Case(
        "train",
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n",
        ": a Git LFS pointer, not yet the file itself; fetch that with 'git lfs pull', or download it by"
        " hand",
    ),
    "NUL byte": row("2\ta3\tth\0ree\t1", NUL),
    "nothing but NUL bytes": Case("train", "\0" * 5000, f":1: {NUL}"),
    "not UTF-8": Case(
        "train",
        GOOD.replace("\n", "\r\n").encode() + b"\r2\ta3\tna\xefve\t1\n",
        ":5: not UTF-8 text (byte 0xef); save the file as UTF-8",
    ),
    # The header, and whether there is anything under it.
    "empty file": Case("train", "", f": the file is empty; {COLUMNS}"),
    "blank lines only": Case("test", "\n\r\n", f": the file is empty; {TEST_COLUMNS}"),
    "header only": Case("dev", HEADER, ": no usable row; the file holds a header and no rows"),
    "no usable row": Case(
        "train",
        HEADER + "0\ta1\tone\t\n1\ta2\t \t1\n",
        ": no usable row; 1 row without a label, left out (line 2);"
        " 1 row with an empty sentence, left out (line 3)",
    ),
    "wrong columns": Case(
        "train",
        GOOD.replace("sentence", "text"),
        f":1: no column 'sentence'; {COLUMNS}, found (unnamed), id, text, sentiment",
    ),
    "no label column": Case(
        "train",
        TEST_HEADER + "0\t\ta1\tone\n",
        f":1: no column 'sentiment'; {COLUMNS}, found 0, (unnamed), id, sentence",
    ),
    "column twice": Case(
        "train",
        GOOD.replace("\tid", "id\tid"),
        f":1: two columns 'id'; {COLUMNS}, found id, id, sentence, sentiment",
    ),
    "header of 200 columns": Case(
        "train",
        "\t".join(f"c{n}" for n in range(200)) + "\n",
        f":1: no column 'id'; {COLUMNS}, found c0, c1, c2, c3, c4, c5, c6, c7 and 192 more",
    ),
    "header with escape sequences": Case(
        "train", f"\x1b[2J\t{'x' * 70}\n", f":1: no column 'id'; {COLUMNS}, found ?[2J, {'x' * 57}..."
    ),
    "header of 10 MB": Case("train", "x" * 10_000_000 + "\t\n", f":1: {TOO_LONG}"),
    "commas": Case(
        "train", '"","id","sentence","sentiment"\n', f":1: separated by commas, it seems; {COLUMNS}"
    ),
    "semicolons": Case(
        "test", "id;sentence\na1;one\n", f":1: separated by semicolons, it seems; {TEST_COLUMNS}"
    ),
    "commas and blanks": Case(
        "train", "id , sentence , sentiment\n", f":1: separated by commas, it seems; {COLUMNS}"
    ),
    "one column": Case("train", "sentence\none\n", f":1: no column 'id'; {COLUMNS}, found sentence"),
    "one column and a blank": Case("dev", "id \na1\n", f":1: no column 'sentence'; {COLUMNS}, found id"),
    "column twice, once with a blank": Case(
        "train",
        GOOD.replace("\tid", "id \tid"),
        f":1: two columns 'id'; {COLUMNS}, found id, id, sentence, sentiment",
    ),
    # Quotation marks and fields.
    "quote never closed": row(
        '2\ta3\t"three\t1\n3\ta4\tfour\t2', f"a quotation mark in this row is never closed; {QUOTES}"
    ),
    "quote never closed in a long file": row(
        '2\ta3\t"three\t1\n' + f"3\ta4\t{'x' * 990}\t2\n" * 5000,
        f"a quotation mark in this row is not closed up to line 136; {QUOTES}",
    ),
    "quote that ends a later field": row('2\ta3\t"three\t1\n3\ta4\tfour"\t2', SWALLOWS),
    "quote that begins a later field": row(
        '2\ta3\t"three\t1\n3\ta4\tfour\t2\n4\ta5\t"five"\t2',
        f"a quotation mark in this row is closed only in line 6, with text after it; {QUOTES}",
    ),
    "quote in old Mac line ends": Case(
        "train", (GOOD + '2\ta3\t"three\t1\n3\ta4\tfour"\t2\n').replace("\n", "\r"), f":4: {SWALLOWS}"
    ),
    "text after a closing quote": row(
        '2\ta3\t"Yes" or "no"\t1', f"text after the quotation mark that closes a field; {QUOTES}"
    ),
    "field of 10 MB": row(f"2\ta3\t{'x' * 10_000_000}\t1", TOO_LONG),
    "too many fields": row(
        "2\ta3\tx\ty\t1",
        "5 fields, more fields than the header has columns (4);"
        " put a sentence that holds a tab in quotation marks",
    ),
    # Ids.
    "id twice": row("2\tA1\tthree\t1", "id 'a1' appears twice, first in line 2"),
    "id twice after a sentence of two lines": Case(
        "train",
        GOOD + '2\ta3\t"three\nlines"\t1\n3\ta3\tx\t1\n',
        ":6: id 'a3' appears twice, first in line 4",
    ),
    "no id": row("2\t \tx\t1", "the row has no id; expected one in each row"),
    "id with a comma": Case("test", TEST_HEADER + "0\t\ta,b\tx\n", f":2: id is 'a,b'; {BAD_ID}"),
    "id with a tab": row('2\t"a\tb"\tx\t1', f"id is 'a\\tb'; {BAD_ID}"),
    "id with a quote": row("2\ta\"b'\tx\t1", f"id is 'a\"b\\''; {BAD_ID}", "dev"),
    "id with a line break": row('2\t"a\nb"\tx\t1', f"id is 'a\\nb'; {BAD_ID}"),
    "id with a Unicode line break": row("2\ta\u2028b\tx\t1", f"id is 'a\\u2028b'; {BAD_ID}"),
    "long id with escape sequences": row(
        f"2\t\x1b[31m{'x' * 100_000}\tx\t1", f"id is '\\x1b[31m{'x' * 19}...{'x' * 28}'; {BAD_ID}"
    ),
    # Labels.
    "label too high": row("2\ta3\tx\t5", f"sentiment is '5'; {LABEL}"),
    "label too low": row("2\ta3\tx\t-1", f"sentiment is '-1'; {LABEL}"),
    "label with a fraction": row("2\ta3\tx\t1.5", f"sentiment is '1.5'; {LABEL}"),
    "label NaN": row("2\ta3\tx\tNaN", f"sentiment is 'NaN'; {LABEL}"),
    "label infinite": row("2\ta3\tx\t-inf", f"sentiment is '-inf'; {LABEL}"),
    "label with an underscore": row(
        "2\ta3\tx\t0_1", f"sentiment is '0_1'; {LABEL}"
    ),  # float() takes it for 1
    "label not a number": row(
        f"2\ta3\tx\tgood\x1b[5m{'!' * 99}",
        f"sentiment is 'good\\x1b[5m{'!' * 16}...{'!' * 28}'; {LABEL}",
        "dev",
    ),
    "label after blank lines": Case(
        "train", GOOD + "\n\n2\ta3\tx\tbad\n", f":6: sentiment is 'bad'; {LABEL}"
    ),
    "several errors": row(
        "2\ta3\tx\t9\n3\t\tx\t1\n4\ta1\tx\t1",
        f"sentiment is '9'; {LABEL}, and 2 more errors in this file;"
        " 'python -m training.check_data {folder}' lists them",
    ),
    # Accepted, with a warning.
    "byte order mark": warning("train", "\ufeff" + GOOD, ": begins with a byte order mark, ignored"),
    "CRLF": warning("train", GOOD.replace("\n", "\r\n"), ": has Windows line ends (CRLF), accepted"),
    "old Mac line ends": warning(
        "train",
        GOOD.replace("\n", "\r"),
        ": has lone carriage returns (old Mac line ends), taken for line ends (first in line 1)",
    ),
    "blanks in the header": warning(
        "train",
        GOOD.replace("id\tsentence\tsentiment", "id \t sentence\t\u00a0sentiment "),
        ": has blanks around names of columns, ignored",
    ),
    "no label": warning(
        "train", GOOD + "2\ta3\tx\t\n3\ta4\tx\t \n", ": 2 rows without a label, left out (lines 4, 5)"
    ),
    "empty sentence": warning(
        "dev", GOOD + "2\ta3\t \u00a0\t1\n", ": 1 row with an empty sentence, left out (line 4)"
    ),
    "empty sentences in test": warning(
        "test",
        TEST_HEADER + "".join(f"{n}\t\ta{n}\t\n" for n in range(7)),
        ": 7 rows with an empty sentence, kept: each test row needs a prediction"
        " (lines 2, 3, 4, 5, 6 and 2 more)",
    ),
    "too few fields": warning(
        "train",
        GOOD + "2\ta3\tcut off he",
        ": 1 row with fewer fields than the header has columns, left out (line 4)",
    ),
    "too few fields in test": warning(
        "test",
        GOOD_FILES["test"] + "2\t0\ta3\n",
        ": 1 row with fewer fields than the header has columns, kept (line 4)",
    ),
    "too few fields, but none that is needed": warning(
        "train",
        "id\tsentence\tsentiment\tnotes\na1\tone\t1\ta note\na2\ttwo\t2\n",
        ": 1 row with fewer fields than the header has columns, kept (line 3)",
    ),
    "test file with labels": warning(
        "test", GOOD, ": 2 rows with a label, which is not read in a test file (lines 2, 3)"
    ),
}


@pytest.fixture
def folder(tmp_path):
    """A folder with sentiment data in good order."""
    for split, text in GOOD_FILES.items():
        (tmp_path / SST.files[split]).write_text(text, encoding="utf-8")
    return tmp_path


def write(path: Path, content) -> None:
    path.unlink()
    if callable(content):
        content(path)
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def run_check(folder: Path, capsys, *flags: str) -> tuple[int, list[str], str]:
    code = main([str(folder), *(flags or ("--tasks", "sst", "--batch_size", "1"))])
    said = capsys.readouterr()
    return code, said.out.splitlines(), said.err


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(case, folder, capsys):
    split, contents, message, outcome = BAD_DATA[case]
    path = folder / SST.files[split]
    write(path, contents)
    message = str(path) + message.replace("{folder}", str(folder))
    started = time.perf_counter()
    if outcome == "error":
        with pytest.raises(UserError) as caught:
            read_rows(path, SST, split)
        assert str(caught.value) == message
        expected = getattr(caught.value, "errors", [message])
    else:
        assert warning_lines(read_rows(path, SST, split)) == [message]
        expected = [message]
    code, out, err = run_check(folder, capsys)
    assert time.perf_counter() - started < 5
    if case == "missing test file":
        outcome = "warning"  # training does without
    assert [line for line in out if line.startswith(" ")] == [
        f"       {outcome}: {text}" for text in expected
    ]
    if outcome == "error":
        number = f"{len(expected)} error{'s' * (len(expected) > 1)}"
        assert code == 2
        assert err == f"training.check_data: error: {folder}: {number}, 0 warnings, listed above\n"
    else:
        assert code == 0 and err == "" and out[-1] == "0 errors, 1 warning"


def test_every_kind_of_warning_has_a_case(folder):
    kinds = set()
    for split, contents, _, outcome in BAD_DATA.values():
        if outcome == "warning":
            write(folder / SST.files[split], contents)
            kinds |= set(read_rows(folder / SST.files[split], SST, split).warnings)
    assert kinds == set(WARNINGS)


# Each kind of error, by words of its message, and each kind of warning -> the words for it in docs/data.md.
ERRORS_ON_THE_PAGE = {
    "no such file": "missing",
    "is a folder": "a folder",
    "is a pipe or device": "a pipe",
    "looks like": "UTF-16, gzip, zip",
    "NUL byte": "NUL bytes",
    "not UTF-8 text": "not UTF-8",
    "the file is empty": "empty",
    "no usable row": "usable row",
    "separated by": "other separators",
    "Git LFS": "Git LFS",
    "no column": "column is missing",
    "two columns": "twice",
    "quotation mark in": "quotation marks",
    "text after the quotation": "text after the closing one",
    "a field of more than": "131,072 characters",
    "more fields than": "more fields than",
    "no id": "ids: missing",
    "appears twice": "twice",
    "id is": "would break a prediction file",
    "sentiment is": "labels: not a number",
}
WARNINGS_ON_THE_PAGE = {
    "byte order mark": "byte order mark",
    "blanks in the header": "blanks around the header's names",
    "CRLF": "Windows",
    "CR": "old Mac line ends",
    "no label": "without a label",
    "empty sentence": "empty sentence",
    "too few fields": "too few fields",
    "empty sentence, kept": "kept in test",
    "too few fields, kept": "kept in test",
    "label in a test file": "labels in a test file",
}
DATA_PAGE = ROOT / "docs" / "data.md"


def test_every_kind_has_words():
    errors = [case.message for case in BAD_DATA.values() if case.outcome == "error"]
    assert all(any(kind in message for kind in ERRORS_ON_THE_PAGE) for message in errors)
    assert all(any(kind in message for message in errors) for kind in ERRORS_ON_THE_PAGE)
    assert set(WARNINGS_ON_THE_PAGE) == set(WARNINGS)


@pytest.mark.skipif(not DATA_PAGE.exists(), reason="docs/data.md is not written yet")
def test_the_page_about_data_names_each_kind_of_error_and_warning():
    page = " ".join(DATA_PAGE.read_text(encoding="utf-8").split())
    words = {*ERRORS_ON_THE_PAGE.values(), *WARNINGS_ON_THE_PAGE.values()}
    assert [each for each in sorted(words) if each not in page] == []


def test_what_is_accepted_is_read_rightly(folder):
    """A byte order mark, other line ends, blank lines and a missing last line end change no row."""
    path = folder / SST.files["train"]
    reference = read_rows(path, SST, "train")
    text = GOOD_FILES["train"]
    variants = (
        text.replace("\n", "\r\n"),
        text.replace("\n", "\r"),
        "\ufeff" + text,
        "\n\n" + text,
        text[:-1],
        text.replace("\tid\tsentence\t", " \t id\tsentence \t"),
    )
    for variant in (*variants, text.replace("\n", "\n\n\n")):
        path.write_bytes(variant.encode())
        rows = read_rows(path, SST, "train")
        assert (rows.ids, rows.texts, rows.labels.tolist(), rows.num_rows) == (
            reference.ids,
            reference.texts,
            reference.labels.tolist(),
            2,
        )
        assert rows.sha256 != reference.sha256


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")]
)
@pytest.mark.parametrize("name", ["support.files.open", "pathlib.Path.stat"])
def test_file_that_cannot_be_read(folder, monkeypatch, capsys, name, error):
    """Simulated, because root, who may run these tests, can read every file."""
    path, original = folder / SST.files["dev"], open if name == "support.files.open" else Path.stat

    def refuse(file, *args, **options):
        if file == path:
            raise error
        return original(file, *args, **options)

    monkeypatch.setattr(name, refuse, raising=False)
    message = f"{path}: cannot be read ({error.strerror})"
    with pytest.raises(UserError) as caught:
        read_rows(path, SST, "dev")
    assert str(caught.value) == message
    code, out, _ = run_check(folder, capsys)
    assert code == 2 and f"       error: {message}" in out


def test_all_errors_of_a_file_are_kept(folder, capsys):
    path = folder / SST.files["train"]
    path.write_text(HEADER + "".join(f"{n}\tb{n}\tx\tbad\n" for n in range(MAX_SHOWN + 5)))
    with pytest.raises(DataError, match=f"and {MAX_SHOWN + 4} more errors in this file; ") as caught:
        read_rows(path, SST, "train")
    assert len(caught.value.errors) == MAX_SHOWN + 5
    code, out, err = run_check(folder, capsys)
    assert code == 2 and f"{MAX_SHOWN + 5} errors" in err
    assert [line for line in out if line.startswith(" ")] == [
        *(f"       error: {text}" for text in caught.value.errors[:MAX_SHOWN]),
        "       and 5 more errors in this file",
    ]
    # Elsewhere --check would not find the file, so it is not pointed to.
    other = shutil.copy(path, folder / "mine.tsv")
    with pytest.raises(DataError, match="more errors in this file$"):
        read_rows(other, SST, "train")


def test_what_ends_the_reading_comes_first(folder):
    path = folder / SST.files["train"]
    path.write_text(GOOD + '2\ta3\tx\tbad\n3\ta4\t"x\t1\n')
    said = r":5: a quotation mark .* never closed; .*, and 1 more error in this"
    with pytest.raises(DataError, match=said):
        read_rows(path, SST, "train")


def test_very_many_errors_end_the_reading(folder):
    path = folder / SST.files["train"]
    path.write_text(HEADER + "0\t\tx\t1\n" * (MAX_ERRORS + 50))
    with pytest.raises(DataError, match=f"and at least {MAX_ERRORS - 1} more errors") as caught:
        read_rows(path, SST, "train")
    assert len(caught.value.errors) == MAX_ERRORS


PIECES = st.sampled_from(
    [
        b"\t",
        b"\n",
        b"\r",
        b'"',
        b"\0",
        b"\xef\xbb\xbf",
        b"\xff",
        b"\x1b[2J",
        b"a",
        b"1",
        b"nan",
        b",",
        b" ",
        b"\\",
    ]
)


@settings(derandomize=True, deadline=None, max_examples=200, database=None)
@given(pieces=st.lists(PIECES | st.binary(max_size=3), max_size=40), header=st.booleans())
def test_any_bytes_are_read_or_refused_in_one_printable_line(tmp_path_factory, pieces, header):
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(HEADER.encode() * header + b"".join(pieces))
    for split in ("train", "test"):
        try:
            said = warning_lines(read_rows(path, SST, split))
        except UserError as error:
            said = [str(error)]
        assert all(line.isprintable() and len(line) < 500 for line in said)


def test_names_in_messages():
    assert name_some([1, 2]) == "1, 2" and name_some(range(7)) == "0, 1, 2, 3, 4 and 2 more"


# --- across files -------------------------------------------------------------------------------------------


def make_rows(texts: list[str], labels=None) -> Rows:
    labels = None if labels is None else np.array(labels, dtype=np.float32)
    return Rows(Path("rows.csv"), [f"id{n}" for n in range(len(texts))], [(text,) for text in texts], labels)


def messages(*args) -> list[str]:
    return [check.message for check in cross_checks(*args)]


def test_train_rows_in_dev_are_counted_and_named():
    train = {"sst": make_rows(["a", "b", "c", "c"], [0, 1, 2, 3])}
    dev = {"sst": make_rows(["x", "c", "A", "a", "c"], [0, 1, 2, 3, 4])}
    said = "3 of 5 sst dev examples also occur in its training data (dev ids id1, id3, id4)"
    assert cross_checks(train, dev) == [CrossCheck("overlap", "sst", "dev", 3, said)]
    assert cross_checks(train, {}) == cross_checks({}, dev) == []


@pytest.mark.parametrize(("task", "label"), [("sst", 3), ("para", 0), ("sts", 2.5)])
def test_equal_labels_are_warned_about(task, label):
    one, several = make_rows(["a", "b"], [label] * 2), make_rows(["c", "d"], [0, 1])
    assert messages({task: one}, {task: several}) == [
        f"all {task} train labels are {label:g}; there is nothing to learn"
    ]
    assert messages({task: several}, {task: one}) == [
        f"all {task} dev labels are {label:g}; its score will say nothing"
    ]


def test_fewer_rows_than_a_batch_are_warned_about():
    train = {"sst": make_rows(["a", "b"], [0, 1]), "para": make_rows(["a"] * 9, [0, 1] * 4 + [0])}
    sizes = {"sst": 3, "para": 9}
    assert messages(train, {}, sizes) == ["2 sst training examples, fewer than a batch of 3"]
    assert cross_checks(train, {}, {"sst": 2}) == cross_checks(train, {}) == []


def test_files_are_compared_by_check_too(folder, capsys):
    (folder / SST.files["dev"]).write_text(HEADER + "0\td1\talpha\t2\n")
    code, out, _ = run_check(folder, capsys, "--tasks", "sst")
    assert code == 0 and [line for line in out if line.startswith(" ")] == [
        "       warning: 1 of 1 sst dev examples also occur in its training data (dev ids d1)",
        "       warning: all sst dev labels are 2; its score will say nothing",
        "       warning: 2 sst training examples, fewer than a batch of 8",
    ]


def test_report_for_the_run_folder(folder):
    path = folder / SST.files["train"]
    path.write_text(GOOD + "".join(f"{n}\tn{n}\tx\t\n" for n in range(7)))
    train = {"sst": read_rows(path, SST, "train"), "sts": make_rows(["a", "b"], [1, 4])}
    test = {"sst": read_rows(folder / SST.files["test"], SST, "test")}
    report = make_report({"train": train, "test": test}, cross_checks(train, {}, {"sst": 5, "sts": 2}))
    assert report == json.loads(json.dumps(report))
    assert report["tasks"]["sst"]["train"] == {
        "path": str(path),
        "sha256": train["sst"].sha256,
        "rows": 9,
        "examples": 2,
        "labels": {"counts": {"0": 0, "1": 1, "2": 1, "3": 0, "4": 0}},
        "warnings": {
            "no label": {
                "count": 7,
                "first_lines": [4, 5, 6, 7, 8],
                "message": "7 rows without a label, left out (lines 4, 5, 6, 7, 8 and 2 more)",
            }
        },
    }
    assert report["tasks"]["sts"]["train"]["labels"] == {"mean": 2.5, "min": 1, "max": 4}
    assert report["tasks"]["sst"]["test"]["labels"] == {} and report["tasks"]["sst"]["test"]["rows"] == 2
    assert [check["check"] for check in report["cross_checks"]] == ["fewer rows than a batch"]


# --- python -m training.check_data --------------------------------------------------------------------------


def test_good_folder(tmp_path, capsys):
    make_data(tmp_path / "data")
    code, out, err = run_check(tmp_path / "data", capsys, "--batch_size", "4")
    assert code == 0 and err == "" and out[-1] == "0 errors, 0 warnings"
    assert len(out) == 3 * len(TASKS) + len(("sick", "cfimdb")) + 1
    path = tmp_path / "data" / SST.files["train"]
    assert out[0].startswith(f"sst    train     24 examples from {path} (labels: 0: ")


def test_the_sample_that_comes_with_the_project():
    lines, num_errors, num_warnings = check_folder(SAMPLE, DEFAULT_TASKS, 16)
    assert num_errors == 0 and num_warnings == 2
    assert sum("without a label, left out" in line for line in lines) == 2  # as in the course's Quora files


def test_absent_tasks(folder, tmp_path, capsys):
    """Only an error if they are asked for, or if there is none at all."""
    code, out, _ = run_check(folder, capsys, "--batch_size", "2")
    assert code == 0 and {"para   absent", "sts    absent", "cfimdb absent"} <= set(out)
    code, out, err = run_check(folder, capsys, "--tasks", "sst,sts", "--batch_size", "2")
    message = f"{folder}: none of sts-train.csv, sts-dev.csv, sts-test-student.csv is there"
    assert code == 2 and f"       error: {message}" in out and "cfimdb absent" not in out
    assert err == f"training.check_data: error: {folder}: 1 error, 0 warnings, listed above\n"
    empty = tmp_path / "empty"
    empty.mkdir()
    code, out, _ = run_check(empty, capsys, "--batch_size", "2")
    assert code == 2 and f"       error: {empty}: no data file of any task is there" in out


def test_sources_of_additional_data(tmp_path, capsys):
    data = make_data(tmp_path / "data")
    path = data / EXTRA_SOURCES["sick"].files[0]
    good = path.read_text()
    path.write_text(good + "a\tb\t\n")
    _, out, _ = run_check(data, capsys, "--tasks", "sts", "--batch_size", "1")
    assert f"sts    extra     10 examples of 11 rows from sick ({path})" in out
    assert not any("cfimdb" in line for line in out)  # feeds sst
    path.write_text(good + "a\tb\t7\n")
    code, out, _ = run_check(data, capsys, "--tasks", "sts", "--batch_size", "1")
    message = f"{path}:12: relatedness_score is '7'; expected a number from 1 to 5"
    assert code == 2 and f"       error: {message}" in out
    path.write_text(good.splitlines()[0] + "\na\tb\t\n")
    code, out, _ = run_check(data, capsys, "--tasks", "sts", "--batch_size", "1")
    assert code == 0 and "       warning: sick: no row with a usable label and sentence" in out
    path.unlink()
    os.mkfifo(path)
    code, out, _ = run_check(data, capsys, "--tasks", "sts", "--batch_size", "1")
    assert code == 2 and f"       error: --extra_data: {path}: cannot be read (not a regular file)" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "the following arguments are required: DIR"),
        ([".", "--tasks", "xyz"], "argument --tasks: value is 'xyz'; expected some of"),
        (
            [".", "--batch_size", "0"],
            "argument --batch_size: value is '0'; expected a whole number",
        ),
    ],
)
def test_wrong_use(flags, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(flags)
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith(f"training.check_data: error: {message}")


def test_folder_that_is_not_there(tmp_path, capsys):
    for path in (tmp_path / "absent", Path(__file__)):
        assert main([str(path)]) == 2
        assert capsys.readouterr().err.startswith(f"training.check_data: error: {path}: no such folder;")


@pytest.mark.slow
def test_as_a_command(folder):
    (folder / SST.files["dev"]).write_text(GOOD + "2\ta3\tx\t9\n3\ta4\tx\tbad\n")
    done = subprocess.run(
        [sys.executable, "-m", "training.check_data", str(folder), "--batch_size", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout.count("       error: ") == 2
    assert f"{SST.files['dev']}:5: sentiment is 'bad'" in done.stdout
    assert done.stderr == f"training.check_data: error: {folder}: 2 errors, 0 warnings, listed above\n"

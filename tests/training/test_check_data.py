"""Bad data: each case is one line of error or a counted warning, from `read_rows` and from the command.

Also checks across files, the record for the run folder, and the command itself.
"""

import gzip
import json
import os
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from config import DEFAULT_TASKS, TASKS
from datasets import (
    MAX_ERRORS,
    MAX_FIELD_SIZE,
    WARNINGS,
    DataError,
    Rows,
    read_rows,
    warning_lines,
)
from support.errors import UserError
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
QUOTE = "a quotation mark in this row is"
SWALLOWS = f"{QUOTE} closed only in line 5 and swallows the rows between; {QUOTES}"
TOO_LONG = f"a field of more than {MAX_FIELD_SIZE} characters; expected a sentence"
TOO_MANY = "5 fields, more fields than the header has columns (4);"
TOO_MANY += " put a sentence that holds a tab in quotation marks"
BAD_ID = "expected no comma, tab, quotation mark or line break, which would break the prediction file"
LABEL = "expected a number from 0 to 4, without fraction"
UTF_16 = ": looks like UTF-16; save it as UTF-8"
NOT_UTF_8 = GOOD.replace("\n", "\r\n").encode() + b"\r2\ta3\tna\xefve\t1\n"
UNNAMED = "(unnamed), id, text, sentiment"
TWO_LINES = '2\ta3\t"three\nlines"\t1\n3\ta3\tx\t1\n'  # and two rows
UNPACK = "unpack it, or export it as tab-separated text"
FETCH = "fetch that with 'git lfs pull', or download it by hand"
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
LEFT_OUT = "1 row without a label, left out (line 2); 1 row with an empty sentence, left out (line 3)"
NO_FILE = (
    ": no such file; 'make data' downloads the course's files into data/, and '--data_dir data/sample' takes"
    " the sample that comes with the project"
)
NUL = "a NUL byte; expected text, so the file may be damaged"
MANY_NAMES = "\t".join(f"c{n}" for n in range(200)) + "\n"
TWICE = f":1: two columns 'id'; {COLUMNS}, found id, id, sentence, sentiment"


def absent(column: str, found: str) -> str:
    return f":1: no column '{column}'; {COLUMNS}, found {found}"


def row(text: str, message: str, split: str = "train") -> tuple:
    """A bad row in line 4 of a train or dev file."""
    return split, GOOD + text + "\n", f":4: {message}"


def bad_id(found: str, shown: str) -> tuple:
    return row(f"2\t{found}\tx\t1", f"id is '{shown}'; {BAD_ID}")


def bad_label(found: str, shown: str | None = None) -> tuple:
    return row(f"2\ta3\tx\t{found}", f"sentiment is '{shown or found}'; {LABEL}")


# A file's split and contents (None: no file; a function makes it), and what is said after its path.
ERRORS = {
    # The file as such.
    "missing file": ("train", None, NO_FILE),
    "missing test file": ("test", None, NO_FILE),
    "folder": ("train", Path.mkdir, ": is a folder; expected a file"),
    "pipe": ("dev", os.mkfifo, ": is a pipe or device; expected a file"),
    "device": ("train", lambda path: path.symlink_to("/dev/null"), ": is a pipe or device; expected a file"),
    "UTF-16": ("train", GOOD.encode("utf-16"), UTF_16),
    "UTF-16 without a mark": ("train", GOOD.encode("utf-16-be"), UTF_16),
    "gzip": ("train", gzip.compress(GOOD.encode()), ": looks like a gzip archive; unpack it"),
    "zip": ("train", b"PK\x03\x04rest", f": looks like a zip archive or a spreadsheet; {UNPACK}"),
    "pointer of Git LFS": ("train", LFS_POINTER, f": a Git LFS pointer, not yet the file itself; {FETCH}"),
    "NUL byte": row("2\ta3\tth\0ree\t1", NUL),
    "nothing but NUL bytes": ("train", "\0" * 5000, f":1: {NUL}"),
    "not UTF-8": ("train", NOT_UTF_8, ":5: not UTF-8 text (byte 0xef); save the file as UTF-8"),
    # The header, and whether there is anything under it.
    "empty file": ("train", "", f": the file is empty; {COLUMNS}"),
    "blank lines only": ("test", "\n\r\n", f": the file is empty; {TEST_COLUMNS}"),
    "header only": ("dev", HEADER, ": no usable row; the file holds a header and no rows"),
    "no usable row": ("train", HEADER + "0\ta1\tone\t\n1\ta2\t \t1\n", f": no usable row; {LEFT_OUT}"),
    "wrong columns": ("train", HEADER.replace("sentence", "text"), absent("sentence", UNNAMED)),
    "column twice": ("train", GOOD.replace("\tid", "id \tid"), TWICE),
    "many columns": ("train", MANY_NAMES, absent("id", "c0, c1, c2, c3, c4, c5, c6, c7 and 192 more")),
    "header with escape sequences": ("train", f"\x1b[2J\t{'x' * 70}\n", absent("id", f"?[2J, {'x' * 57}...")),
    "header of 10 MB": ("train", "x" * 10_000_000 + "\t\n", f":1: {TOO_LONG}"),
    "commas": ("train", "id , sentence , sentiment\n", f":1: separated by commas, it seems; {COLUMNS}"),
    "semicolons": ("test", "id;sentence\na1;one\n", f":1: separated by semicolons, it seems; {TEST_COLUMNS}"),
    "one column and a blank": ("dev", "id \na1\n", absent("sentence", "id")),
    # Quotation marks and fields.
    "quote never closed": row('2\ta3\t"three\t1\n3\ta4\tfour\t2', f"{QUOTE} never closed; {QUOTES}"),
    "quote never closed in a long file": row(
        '2\ta3\t"three\t1\n' + f"3\ta4\t{'x' * 990}\t2\n" * 5000,
        f"{QUOTE} not closed up to line 136; {QUOTES}",
    ),
    "quote that ends a later field": row('2\ta3\t"three\t1\n3\ta4\tfour"\t2', SWALLOWS),
    "quote that begins a later field": row(
        '2\ta3\t"three\t1\n3\ta4\tfour\t2\n4\ta5\t"five"\t2',
        f"{QUOTE} closed only in line 6, with text after it; {QUOTES}",
    ),
    "text after a closing quote": row(
        '2\ta3\t"Yes" or "no"\t1', f"text after the quotation mark that closes a field; {QUOTES}"
    ),
    "field of 10 MB": row(f"2\ta3\t{'x' * 10_000_000}\t1", TOO_LONG),
    "too many fields": row("2\ta3\tx\ty\t1", TOO_MANY),
    # Ids.
    "id twice, once in capitals": row("2\tA1\tthree\t1", "id 'a1' appears twice, first in line 2"),
    "id twice": ("train", GOOD + TWO_LINES, ":6: id 'a3' appears twice, first in line 4"),
    "no id": row("2\t \tx\t1", "the row has no id; expected one in each row"),
    "id with a comma": ("test", TEST_HEADER + "0\t\ta,b\tx\n", f":2: id is 'a,b'; {BAD_ID}"),
    "id with a tab": bad_id('"a\tb"', "a\\tb"),
    "id with quotes": bad_id("a\"b'", "a\"b\\'"),
    "id with a line break": bad_id('"a\nb"', "a\\nb"),
    "id with a Unicode line break": bad_id("a\u2028b", "a\\u2028b"),
    "long id with escape sequences": bad_id(f"\x1b[31m{'x' * 100_000}", f"\\x1b[31m{'x' * 19}...{'x' * 28}"),
    # Labels.
    **{f"label {label}": bad_label(label) for label in ("5", "-1", "1.5", "NaN", "-inf")},
    "label with an underscore": bad_label("0_1"),  # float() takes it for 1
    "label not a number": bad_label(f"good\x1b[5m{'!' * 99}", f"good\\x1b[5m{'!' * 16}...{'!' * 28}"),
    "label after blank lines": ("train", GOOD + "\n\n2\ta3\tx\tbad\n", f":6: sentiment is 'bad'; {LABEL}"),
    "several errors": row(
        "2\ta3\tx\t9\n3\t\tx\t1\n4\ta1\tx\t1",
        f"sentiment is '9'; {LABEL}, and 2 more errors in this file;"
        " 'python -m training.check_data {folder}' lists them",
    ),
}
OLD_MAC = ": has lone carriage returns (old Mac line ends), taken for line ends (first in line 1)"
SHORT = "with fewer fields than the header has columns"
EMPTY, NO_LABEL = "with an empty sentence", "without a label"
ACCEPTED = {
    "byte order mark": ("train", "\ufeff" + GOOD, ": begins with a byte order mark, ignored"),
    "CRLF": ("train", GOOD.replace("\n", "\r\n"), ": has Windows line ends (CRLF), accepted"),
    "old Mac line ends": ("train", GOOD.replace("\n", "\r"), OLD_MAC),
    "blanks in the header": (
        "train",
        GOOD.replace("id\tsentence\tsentiment", "id \t sentence\t\u00a0sentiment "),
        ": has blanks around names of columns, ignored",
    ),
    "no label": ("train", GOOD + "2\ta3\tx\t\n3\ta4\tx\t \n", f": 2 rows {NO_LABEL}, left out (lines 4, 5)"),
    "empty sentence": ("dev", GOOD + "2\ta3\t \u00a0\t1\n", f": 1 row {EMPTY}, left out (line 4)"),
    "empty sentences in test": (
        "test",
        TEST_HEADER + "".join(f"{n}\t\ta{n}\t\n" for n in range(7)),
        f": 7 rows {EMPTY}, kept: each test row needs a prediction (lines 2, 3, 4, 5, 6 and 2 more)",
    ),
    "too few fields": ("train", GOOD + "2\ta3\tcut off he", f": 1 row {SHORT}, left out (line 4)"),
    "too few fields in test": ("test", GOOD_FILES["test"] + "2\t0\ta3\n", f": 1 row {SHORT}, kept (line 4)"),
    "too few fields, but none that is needed": (
        "train",
        "id\tsentence\tsentiment\tnotes\na1\tone\t1\ta note\na2\ttwo\t2\n",
        f": 1 row {SHORT}, kept (line 3)",
    ),
    "test with labels": (
        "test",
        GOOD,
        ": 2 rows with a label, which is not read in a test file (lines 2, 3)",
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
    """The exit code, what was found (indented lines, or all others) and what stands on standard error."""
    code = main([str(folder), *(flags or ("--tasks", "sst", "--batch_size", "1"))])
    said = capsys.readouterr()
    return code, said.out.splitlines(), said.err


def indented(lines: list[str]) -> list[str]:
    return [line.strip() for line in lines if line.startswith(" ")]


@pytest.mark.parametrize("case", ERRORS)
def test_error_is_one_line_that_names_the_place(case, folder, capsys):
    split, contents, message = ERRORS[case]
    path = folder / SST.files[split]
    write(path, contents)
    message = str(path) + message.replace("{folder}", str(folder))
    started = time.perf_counter()
    with pytest.raises(UserError) as caught:
        read_rows(path, SST, split)
    assert str(caught.value) == message
    expected = getattr(caught.value, "errors", [message])
    code, out, err = run_check(folder, capsys)
    assert time.perf_counter() - started < 5
    if case == "missing test file":  # training does without
        said = f"{path}: no such file; without it, sst gets no test predictions"
        assert code == 0 and indented(out) == [f"warning: {said}"]
        return
    assert code == 2 and indented(out) == [f"error: {text}" for text in expected]
    number = f"{len(expected)} error{'s' * (len(expected) > 1)}"
    assert err == f"training.check_data: error: {folder}: {number}, 0 warnings, listed above\n"


def test_what_is_accepted_is_counted_and_named(folder, capsys):
    kinds = set()
    for case, (split, contents, message) in ACCEPTED.items():
        path = folder / SST.files[split]
        write(path, contents)
        rows = read_rows(path, SST, split)
        assert warning_lines(rows) == [f"{path}{message}"], case
        code, out, err = run_check(folder, capsys)
        assert indented(out) == [f"warning: {path}{message}"], case
        assert code == 0 and err == "" and out[-1] == "0 errors, 1 warning"
        kinds |= set(rows.warnings)
        write(path, GOOD_FILES[split])
    assert kinds == set(WARNINGS)


def test_what_is_accepted_is_read_rightly(folder):
    """A byte order mark, other line ends, blank lines and a missing last line end change no row."""
    path = folder / SST.files["train"]
    reference = read_rows(path, SST, "train")
    text = GOOD_FILES["train"]
    blanks = text.replace("\tid\tsentence\t", " \t id\tsentence \t")
    variants = [text.replace("\n", end) for end in ("\r\n", "\r", "\n\n\n")]
    for variant in (*variants, "\ufeff" + text, "\n\n" + text, text[:-1], blanks):
        path.write_bytes(variant.encode())
        rows = read_rows(path, SST, "train")
        assert (rows.ids, rows.texts, rows.num_rows) == (reference.ids, reference.texts, 2)
        assert rows.labels.tolist() == reference.labels.tolist() and rows.sha256 != reference.sha256


@pytest.mark.parametrize("name", ["support.files.open", "pathlib.Path.stat"])
def test_file_that_cannot_be_read(folder, monkeypatch, capsys, name):
    """Simulated, because root, who may run these tests, can read every file."""
    path, original = folder / SST.files["dev"], open if name == "support.files.open" else Path.stat

    def refuse(file, *args, **options):
        if file == path:
            raise PermissionError(13, "Permission denied")
        return original(file, *args, **options)

    monkeypatch.setattr(name, refuse, raising=False)
    code, out, _ = run_check(folder, capsys)
    assert code == 2 and indented(out) == [f"error: {path}: cannot be read (Permission denied)"]


def test_all_errors_of_a_file_are_kept(folder, capsys):
    path = folder / SST.files["train"]
    path.write_text(HEADER + "".join(f"{n}\tb{n}\tx\tbad\n" for n in range(MAX_SHOWN + 5)))
    with pytest.raises(DataError, match=f"and {MAX_SHOWN + 4} more errors in this file; ") as caught:
        read_rows(path, SST, "train")
    assert len(caught.value.errors) == MAX_SHOWN + 5
    code, out, err = run_check(folder, capsys)
    assert code == 2 and f"{MAX_SHOWN + 5} errors" in err
    shown = [f"error: {text}" for text in caught.value.errors[:MAX_SHOWN]]
    assert indented(out) == [*shown, "and 5 more errors in this file"]
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


def test_any_bytes_are_read_or_refused_in_one_printable_line(tmp_path):
    path, rng = tmp_path / "any.csv", random.Random(0)
    pieces = [bytes([byte]) for byte in b'\t\n\r"\0\xffa1, \\'] + [b"\xef\xbb\xbf", b"\x1b[2J", b"nan"]
    for number in range(100):
        some = [rng.choice((rng.choice(pieces), rng.randbytes(3))) for _ in range(rng.randrange(40))]
        path.write_bytes(HEADER.encode() * (number % 2) + b"".join(some))
        for split in ("train", "test"):
            try:
                said = warning_lines(read_rows(path, SST, split))
            except UserError as error:
                said = [str(error)]
            assert all(line.isprintable() and len(line) < 500 for line in said)


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
    assert code == 0 and indented(out) == [
        "warning: 1 of 1 sst dev examples also occur in its training data (dev ids d1)",
        "warning: all sst dev labels are 2; its score will say nothing",
        "warning: 2 sst training examples, fewer than a batch of 8",
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
    assert len(out) == 3 * len(TASKS) + len(("sick", "sst_trees", "cfimdb")) + 1
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

    def check(text):
        path.unlink()
        os.mkfifo(path) if text is None else path.write_text(text)
        return run_check(data, capsys, "--tasks", "sts", "--batch_size", "1")[:2]

    _, out = check(good + "a\tb\t\n")
    assert f"sts    extra     10 examples of 11 rows from sick ({path})" in out
    assert not any("cfimdb" in line for line in out)  # feeds sst
    code, out = check(good.splitlines()[0] + "\na\tb\t\n")
    assert code == 0 and "warning: sick: no row with a usable label and sentence" in indented(out)
    for text, message in (
        (good + "a\tb\t7\n", f"{path}:12: relatedness_score is '7'; expected a number from 1 to 5"),
        (None, f"--extra_data: {path}: cannot be read (not a regular file)"),
    ):
        code, out = check(text)
        assert code == 2 and f"error: {message}" in indented(out)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "the following arguments are required: DIR"),
        ([".", "--tasks", "xyz"], "argument --tasks: value is 'xyz'; expected some of"),
        ([".", "--batch_size", "0"], "argument --batch_size: value is '0'; expected a whole number"),
    ],
)
def test_wrong_use(flags, message, refused):
    assert refused(main, flags).startswith(f"training.check_data: error: {message}")


def test_folder_that_is_not_there(tmp_path, refused):
    for path in (tmp_path / "absent", Path(__file__)):
        assert refused(main, [str(path)]).startswith(f"training.check_data: error: {path}: no such folder;")

"""Additional training rows: each form and kind of label by hand, and nothing of dev or test among them."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest

from config import DEFAULT_TASKS, TASKS
from datasets import Rows
from multitask_classifier import main
from support.errors import UserError
from tests.tiny import make_data, make_encoder
from training import sources
from training.sources import (
    EXTRA_SOURCES,
    SOURCE_FORMS,
    SourceSpec,
    add_sources,
    held_out_keys,
    read_source,
    text_key,
)

# form -> (lines, columns of files without a header, rows).
FORM_CASES = {
    "quoted": (
        ["a\tb\r\n", '"say ""hi""\tthere"\t1\r\n', "x\t2\r\n"],
        None,
        [{"a": 'say "hi"\tthere', "b": "1"}, {"a": "x", "b": "2"}],
    ),
    "plain": (
        ['1\t"a\tb"\r\n', "2\tc\td\n"],
        ("id", "first", "second"),
        [{"id": "1", "first": '"a', "second": 'b"'}, {"id": "2", "first": "c", "second": "d"}],
    ),
    "byte_literals": (
        ["s\tt\n", "b'caf\\xc3\\xa9'\tb\"it 's\"\n", "plain\t0\n"],
        None,
        [{"s": "café", "t": "it 's"}, {"s": "plain", "t": "0"}],
    ),
    "triplets": (
        ["sent0,sent1,hard_neg\r\n", '"A, b",c,d\r\n'],
        None,
        [
            {"sentence1": "A, b", "sentence2": "c", "label": "entailment"},
            {"sentence1": "A, b", "sentence2": "d", "label": "contradiction"},
        ],
    ),
    "trees": (
        ["(3 (2 The) (4 (1 bad) (3 film)))\n", "(0 no)\n"],
        None,
        [
            {"phrase": "The", "label": "2", "sentence": "The bad film"},
            {"phrase": "bad", "label": "1", "sentence": "The bad film"},
            {"phrase": "film", "label": "3", "sentence": "The bad film"},
            {"phrase": "bad film", "label": "4", "sentence": "The bad film"},
            {"phrase": "The bad film", "label": "3", "sentence": "The bad film"},
            {"phrase": "no", "label": "0", "sentence": "no"},
        ],
    ),
    "json": (
        ['{"0": {"a": "x, y", "b": "1"},\n', '"1": {"a": "z", "b": "2"}}\n'],
        None,
        [{"a": "x, y", "b": "1"}, {"a": "z", "b": "2"}],
    ),
    "pos": (['a "fine"\tfilm \n'], None, [{"sentence": 'a "fine"\tfilm \n', "label": "1"}]),
    "neg": (["dull\n", "\n"], None, [{"sentence": s, "label": "0"} for s in ("dull\n", "\n")]),
}


def test_every_form_has_a_case_and_every_source_a_form():
    assert set(FORM_CASES) == set(SOURCE_FORMS)
    endings = {Path(name).suffix[1:] for source in EXTRA_SOURCES.values() for name in source.files}
    used = {source.form for source in EXTRA_SOURCES.values()}
    assert used | (endings & set(SOURCE_FORMS)) == set(SOURCE_FORMS)


@pytest.mark.parametrize("form", FORM_CASES)
def test_form_by_hand(form):
    lines, columns, expected = FORM_CASES[form]
    names = expected[0] if expected else ()  # trees have more cells; their words are tested with phrases
    assert [{name: row[name] for name in names} for row in SOURCE_FORMS[form](lines, columns)] == expected


@pytest.mark.parametrize("name", EXTRA_SOURCES)
def test_labels_of_a_source_stay_in_the_range_of_its_task(name):
    source = EXTRA_SOURCES[name]
    task = TASKS[source.task]
    assert len(source.text_columns) == len(task.text_columns)
    assert source.task in DEFAULT_TASKS
    if isinstance(source.labels, dict):
        cells = list(source.labels)
    else:
        cells = [str(value) for value in (source.labels or task.label_range)]
    labels = [sources.map_label(cell, source, "here") for cell in cells]
    low, high = task.label_range
    assert all(low <= label <= high for label in labels)
    if isinstance(source.labels, tuple):
        assert labels == [low, high]  # the ends of the scale meet


@pytest.fixture
def source(monkeypatch, tmp_path):
    """Makes a source out of lines; the name to use is its only argument's key."""

    def make(name, text, **changes):
        settings = {
            "task": "sts",
            "form": "plain",
            "text_columns": ("a", "b"),
            "label_column": "y",
            "labels": (1, 5),
        }
        spec = SourceSpec(**({"files": (f"{name}.txt",)} | settings | changes))
        monkeypatch.setitem(EXTRA_SOURCES, name, spec)
        (tmp_path / spec.files[0]).write_bytes(text if isinstance(text, bytes) else text.encode())
        return name

    return make


def test_scale_is_stretched(source, tmp_path):
    source("s", "a\tb\ty\nx\tz\t1\nx\tw\t4.5\nx\tv\t5\n")
    found, unusable = read_source("s", tmp_path)
    assert [row.label for row in found] == [0.0, 4.375, 5.0] and unusable == 0


def test_byte_order_mark_windows_line_ends_and_blanks_in_the_header(source, tmp_path):
    source("s", b"\xef\xbb\xbfa \t b\ty\r\nx\tz\t3\r\n")
    assert read_source("s", tmp_path) == ([(("x", "z"), 2.5, None)], 0)


def test_rows_without_a_usable_label_or_sentence_are_counted(source, tmp_path):
    source(
        "s",
        "a\tb\ty\nx\tz\tyes\nx\tw\tmaybe\nx\t\tyes\nx\tw\nx\tv\tno\n",
        task="para",
        labels={"yes": 1.0, "no": 0.0},
    )
    found, unusable = read_source("s", tmp_path)
    assert found == [(("x", "z"), 1.0, None), (("x", "v"), 0.0, None)] and unusable == 3


TREES = {"form": "trees", "task": "sst", "text_columns": ("phrase",), "label_column": "label", "labels": None}


def literals(cell):
    return f"a\tb\ty\n{cell}\tz\t3\n", {"form": "byte_literals"}


# What the source's file holds, what is special about the source, and what is said.
BROKEN = [
    ("a\tb\ty\nx\tz\t6\n", {}, "s.txt:2: y is '6'; expected a number from 1 to 5"),
    ("a\tb\ty\nx\tz\t0.5\n", {"task": "para", "labels": None}, "s.txt:2: y is '0.5'"),
    ("a\tc\ty\nx\tz\t3\n", {}, "s.txt:1: no column 'b'"),
    ("a\tb\ty\nx\tz\t3\t4\n", {}, "more fields than the header"),
    (b"a\tb\ty\nx\tz\t3\n\xff\tz\t3\n", {}, "s.txt:3: not UTF-8 text (byte 0xff)"),
    ("a\tb\ty\nx\0\tz\t3\n", {}, "s.txt:2: a NUL byte"),
    ("", {}, "s.txt: holds no row; expected the form plain"),
    ("a\tb\ta\n", {}, "s.txt:1: not readable as plain (two columns have the same name)"),
    ("a\tb\ty\nx\tz\t\x1b[2J\n", {}, r"s.txt:2: y is '\x1b[2J'"),
    (f"a\tb\ty\n{'x' * 10**7}\tz\t3\n", {}, "s.txt:2: not readable as plain (field larger than field limit"),
    (
        'a\tb\ty\n"x\tz\t3\nu\tv"\tw\t3\n',
        {"form": "quoted"},
        "s.txt:3: not readable as quoted (a quotation mark",
    ),
    (*literals("b'x"), "s.txt:2: not readable as byte_literals"),
    (*literals("b'x' + b'y'"), "goes on after its end"),
    (*literals("b'x'" + "(" * 10**5), "goes on after its end"),
    (*literals("b'" + "\\" * 10**5), "is not closed"),
    (*literals(r"b'\xff'"), "s.txt:2: not readable as byte_literals ('utf-8'"),
    ("(3 (2 x)\n", TREES, "s.txt:1: not readable as trees (1 brackets are not closed)"),
    ("(3 x))\n", TREES, "s.txt:1: not readable as trees (one closing bracket too many)"),
    ("(3 x)\n(3 x) y\n", TREES, "s.txt:2: not readable as trees (a word outside all brackets)"),
    ("(0 x " * 10**4 + ")" * 10**4, TREES, "s.txt:1: not readable as trees (more than 100 nested brackets)"),
    ("(0 x) " * 10**5, TREES, "s.txt:1: not readable as trees (a line of more than 131072 characters"),
    ("a,b\n1,2\n", {"form": "triplets"}, "s.txt:2: not readable as triplets (no column 'sent0')"),
    ('{"0": {"a": "x"}}', {"form": "json"}, "s.txt:1: no column 'b'"),
    (
        '{"0": {"a": "x", "b": 1}}',
        {"form": "json"},
        "s.txt:1: not readable as json (expected an object of obj",
    ),
    ("[" * 10**5, {"form": "json"}, "s.txt:1: not readable as json"),
    ("x" * 10**6, {"form": "neg"}, "s.txt:1: not readable as neg (a line of more than 131072 characters"),
]


@pytest.mark.parametrize(("text", "changes", "message"), BROKEN, ids=range(len(BROKEN)))
def test_broken_sources_name_the_line(source, tmp_path, text, changes, message):
    source("s", text, **changes)
    with pytest.raises(UserError, match="s.txt") as error:
        read_source("s", tmp_path)
    assert message in str(error.value) and str(error.value).isprintable() and len(str(error.value)) < 400


def test_long_bytes_literal_is_read(source, tmp_path):
    source("s", "a\tb\ty\nb'" + "\\xc3\\xa9" * 10**4 + "'\tz\t3\n", form="byte_literals")
    assert read_source("s", tmp_path)[0] == [(("é" * 10**4, "z"), 2.5, None)]


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_source_that_is_no_file(source, tmp_path, make):
    source("s", "")
    (tmp_path / "s.txt").unlink()
    make(tmp_path / "s.txt")
    with pytest.raises(UserError, match="--extra_data: .*s.txt: cannot be read .not a regular file"):
        read_source("s", tmp_path)


@pytest.mark.parametrize(
    ("name", "said"),
    [("sick", "SICK.txt: no such file; 'make extra_data NAMES=sick' "), ("quora_positives", "No such file")],
)
def test_missing_source_is_named(tmp_path, name, said):
    with pytest.raises(UserError, match=f"--extra_data: .*{said}"):
        read_source(name, tmp_path)


def test_other_files_are_read_where_the_published_ones_are_not(source, tmp_path):
    text = "a\tb\ty\nx\tz\t1\n"
    source("s", text, files=("s.txt",))
    source("s", json.dumps({"0": {"a": "u", "b": "v", "y": "5"}}), files=("s.json",), other_files=("s.txt",))
    assert read_source("s", tmp_path)[0] == [(("u", "v"), 5.0, None)]
    (tmp_path / "s.json").unlink()
    assert read_source("s", tmp_path)[0] == [(("x", "z"), 0.0, None)]


def test_rows_that_contain_a_held_out_sentence_are_dropped(source, tmp_path):
    """Sixteen letters are enough, fifteen are not; the whole tree goes, unless training has its sentence."""
    held_out = {("sixteenlettersss",), ("fifteenletterss",), ("two", "inapairofsentences")}
    reviews = ["Well: sixteen letters, SS!S.", "sixteenletterssto", "x fifteenletterss y"]
    reviews += ["in a pair of sentences"]
    source(
        "s",
        "\n".join(reviews),
        **TREES | {"form": "pos", "text_columns": ("sentence",)},
        screened_column="sentence",
    )
    trees = ["(2 (1 bad) (2 (0 sixteen) (2 letterssssss)))", "(2 (2 old) (3 sixteenlettersss))"]
    source("t", "\n".join(trees), **TREES, screened_column="sentence")
    rows = Rows("train.csv", ["1"], [("old sixteenlettersss",)], np.array([1], dtype=np.float32), {})
    rows, said = add_sources(rows, {"s": None, "t": None}, tmp_path, held_out)
    assert [text for (text,) in rows.texts[1:]] == [*reviews[1:], "old"]
    assert "3 examples from s (of 4: 1 in a dev" in said[0] and "1 examples from t (of 8: 6 in" in said[1]


def test_text_key():
    assert text_key(("A Café, here!", "b")) == text_key(("B", "a cafe  here"))
    assert text_key(("a", "b")) != text_key(("a", "c"))
    assert text_key(("ab",)) != text_key(("a", "b"))


def make_rows():
    texts = [("old one", "other"), ("old two", "other")]
    return Rows("train.csv", ["1", "2"], texts, np.array([1, 2], dtype=np.float32), {"no label": [7]})


def test_what_leaks_or_is_known_is_dropped_and_counted(source, tmp_path):
    lines = "a\tb\ty, Other!\told one\t3, dev a\tdev b\t3, new\tpair\t5, PAIR\tnew\t1, more\tpair\t1, x\t\t2"
    source("s", lines.replace(", ", "\n") + "\n")
    rows, said = add_sources(make_rows(), {"s": None}, tmp_path, {text_key(("dev b", "dev a"))})
    assert rows.texts == [*make_rows().texts, ("new", "pair"), ("more", "pair")]
    assert rows.labels.tolist() == [1, 2, 5, 0] and rows.labels.dtype == np.float32
    assert len(set(rows.ids)) == 4 and rows.ids[:2] == ["1", "2"] and rows.warnings == {"no label": [7]}
    assert len(said) == 1
    assert "2 examples from s (of 6: 1 in a dev or test file, 2 already known, 1 without" in said[0]


def test_limits(source, tmp_path):
    text = "a\tb\ty\n" + "".join(f"x{n}\tz\t3\n" for n in range(50))
    source("s", text, max_examples=20)

    def take(limit):
        return add_sources(make_rows(), {"s": limit}, tmp_path, set())[0].texts[2:]

    assert len(take(None)) == 20 and take(None) == take(None)
    assert len(take(30)) == 30 and len(take(500)) == 50
    assert set(take(20)) <= set(take(30))
    assert take(20) != [(f"x{n}", "z") for n in range(20)]  # drawn, not the first ones


def test_sources_do_not_repeat_each_other(source, tmp_path):
    source("s", "a\tb\ty\nx\tz\t3\n")
    source("t", "a\tb\ty\nz\tx\t1\nx\tw\t1\n")
    rows, said = add_sources(make_rows(), {"s": None, "t": None}, tmp_path, set())
    assert rows.texts[2:] == [("x", "z"), ("x", "w")] and "1 already known" in said[1]


@pytest.mark.slow
def test_a_run_with_more_data(tmp_path, monkeypatch, capsys):
    """A dev pair that is in the source, turned round and with other punctuation, is not trained on."""
    monkeypatch.setattr("multitask_classifier.plot_run", lambda folder: None)
    data = make_data(tmp_path / "data")
    with open(data / TASKS["sts"].files["dev"], encoding="utf-8", newline="") as file:
        pair = next(csv.DictReader(file, delimiter="\t"))
    with open(data / EXTRA_SOURCES["sick"].files[0], "a", encoding="utf-8") as file:
        file.write(f"{pair['sentence2'].upper()} !\t{pair['sentence1']}\t3\n")
    flags = f"--pretrained {make_encoder(tmp_path / 'encoder')} --data_dir {data} --output_dir {tmp_path}/run"
    assert main(f"{flags} --max_steps 1 --batch_size 4 --tasks sst,sts --extra_data sick=7".split()) == 0
    assert "sts    extra 7 examples from sick (of 11: 1 in a dev or test file" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "args.json").read_text())["args"]["extra_data"] == {"sick": 7}


def test_held_out_keys_hold_dev_and_test_of_all_tasks(tmp_path):
    make_data(tmp_path)
    files = [
        (tmp_path / spec.files[split], spec, split) for spec in TASKS.values() for split in ("dev", "test")
    ]
    keys = held_out_keys(files)
    for path, spec, _ in files:
        with open(path, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file, delimiter="\t"):
                assert text_key(tuple(row[column] for column in spec.text_columns)) in keys

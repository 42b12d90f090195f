"""Bars are seen on terminals, wide or narrow, and leave nothing in a pipe or a file."""

import io
import sys

import numpy as np
import pytest
from tqdm import tqdm

import datasets
import evaluation
import tokenizer
from bert import BertModel
from config import TASKS
from heads import MultitaskBERT
from reporting import predict
from support import bars
from support.bars import Bar, has_terminal
from tests.tiny import make_config, make_data, make_encoder
from training.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """Makes both streams a terminal of so many columns; returns it."""

    def make(columns):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("LINES", "25")
        stream = Terminal()
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, stream)
        monkeypatch.setattr(bars, "MIN_SECONDS", 0)
        monkeypatch.setattr(tqdm, "__init__", at_once(tqdm.__init__, columns))
        return stream

    return make


def at_once(init, columns):
    """Every update is drawn, not ten a second; a stand-in for the width that tqdm asks the system for."""

    def new_init(bar, **options):
        init(bar, mininterval=0, **options)
        bar.dynamic_ncols = lambda file: (columns, 25)

    return new_init


def test_who_sees_a_bar(monkeypatch, tmp_path):
    with open(tmp_path / "log", "w") as file:
        for stdout, stderr, seen in (
            (Terminal(), Terminal(), True),
            (file, Terminal(), True),
            (io.StringIO(), Terminal(), False),  # a pipe, perhaps `| tee log`
            (Terminal(), io.StringIO(), False),
        ):
            monkeypatch.setattr(sys, "stdout", stdout)
            monkeypatch.setattr(sys, "stderr", stderr)
            assert has_terminal() == seen
    monkeypatch.setattr(sys, "stdout", file)  # closed
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert not has_terminal()


def test_nothing_is_written_without_a_terminal(capfd):
    with Bar(3, " lines", "reading", stays=True) as bar:
        bar.update(3)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("columns", [100, 40])
def test_rate_and_time_left_at_any_width(terminal, columns):
    stream = terminal(columns)
    with Bar(20, " lines", "reading") as bar:
        bar.update(5)
        shown = stream.getvalue().rpartition("\r")[2].rstrip()
        assert len(shown) <= columns and "5/20" in shown and " lines/s" in shown
        assert shown.startswith("reading" if columns == 100 else "5/20")
    assert stream.getvalue().split("\r")[-2].strip() == ""  # cleared


def test_short_work_shows_no_bar(terminal, monkeypatch):
    stream = terminal(80)
    monkeypatch.setattr(bars, "MIN_SECONDS", 60)
    with Bar(20, " lines") as bar:
        bar.update(20)
    assert stream.getvalue().strip() == ""


@pytest.mark.parametrize("columns", [160, 80, 40])
def test_losses_are_whole_beside_the_bar_or_above_it(terminal, columns):
    stream = terminal(columns)
    progress = Progress(0, 100)
    progress.add_step(0.5, 600)
    loss = dict.fromkeys(("sst", "para", "sts"), 1.25)
    text = "loss sst 1.250 para 1.250 sts 1.250  lr 1.00e-04  1200 tokens/s"
    for step in (1, 2):
        progress.show({"step": step, "loss": loss, "lr": 1e-4, "tokens_per_second": 1200})
        progress.add_step(0.5, 600)
        assert text in stream.getvalue()
        assert (f"step {step}/100  {text}\n" in stream.getvalue()) == (columns < 160)
    progress.close()


class Count:
    """Stands in for Bar: how far it came, and of how much."""

    def __init__(self, total, unit, what="", **options):
        self.total, self.what, self.n = total, what, 0
        self.all.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def update(self, n):
        self.n += n


def test_what_takes_long_counts_to_its_end(monkeypatch, tmp_path):
    Count.all = counts = []
    encoder = tokenizer.BertTokenizer.from_pretrained(make_encoder(tmp_path / "encoder"))
    path = make_data(tmp_path / "data") / TASKS["sst"].files["dev"]
    whole = datasets.tokenize(
        datasets.read_rows(path, TASKS["sst"], "dev"), encoder, joint=False, max_length=24
    )
    for module in (datasets, tokenizer, evaluation, predict):
        monkeypatch.setattr(module, "Bar", Count)
    monkeypatch.setattr(tokenizer, "ENCODED_AT_ONCE", 2)
    rows = datasets.read_rows(path, TASKS["sst"], "dev")
    data = datasets.tokenize(rows, encoder, joint=False, max_length=24)
    assert np.array_equal(data.sequences.input_ids, whole.sequences.input_ids)
    model = MultitaskBERT(BertModel(make_config(len(encoder))), {"sst": TASKS["sst"]}, {"sst": "single"})
    evaluation.predict(model, "sst", data, encoder.pad_token_id)
    monkeypatch.setattr(predict, "has_terminal", lambda: True)
    chunks = [[(1, ("a",)), (2, ("b",))], [(12, ("c",))]]  # the lines where examples begin
    assert list(predict.watch(iter(chunks), str(path))) == chunks
    assert [count.what for count in counts] == [
        "reading ids-sst-dev.csv",
        "tokenizing",
        "predicting sst",
        "predicting",
    ]
    assert [count.n for count in counts] == [count.total for count in counts] and counts[0].total == 12

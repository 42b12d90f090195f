"""Signals, errors in one line, freed memory; the rest of command_line.py is tested by the scripts' tests."""

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch
from safetensors import SafetensorError

import multitask_classifier
import prepare_submit
import results_table
from benchmarks import speed
from reporting import ensemble, export, predict, report
from support.command_line import OneLineParser, Stopped, catch_signals, run_script
from support.device import is_out_of_memory, keep_freed_memory, out_of_memory_hint
from support.errors import UserError
from support.files import ROOT
from training import check_data, download, pretrain_mlm

# Page faults of five blocks of 64 MiB, each freed at once, before and after freed memory is kept.
FAULTS = """
import sys, unittest.mock
sys.modules["torch"] = unittest.mock.MagicMock()  # whose import takes seconds, and which has no part in it
import numpy as np
from resource import RUSAGE_SELF, getrusage
from support.device import keep_freed_memory

def faults():
    np.ones(2**23)
    before = getrusage(RUSAGE_SELF).ru_minflt
    for _ in range(5):
        np.ones(2**23)
    return getrusage(RUSAGE_SELF).ru_minflt - before

before = faults()
keep_freed_memory()
print(before, faults())
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="asks glibc")
def test_freed_memory_is_kept():
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    # 5 x 64 MiB are 81,920 pages, or 160 large ones; kept memory needs none of them again.
    default, kept = map(int, done.stdout.split())
    assert default >= 150 and kept < default / 5


@pytest.mark.parametrize("error", [OSError, AttributeError])
def test_other_c_libraries_are_left_alone(monkeypatch, error):
    def refuse(name):
        raise error

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    keep_freed_memory()


# --- names that are nearly right ------------------------------------------------------------------


NEARLY_RIGHT = {
    "--max_steps": "--max_step, --max-steps, --MaxSteps, -max_steps, \u2014max_steps, --max_setps=5, --max",
    "--fine-tune-mode": "folder --fine_tune_mode full",
    "round_robin": "--sampler Round-Robin",
    "sqrt": "--sampler sqroot",
    None: f"--seed 3, stray, --{'max_steps' * 10_000}, --sampler \x1b[31m, --sampler nothing_like_it",
}


def test_a_nearly_right_name_is_recognised(capsys):
    parser = OneLineParser(prog="x", allow_abbrev=False)
    parser.add_argument("--max_steps", type=int)
    parser.add_argument("--fine-tune-mode")
    parser.add_argument("--sampler", choices={"round_robin": 1, "sqrt": 2})
    for meant, argv in ((meant, argv) for meant, line in NEARLY_RIGHT.items() for argv in line.split(", ")):
        with pytest.raises(SystemExit) as end:
            parser.parse_args(argv.split())
        error = capsys.readouterr().err
        assert end.value.code == 2 and error.count("\n") == 1
        assert error.endswith(f"; did you mean {meant}?\n") if meant else "did you mean" not in error


def test_a_name_that_is_not_utf_8_is_refused_where_it_enters(capsys):
    entries = (
        (multitask_classifier, "--output_dir {}"),
        (export, "{} new --to hf"),
        (ensemble, "a {} --output_dir b"),
    )
    for script, words in entries:
        with pytest.raises(SystemExit):
            script.main(words.format("r\udcff").split())
        assert " is 'r\\udcff'; expected text in UTF-8\n" in capsys.readouterr().err


def test_every_script_knows_nearly_right_names(capsys):
    scripts = (multitask_classifier, prepare_submit, results_table, report, predict, export)
    for script in (*scripts, pretrain_mlm, check_data, download, speed):
        with pytest.raises(SystemExit):
            script.main(["step", "--hlep", "--output_dir", "x", "--to", "hf"])
        error = capsys.readouterr().err
        assert error.endswith("; did you mean --help?\n") and error.count("\n") == 1


# --- signals and errors ---------------------------------------------------------------------------

NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
LIBRARYS_OWN = RuntimeError("what a library has made of our exception")


def stopped_by(number, made_of_it, handlers):
    """Work that gets a signal, in a library that turns our exception into another one; notes the handlers."""
    try:
        signal.raise_signal(number)
    except Stopped:
        handlers += [signal.getsignal(each) for each in NUMBERS]
        raise made_of_it or Stopped from None
    pytest.fail("it should have stopped here")


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("made_of_it", [None, LIBRARYS_OWN, UserError("damaged")])
def test_signal_ends_a_script_with_its_code(number, made_of_it, capsys):
    before = [signal.getsignal(each) for each in NUMBERS]
    handlers = []
    assert run_script("x", partial(stopped_by, number, made_of_it, handlers)) == 128 + number
    assert handlers[:2] == [signal.SIG_DFL] * 2  # a second one kills
    assert capsys.readouterr().err == "x: interrupted\n"
    assert [signal.getsignal(each) for each in NUMBERS] == before


def test_a_hang_up_under_nohup_stays_ignored():
    before, handlers = signal.signal(signal.SIGHUP, signal.SIG_IGN), []
    try:
        run_script("x", partial(stopped_by, signal.SIGTERM, None, handlers))
        assert handlers[2] == signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_caught_signal_waits_but_for_work_that_is_interruptible():
    with catch_signals() as stop:
        assert stop.interruptible(lambda: 5) == 5 and not stop.requested
        with pytest.raises(ZeroDivisionError):
            stop.interruptible(lambda: 1 / 0)
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested and stop.exit_code == 143
        assert stop.interruptible(lambda: pytest.fail("it had come before")) is None
    for made_of_it in (None, LIBRARYS_OWN):
        with catch_signals() as stop:
            assert stop.interruptible(partial(stopped_by, signal.SIGINT, made_of_it, [])) is None
            assert stop.requested
    # A hang-up that is ignored stays so, as under nohup.
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with catch_signals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


NOT_MEMORY = [RuntimeError("shapes cannot be multiplied"), ValueError("can't allocate memory")]


def test_lack_of_memory_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.int8)
    c_plus_plus = RuntimeError("std::bad_alloc")
    for error in (raised.value, torch.OutOfMemoryError("CUDA"), MemoryError(), c_plus_plus, *NOT_MEMORY):
        expected = error not in NOT_MEMORY
        assert is_out_of_memory(error) == expected
        with (
            pytest.raises(UserError if expected else type(error)) as caught,
            out_of_memory_hint(lambda: "in a batch"),
        ):
            raise error
        assert (str(caught.value) == "out of memory in a batch") == expected


@pytest.mark.parametrize("closed", [False, True])
def test_any_text_can_be_printed_to_any_stream(tmp_path, closed):
    """Streams that are ASCII only or closed: no traceback, and no text in files that are opened later."""
    printed, written = tmp_path / "printed", tmp_path / "written"
    printed.touch()

    def work():
        print("caf\u00e9", flush=True)
        with open(written, "w") as file:  # must not get the number of a closed stream
            print("printed", flush=True)
            file.write("written")
        sys.stdout.isatty()

    def child():
        """With the streams that Python makes at its start."""
        for number in (1, 2):
            os.dup2(os.open(printed, os.O_WRONLY | os.O_APPEND), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="ascii") for number in (1, 2))
        if closed:
            sys.stdout = sys.stderr = None  # which closes both
        os._exit(run_script("x", work))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == 0 and written.read_text() == "written"
    assert printed.read_text() == ("" if closed else "caf\\xe9\nprinted\n")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("bad\nfile \x1b[2Jname \ud800 ü"), 2, "x: error: bad\\nfile \\x1b[2Jname \\ud800 ü\n"),
        (OSError(28, "No space left on device", "a/b"), 2, "x: error: a/b: No space left on device\n"),
        (SafetensorError("I/O error"), 2, "x: error: a checkpoint could not be written (I/O error)\n"),
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), 2, "--batch_size"),
        (KeyboardInterrupt(), 130, "x: interrupted\n"),
    ],
)
def test_what_a_user_can_mend_ends_in_one_line(error, code, message, capsys):
    def work():
        raise error

    assert run_script("x", work) == code
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1
    with pytest.raises(ZeroDivisionError):  # our own mistakes keep their traceback
        run_script("x", lambda: 1 / 0)

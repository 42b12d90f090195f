"""Signals, errors in one line, freed memory; the rest of command_line.py is tested by the scripts' tests."""

import ctypes
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError

import multitask_classifier
import prepare_submit
import results_table
from benchmarks import speed
from reporting import report
from support.command_line import OneLineParser, Stopped, catch_signals, printable, run_script
from support.device import is_out_of_memory, keep_freed_memory, out_of_memory_hint
from support.errors import UserError
from support.files import ROOT
from training import pretrain_mlm

CODE = """
import resource, sys
import numpy as np
from support.command_line import Stopped, catch_signals, printable, run_script
from support.device import out_of_memory_hint, is_out_of_memory, keep_freed_memory
from config import UserError
if sys.argv[1] == "keep":
    keep_freed_memory()
np.ones(2**23)  # 64 MiB, freed at once
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    np.ones(2**23)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode):
    done = subprocess.run(
        [sys.executable, "-c", CODE, mode], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    return int(done.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="asks glibc")
def test_freed_memory_is_kept():
    # 5 x 64 MiB are 81,920 pages, or 160 large ones; kept memory needs none of them again.
    default, kept = page_faults("default"), page_faults("keep")
    assert default >= 150 and kept < default / 5


@pytest.mark.parametrize("error", [OSError, AttributeError])
def test_other_c_libraries_are_left_alone(monkeypatch, error):
    def refuse(name):
        raise error

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    keep_freed_memory()


# --- names that are nearly right ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        ("--max_step 5", "--max_steps"),
        ("--max-steps 5", "--max_steps"),
        ("--MaxSteps 5", "--max_steps"),
        ("-max_steps 5", "--max_steps"),
        ("\u2014max_steps 5", "--max_steps"),
        ("--max_setps=5", "--max_steps"),
        ("--max", "--max_steps"),
        ("folder --fine_tune_mode full", "--fine-tune-mode"),
        ("--seed 3", None),
        ("stray", None),
        ("--" + "max_steps" * 10_000, None),
        ("--sampler Round-Robin", "round_robin"),
        ("--sampler sqroot", "sqrt"),
        ("--sampler \x1b[31m", None),
        ("--sampler nothing_like_it", None),
    ],
)
def test_a_nearly_right_name_is_recognised(argv, meant, capsys):
    parser = OneLineParser(prog="x", allow_abbrev=False)
    parser.add_argument("--max_steps", type=int)
    parser.add_argument("--fine-tune-mode")
    parser.add_argument("--sampler", choices={"round_robin": 1, "sqrt": 2})
    with pytest.raises(SystemExit) as end:
        parser.parse_args(argv.split())
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert error.endswith(f"; did you mean {meant}?\n") if meant else "did you mean" not in error


def test_every_script_knows_nearly_right_names(capsys):
    for script in (multitask_classifier, prepare_submit, results_table, report, pretrain_mlm, speed):
        with pytest.raises(SystemExit):
            script.main(["step", "--hlep", "--output_dir", "x"])
        error = capsys.readouterr().err
        assert error.endswith("; did you mean --help?\n") and error.count("\n") == 1


# --- signals and errors ---------------------------------------------------------------------------

NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("made_of_it", [None, RuntimeError("a library's own words"), UserError("damaged")])
def test_signal_ends_a_script_with_its_code(number, made_of_it, capsys):
    """Also when a library turns our exception into another one."""
    before = [signal.getsignal(each) for each in NUMBERS]

    def work():
        try:
            signal.raise_signal(number)
        except Stopped:
            assert [signal.getsignal(each) for each in NUMBERS][:2] == [
                signal.SIG_DFL
            ] * 2  # a second one kills
            raise made_of_it or Stopped from None

    assert run_script("x", work) == 128 + number
    assert capsys.readouterr().err == "x: interrupted\n"
    assert [signal.getsignal(each) for each in NUMBERS] == before


def test_caught_signal_waits_but_for_work_that_is_interruptible():
    with catch_signals() as stop:
        assert stop.interruptible(lambda: 5) == 5 and not stop.requested
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested and stop.exit_code == 143
        assert stop.interruptible(lambda: pytest.fail("it had come before")) is None


@pytest.mark.parametrize("made_of_it", [None, RuntimeError("a library's own words")])
def test_interruptible_work_is_given_up(made_of_it):
    def work():
        try:
            signal.raise_signal(signal.SIGINT)
        except Stopped:
            raise made_of_it or Stopped from None
        pytest.fail("it should have stopped here")

    with catch_signals() as stop:
        assert stop.interruptible(work) is None and stop.requested


def test_errors_of_interruptible_work_are_its_own():
    with catch_signals() as stop, pytest.raises(ZeroDivisionError):
        stop.interruptible(lambda: 1 / 0)


def test_error_is_one_line_whatever_it_holds(capsys):
    def work():
        raise UserError("bad\nfile \x1b[2Jname \ud800 \u00fc")

    assert run_script("x", work) == 2
    assert capsys.readouterr().err == "x: error: bad\\nfile \\x1b[2Jname \\ud800 \u00fc\n"
    assert printable("plain") == "plain"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_lack_of_memory_is_told_from_other_errors(error, expected):
    assert is_out_of_memory(error) == expected
    with (
        pytest.raises(UserError if expected else type(error)) as raised,
        out_of_memory_hint(lambda: "in a batch"),
    ):
        raise error
    assert (str(raised.value) == "out of memory in a batch") == expected


def test_torch_says_so_when_memory_runs_out():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.int8)
    assert is_out_of_memory(raised.value)


PRINT = """
import sys
from support.command_line import run_script
def work():
    print("caf\u00e9", flush=True)
    with open(sys.argv[1], "w") as file:  # must not get the number of a closed stream
        print("printed", flush=True)
        file.write("written")
    sys.stdout.isatty()
sys.exit(run_script("x", work))
"""


@pytest.mark.parametrize(
    ("redirection", "encoding"), [("", "ascii"), (">&-", "utf-8"), (">&- 2>&-", "utf-8")]
)
def test_any_text_can_be_printed_to_any_stream(tmp_path, redirection, encoding):
    """Streams that are ASCII only or closed: no traceback, and no text in files that are opened later."""
    command = f'"$0" -c "$1" "$2" {redirection}'
    done = subprocess.run(
        ["sh", "-c", command, sys.executable, PRINT, str(tmp_path / "file")],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": encoding},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0 and not done.stderr
    assert done.stdout == ("" if redirection else "caf\\xe9\nprinted\n")
    assert (tmp_path / "file").read_text() == "written"


def test_hang_up_that_is_ignored_stays_ignored():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with catch_signals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("mend it"), 2, "x: error: mend it\n"),
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


def test_our_own_mistakes_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run_script("x", lambda: 1 / 0)

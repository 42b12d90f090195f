"""Signals, errors in one line, freed memory; the rest of command_line.py is tested with the scripts that use it."""

import ctypes
import signal
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError

from support.command_line import Stopped, catch_signals, printable, run_script
from support.device import explain_memory, is_out_of_memory, keep_freed_memory
from support.errors import UserError
from support.files import ROOT

CODE = """
import resource, sys
import numpy as np
from support.command_line import Stopped, catch_signals, printable, run_script
from support.device import explain_memory, is_out_of_memory, keep_freed_memory
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


# --- signals and errors ------------------------------------------------------------------------------------------

NUMBERS = [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("made_of_it", [None, RuntimeError("a library's own words"), UserError("damaged")])
def test_signal_ends_a_script_with_its_code(number, made_of_it, capsys):
    """Also when a library turns our exception into another one."""
    before = [signal.getsignal(each) for each in NUMBERS]

    def work():
        try:
            signal.raise_signal(number)
        except Stopped:
            assert [signal.getsignal(each) for each in NUMBERS] == [signal.SIG_DFL] * 2  # a second one kills
            raise made_of_it or Stopped from None

    assert run_script("x", work) == 128 + number
    assert capsys.readouterr().err == "x: interrupted\n"
    assert [signal.getsignal(each) for each in NUMBERS] == before


def test_caught_signals_wait_unless_told_to_stop_at_once():
    with catch_signals() as signals:
        with signals.stop_at_once():
            pass
        signal.raise_signal(signal.SIGTERM)
        assert signals == [signal.SIGTERM]
        with pytest.raises(Stopped), signals.stop_at_once():
            pytest.fail("it had come before")
    with catch_signals() as signals, pytest.raises(Stopped), signals.stop_at_once():
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it should have stopped here")


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
        explain_memory(lambda: "in a batch"),
    ):
        raise error
    assert (str(raised.value) == "out of memory in a batch") == expected


def test_torch_says_so_when_memory_runs_out():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.int8)
    assert is_out_of_memory(raised.value)


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

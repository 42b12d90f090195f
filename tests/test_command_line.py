"""Keeping freed memory; the rest of command_line.py is tested with the scripts that use it."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import keep_freed_memory

CODE = """
import resource, sys
import numpy as np
from command_line import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
np.ones(2**23)  # 64 MiB, freed at once
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    np.ones(2**23)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode):
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-c", CODE, mode], cwd=root, capture_output=True, text=True, check=True, timeout=120
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

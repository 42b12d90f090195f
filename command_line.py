"""What every script's command line shares: errors in one line, checked numbers, exit codes."""

import argparse
import ctypes
import math
import os
import sys
from collections.abc import Callable

import torch
from safetensors import SafetensorError

from config import UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's <malloc.h>


class OneLineParser(argparse.ArgumentParser):
    """Reports an error as one line; the usage of this many flags would bury it."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(
    kind: type, low: float, high: float = math.inf, *, low_open: bool = False, high_open: bool = False
):
    """An argparse type: a finite number of `kind` in a range."""
    word = "a whole number" if kind is int else "a number"
    expected = f"{word} {'above' if low_open else 'of at least'} {low:g}"
    if high < math.inf:
        expected += f" and {'below' if high_open else 'at most'} {high:g}"

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        inside = (value > low if low_open else value >= low) and (
            value < high if high_open else value <= high
        )
        if not (inside and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"value is {text!r}; expected {expected}")
        return value

    return parse


def keep_freed_memory() -> None:
    """Let the C library keep what is freed, for the next step to use.

    By default glibc gives large blocks back to the system, which hands them out again page by page, each zeroed:
    45,000 page faults in every training step, a quarter of its time. Other C libraries are left as they are.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
    except (OSError, AttributeError, TypeError):  # not glibc
        pass


def run_script(prog: str, work: Callable[[], None]) -> int:
    """Run a script's work and turn what the user can mend into one line.

    Returns:
        the exit code: 0; 2 for an error; 130 after Ctrl-C; 141 when the reader of a pipe is gone.
    """
    keep_freed_memory()
    try:
        work()
        return 0
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Python flushes once more at its end; let that go nowhere instead of failing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except UserError as error:
        message = str(error)
    except OSError as error:  # disk full, no permission
        message = f"{error.filename or 'writing'}: {error.strerror or error}"
    except SafetensorError as error:  # the same, while tensors are written
        message = f"a checkpoint could not be written ({error})"
    except torch.OutOfMemoryError as error:
        message = f"out of memory; try a smaller --batch_size with a larger --grad_accum ({str(error).splitlines()[0]})"
    print(f"{prog}: error: {message}", file=sys.stderr)
    return 2

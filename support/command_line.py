"""What every script's command line shares: errors in one line, checked numbers, signals, exit codes."""

import argparse
import math
import os
import signal
import sys
from collections.abc import Callable
from contextlib import contextmanager, suppress

from safetensors import SafetensorError

from support.device import is_out_of_memory, keep_freed_memory
from support.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's <malloc.h>


class OneLineParser(argparse.ArgumentParser):
    """Reports an error as one line; the usage of this many flags would bury it."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {printable(message)}\n")


def printable(text: str) -> str:
    """Text in one line, whatever a file or a file name has put into it."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


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


# --- signals -----------------------------------------------------------------------------------------------------


class Stopped(KeyboardInterrupt):
    """SIGTERM or SIGINT came, and nothing had to be finished first."""


class Signals(list):
    """Numbers of the signals that have come, for work that stops where it can be taken up again."""

    def __init__(self):
        super().__init__()
        self.interrupts = False

    @contextmanager
    def stop_at_once(self):
        """Raise `Stopped` when one comes; for long parts that change nothing."""
        self.interrupts = True
        try:
            if self:
                raise Stopped
            yield
        finally:
            self.interrupts = False


@contextmanager
def handle_signals(receive: Callable):
    """Let SIGINT and SIGTERM call `receive(number, frame)`; outside the main thread they are left as they are."""
    before = {}
    with suppress(ValueError):  # not the main thread
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, receive)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def catch_signals():
    """Collect SIGINT and SIGTERM in the `Signals` that this yields; a second one ends the process at once."""
    signals = Signals()

    def receive(number, frame):
        signals.append(number)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        if signals.interrupts:
            raise Stopped

    with handle_signals(receive):
        yield signals


# --- errors ------------------------------------------------------------------------------------------------------


def explain(error: Exception) -> str | None:
    """What to tell the user of an error that they can mend; None for our own mistakes."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):  # disk full, no permission
        return f"{error.filename or 'writing'}: {error.strerror or error}"
    if isinstance(error, SafetensorError):  # the same, while tensors are written
        return f"a checkpoint could not be written ({error})"
    if is_out_of_memory(error):
        doing = "".join(f" {note}" for note in getattr(error, "__notes__", ()))
        return f"out of memory{doing}; try a smaller encoder, or a smaller --batch_size or --max_length"
    return None


def run_script(prog: str, work: Callable[[], None]) -> int:
    """Run a script's work and turn what the user can mend into one line.

    Returns:
        the exit code: 0; 2 for an error; 130 after SIGINT (Ctrl-C) and 143 after SIGTERM; 141 when the reader of a
        pipe is gone.
    """
    received = []

    def stop(number, frame):
        received.append(number)
        for each in (signal.SIGINT, signal.SIGTERM):  # a second one need not wait for files to be removed
            signal.signal(each, signal.SIG_DFL)
        raise Stopped

    keep_freed_memory()
    try:
        with handle_signals(stop):
            work()
        return 0
    except (Exception, KeyboardInterrupt) as error:
        # Whatever a library may have made of our exception, it was the signal.
        if received or isinstance(error, KeyboardInterrupt):
            print(f"{prog}: interrupted", file=sys.stderr)
            return 128 + (received[0] if received else signal.SIGINT)
        if isinstance(error, BrokenPipeError):
            # Python flushes once more at its end; let that go nowhere instead of failing.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        message = explain(error)
        if message is None:
            raise
    print(f"{prog}: error: {printable(message)}", file=sys.stderr)
    return 2

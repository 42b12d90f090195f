"""What every script's command line shares: errors in one line, checked numbers, signals, exit codes."""

import argparse
import dataclasses
import difflib
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import contextmanager, suppress
from typing import TypeVar

from safetensors import SafetensorError

from support.device import is_out_of_memory, keep_freed_memory
from support.errors import RankError, UserError

Result = TypeVar("Result")

DASHES = (
    "-",
    "\u2010",
    "\u2012",
    "\u2013",
    "\u2014",
    "\u2212",
)  # as text processors make them of two hyphens
LONE_SURROGATES = "[\ud800-\udfff]"  # what the system makes of bytes in a name that are not UTF-8
NO_DASHES = str.maketrans(dict.fromkeys((*DASHES, "_"), ""))


class OneLineParser(argparse.ArgumentParser):
    """Reports an error as one line; the usage of this many flags would bury it. Knows nearly right names.

    Args:
        prog: `FILE.py`, or a module; errors begin with it, and the usage has what is typed.
    """

    def __init__(self, prog: str | None = None, **options):
        typed = prog and f"python {'' if prog.endswith('.py') else '-m '}{prog}"
        super().__init__(typed, **options)
        self.name = prog or self.prog

    def parse_args(self, args=None, namespace=None):
        return self._all_known(*self.parse_known_args(args, namespace))

    def parse_intermixed_args(self, args=None, namespace=None):
        return self._all_known(*self.parse_known_intermixed_args(args, namespace))

    def _all_known(self, parsed: argparse.Namespace, unknown: list[str]) -> argparse.Namespace:
        if unknown:
            flags = {simplify(flag): flag for flag in self._option_string_actions if flag.startswith("--")}
            near = [nearest(word.partition("=")[0], flags) for word in unknown if word[0:1] in DASHES]
            hint = f"; did you mean {near[0]}?" if near and near[0] else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        for name, value in vars(parsed).items():
            flag = f"--{name}" if f"--{name}" in self._option_string_actions else name
            for text in map(str, value if isinstance(value, list | tuple) else [value]):
                # No page could show such a name, and the library of weights knows UTF-8 only.
                if re.search(LONE_SURROGATES, text):
                    self.error(f"{flag} is {text!r}; expected text in UTF-8")
        return parsed

    def _check_value(self, action: argparse.Action, value) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            near = nearest(str(value), {simplify(str(choice)): choice for choice in action.choices})
            if near:
                error.message += f"; did you mean {near}?"
            raise

    def error(self, message: str):
        self.exit(2, f"{self.name}: error: {printable(message)}\n")


def simplify(name: str) -> str:
    """A name without what is easily mistaken in it: dashes of all kinds, underscores, capitals."""
    return name.lower().translate(NO_DASHES)


def nearest(word: str, names: Mapping[str, str]) -> str | None:
    """The one of `names`, by their simplified spellings, that a word was probably meant to be."""
    word = simplify(word[:100])
    found = difflib.get_close_matches(word, names, n=1, cutoff=0.7)
    found = found or [name for name in names if len(word) > 2 and name.startswith(word)]
    return names[found[0]] if found else None


def printable(text: str) -> str:
    """Text in one line, whatever a file or a file name has put into it."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@dataclasses.dataclass(frozen=True)
class FlagType:
    """An argparse type that can also judge a value that it did not convert, one from a run's `args.json`."""

    convert: Callable[[str], object]  # ValueError for text that has no value
    is_valid: Callable[[object], bool]
    expected: str
    metavar: str

    def __call__(self, text: str):
        try:
            value = self.convert(text)
            if self.is_valid(value):
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"value is {text!r}; expected {self.expected}")


def number(
    kind: type, low: float, high: float = math.inf, *, low_open: bool = False, high_open: bool = False
) -> FlagType:
    """An argparse type: a finite number of `kind`, int or float, in a range."""
    expected = f"a {'whole ' if kind is int else ''}number {'above' if low_open else 'of at least'} {low:g}"
    if high < math.inf:
        expected += f" and {'below' if high_open else 'at most'} {high:g}"

    def is_valid(value) -> bool:
        if type(value) not in (kind, int):  # of isinstance, True would be an int
            return False
        inside = (value > low if low_open else value >= low) and (
            value < high if high_open else value <= high
        )
        return inside and abs(value) <= sys.float_info.max  # not infinite, and no float could hold more

    return FlagType(kind, is_valid, expected, "N" if kind is int else "X")


def values_by_name(text: str) -> dict[str, str]:
    """The parts of `NAME=VALUE,...`; the value of a NAME alone is empty.

    Raises:
        ValueError: if a name is given twice.
    """
    pairs = [part.partition("=") for part in text.split(",")]
    values = {name.strip(): value.strip() for name, _, value in pairs}
    if len(values) < len(pairs):
        raise ValueError("a name is given twice")
    return values


# --- signals --------------------------------------------------------------------------------------


# Ctrl-C, the system's and Slurm's request to end, and the end of the terminal or ssh session.
# Clusters send the last two before a job's time is over (Slurm's `sbatch --signal`).
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Stopped(KeyboardInterrupt):
    """One of STOP_SIGNALS came, and nothing had to be finished first."""


class StopRequest:
    """Whether a signal has asked this process to stop, for work that stops where it can be taken up again."""

    def __init__(self):
        self.signal_number: int | None = None
        self._is_interruptible = False

    @property
    def requested(self) -> bool:
        return self.signal_number is not None

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that a signal has ended."""
        return 128 + self.signal_number

    def receive(self, number: int, frame=None) -> None:
        """The signal handler. A second signal ends the process at once."""
        self.signal_number = number
        let_next_signal_end(number)
        if self._is_interruptible:
            raise Stopped

    def interruptible(self, work: Callable[[], Result]) -> Result | None:
        """Do long work that changes nothing, unless or until a stop is requested.

        Returns:
            what `work` returns; None if a stop was requested before or meanwhile.
        """
        if self.requested:
            return None
        try:
            try:
                self._is_interruptible = True
                return work()
            finally:
                self._is_interruptible = False
        except (Exception, Stopped):
            # Whatever a library has made of our exception on its way here, the stop is what it was about.
            if not self.requested:
                raise
            return None


def let_next_signal_end(number: int) -> None:
    """After a first signal, let a second one end the process without waiting for anything."""
    for each in STOP_SIGNALS:
        if signal.getsignal(each) != signal.SIG_IGN:  # a hang-up under nohup stays ignored
            signal.signal(each, signal.SIG_DFL)
    if number == signal.SIGHUP:  # the terminal is gone: writing to it would be an error before all is saved
        signal.signal(number, signal.SIG_IGN)  # the system may send it again
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            if os.isatty(descriptor):
                os.dup2(nowhere, descriptor)


@contextmanager
def handle_signals(receive: Callable):
    """Let STOP_SIGNALS call `receive(number, frame)`; does nothing outside the main thread."""
    before = {}
    with suppress(ValueError):  # not the main thread
        for number in STOP_SIGNALS:
            # Under nohup, a hang-up is ignored on purpose.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, receive)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def catch_signals():
    """Note STOP_SIGNALS in a `StopRequest`; a second one ends the process at once."""
    stop = StopRequest()
    with handle_signals(stop.receive):
        yield stop


# --- errors ---------------------------------------------------------------------------------------


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


def mend_standard_streams() -> None:
    """Make sure that anything can be printed, also to streams that are closed or ASCII only."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:  # closed, as by >&-: without this the next file to be opened would take its number
            os.open(os.devnull, os.O_RDWR)
        stream = getattr(sys, name)
        if stream is None:
            stream = os.fdopen(descriptor, "r" if name == "stdin" else "w", closefd=False)
            setattr(sys, name, stream)
        elif name != "stdin" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def run_script(prog: str, work: Callable[[], None]) -> int:
    """Run a script's work and turn what the user can mend into one line.

    Returns:
        the exit code: 0; 2 for an error; 128 and the number of the signal that ended it; 141 when the reader
        of a pipe is gone.
    """
    received = []

    def stop(number, frame):
        received.append(number)
        let_next_signal_end(number)
        raise Stopped

    keep_freed_memory()
    mend_standard_streams()
    try:
        with handle_signals(stop):
            work()
        return 0
    except (Exception, KeyboardInterrupt) as error:
        # Whatever a library may have made of our exception, it was the signal; but a rank that is lost comes
        # first, since torchrun then sends all others a signal.
        is_of_ranks = isinstance(error, RankError)
        if not is_of_ranks and (received or isinstance(error, KeyboardInterrupt)):
            print(f"{prog}: interrupted", file=sys.stderr)
            return 128 + (received[0] if received else signal.SIGINT)
        if isinstance(error, BrokenPipeError):
            # Python flushes once more at its end; let that go nowhere instead of failing.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        message = explain(error)
        if message is None:
            raise
    if message:
        print(f"{prog}: error: {printable(message)}", file=sys.stderr)
    return 2

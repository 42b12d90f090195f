"""Bars for what takes long: on a terminal only, with rate and time left, however narrow it is."""

import os
import shutil
import stat
import sys

from tqdm import tqdm

MIN_SECONDS = 1.0  # what is done sooner needs no bar
NARROW = 64  # columns; with fewer, the numbers come first, since what does not fit is cut off on the right
NUMBERS = "{n_fmt}/{total_fmt} {rate_fmt} {remaining} left {desc}{postfix}"


def has_terminal() -> bool:
    """Whether a bar on standard error is seen by somebody and spoils nothing.

    Standard output may be the same terminal or a file, but not a pipe: that may lead to the terminal again
    (`| tee log`).
    """
    try:
        if not sys.stderr.isatty():
            return False
        if sys.stdout.isatty():
            return True
        return stat.S_ISREG(os.fstat(sys.stdout.fileno()).st_mode)
    except (OSError, ValueError):  # it has no file, or is closed
        return False


class Bar(tqdm):
    """A bar on standard error; where `has_terminal` says no, it does nothing.

    Args:
        total: in units; None if it is not known.
        what: is going on.
        stays: whether the bar shows at once and is still there at the end; else it comes after MIN_SECONDS
            and goes.
        scaled: write 12.3k for 12345.
    """

    monitor_interval = 0  # tqdm would start a thread

    def __init__(
        self,
        total: int | None,
        unit: str,
        what: str = "",
        *,
        initial: int = 0,
        stays: bool = False,
        scaled: bool = False,
    ):
        is_narrow = shutil.get_terminal_size().columns < NARROW
        super().__init__(
            total=total,
            unit=unit,
            desc=what or None,
            initial=initial,
            leave=stays,
            delay=0 if stays else MIN_SECONDS,
            unit_scale=scaled,
            miniters=1,
            dynamic_ncols=True,
            bar_format=NUMBERS + " {bar}" if is_narrow and total else None,
            disable=not has_terminal(),
        )

    def has_room(self, text: str) -> bool:
        """Whether a text fits beside the numbers."""
        numbers = self.format_meter(
            **self.format_dict | {"bar_format": NUMBERS, "ncols": None, "postfix": None}
        )
        return len(numbers) + len(" 100%||, ") + len(text) < shutil.get_terminal_size().columns

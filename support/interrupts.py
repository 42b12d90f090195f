"""Ctrl-C while a command's imports run, which takes seconds; to be called before them."""

import signal


def end_quietly() -> None:
    """Until `run_script` takes over, Ctrl-C ends the process at once, without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)

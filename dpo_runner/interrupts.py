"""Ctrl-C in a command ends it with one line and exit code 130 at any instant, also while libraries are imported.

An exception would not do there: Python shows where it came up, and what it comes up in may swallow it.
Comes before all that takes time, so it imports next to nothing itself.
"""

import os
import signal
import sys
from types import FrameType


def is_command() -> bool:
    """Return whether this is `python -m dpo_runner…`, whose package is just being found, or `dpo-runner…`."""
    program = sys.argv[0] if sys.argv else ""
    if program != "-m":  # what Python puts there for so long
        return program.rpartition(os.sep)[2].startswith("dpo-runner")
    given = sys.orig_argv
    names = [following if flag == "-m" else flag[2:] for flag, following in zip(given, [*given[1:], ""], strict=True)]
    return any(name.partition(".")[0] == "dpo_runner" for name in names)


def end_at_once(number: int, frame: FrameType | None) -> None:
    """End the process; a signal handler."""
    try:
        os.write(2, b"error: interrupted\n")
    finally:
        os._exit(128 + number)


def end_at_once_on_ctrl_c() -> None:
    """Have Ctrl-C end this process wherever it is, but where it is to be ignored, as by a job in the background."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_at_once)
        sys.unraisablehook = _end_of_unraisable


def deals_with_ctrl_c() -> bool:
    """Return whether this is a command whose Ctrl-C is dealt with here."""
    return signal.getsignal(signal.SIGINT) in (end_at_once, raise_once)


def raise_once(number: int, frame: FrameType | None) -> None:
    """Leave things in order by an exception; a second Ctrl-C does not wait for that. A signal handler."""
    signal.signal(number, end_at_once)
    raise KeyboardInterrupt(number)


def _end_of_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """End the process where Python would only show that KeyboardInterrupt came up in a callback, and go on."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        end_at_once(signal.SIGINT, None)
    sys.__unraisablehook__(unraisable)

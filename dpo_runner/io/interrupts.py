"""Ctrl-C ends a command with one line and exit code 130, also while libraries are imported.

An exception would not do during imports: Python prints a traceback for it, and a library may swallow it.
This module imports next to nothing, because it comes before everything that takes time.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], None]


@contextmanager
def on_ctrl_c(handler: Handler) -> Iterator[None]:
    """Let `handler` handle SIGINT inside this block, unless SIGINT is ignored or the program has its own handler."""
    previous = signal.getsignal(signal.SIGINT)
    ours = previous in (signal.default_int_handler, end_at_once, raise_once)
    if not ours or threading.current_thread() is not threading.main_thread():
        yield
        return
    hook, sys.unraisablehook = sys.unraisablehook, _end_if_interrupted
    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        sys.unraisablehook = hook


def end_at_once(number: int, frame: FrameType | None) -> None:
    """End the process; a signal handler."""
    try:
        os.write(2, b"error: interrupted\n")
    finally:
        os._exit(128 + number)


def raise_once(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt; a second Ctrl-C ends the process at once. A signal handler."""
    signal.signal(number, end_at_once)
    raise KeyboardInterrupt(number)


def handles_ctrl_c() -> bool:
    """Whether this process is a command whose Ctrl-C is handled here."""
    return signal.getsignal(signal.SIGINT) in (end_at_once, raise_once)


def _end_if_interrupted(unraisable: "sys.UnraisableHookArgs") -> None:
    """End the process where Python would only report a KeyboardInterrupt in a callback, and go on."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        end_at_once(signal.SIGINT, None)
    sys.__unraisablehook__(unraisable)

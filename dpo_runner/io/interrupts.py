"""Ctrl-C handling: a command ends with one line and exit code 130, also during imports.

An exception is not enough during imports: Python prints a traceback for it, and a library may swallow it.
This module imports almost nothing, because it loads before everything slow.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Signals that end a run with a checkpoint: Ctrl-C, preemption by a scheduler, its advance warning (Slurm's
`--signal=USR1@120`), and a closed terminal."""

Handler = Callable[[int, FrameType | None], None]


@contextmanager
def on_ctrl_c(handler: Handler) -> Iterator[None]:
    """Handle SIGINT with `handler` in this block, unless it is ignored or has a handler of the program."""
    previous = signal.getsignal(signal.SIGINT)
    known = (signal.default_int_handler, end_at_once, raise_once)
    ours = previous in known and threading.current_thread() is threading.main_thread()
    if ours:
        signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, previous)


def end_at_once(number: int, frame: FrameType | None) -> None:
    """Exit the process; a signal handler."""
    try:
        os.write(2, b"error: interrupted\n")
    finally:
        exit_now(128 + number)


def exit_now(code: int) -> NoReturn:
    """Exit the process from any thread, without waiting for the others."""
    os._exit(code)


def raise_once(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt; a second Ctrl-C exits the process at once. A signal handler."""
    signal.signal(number, end_at_once)
    raise KeyboardInterrupt(number)


def handles_ctrl_c() -> bool:
    """Return whether this module handles Ctrl-C in this process."""
    return signal.getsignal(signal.SIGINT) in (end_at_once, raise_once)

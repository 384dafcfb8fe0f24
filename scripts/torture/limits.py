"""A time limit for code that may hang."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any


class Hang(BaseException):
    """The time limit was exceeded; a BaseException, so that `except Exception` does not catch it."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise Hang inside the block after `seconds`; works in the main thread only."""

    def stop(*_: Any) -> None:
        raise Hang(f"takes more than {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)

"""What the fuzzers share."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any


class Hang(BaseException):
    """What had to be over by then is not; no handler of errors in what hangs may catch it."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise Hang within what takes longer; in the main thread only."""

    def stop(*_: Any) -> None:
        raise Hang(f"takes more than {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)

"""Standard output and error of every command; a failing stream never changes what the command does.

Does not import rich, which a command may not need.
"""

import contextlib
import io
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

silenced: dict[int, str] = {}
"""File descriptors of the standard streams that were redirected to the null device, with the reasons."""


class Guarded:
    """A stream that goes silent when writing fails: the reader has closed the pipe (`| head`), or the disk is full.

    Characters that its encoding lacks are escaped (`LC_ALL=C`, PYTHONIOENCODING=ascii).

    Args:
        stream: the stream, which supplies all other attributes; None in a process without it.
    """

    def __init__(self, stream: Any) -> None:
        self._stream, self._is_silent = stream, stream is None
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self).get("_stream"), name)

    def write(self, data: str | bytes) -> int:
        self._attempt(lambda: self._stream.write(data))
        return len(data)

    def flush(self) -> None:
        self._attempt(lambda: self._stream.flush())

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            if not self._is_silent:
                action()
        except (OSError, ValueError) as error:  # ValueError if the stream is closed
            self._is_silent = True
            logger.info("nothing more is printed: %s", error)  # in run.log, if there is one
            with contextlib.suppress(OSError, ValueError, AttributeError):
                if (number := self._stream.fileno()) in (1, 2):  # never redirect another file
                    silenced[number] = str(error)
                    with Path(os.devnull).open("wb") as nowhere:
                        os.dup2(nowhere.fileno(), number)


def put(text: str, end: str = "\n", to_stderr: bool = False) -> None:
    """Print a text."""
    stream = Guarded(sys.stderr if to_stderr else sys.stdout)
    stream.write(text + end)
    stream.flush()  # a failure at interpreter exit would change the exit code

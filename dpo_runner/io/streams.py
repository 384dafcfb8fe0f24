"""Standard output and error of every command; a failing stream never changes what the command does.

The reader may close the pipe (`| head`), the disk may be full, the encoding may lack a character. The first two silence
the stream, the third prints an escape. Does not import rich, which a command may not need.
"""

import contextlib
import io
import logging
import os
import select
import sys
from typing import IO, Any

logger = logging.getLogger(__name__)

TROUBLE = (OSError, ValueError)
"""Errors of writing to a stream; ValueError if the stream is closed or the encoding fails."""

_silent: set[int] = set()
"""File descriptors of the standard streams that were redirected to the null device."""


def show_every_character() -> None:
    """Make stdout and stderr escape characters their encoding lacks (`LC_ALL=C`, PYTHONIOENCODING=ascii)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def put(text: str | bytes, end: str = "\n") -> None:
    """Print a text, or bytes that may not be valid text."""
    _put(text, end, sys.stdout)


def put_error(text: str) -> None:
    """Print a line on stderr."""
    _put(text, "\n", sys.stderr)


def _put(text: str | bytes, end: str, stream: IO[str] | None) -> None:
    if stream is None:  # a process may run without standard streams
        return
    show_every_character()
    try:
        if isinstance(text, bytes):
            stream.flush()
            stream.buffer.write(text + end.encode())  # type: ignore[attr-defined]
        else:
            stream.write(text + end)
        stream.flush()  # a failure at interpreter exit would change the exit code
    except TROUBLE as error:
        silence(stream, error)


def silence(stream: Any, error: BaseException) -> None:
    """Redirect a standard stream to the null device, and record the reason in run.log, if there is one."""
    logger.info("nothing more is printed: %s", error)
    with contextlib.suppress(*TROUBLE, AttributeError):
        number = stream.fileno()
        if number in (1, 2):  # never redirect another file
            _silent.add(number)
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)


def has_lost_its_reader(stream: Any) -> bool:
    """Return whether a stream is a pipe whose reader has closed it."""
    try:
        asked = select.poll()
        asked.register(stream.fileno(), 0)
        return bool(asked.poll(0))
    except (*TROUBLE, AttributeError):
        return False


def is_silent() -> bool:
    """Return whether stdout was redirected to the null device."""
    return 1 in _silent

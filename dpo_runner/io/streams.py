"""What every command prints goes through here, and nothing that becomes of a terminal changes what the command does.

A reader may go away (`| head`), a disk that output goes to may be full, an encoding may lack a character. The first two
make a stream silent, the third shows an escape. Imports no rich, which a command may not need.
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
"""What writing to a stream may raise; the second where somebody has closed it, or for an encoding."""

_silent: set[int] = set()
"""The standard streams that lead nowhere any more, by their file descriptors."""


def show_every_character() -> None:
    """Let the standard streams write an escape for what their encoding lacks (`LC_ALL=C`, PYTHONIOENCODING=ascii)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def put(text: str | bytes, end: str = "\n") -> None:
    """Print a text, or bytes that may be no text."""
    _put(text, end, sys.stdout)


def put_error(text: str) -> None:
    """Print a line on stderr."""
    _put(text, "\n", sys.stderr)


def _put(text: str | bytes, end: str, stream: IO[str] | None) -> None:
    if stream is None:  # a process may have none
        return
    show_every_character()
    try:
        if isinstance(text, bytes):
            stream.flush()
            stream.buffer.write(text + end.encode())  # type: ignore[attr-defined]
        else:
            stream.write(text + end)
        stream.flush()  # else it would fail when the interpreter ends, which then changes the exit code
    except TROUBLE as error:
        silence(stream, error)


def silence(stream: Any, error: BaseException) -> None:
    """Send what is still to be written to a stream nowhere, and note that in run.log, if there is one."""
    logger.info("nothing more is printed: %s", error)
    with contextlib.suppress(*TROUBLE, AttributeError):
        number = stream.fileno()
        if number in (1, 2):  # another file is not ours to turn away
            _silent.add(number)
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)


def has_lost_its_reader(stream: Any) -> bool:
    """Return whether a stream is a pipe that nobody reads."""
    try:
        asked = select.poll()
        asked.register(stream.fileno(), 0)
        return bool(asked.poll(0))
    except (*TROUBLE, AttributeError):
        return False


def is_silent() -> bool:
    """Return whether stdout leads nowhere any more."""
    return 1 in _silent

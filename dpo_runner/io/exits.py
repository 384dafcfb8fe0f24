"""Command exits: one stderr line per mistake, and a reliable exit code."""

import gc
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from dpo_runner.errors import ConfigError, DpoRunnerError, SweepFailed
from dpo_runner.io.interrupts import on_ctrl_c, raise_once
from dpo_runner.io.masking import mask_text
from dpo_runner.io.streams import Guarded, put

_LONG_WORD = re.compile(r"(\S{300})\S{100,}(\S{60})")
_LONGEST_LINE = 2000
"""In characters; a mistake may quote a value as long as a command line allows."""


def report(error: DpoRunnerError) -> int:
    """Print each mistake as one line, `error: …`, with secrets masked and control characters made visible.

    Returns:
        The exit code.
    """
    from dpo_runner.io.console import visible  # imports rich, which a successful command may not need

    told = error.message if isinstance(error, SweepFailed) else str(error)
    lines = [f"error: {line}" for line in (error.mistakes if isinstance(error, ConfigError) else [told])]
    for line in [*lines, *(error.table if isinstance(error, SweepFailed) else ())]:
        put(visible(mask_text(_to_line(line))), to_stderr=True)
    return error.exit_code


def _to_line(mistake: str) -> str:
    mistake = mistake.strip("\n").replace("\n", "␊").replace("\r", "␍")  # from a quoted value
    line = _LONG_WORD.sub(r"\1…\2", mistake)
    return line if len(line) <= _LONGEST_LINE else f"{line[: _LONGEST_LINE // 2]} … {line[-_LONGEST_LINE // 2 :]}"


@contextmanager
def honest_exit(interrupted: str) -> Iterator[None]:
    """Exit the program if the block fails: with the error's exit code, or 130 after Ctrl-C.

    Args:
        interrupted: the message after Ctrl-C.

    Raises:
        SystemExit: instead of a DpoRunnerError or KeyboardInterrupt.
    """
    stdout: Any = Guarded(sys.stdout)  # libraries print too (Hydra's --cfg)
    try:
        with on_ctrl_c(raise_once), redirect_stdout(stdout):
            yield
    except DpoRunnerError as error:
        sys.exit(report(error))
    except KeyboardInterrupt as error:
        if sys.stderr is not None and sys.stderr.isatty():
            put("", to_stderr=True)  # the terminal echoed ^C on the current line
        put(f"error: {interrupted}", to_stderr=True)
        sys.exit(128 + (error.args[0] if error.args else signal.SIGINT))  # a run passes the number of its first signal
    finally:
        put("", end="")  # flush other prints here, where errors are handled
        gc.freeze()  # the final collections at interpreter exit would traverse all modules: over a second

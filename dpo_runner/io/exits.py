"""How a command ends: each mistake as a line on stderr, and an exit code that a script can trust."""

import gc
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from dpo_runner.errors import ConfigError, DpoRunnerError, SweepFailed
from dpo_runner.io.interrupts import on_ctrl_c, raise_once
from dpo_runner.io.masking import mask_text
from dpo_runner.io.streams import has_lost_its_reader, put, put_error, silence

_LONG_WORD = re.compile(r"(\S{300})\S{100,}(\S{60})")
_LONGEST_LINE = 2000
"""Characters of a mistake; a value may be as long as a command line allows."""


def report(error: DpoRunnerError) -> int:
    """Print each mistake as one line, `error: …`, which commands no terminal and tells no secret.

    Returns:
        The exit code.
    """
    from dpo_runner.io.console import visible  # rich, which a command that ends well may not need

    told = error.message if isinstance(error, SweepFailed) else str(error)
    lines = [f"error: {line}" for line in (error.mistakes if isinstance(error, ConfigError) else [told])]
    for line in [*lines, *(error.table if isinstance(error, SweepFailed) else ())]:
        put_error(visible(mask_text(_to_line(line))))
    return error.exit_code


def _to_line(mistake: str) -> str:
    mistake = mistake.strip("\n").replace("\n", "␊").replace("\r", "␍")  # of a value: ours has none
    line = _LONG_WORD.sub(r"\1…\2", mistake)
    return line if len(line) <= _LONGEST_LINE else f"{line[: _LONGEST_LINE // 2]} … {line[-_LONGEST_LINE // 2 :]}"


@contextmanager
def honest_exit(interrupted: str) -> Iterator[None]:
    """End the program where what happens inside fails: with the error's own code, or 130 after Ctrl-C.

    Args:
        interrupted: what a person is told after Ctrl-C.

    Raises:
        SystemExit: instead of a DpoRunnerError or KeyboardInterrupt.
    """
    try:
        with on_ctrl_c(raise_once):
            yield
    except DpoRunnerError as error:
        sys.exit(report(error))
    except BrokenPipeError as error:
        if not has_lost_its_reader(sys.stdout):
            raise
        silence(sys.stdout, error)  # in what others print (Hydra's --cfg): whoever has read enough has what he wanted
    except KeyboardInterrupt as error:
        if sys.stderr is not None and sys.stderr.isatty():
            put_error("")  # the terminal has put ^C at the end of whatever was there
        put_error(f"error: {interrupted}")
        sys.exit(128 + (error.args[0] if error.args else signal.SIGINT))  # a run's has the first signal's number
    finally:
        put("", end="")  # what was printed elsewhere is flushed here, where that may fail
        gc.freeze()  # the interpreter's last collections would go through every module's objects, for over a second

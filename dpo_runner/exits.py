"""How a command ends: each mistake as a line on stderr, and an exit code that a script can trust."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from dpo_runner.errors import ConfigError, DpoRunnerError, SweepFailed
from dpo_runner.masking import mask_text

_LONG_WORD = re.compile(r"(\S{300})\S{100,}(\S{60})")
_LONGEST_LINE = 2000
"""Characters of a mistake; a value may be as long as a command line allows."""


def report(error: DpoRunnerError) -> int:
    """Print each mistake as one line, `error: …`, which commands no terminal and tells no secret.

    Returns:
        The exit code.
    """
    from dpo_runner.console import visible  # rich, which a command that ends well may not need

    told = error.message if isinstance(error, SweepFailed) else str(error)
    lines = [f"error: {line}" for line in (error.mistakes if isinstance(error, ConfigError) else [told])]
    for line in [*lines, *(error.table if isinstance(error, SweepFailed) else ())]:
        print(visible(mask_text(_to_line(line))), file=sys.stderr)
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
        yield
    except DpoRunnerError as error:
        sys.exit(report(error))
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            print(file=sys.stderr)  # the terminal has put ^C at the end of whatever was there
        print(f"error: {interrupted}", file=sys.stderr)
        sys.exit(130)

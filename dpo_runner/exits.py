"""How a command ends: each mistake as a line on stderr, and an exit code that a script can trust."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from dpo_runner.errors import ConfigError, DpoRunnerError


def report(error: DpoRunnerError) -> int:
    """Print each mistake as `error: …`, with what could command a terminal made visible; return the exit code."""
    from dpo_runner.console import visible  # rich, which a command that ends well may not need

    for line in error.mistakes if isinstance(error, ConfigError) else [str(error)]:
        print(f"error: {visible(line)}", file=sys.stderr)
    return error.exit_code


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

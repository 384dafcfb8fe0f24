"""The errors a person sees, and the exit code that each one ends the program with."""

import errno
import typing
from difflib import get_close_matches


def suggest(wrong: object, right: typing.Iterable[str]) -> str:
    """Return "; did you mean …?" with the nearest of the valid names, or the whole list where none is near."""
    names = sorted(right)
    near = get_close_matches(str(wrong), names, n=1, cutoff=0.6)
    if near:
        return f"did you mean `{near[0]}`?"
    return "choose from " + ", ".join(names) if len(names) <= 25 else ""


class DpoRunnerError(Exception):
    """Base of every error that is shown as one line, without a traceback."""

    exit_code = 1


class ConfigError(DpoRunnerError):
    """The configuration (or what it points at) cannot be run; nothing was trained.

    Attributes:
        mistakes: one line for each mistake found, all of them reported together.
    """

    exit_code = 2

    def __init__(self, mistakes: str | list[str]) -> None:
        self.mistakes = [mistakes] if isinstance(mistakes, str) else list(mistakes)
        super().__init__("\n".join(self.mistakes))


class DataError(ConfigError):
    """Preference data that cannot be used: a file, or all its rows together."""


class RowError(DataError):
    """One row that cannot be used.

    Args:
        reason: what kind of problem it is, the same words for all rows that have it.
        detail: what is special about this row.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        detail = " ".join(line.strip() for line in detail.splitlines())  # a template's words, say, may have several
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class LeftOut(RowError):
    """One sound row of which no pair is made, because the configuration says so."""


class RunBusy(ConfigError):
    """Another process is running in the run directory, which is its own to write to."""


class RunError(DpoRunnerError):
    """The run was sound on paper and went wrong while it ran (a failed check, a non-finite loss, …)."""


class SweepFailed(RunError):
    """Runs of a sweep failed.

    Args:
        message: how many.
        table: a line or more for each of them, shown beneath.
    """

    def __init__(self, message: str, table: list[str]) -> None:
        super().__init__("\n".join([message, *table]))
        self.message, self.table = message, table


class RunPruned(DpoRunnerError):
    """A search has given up the run; what it has logged so far is on disk.

    Args:
        step: the optimizer steps that were made.
        steps: those that it would have had.
    """

    def __init__(self, step: int, steps: int) -> None:
        super().__init__(f"given up by the search at step {step} of {steps}")
        self.step, self.steps = step, steps


class RunInterrupted(DpoRunnerError):
    """The run was stopped from outside by a signal.

    Args:
        signal_number: the signal that ended it; the exit code is 128 plus it, as shells have it.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def describe_failure(error: BaseException) -> str:
    """Return the kind of an error and what it says, in one line; of SystemExit, which says nothing, what happened.

    A library's message may have more lines, which are for a person who reads its traceback.
    """
    if isinstance(error, SystemExit):
        return f"the run called sys.exit({error.code!r})"
    if is_disk_full(error) and not isinstance(error, DpoRunnerError):
        return f"no space is left on a disk; free some, and the same command goes on ({reason_of(error)})"
    name = type(error).__name__
    if isinstance(error, DpoRunnerError):
        return f"{name}: {str(error).strip()}"  # in our own words, of which each line is a mistake
    return name if (reason := reason_of(error)) == name else f"{name}: {reason}"


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error, or what caused it, is of a disk without space."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "(os error 28)" in str(cause):  # so safetensors says it, whose errors are no OSError
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def reason_of(error: BaseException) -> str:
    """Return the first line of an error's message that is not blank, else the name of its class."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.strerror} ({error.filename})"
    return next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)

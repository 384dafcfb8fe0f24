"""Errors shown to the user, with their exit codes."""

import errno
import re
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches

_MOST_CHOICES = 45
"""More than the fields of PEFT's LoraConfig and the optimizers, and fewer than those of `training`."""


def suggest(wrong: object, right: typing.Iterable[str]) -> str:
    """Return "; did you mean …?" with the closest valid name, "; choose from …" if there are few, or an empty text.

    Names that hold the wrong one as whole words (`apo` in `apo_zero`) go before those that are spelled alike (`ipo`).
    """
    names, text = sorted(right), str(wrong)
    holds = re.compile(rf"(?<![^\W_]){re.escape(text)}(?![^\W_])", re.IGNORECASE)
    whole = [name for name in names if text and holds.search(name)]
    near = [name for name in names if name.lower() == text.lower()] or get_close_matches(text, names, n=1, cutoff=0.6)
    if whole and not set(near) & set(whole):
        near, names = whole[: len(whole) == 1], whole
    if near:
        return f"; did you mean `{near[0]}`?"
    return f"; choose from {', '.join(names)}" if 0 < len(names) <= _MOST_CHOICES else ""


class DpoRunnerError(Exception):
    """Base class of errors shown as one line, without a traceback. Picklable, whatever its constructor takes."""

    exit_code = 1

    def __reduce__(self) -> "tuple[typing.Any, ...]":
        return _restore, (type(self), self.args, self.__dict__)


def _restore(kind: type[DpoRunnerError], args: tuple[object, ...], attributes: dict[str, object]) -> DpoRunnerError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(attributes)
    return error


class ConfigError(DpoRunnerError):
    """The configuration, or a file it names, cannot be used; nothing was trained.

    Attributes:
        mistakes: one line for each mistake; all are reported together.
    """

    exit_code = 2

    def __init__(self, mistakes: str | list[str]) -> None:
        self.mistakes = [mistakes] if isinstance(mistakes, str) else list(mistakes)
        super().__init__("\n".join(self.mistakes))


@contextmanager
def renaming(key: str, wrong: str, value: str) -> Iterator[None]:
    """Let a ConfigError about `wrong` name the key that the value comes from."""
    try:
        yield
    except ConfigError as error:
        lines = [line.replace(f"`{wrong}={value}`", f"`{key}={value}`") for line in error.mistakes]
        raise ConfigError(lines) from None


class DataError(ConfigError):
    """Unusable preference data: a file, or its rows as a whole."""


class RowError(DataError):
    """One unusable row.

    Args:
        reason: the kind of problem, worded the same for all rows that have it.
        detail: the part specific to this row.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        # The error of a chat template, for example, may have several lines.
        detail = " ".join(line.strip() for line in detail.splitlines())
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class LeftOut(RowError):
    """A valid row that the configuration excludes."""


class RunBusy(ConfigError):
    """Another process is running in the run directory."""


class RunError(DpoRunnerError):
    """A valid run failed while it ran (a failed check, a non-finite loss, …)."""


class SweepFailed(RunError):
    """Runs of a sweep failed.

    Args:
        message: the number of failed runs.
        table: one or more lines for each failed run, shown below the message.
    """

    def __init__(self, message: str, table: list[str]) -> None:
        super().__init__("\n".join([message, *table]))
        self.message, self.table = message, table


class RunPruned(DpoRunnerError):
    """The search pruned the run; everything logged so far is on disk.

    Args:
        step: optimizer steps done.
        steps: optimizer steps planned.
    """

    def __init__(self, step: int, steps: int) -> None:
        super().__init__(f"given up by the search at step {step} of {steps}")
        self.step, self.steps = step, steps


class RunInterrupted(DpoRunnerError):
    """A signal stopped the run.

    Args:
        signal_number: the signal; the exit code is 128 plus this number, as in shells.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def describe_failure(error: BaseException) -> str:
    """Return the class and message of an error in one line.

    Of a library's message only the first line is kept; the traceback has the rest. SystemExit, which has no message,
    is described as the call of sys.exit.
    """
    if isinstance(error, SystemExit):
        return f"the run called sys.exit({error.code!r})"
    if is_disk_full(error) and not isinstance(error, DpoRunnerError):
        return f"no space is left on a disk; free some, and the same command goes on ({reason_of(error)})"
    name = type(error).__name__
    if isinstance(error, DpoRunnerError):
        return f"{name}: {str(error).strip()}"  # each line is a mistake
    return name if (reason := reason_of(error)) == name else f"{name}: {reason}"


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error, or one in its chain of causes, means that the disk is full."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "(os error 28)" in str(cause):  # safetensors' errors are not OSErrors
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def reason_of(error: BaseException) -> str:
    """Return the first non-blank line of an error's message, else the name of its class."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.strerror} ({error.filename})"
    return next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)

"""A thread of each process of a run that ends the process when another has failed, or when none makes progress.

A process that waits in a collective operation does not return to Python: with NCCL it would wait for a dead process
until the operation times out, and a signal would not be heard.
"""

import contextlib
import faulthandler
import functools
import os
import pickle
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

from dpo_runner.config.run_conf import RunConf
from dpo_runner.errors import DpoRunnerError, RunError, RunInterrupted, describe_failure
from dpo_runner.io.exits import report
from dpo_runner.io.interrupts import exit_now
from dpo_runner.training.ranks.group import (
    check_environment,
    count,
    is_first,
    is_launched,
    join_group,
    leave_together,
    open_store,
    rank,
)

FAILED = "failed"
"""The key of the first failure in the processes' store."""

_POLL_SECONDS = 0.5
_GRACE_SECONDS = 5
"""Time that a process has to end by itself, after another has failed."""
_CAUSE_SECONDS = 3
"""How long a process whose connection broke waits for the failure that broke it."""

Run = TypeVar("Run", bound=Callable[..., Any])


class _Watch(threading.Thread):
    """Watches the other processes' failures, and this process's progress.

    Args:
        minutes: the longest time between two signs of progress, once there was one.
    """

    def __init__(self, minutes: float) -> None:
        super().__init__(name="watch", daemon=True)
        self.store = open_store()
        self.folder: Path | None = None
        self.note_end: Callable[[str, str], None] = lambda state, reason: None
        self.last_sign: float | None = None
        self._minutes, self._seconds = minutes, 60 * minutes
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(_POLL_SECONDS):
            failure = find_failure(self.store)
            if failure is None and self.last_sign is not None and time.monotonic() - self.last_sign > self._seconds:
                failure = self._give_up()
            if failure is not None and not self._ended.wait(_GRACE_SECONDS):
                self._end(failure)

    def _give_up(self) -> DpoRunnerError:
        where = "" if self.folder is None else f"; {self.folder} has each process's stack"
        error = RunError(f"no step for {self._minutes:g} minutes (launch.timeout){where}")
        post(self.store, error, number=0)
        return error

    def _end(self, failure: DpoRunnerError) -> None:
        """End this process, which has not ended by itself, and leave a note of where it was."""
        if self.folder is not None:
            with (self.folder / f"{rank()}.stacks").open("w") as stream:
                faulthandler.dump_traceback(stream)
        if is_first():
            state = "interrupted" if isinstance(failure, RunInterrupted) else "failed"
            self.note_end(state, describe_failure(failure))
            if not is_launched():
                report(failure)
        exit_now(failure.exit_code)

    def stop(self) -> None:
        """End the thread. A process that exits while one of its threads uses torch's store is aborted."""
        self._ended.set()
        self.join(_GRACE_SECONDS)


_watch: _Watch | None = None
_has_failed = False
"""Whether a run of this process, among several, has failed. The others may have ended since, or be in another step."""


def over_processes(run: Run) -> Run:
    """Let a function, which takes a configuration, join the processes of a launcher, and tell them of its failure.

    It raises a RunError if an earlier one has failed in these processes.
    """

    @functools.wraps(run)
    def joined(conf: RunConf, *args: Any, **kwargs: Any) -> Any:
        conf = join_group(conf)
        with _watching(conf.launch.timeout):
            check_environment(conf)
            result = run(conf, *args, **kwargs)
            leave_together()
            return result

    return cast(Run, joined)


@contextmanager
def _watching(minutes: float) -> Iterator[None]:
    global _watch, _has_failed
    if count() == 1:
        yield
        return
    if _has_failed:
        raise RunError("an earlier run has failed in these processes, which may be out of step; start them again")
    _watch = _Watch(minutes)
    _watch.start()
    try:
        yield
    except BaseException as error:
        _has_failed = True
        post(_watch.store, _to_ours(error))
        raise
    finally:
        _watch.stop()
        _watch = None


def _to_ours(error: BaseException) -> DpoRunnerError:
    if isinstance(error, DpoRunnerError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return RunInterrupted("interrupted", error.args[0] if error.args else signal.SIGINT)
    return RunError(describe_failure(error))


def post(store: Any, error: DpoRunnerError, number: int | None = None) -> None:
    """Tell the other processes of a failure; the first one counts.

    Args:
        store: from `open_store`.
        error: the failure.
        number: the process that failed; this one by default. The message names it unless it is the first.
    """
    with contextlib.suppress(RuntimeError):  # its server may be gone
        if not store.check([FAILED]):
            store.set(FAILED, pickle.dumps((rank() if number is None else number, error)))


def find_failure(store: Any) -> DpoRunnerError | None:
    """Return the first failure of any process, or None."""
    try:
        if not store.check([FAILED]):
            return None
        number, error = pickle.loads(store.get(FAILED))
    except RuntimeError:  # DistNetworkError, DistStoreError
        return RunError("the first process, or its launcher, is gone")
    failure: DpoRunnerError = error
    if type(failure) is RunError and number != 0:
        return RunError(f"process {number}: {failure}; its output is in ranks/{number}.log")
    return failure


def note_progress() -> None:
    """Record that this process has made a step, or scored a batch."""
    if _watch is not None:
        _watch.last_sign = time.monotonic()


def write_into(folder: Path, note_end: Callable[[str, str], None]) -> None:
    """Direct all that this process prints, unless it is the first, into `folder`/N.log.

    Args:
        folder: the run's folder `ranks`.
        note_end: records state and reason in status.json, if the watch ends the first process.
    """
    if _watch is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    _watch.folder, _watch.note_end = folder, note_end
    if not is_first():
        with (folder / f"{rank()}.log").open("ab") as file:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            for number in (1, 2):
                os.dup2(file.fileno(), number)


@contextmanager
def ending_by_itself() -> Iterator[None]:
    """Stop the watch when this block fails, because the last records may take longer than it waits.

    Raises:
        DpoRunnerError: the failure of another process, if that has broken this one's connection.
        KeyboardInterrupt: the same, after a signal to the other process.
    """
    try:
        yield
    except BaseException as error:
        if _watch is None:
            raise
        cause = find_cause(error)
        if cause is None:
            post(_watch.store, _to_ours(error))
        _watch.stop()
        if isinstance(cause, RunInterrupted):
            raise KeyboardInterrupt(cause.exit_code - 128) from error
        if cause is not None:
            raise cause from error
        raise


def find_cause(error: BaseException) -> DpoRunnerError | None:
    """Return the failure of another process that broke this one's connection, if that is what `error` says."""
    if _watch is None or not isinstance(error, RuntimeError) or not re.search("gloo|NCCL|TCPStore|socket", str(error)):
        return None
    until = time.monotonic() + _CAUSE_SECONDS
    while (failure := find_failure(_watch.store)) is None and time.monotonic() < until:
        time.sleep(_POLL_SECONDS)
    return failure

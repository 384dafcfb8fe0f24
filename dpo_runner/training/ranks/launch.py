"""Start the processes of a run (`launch.processes`), pass signals on to them, and end as they do.

torch's elastic launcher would lose the exit codes, take a second signal as a reason to leave the processes behind, and
start processes again that failed for good. Its store is used: the processes meet there, and leave their first failure.
"""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpo_runner.config.run_conf import RunConf
from dpo_runner.errors import ConfigError, RunError, RunInterrupted, reason_of
from dpo_runner.io.interrupts import SIGNALS
from dpo_runner.records.directory import update_status
from dpo_runner.records.reading import read_status
from dpo_runner.records.resume import interrupted
from dpo_runner.training.ranks.group import LAUNCHER, PrefixStore, TCPStore, count, count_processes
from dpo_runner.training.ranks.watch import FAILED, find_failure, post

_POLL_SECONDS = 0.1
_LAST_SECONDS = 120
"""Time that processes have to save a checkpoint and end, after a signal or after one of them has ended."""
_FAILED_SECONDS = 20
"""Time that they have after a failure, in which they write only their records."""


def starts_processes(conf: RunConf) -> bool:
    """Return whether this process is to start the run's processes, rather than to train."""
    return count() == 1 and count_processes(conf) > 1


def launch(job: Callable[[], Any], processes: int, path: Path) -> None:
    """Run a picklable job in several processes to its end.

    Args:
        job: what each process does; the first one writes to the terminal of this process.
        processes: their number.
        path: the run's directory; output of the others goes to `ranks/N.log` there.

    Raises:
        ConfigError: the job cannot be pickled.
        DpoRunnerError: the first failure of any process.
    """
    try:
        pickled = pickle.dumps(job)
    except Exception as error:
        told = f"the run cannot be passed to other processes; {reason_of(error)}"
        raise ConfigError(f"`launch.processes={processes}`: {told}") from None
    with tempfile.TemporaryDirectory(prefix="dpo_runner-") as folder:
        file = Path(folder) / "job.pickle"
        file.write_bytes(pickled)
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = PrefixStore("dpo_runner/0", store)
        started = [_start(number, processes, store.port, file) for number in range(processes)]
        try:
            with _passing_on(started) as received:
                _wait(started, shared, received)
        finally:
            for process in started:
                process.kill()
                process.wait()
        _raise_failure(started, shared, received, path)


def _start(number: int, processes: int, port: int, file: Path) -> "subprocess.Popen[bytes]":
    threads = int(os.environ.get("OMP_NUM_THREADS", "").partition(",")[0] or len(os.sched_getaffinity(0)))
    environment = {
        **os.environ,
        LAUNCHER: str(os.getpid()),
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "OMP_NUM_THREADS": str(max(threads // processes, 1)),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "dpo_runner.training.ranks.child", str(file), str(os.getpid())],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=None if number == 0 else subprocess.DEVNULL,
        process_group=0,  # Ctrl-C in the terminal reaches only this process, which passes it on once
    )


@contextmanager
def _passing_on(processes: "list[subprocess.Popen[bytes]]") -> Iterator[list[int]]:
    """Pass signals on to the processes, as far as they heed them; yields the received ones.

    Outside the main thread, which alone receives signals, nothing is changed.
    """
    received: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        received.append(number)
        for process in processes:
            process.send_signal(number)

    previous = {}
    with contextlib.suppress(ValueError):
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # SIGHUP under nohup
                previous[number] = signal.signal(number, pass_on)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(processes: "list[subprocess.Popen[bytes]]", store: Any, received: list[int]) -> None:
    """Wait until all processes have ended, or the time is over that they have after the first one."""
    until = None
    while None in (codes := [process.poll() for process in processes]):
        for number, code in enumerate(codes):
            if code is not None and code < 0 and not received and not store.check([FAILED]):
                post(store, RunError(_describe_kill(number, code)))
        if until is None and any(code is not None for code in codes):
            until = time.monotonic() + (_LAST_SECONDS if received or not any(codes) else _FAILED_SECONDS)
        if until is not None and time.monotonic() > until:
            return
        time.sleep(_POLL_SECONDS)


def _describe_kill(number: int, code: int) -> str:
    return f"process {number} was killed by {signal.Signals(-code).name}; the same command continues the run"


def _raise_failure(processes: "list[subprocess.Popen[bytes]]", store: Any, received: list[int], path: Path) -> None:
    codes = [process.returncode for process in processes]
    if not any(codes):
        return
    failure = find_failure(store)
    killed = next((number for number, code in enumerate(codes) if code in (-signal.SIGKILL, -signal.SIGSEGV)), None)
    if failure is None or (killed is not None and type(failure) is RunError):
        number = killed if killed is not None else next(number for number, code in enumerate(codes) if code)
        code = codes[number]
        failure = RunError(
            _describe_kill(number, code) if code < 0 else f"process {number} ended with exit code {code}"
        )
        failure.exit_code = 128 - code if code < 0 else code
    if (status := read_status(path)) is not None and status["state"] == "running":
        end = {"state": "interrupted" if isinstance(failure, RunInterrupted) else "failed", "error": str(failure)}
        update_status(path, **end)
    raise interrupted(path, failure.exit_code - 128) if isinstance(failure, RunInterrupted) else failure

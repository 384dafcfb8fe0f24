"""Start the processes of a run (`launch.processes`), pass signals on to them, and end as they do.

torch's elastic launcher would lose the exit codes, and leave the processes behind at a second signal. Its key-value
store is used: the processes find one another in it, and write their first failure into it.
"""

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpo_runner.config.run_conf import RunConf, count_processes
from dpo_runner.errors import ConfigError, DpoRunnerError, RunError, RunInterrupted, RunPruned, reason_of
from dpo_runner.io.interrupts import SIGNALS
from dpo_runner.records.directory import update_status
from dpo_runner.records.reading import read_status
from dpo_runner.records.resume import interrupted
from dpo_runner.training.ranks.group import LAUNCHER, PrefixStore, TCPStore, count
from dpo_runner.training.ranks.watch import FAILED, find_failure, post

_POLL_SECONDS = 0.1
_LAST_SECONDS = 120
"""Time that processes have to write their last records after one of them has ended."""


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
    if b"__main__" in pickled:
        told = "a callback of the program's main file cannot be passed to other processes; put it into a module"
        raise ConfigError(f"`launch.processes={processes}`: {told}")
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))  # torch would listen on all addresses
        listening.listen()
        port = listening.getsockname()[1]
        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())
    shared = PrefixStore("dpo_runner/0", store)
    started = [_start(number, processes, port) for number in range(processes)]
    received: list[int] = []
    try:
        for process in started:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError), process.stdin:  # it has ended already
                process.stdin.write(pickled)
        with _passing_on(started, received):
            codes = _wait(started, shared, received)
    finally:
        for process in started:
            process.kill()
            process.wait()
    if any(codes):
        raise _find_failure(codes, shared, received, path)


def _start(number: int, processes: int, port: int) -> "subprocess.Popen[bytes]":
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
        [sys.executable, "-m", "dpo_runner.training.ranks.child", str(os.getpid())],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=None if number == 0 else subprocess.DEVNULL,
        process_group=0,  # Ctrl-C in the terminal reaches only this process, which passes it on once
    )


@contextmanager
def _passing_on(processes: "list[subprocess.Popen[bytes]]", received: list[int]) -> Iterator[None]:
    """Pass signals on to the processes in this block, and add them to `received`.

    Only the main thread receives signals; in another one this does nothing.
    """

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
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(processes: "list[subprocess.Popen[bytes]]", store: Any, received: list[int]) -> list[int | None]:
    """Wait until all processes have ended, or their time after the end of the first is over.

    Returns:
        Each process's exit code; None for one that is still running.
    """
    until = None
    while None in (codes := [process.poll() for process in processes]):
        for number, code in enumerate(codes):
            if code is not None and code < 0 and not received and not store.check([FAILED]):
                post(store, RunError(_describe_kill(number, code)))
        if until is None and any(code is not None for code in codes):
            until = time.monotonic() + _LAST_SECONDS
        if until is not None and time.monotonic() > until:
            break
        time.sleep(_POLL_SECONDS)
    return codes


def _describe_kill(number: int, code: int) -> str:
    return f"process {number} was killed by {signal.Signals(-code).name}; the same command continues the run"


def _find_failure(codes: list[int | None], store: Any, received: list[int], path: Path) -> DpoRunnerError:
    """Return the failure that has ended the processes, and complete status.json if the first one could not.

    A process that was killed, by another hand than this program's, goes before what the others make of it.
    """
    failure = find_failure(store)
    killed = next((number for number, code in enumerate(codes) if code in (-signal.SIGKILL, -signal.SIGSEGV)), None)
    if failure is None and received:
        failure = RunInterrupted("interrupted", received[0])
    elif failure is None or (killed is not None and type(failure) is RunError):
        number = next(number for number, code in enumerate(codes) if code) if killed is None else killed
        code = codes[number] or 0
        told = _describe_kill(number, code) if code < 0 else f"process {number} ended with exit code {code}"
        failure = RunError(told)
        failure.exit_code = 128 - code if code < 0 else code
    if isinstance(failure, RunInterrupted):
        failure = interrupted(path, failure.exit_code - 128)
    if (status := read_status(path)) is not None and status["state"] == "running":
        state = {RunInterrupted: "interrupted", RunPruned: "pruned"}.get(type(failure), "failed")
        update_status(path, state=state, error=str(failure))
    return failure

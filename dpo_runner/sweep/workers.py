"""Pool of worker processes, and descriptions of how a worker died."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from dpo_runner.config.run_conf import RunConf
from dpo_runner.errors import RunError
from dpo_runner.io.processes import list_gpus
from dpo_runner.records.directory import update_status
from dpo_runner.records.reading import read_status
from dpo_runner.sweep.directory import DONE
from dpo_runner.sweep.jobs import Job, Outcome
from dpo_runner.training.memory.smaller import list_ways

_VMSTAT = Path("/proc/vmstat")


def count_oom_kills() -> int:
    """Return the number of OOM kills on this machine; 0 if it is unknown."""
    if not _VMSTAT.exists():
        return 0
    lines = _VMSTAT.read_text(encoding="ascii").splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def describe_death(returncode: int, oom_kills: int) -> tuple[str, bool]:
    """Return how a worker died, and whether it ran out of memory.

    Args:
        returncode: as in `subprocess`; negative for a signal.
        oom_kills: the number of OOM kills on the machine while the worker ran.
    """
    if returncode >= 0:
        return f"its process ended with exit code {returncode}", False
    name = signal.Signals(-returncode).name
    if -returncode == signal.SIGKILL and oom_kills:
        return f"its process was killed by {name}: the machine was out of memory", True
    likely = "; the machine does so when it is out of memory" if -returncode == signal.SIGKILL else ""
    return f"its process was killed by {name}{likely}", False


def advise_on_memory(conf: RunConf, workers: int, has_advice: bool) -> str:
    """Return advice with overrides that make a job smaller; those that do not change results come first.

    Args:
        conf: the job's configuration.
        workers: the number of workers of the sweep.
        has_advice: whether the job's own error already names settings; it does unless its process was killed.
    """
    ways = [f"sweep.workers={workers - 1}"] if workers > 1 else []
    ways += [] if has_advice else list_ways(conf)
    return f"try {', or '.join(ways)}" if ways else ""


_POLL_SECONDS = 0.2
_EXIT_SECONDS = 30
_MOST_FAILED_STARTS = 3
_NOTICE = b"\nrunning jobs stop after their step, with a checkpoint; Ctrl-C again stops them at once\n"


class Worker:
    """One worker process.

    Args:
        environment: variables to set in it.
        log: the file for output outside of jobs.
        inherited: file descriptors that it keeps open until it ends.
    """

    def __init__(self, environment: dict[str, str], log: Path, inherited: Sequence[int]) -> None:
        self.connection, theirs = Pipe()
        self.log = log
        self.ready = False
        self.job: Job | None = None
        self.started = 0.0
        self._oom_kills = count_oom_kills()
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dpo_runner.sweep.executor", str(theirs.fileno())],
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                pass_fds=[theirs.fileno(), *inherited],
                process_group=0,  # Ctrl-C in the terminal reaches only the sweep, which forwards it once
            )
        theirs.close()

    def give(self, job: Job) -> None:
        self.job, self.started = job, time.monotonic()
        self.connection.send((job.conf, list(job.overrides)))

    def receive(self) -> dict[str, Any] | None:
        """Return a message, or None if there is none; `state` is `died` once the process has ended."""
        try:
            if self.connection.poll():
                message: dict[str, Any] = self.connection.recv()
                return message
        except (EOFError, OSError):
            self.process.wait()  # its end of the connection closes shortly before it exits
        if self.process.poll() is None:
            return None
        self.kill()  # its child processes
        error, of_memory = describe_death(self.process.returncode, count_oom_kills() - self._oom_kills)
        return {"state": "died", "error": error, "out_of_memory": of_memory}

    def dismiss(self) -> None:
        """Ask the worker to end after its jobs."""
        try:
            self.connection.send(None)
        except OSError:
            return  # it has ended already

    def kill(self) -> None:
        """Kill the worker and its child processes."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # macOS raises the latter for a group of zombies
            return


class WorkerPool:
    """Runs jobs on worker processes.

    Args:
        count: the number of workers; None for one per GPU, or group of GPUs, or one on the CPU.
        threads: the number of threads of each worker.
        log_dir: the folder for the workers' output outside of jobs.
        inherited: file descriptors that workers keep open until they end.
        gpus: the GPUs of each worker; see `group_gpus`.
    """

    def __init__(
        self, count: int | None, threads: int, log_dir: Path, inherited: Sequence[int] = (), gpus: Sequence[str] = ()
    ) -> None:
        self._gpus = gpus
        self.count = count_workers(count, gpus)
        self._threads, self._log_dir, self._inherited = threads, log_dir, inherited
        self._workers: dict[int, Worker] = {}
        self._leaving: list[Worker] = []
        self._failed_starts = 0
        self.signal: int | None = None
        """The signal that has stopped the sweep, if any."""

    def run(self, jobs: deque[Job], on_start: Callable[[Job], None], on_end: Callable[[Outcome], None]) -> None:
        """Run `jobs` in order, each as soon as a worker is free, until none is left.

        SIGINT and SIGTERM stop running jobs as Ctrl-C stops a run, and no more are started; a second SIGINT kills them.

        Args:
            jobs: taken from the left; `on_end` may add to it or clear it.
            on_start: called before each job.
            on_end: called after each job.

        Raises:
            RunError: workers repeatedly fail to start.
        """
        try:
            with self._handle_signals():
                while (jobs and self.signal is None) or self._busy():
                    if self.signal is None:
                        self._start_workers(len(jobs))
                        self._assign_jobs(jobs, on_start)
                    wait([worker.connection for worker in self._workers.values()], _POLL_SECONDS)
                    for slot, worker in list(self._workers.items()):
                        if (message := worker.receive()) is not None:
                            self._handle_message(slot, worker, message, on_end)
        finally:
            self._stop_workers()

    def _busy(self) -> int:
        return sum(worker.job is not None for worker in self._workers.values())

    def _assign_jobs(self, jobs: deque[Job], on_start: Callable[[Job], None]) -> None:
        for worker in self._workers.values():
            if jobs and worker.ready and worker.job is None:
                on_start(jobs[0])
                worker.give(jobs.popleft())

    def _handle_message(
        self, slot: int, worker: Worker, message: dict[str, Any], on_end: Callable[[Outcome], None]
    ) -> None:
        if message["state"] == "ready":
            worker.ready, self._failed_starts = True, 0
            return
        if message["state"] not in DONE:
            self._leaving.append(self._workers.pop(slot))
        if worker.job is not None:
            job, worker.job = worker.job, None
            on_end(self._build_outcome(worker, job, message))
        elif not worker.ready and self.signal is None:
            self._failed_starts += 1
            if self._failed_starts < _MOST_FAILED_STARTS:
                return
            raise RunError(f"a worker could not start ({message['error']}); see {worker.log}")

    def _build_outcome(self, worker: Worker, job: Job, message: dict[str, Any]) -> Outcome:
        state, error = message["state"], message.get("error")
        died = state == "died"
        if died:
            state = "failed" if self.signal is None else "interrupted"
            if (told := (read_status(job.path) or {}).get("state")) in DONE:
                state, error = str(told), None  # it died after the job, before it sent the outcome
        if message.get("out_of_memory"):
            error = f"{error}\n{advise_on_memory(job.conf, self.count, message.get('has_advice', False))}".rstrip()
        if state not in DONE and (died or message.get("out_of_memory")):
            update_status(job.path, state=state, error=error, log=str(job.path / "job.log"))
        return Outcome(job, state, time.monotonic() - worker.started, error)

    def _start_workers(self, jobs: int) -> None:
        """Start workers up to the number that has work; a dead one is replaced while there are jobs."""
        for slot in range(self.count):
            if slot not in self._workers and len(self._workers) < self._busy() + jobs:
                environment = {"OMP_NUM_THREADS": str(self._threads), "MKL_NUM_THREADS": str(self._threads)}
                if self._gpus:
                    environment["CUDA_VISIBLE_DEVICES"] = self._gpus[slot % len(self._gpus)]
                log = self._log_dir / f"worker-{slot}.log"
                self._workers[slot] = Worker(environment, log, self._inherited)

    @contextmanager
    def _handle_signals(self) -> Iterator[None]:
        def stop(number: int, frame: Any) -> None:
            again = self.signal is not None
            if again and number != signal.SIGINT:
                return  # schedulers repeat SIGTERM while checkpoints are being written
            self.signal = self.signal or number
            if not again:
                with contextlib.suppress(OSError):  # stderr may be closed
                    os.write(2, _NOTICE)  # not print: the signal may have interrupted a print
            for worker in self._workers.values():
                if again:
                    worker.kill()
                elif worker.job is not None:
                    worker.process.terminate()

        previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _stop_workers(self) -> None:
        workers = [*self._workers.values(), *self._leaving]
        for worker in self._workers.values():
            if worker.ready and worker.job is None:
                worker.dismiss()
            else:
                worker.kill()
        for worker in workers:
            try:
                worker.process.wait(timeout=_EXIT_SECONDS)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.process.wait()
        self._workers, self._leaving = {}, []


def count_workers(count: int | None, gpus: Sequence[str]) -> int:
    """Return the number of workers for `sweep.workers`: null means one per group of GPUs, or one on the CPU."""
    return count or max(len(gpus), 1)


def group_gpus(confs: Sequence[RunConf]) -> list[str]:
    """Return the values of CUDA_VISIBLE_DEVICES among which jobs are divided; empty if all train on the CPU.

    Each group has as many GPUs as the largest job has processes (`launch.processes`). If there are too few GPUs, all
    are in one group, and the job fails with a line that says so.
    """
    gpus = list_gpus()
    if not gpus or all(conf.training.use_cpu for conf in confs):
        return []
    asked = [conf.launch.processes or 1 for conf in confs]
    size = min(max(len(gpus) if number == "auto" else int(number) for number in asked), len(gpus))
    return [",".join(gpus[start : start + size]) for start in range(0, len(gpus) - size + 1, size)]

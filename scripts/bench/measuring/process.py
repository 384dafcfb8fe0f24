"""Commands and functions run in separate processes, with their time and memory."""

import ast
import hashlib
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_EVENT = re.compile(r"\{'.*\}")


class CommandFailed(Exception):
    """A command exited with a code other than 0, or timed out."""


@dataclass(frozen=True)
class Finished:
    """Measurements of a process that has ended.

    Attributes:
        seconds: wall-clock time.
        started: start time, in seconds since the epoch.
        peak_gb: peak resident memory of its largest process, in GB (1e9 bytes).
        cpu_seconds: CPU time of all its processes.
        events: the dicts that it printed, each with the arrival time of its line.
    """

    seconds: float
    started: float
    peak_gb: float
    cpu_seconds: float
    events: list[tuple[float, dict[str, float]]]


def build_environment(threads: int, work: Path, root: Path) -> dict[str, str]:
    """Return the environment variables of every side.

    `accelerate launch`, and so `trl dpo`, uses a single thread if OMP_NUM_THREADS is not set.
    """
    # importing dpo_runner sets the last two
    left_out = ("WANDB_", "DPO_RUNNER_", "HF_", "GOMP_SPINCOUNT", "PYTORCH_ALLOC_CONF")
    folders = [str(root), *carry_packages(os.environ.get("PYTHONPATH", ""), work)]
    kept = {key: value for key, value in os.environ.items() if not key.startswith(left_out)}
    return {
        **kept,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(folders),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(work / "hf"),
        "TOKENIZERS_PARALLELISM": "false",
    }


def carry_packages(path: str, work: Path) -> list[str]:
    """Return the folders of a PYTHONPATH, those of packages under a name that dill takes for one of packages.

    dill, by which `datasets.map` tells functions apart, pickles the contents of modules that lie neither under
    `sys.prefix` nor in a folder called site-packages; those of pyarrow cannot be.

    Args:
        path: the value of PYTHONPATH.
        work: folder for links of that name.
    """
    folders = []
    for folder in filter(None, path.split(os.pathsep)):
        found = Path(folder).resolve()
        if "site-packages" not in folder and any(found.glob("*.dist-info")):
            link = work / "packages" / hashlib.sha256(str(found).encode()).hexdigest()[:8] / "site-packages"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(found)
            folder = str(link)
        folders.append(folder)
    return folders


def aside(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function in a separate process.

    This keeps the benchmark's own process small: the kernel's peak memory of a command starts at the memory of the
    process that launched it.

    Raises:
        CommandFailed: the process died.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(work, *args, **kwargs).result()
        except BrokenProcessPool:
            raise CommandFailed(f"{work.__name__}: its process died, of too little memory perhaps") from None


def run(
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    timeout: float | None = None,
    hear: Callable[[str], None] = lambda line: None,
) -> Finished:
    """Run a command to its end, with its output in `log`.

    Args:
        command: program and arguments.
        environment: all environment variables.
        log: file to overwrite.
        timeout: seconds after which the command and all its child processes are killed.
        hear: called with each line of output when it is there.

    Raises:
        CommandFailed: the command failed, with the log's last lines, or timed out.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    events = []
    start, started = time.perf_counter(), time.time()
    with log.open("w", encoding="utf-8") as file:
        file.write(" ".join(command) + "\n")
        process = subprocess.Popen(
            command,
            env=dict(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # `trl dpo` trains in a child process; killpg ends both
        )
        assert process.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(threading.TIMEOUT_MAX if timeout is None else timeout, end)
        timer.daemon = True
        timer.start()
        try:
            for line in process.stdout:
                now = time.time()
                file.write(line)
                hear(line)
                if (event := read_event(line)) is not None:
                    events.append((now, event))
        except BaseException:
            end()
            raise
        finally:
            timer.cancel()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if late.is_set():
        raise CommandFailed(f"took more than {timeout:.0f} s; {log}")
    if process.returncode:
        tail = log.read_text(encoding="utf-8").splitlines()[-12:]
        raise CommandFailed(f"exit code {process.returncode}; {log} ends with:\n" + "\n".join(tail))
    return Finished(seconds, started, usage.ru_maxrss * 1024 / 1e9, usage.ru_utime + usage.ru_stime, events)


def read_event(line: str) -> dict[str, float] | None:
    """Return the numbers of a dict that `Trainer` printed in this line; None if there is no such dict."""
    found = _EVENT.search(line)
    if found is None or ("'loss'" not in line and "'train_runtime'" not in line):
        return None
    with suppress(ValueError, SyntaxError):
        return {key: float(value) for key, value in ast.literal_eval(found.group()).items()}
    return None

"""Why jobs failed: memory that ran out, and what to do about it; the table of all failures. Imports no torch."""

import signal
from collections.abc import Sequence
from pathlib import Path

from dpo_runner.config import RunConf
from dpo_runner.errors import SweepFailed
from dpo_runner.fitting import list_ways
from dpo_runner.sweep.states import JobState

_VMSTAT = Path("/proc/vmstat")


def count_oom_kills() -> int:
    """Return how many processes this machine has killed for want of memory; 0 where it does not tell."""
    if not _VMSTAT.exists():
        return 0
    lines = _VMSTAT.read_text(encoding="ascii").splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def describe_death(returncode: int, oom_kills: int) -> tuple[str, bool]:
    """Say how a worker died, and whether that was for want of memory.

    Args:
        returncode: as `subprocess` has it; negative for a signal.
        oom_kills: how many processes the machine killed for want of memory while it ran.
    """
    if returncode >= 0:
        return f"its process ended with exit code {returncode}", False
    name = signal.Signals(-returncode).name
    if -returncode == signal.SIGKILL and oom_kills:
        return f"its process was killed by {name}: the machine was out of memory", True
    likely = "; the machine does so when it is out of memory" if -returncode == signal.SIGKILL else ""
    return f"its process was killed by {name}{likely}", False


def advise_on_memory(conf: RunConf, workers: int, has_advice: bool) -> str:
    """Name the overrides that would make a job smaller, those that change no result first.

    Args:
        conf: the job.
        workers: of the sweep.
        has_advice: whether the job's own error names its settings, as it does unless its process was killed.
    """
    ways = [f"sweep.workers={workers - 1}"] if workers > 1 else []
    ways += [] if has_advice else list_ways(conf)
    return f"try {', or '.join(ways)}" if ways else ""


def list_failures(failed: Sequence[tuple[JobState, str]], total: int, path: Path) -> SweepFailed:
    """Return the error that has the table of all failures.

    Args:
        failed: each job that failed, with what it varies.
        total: how many jobs there are.
        path: the sweep's directory.
    """
    lines = []
    for job, label in failed:
        lines += [f"  {job.name}  {label}", *(f"      {line}" for line in str(job.error).splitlines())]
        lines += [f"      log: {job.log}"] if job.log else []
    told = f"{len(failed)} of {total} runs of the sweep failed; sweep.dir={path} with the same command tries them again"
    return SweepFailed(told, lines)

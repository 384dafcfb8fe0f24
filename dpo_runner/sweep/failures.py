"""Why jobs failed: memory that ran out, and what to do about it; the table of all failures. Imports no torch."""

import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

from dpo_runner.config import RunConf
from dpo_runner.sweep.states import JobState

_MEMORY_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")
_VMSTAT = Path("/proc/vmstat")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error, or what caused it, is of memory that ran out, on a device or on the host."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError":
            return True
        if isinstance(cause, (RuntimeError, OSError)) and any(word in str(cause).lower() for word in _MEMORY_WORDS):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


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


def advise_on_memory(conf: RunConf, workers: int) -> str:
    """Name the overrides that would make a job smaller, those that change no result first."""
    return "try " + ", or ".join(_ways(conf, workers))


def _ways(conf: RunConf, workers: int) -> Iterator[str]:
    training = conf.training
    if workers > 1:
        yield f"sweep.workers={workers - 1}"
    if (batch := training.per_device_train_batch_size) > 1:
        accumulation = training.gradient_accumulation_steps
        factor = next(n for n in range(2, batch + 1) if batch % n == 0)  # the effective batch stays the same
        yield (
            f"training.per_device_train_batch_size={batch // factor} "
            f"training.gradient_accumulation_steps={accumulation * factor}"
        )
    if (batch := training.per_device_eval_batch_size) > 1:
        yield f"training.per_device_eval_batch_size={batch // 2}"
    if not training.gradient_checkpointing:
        yield "training.gradient_checkpointing=true"
    if conf.quant is None and (conf.lora is not None or conf.model.adapter is not None):
        yield "quant=nf4"
    if training.max_length is not None:
        yield f"training.max_length={max(training.max_length // 2, 2)} (longer pairs are then left out)"


def list_failures(failed: Sequence[tuple[JobState, str]], total: int, path: Path) -> str:
    """Return the table of all failures as text.

    Args:
        failed: each job that failed, with what it varies.
        total: how many jobs there are.
        path: the sweep's directory.
    """
    lines = [
        f"{len(failed)} of {total} runs of the sweep failed; sweep.dir={path} with the same command tries them again"
    ]
    for job, label in failed:
        lines += [f"  {job.name}  {label}", *(f"      {line}" for line in str(job.error).splitlines())]
        lines += [f"      log: {job.log}"] if job.log else []
    return "\n".join(lines)

"""A sweep's directory: sweep.json, the lock, the states of its jobs. Does not import torch."""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dpo_runner.config.metrics import choose_shown, column_of
from dpo_runner.config.sections.sweep import SweepConf
from dpo_runner.errors import ConfigError
from dpo_runner.io.files import find_fresh_folder, lock, write_json
from dpo_runner.io.masking import mask_override
from dpo_runner.records.checkpoints import find_last_checkpoint, read_step
from dpo_runner.records.directory import update_status
from dpo_runner.records.reading import read_metrics, read_status, read_summary
from dpo_runner.records.status import find_death, is_process_alive
from dpo_runner.sweep.points import Point, assign_names, split_name

_RECORD = "sweep.json"
_LOCK = "sweep.lock"
_LOCK_WAIT_SECONDS = 300  # a worker whose sweep died ends its step and writes a checkpoint


@dataclass
class SweepRecord:
    """The content of sweep.json.

    Attributes:
        threads_per_worker: threads of each worker; bitwise results depend on it.
        jobs: by name of the job's directory, the digest of its configuration (`digest`) and its overrides (`varied`,
            `overrides`).
    """

    threads_per_worker: int
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)


def read_record(path: Path) -> SweepRecord | None:
    """Return sweep.json of a directory, or None if there is none."""
    try:
        return SweepRecord(**json.loads((path / _RECORD).read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None


def resolve_sweep_dir(sweep: SweepConf, run_name: str) -> Path:
    """Return the directory of a sweep: `sweep.dir`, the last one, or a fresh one. Creates nothing.

    Raises:
        ConfigError: there is nothing to resume, or the directory is not a sweep's or has other settings.
    """
    parent = Path("outputs") / "sweeps" / run_name
    if sweep.dir is not None:
        path = Path(sweep.dir).expanduser()
    elif sweep.resume == "last":
        sweeps = [found.parent for found in parent.glob(f"*/{_RECORD}")]
        if not sweeps:
            raise ConfigError(f"`sweep.resume=last`: no sweep is in {parent}; leave it out, or set sweep.dir")
        path = max(sweeps)
    else:
        return find_fresh_folder(parent)
    record = read_record(path)
    if record is None and path.exists() and (not path.is_dir() or {found.name for found in path.iterdir()} - {_LOCK}):
        raise ConfigError(f"`sweep.dir={path}`: holds something other than a sweep; use a new or empty folder")
    if record is not None and record.threads_per_worker != sweep.threads_per_worker:
        raise ConfigError(
            f"`sweep.threads_per_worker={sweep.threads_per_worker}`: the sweep in {path} runs with "
            f"{record.threads_per_worker}, on which results depend; use that value, or another sweep.dir"
        )
    return path


def name_points(points: Sequence[Point], path: Path) -> list[str]:
    """Return the directory name of each point; points that the sweep in `path` has keep their names."""
    record = read_record(path)
    existing = {name: job["digest"] for name, job in record.jobs.items()} if record else {}
    return assign_names([point.digest for point in points], existing)


def prepare(path: Path, names: Sequence[str], points: Sequence[Point], threads: int) -> None:
    """Record the jobs in sweep.json, and create a pending directory for each new one."""
    record = read_record(path) or SweepRecord(threads)
    for name, point in zip(names, points, strict=True):
        told = {key: [mask_override(text) for text in getattr(point, key)] for key in ("varied", "overrides")}
        record.jobs.setdefault(name, {"digest": point.digest, **told})
    write_json(path / _RECORD, asdict(record))
    for name in names:
        if not (path / name / "status.json").exists():
            update_status(path / name, state="pending")


def lock_sweep(path: Path, say: Callable[[str], None]) -> int:
    """Create and lock a sweep's directory until this process and its workers have ended.

    Returns:
        The file descriptor that holds the lock, for workers to inherit.

    Raises:
        ConfigError: another sweep is running there, or the directory cannot be written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        handle = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(f"`sweep.dir={path}`: cannot be written to; {error.strerror}") from None
    deadline = time.monotonic() + _LOCK_WAIT_SECONDS
    while lock(handle, inherited=True) is False:
        owner = os.pread(handle, 32, 0).decode()
        if (owner.isdecimal() and is_process_alive(int(owner))) or time.monotonic() > deadline:
            os.close(handle)
            raise ConfigError(f"`sweep.dir={path}`: process {owner} is running this sweep; wait for it, or stop it")
        if deadline - time.monotonic() > _LOCK_WAIT_SECONDS - 0.3:
            say(f"waiting for the last workers of process {owner}, which was killed, to stop")
        time.sleep(0.5)
    os.ftruncate(handle, 0)
    os.pwrite(handle, str(os.getpid()).encode(), 0)
    return handle


DONE = ("finished", "pruned")
"""States of jobs that are not run again."""


@dataclass(frozen=True)
class JobState:
    """The state of one job, read from its directory.

    Attributes:
        name: the directory's name.
        state: pending, running, finished, failed, interrupted, pruned; died if it was running and its process is gone.
        error: why it did not finish.
        log: the file with the job's output.
        metrics: metrics of the tuned model; {} unless finished.
        checkpoint: the step of its last whole checkpoint, from which it would continue; None if there is none.
    """

    name: str
    state: str
    error: str | None = None
    log: str | None = None
    metrics: dict[str, Any] | None = None
    checkpoint: int | None = None


def read_job(path: Path) -> JobState:
    """Return the state of one job; pending if its directory does not exist."""
    status = read_status(path) or {"state": "pending"}
    state, error = status["state"], status.get("error")
    if state == "running" and (death := find_death(path, status)) is not None:
        state, error = "died", f"{death}; step {read_progress(path)} is the last that is known of"
    last = find_last_checkpoint(path / "checkpoints") if state not in DONE else None
    return JobState(
        path.name,
        state,
        error,
        status.get("log"),
        read_summary(path)["after"] if state == "finished" else {},
        read_step(last) if last is not None else None,
    )


def read_jobs(sweep_dir: Path) -> list[JobState]:
    """Return the state of every job in a sweep's directory, sorted by index."""
    found = [(split, path) for path in sweep_dir.iterdir() if (split := split_name(path.name)) and path.is_dir()]
    return [read_job(path) for _, path in sorted(found)]


def read_progress(path: Path) -> int:
    """Return the number of optimizer steps a run has recorded; a killed run may have made more."""
    status, last = read_status(path) or {}, find_last_checkpoint(path / "checkpoints")
    if status.get("state") == "finished":
        return int(read_summary(path)["steps"])
    logged = [int(event["step"]) for event in read_metrics(path)]
    return max(int(status.get("step", 0)), read_step(last) if last is not None else 0, *logged)


def show_metrics(metrics: dict[str, Any] | None) -> str:
    """Return the key metrics as one line; empty if there are none."""
    metrics = metrics or {}
    return "  ".join(f"{column_of(key)} {metrics[key]:.3f}" for key in choose_shown([metrics]) if key in metrics)

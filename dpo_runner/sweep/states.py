"""What has become of each job of a sweep, read from its directory. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_runner.liveness import explain_death
from dpo_runner.reading import read_metrics, read_status, read_summary
from dpo_runner.sealing import find_last_checkpoint, read_step
from dpo_runner.sweep.names import split_name

DONE = ("finished", "pruned")
"""States of a job that is not run again."""
KEY_METRICS = (
    ("eval_rewards/accuracies", "accuracy"),
    ("eval_rewards/margins", "margin"),
    ("eval_loss", "loss"),
)
"""What a job is judged by, in the order in which it is shown, and how it is called there."""


@dataclass(frozen=True)
class JobState:
    """One job as its directory tells of it.

    Attributes:
        name: the directory's name.
        state: pending, running, finished, failed, interrupted, pruned; died, where it was running and could not say so.
        error: why it did not finish.
        log: the file that tells more.
        metrics: of the tuned model; {} unless it is finished.
        checkpoint: the steps behind its last whole checkpoint, from which it would go on; None without one.
    """

    name: str
    state: str
    error: str | None = None
    log: str | None = None
    metrics: dict[str, Any] | None = None
    checkpoint: int | None = None


def read_job(path: Path) -> JobState:
    """Return the state of one job; a directory that is not there is of a job that is pending."""
    status = read_status(path) or {"state": "pending"}
    state, error = status["state"], status.get("error")
    if state == "running" and (death := explain_death(path, status)) is not None:
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
    """Return the state of every job in a sweep's directory, in the order of their indices."""
    found = [(split, path) for path in sweep_dir.iterdir() if (split := split_name(path.name)) and path.is_dir()]
    return [read_job(path) for _, path in sorted(found)]


def read_progress(path: Path) -> int:
    """Return how many optimizer steps a run has made; one that was killed may have made more since it last said so."""
    status, last = read_status(path) or {}, find_last_checkpoint(path / "checkpoints")
    if status.get("state") == "finished":
        return int(read_summary(path)["steps"])
    logged = [int(event["step"]) for event in read_metrics(path)]
    return max(int(status.get("step", 0)), read_step(last) if last is not None else 0, *logged)


def show_metrics(metrics: dict[str, Any] | None) -> str:
    """Return the key metrics as one line; empty where there are none."""
    return "  ".join(f"{label} {metrics[key]:.3f}" for key, label in KEY_METRICS if metrics and key in metrics)

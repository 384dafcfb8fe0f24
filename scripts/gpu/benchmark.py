"""Both sides on one job: pairs a second, memory, and how near the estimate of memory is.

Both run in a process that has imported everything, by the script that the command runs. The first step, in which
kernels are compiled, is not counted.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import TrainerCallback, trainer

from dpo_runner.training.environment import measure_peak_memory, reset_peak_memory
from dpo_runner.training.memory.device import is_out_of_memory
from scripts.bench.inputs.shapes import Rows
from scripts.bench.measuring.flops import mean_flops, measure_peak
from scripts.bench.peers.sides import BATCHES, TRL_VARIANTS, Job, build_ours, name_split, read_state, write_trl_dataset
from scripts.gpu.inputs import Task, prepare_job
from scripts.gpu.training import empty_cache, run_ours, train_trl
from scripts.gpu.work import Tell, describe_error, free_memory

_STEP = 8
"""Pairs of an optimizer step."""
_SEARCH = 0.6
"""Share of a part's time after which TRL's search begins no further try."""
NEAR = (0.9, 1.3)
"""Allowed range of the estimated over the measured peak."""


class Steps(TrainerCallback):  # type: ignore[misc]
    """The instants at which optimizer steps of this process ended."""

    ends: ClassVar[list[float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


class Measured:
    """Times and peak memory of a training in this process.

    Attributes:
        total: seconds of the block, with loading and saving.
        scoring: seconds of it in which the reference was scored before training.
        step: seconds of a step, the first one left out.
        peak_gb: peak memory in GB (1e9 bytes); of a GPU, what torch has allocated.
    """

    def __init__(self) -> None:
        self.total = self.scoring = self.step = self.peak_gb = 0.0

    def figures(self, pairs: int) -> dict[str, Any]:
        """Return the fields of a result; `pairs` is the number of pairs in the job."""
        speed = _STEP / self.step
        return {
            "pairs_per_second": speed,
            "with_reference": pairs / (pairs / speed + self.scoring),
            "total_seconds": self.total,
            "peak_gb": self.peak_gb,
        }


@contextmanager
def measuring(device: torch.device) -> Iterator[Measured]:
    """Measure the training inside this block, of whichever side."""
    from trl import DPOTrainer

    from dpo_runner.training.engine import install

    measured = Measured()
    Steps.ends.clear()
    scorers = ((DPOTrainer, "_precompute_ref_logps"), (install, "add_reference_columns"))
    kept = [(owner, name, getattr(owner, name)) for owner, name in scorers]
    for owner, name, function in kept:
        setattr(owner, name, _timed(function, measured))
    trainer.DEFAULT_CALLBACKS.append(Steps)
    free_memory()
    reset_peak_memory(device)
    start = time.perf_counter()
    try:
        yield measured
    finally:
        trainer.DEFAULT_CALLBACKS.remove(Steps)
        for owner, name, function in kept:
            setattr(owner, name, function)
    measured.total, measured.peak_gb = time.perf_counter() - start, measure_peak_memory(device)
    measured.step = (Steps.ends[-1] - Steps.ends[0]) / (len(Steps.ends) - 1)


def _timed(function: Callable[..., Any], measured: Measured) -> Callable[..., Any]:
    @wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            measured.scoring += time.perf_counter() - start

    return timed


def measure_ours(size: str, task: Task, tell: Tell) -> None:
    """Measure dpo_runner with an empty and a full reference store, and compare its memory with the estimate."""
    job, rows = prepare_job(task, size, task.pairs)
    _report_peak(job, rows, task, tell)
    with empty_cache(Path(task.work) / f"cache-{size}"):
        free_memory()
        estimated = _estimate(job, Path(task.work) / "runs" / f"{size}-estimate", tell)
        for store in ("cold", "warm"):
            peak = _measure_run(size, job, store, task, tell)
    _compare_memory(estimated, peak, task, tell)


def _measure_run(size: str, job: Job, store: str, task: Task, tell: Tell) -> float:
    """Measure one run, and return its peak memory in GB."""
    folder = Path(task.work) / "runs" / f"{size}-{store}"
    shutil.rmtree(folder, ignore_errors=True)
    with measuring(torch.device(task.device)) as measured:
        ran = run_ours(job, folder)
    for line in ran.fallbacks:
        tell(f"fell back: {line}", False)
    is_scored = any("scoring" in line for line in ran.lines)
    history, figures = read_state(folder / "checkpoints")[1], measured.figures(task.pairs)
    tell(f"dpo_runner, {store} store", is_scored == (store == "cold"), history=history, **figures)
    return float(ran.summary["peak_memory_gb"])


def _report_peak(job: Job, rows: Rows, task: Task, tell: Tell) -> None:
    """Measure the peak in 16 bits on the model's own layers, and count the operations of a pair."""
    tokens = job.batch * sum(map(sum, rows.lengths)) // rows.pairs
    work = 2e11 if task.device == "cuda" else 1e8
    measured = measure_peak(job.model, tokens, task.device, torch.get_num_threads(), job.dtype, work)
    peak = measured["flops_per_second"]
    flops = mean_flops(job.model, rows.lengths)
    tell(f"{job.dtype} products of the model's layers: {peak / 1e12:.3g} TFLOP/s", peak=peak, flops=flops)


def _estimate(job: Job, folder: Path, tell: Tell) -> float:
    """Return the estimate of the run's peak memory in GB, and report what the run decides by it."""
    from dpo_runner.config.compose import load_conf
    from dpo_runner.data.preferences import load_preferences
    from dpo_runner.model.blueprint import draw_blueprint
    from dpo_runner.training.memory.settle import settle

    conf = load_conf(build_ours(job, folder)[3:])
    blueprint = draw_blueprint(conf)
    data = load_preferences(conf, blueprint.tokenizer)
    settled = settle(conf, blueprint, data.shape(), folder / "checkpoints")
    for label, note in settled.notes.items():
        if label != "evaluation":
            tell(f"{label}: {note}")
    return settled.estimate(blueprint).total / 1e9


def _compare_memory(estimated: float, peak: float, task: Task, tell: Tell) -> None:
    ratio = estimated / peak
    if task.device == "cuda":
        is_near = NEAR[0] <= ratio <= NEAR[1]
        tell(
            f"memory estimated {estimated:.2f} GB, allocated at most {peak:.2f} GB: {ratio:.2f}, allowed "
            f"{NEAR[0]:g} to {NEAR[1]:g}",
            is_near,
        )
    else:
        tell(f"memory estimated {estimated:.2f} GB; the process has {peak:.2f} GB, libraries included")


def measure_trl(size: str, task: Task, tell: Tell) -> None:
    """Measure TRL with its defaults, then with other settings of the same job, for the fastest ones.

    Out of memory is a result. No further try begins after a share of the part's time.
    """
    begun = time.monotonic()
    job, _ = prepare_job(task, size, task.pairs)
    folder = Path(task.work) / "runs" / f"{size}-trl"
    speeds: dict[str, float] = {}
    for number, name in enumerate(list_tries(speeds)):
        if number and time.monotonic() - begun > _SEARCH * task.seconds:
            tell(f"the search for TRL's best settings ended after {number} tries, for lack of time")
            return
        variant = TRL_VARIANTS[name]
        write_trl_dataset(job.rows)  # a newer file: TRL finds no reference that an earlier try has cached
        try:
            with measuring(torch.device(task.device)) as measured:
                steps, _ = train_trl(variant.split(job), folder, variant.flags)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            tell(name, out_of_memory=describe_error(error))
            continue
        figures = measured.figures(task.pairs)
        speeds[name] = figures["with_reference"]
        tell(name, history=steps["history"], **figures)


def list_tries(speeds: Mapping[str, float]) -> Iterator[str]:
    """Yield the settings of TRL to try: its defaults, checkpointing and reference, then other micro-batches.

    Args:
        speeds: pairs a second of the settings tried so far; the caller adds to it.
    """
    yield from (name for name, variant in TRL_VARIANTS.items() if variant.batch == BATCHES[0])
    if speeds:
        best = max(speeds, key=speeds.__getitem__)
        yield from (name_split(best, batch) for batch in (8, 2))

"""What the processes of a test's run do: runs one after another, with a fault put into one of them."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from dpo_runner import RunConf, run
from dpo_runner.records.reading import read_status
from dpo_runner.training.engine import token_batches
from dpo_runner.training.engine.token_batches import TokenBatches
from dpo_runner.training.ranks.group import rank
from dpo_runner.training.trainer import RunTrainer


class NoteDraws(TrainerCallback):
    """Writes the first random number of each step to a file of each process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.draws: list[float] = []

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        with torch.random.fork_rng():
            self.draws.append(float(torch.rand(())))
        (self.folder / f"draws-{rank()}.json").write_text(json.dumps(self.draws))


def spoil(ids: list[int]) -> None:
    """Make the loss NaN for batches with a certain row, in runs that skip such steps."""
    compute = TokenBatches.compute_loss

    def spoiled(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute(self, model, inputs, *args, **kwargs)
        if not self.max_skipped:
            return loss
        rows = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        return loss * float("nan") if ids in [row[mask.bool()].tolist() for row, mask in rows] else loss

    TokenBatches.compute_loss = spoiled


def _keep_gradients_apart() -> None:
    token_batches.sum_gradients = lambda weights: None


def _at_step(step: int, act: Callable[[RunTrainer], None]) -> None:
    train = RunTrainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if rank() == 1 and self.state.global_step == step:
            act(self)
        return train(self, *args, **kwargs)

    RunTrainer.training_step = training_step


def _fail(trainer: RunTrainer) -> None:
    raise ValueError("a fault of one process")


def _run_out_of_memory(trainer: RunTrainer) -> None:
    """Run out of memory unless the run has smaller batches already."""
    status = read_status(Path(trainer.args.output_dir).parent)
    if status is not None and "out_of_memory" not in status:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


FAULTS: dict[str, Callable[[], None]] = {
    "gradients stay apart": _keep_gradients_apart,
    "an error": lambda: _at_step(1, _fail),
    "a hang": lambda: _at_step(1, lambda trainer: time.sleep(300)),
    "too little memory": lambda: _at_step(4, _run_out_of_memory),
}


def train(
    confs: Sequence[RunConf], fault: str | None = None, bad_row: list[int] | None = None, draws: Path | None = None
) -> None:
    """Run configurations one after another in this process.

    Args:
        confs: with `run_dir` set.
        fault: one of `FAULTS`.
        bad_row: token ids of a row whose loss is NaN.
        draws: a folder for `NoteDraws`.
    """
    if fault is not None:
        FAULTS[fault]()
    if bad_row is not None:
        spoil(bad_row)
    for conf in confs:
        run(conf, callbacks=[] if draws is None else [NoteDraws(draws)])

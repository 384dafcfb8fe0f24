"""What the processes of a test's run do: runs one after another, with faults put into them."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback

from dpo_runner import RunConf, run
from dpo_runner import train as story
from dpo_runner.records.reading import read_status
from dpo_runner.training.answers import measuring
from dpo_runner.training.engine.token_batches import TokenBatches
from dpo_runner.training.ranks.group import rank
from dpo_runner.training.ranks.sharding import local
from dpo_runner.training.trainer import RunTrainer


class NoteDraws(TrainerCallback):
    """Writes the first random number of each step to a file of each process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.draws: list[float] = []

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        with torch.random.fork_rng():
            self.draws.append(float(torch.rand(())))
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"draws-{rank()}.json").write_text(json.dumps(self.draws))


class NoteParts(TrainerCallback):
    """Writes the bytes of weights that a process has, and of their optimizer states, to a file of each process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **kwargs: Any) -> None:
        states = [value for values in optimizer.state.values() for value in values.values() if value.dim()]
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # the embeddings stay gathered after an evaluation
        sizes = [sum(local(each).nbytes for each in some) for some in (model.parameters(), states)]
        (self.folder / f"parts-{rank()}.json").write_text(json.dumps(sizes))


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


def _run_out_of_memory() -> None:
    step = RunTrainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        status = read_status(Path(self.args.output_dir).parent)
        if rank() == 1 and self.state.global_step == 4 and status is not None and "out_of_memory" not in status:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return step(self, *args, **kwargs)

    RunTrainer.training_step = training_step


def train(
    confs: Sequence[RunConf], short_of_memory: bool = False, bad_row: list[int] | None = None, draws: Path | None = None
) -> None:
    """Run configurations one after another in this process.

    Args:
        confs: with `run_dir` set.
        short_of_memory: let the second process run out of memory, until batches are smaller.
        bad_row: token ids of a row whose loss is NaN, in runs that skip such steps.
        draws: a folder for `NoteDraws`.
    """
    if short_of_memory:
        _run_out_of_memory()
    if bad_row is not None:
        spoil(bad_row)
    for conf in confs:
        callbacks: list[TrainerCallback] = [] if draws is None else [NoteDraws(draws / Path(str(conf.run_dir)).name)]
        run(conf, callbacks=[*callbacks, NoteParts(Path(str(conf.run_dir)))])


STAGES: dict[str, tuple[Any, str]] = {
    "loading": (story, "load_policy"),
    "preparing": (story, "build_trainer"),
    "training": (RunTrainer, "training_step"),
    "evaluating": (RunTrainer, "evaluation_loop"),
    "saving": (RunTrainer, "_save_checkpoint"),
    "answering": (measuring, "generate_answers"),
}
"""Parts of a run, each with the function that does it."""


def fail_in(stage: str, conf: RunConf, folder: Path) -> None:
    """Run a configuration; in the second process a part of it fails, and its time is written to `folder`."""
    owner, name = STAGES[stage]
    whole = getattr(owner, name)

    def fail(*args: Any, **kwargs: Any) -> Any:
        if rank() == 1:
            (folder / "failed").write_text(str(time.time()))
            raise ValueError(f"a fault in {stage}")
        return whole(*args, **kwargs)

    setattr(owner, name, fail)
    run(conf)

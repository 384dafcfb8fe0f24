"""How the trainer saves: checkpoints that are whole or do not count, with all that its logs will need again."""

import json
import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import SaveStrategy, rotate_checkpoints
from trl import DPOTrainer

from dpo_runner.artifacts import write_json
from dpo_runner.engine.token_batches import TokenBatchTrainer
from dpo_runner.errors import RunError
from dpo_runner.sealing import list_checkpoints, put_damaged_aside, write_sealed

logger = logging.getLogger(__name__)

# Private to transformers, and overridden here: an upgrade that renames it must not pass unnoticed.
for _name in ("_save_checkpoint", "_determine_best_metric"):
    assert hasattr(DPOTrainer, _name), f"transformers' Trainer.{_name} is gone"

PROGRESS_FILE = "progress.json"
"""In a checkpoint: what Trainer and TRL keep in memory alone until they log it, and would begin anew."""


class SavingTrainer(TokenBatchTrainer):
    """Saves under another name first; see `sealing.py`.

    Attributes:
        say: shows one line to a person.
    """

    say: Callable[[str], None] = logger.warning

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._epoch_ends = _EpochEnds()
        self.add_callback(self._epoch_ends)  # behind all others: they ask for checkpoints

    def _determine_best_metric(self, metrics: Any, trial: Any) -> bool:
        """With `save_strategy=best` Trainer saves where this is true, and forgets whoever else wants a checkpoint."""
        is_best = bool(super()._determine_best_metric(metrics=metrics, trial=trial))
        if self.args.save_strategy != SaveStrategy.BEST and not self.args.load_best_model_at_end:
            return is_best
        self.control.should_save |= is_best  # one between two saves could not be loaded at the end
        self._epoch_ends.put_off(self.control)
        return bool(self.control.should_save)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write the checkpoint whole or not at all, then drop those that `save_total_limit` has no room for."""
        folder = Path(self.args.output_dir)
        self._check_room(folder)
        final = folder / f"checkpoint-{self.state.global_step}"
        write_sealed(final, partial(self._fill_checkpoint, model, trial, final))
        put_damaged_aside(folder, self.say)
        rotate_checkpoints(str(folder), self.args.save_total_limit, self.state.best_model_checkpoint)

    def _check_room(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)  # somebody may have taken it away
        last = next(iter(list_checkpoints(folder)), None)
        if last is None:
            states = [value for state in self.optimizer.state.values() for value in state.values()]
            tensors = [value for value in states if isinstance(value, torch.Tensor)]
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            needed = sum(tensor.nbytes for tensor in (*trained, *tensors))
        else:
            needed = sum(file.stat().st_size for file in last.rglob("*"))
        if (free := shutil.disk_usage(folder).free) < needed:
            kept = f"; {last.name} is whole, and the same command continues from it" if last else ""
            raise RunError(
                f"{folder}: {free / 1e6:,.0f} MB are free on its disk, and a checkpoint takes {needed / 1e6:,.0f} MB; "
                f"free some{kept}"
            )

    def _fill_checkpoint(self, model: Any, trial: Any, final: Path, staging: Path) -> None:
        folder, self.args.output_dir = self.args.output_dir, str(staging)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.output_dir = folder
        (staging / final.name / TRAINING_ARGS_NAME).unlink()  # a pickle that only code can read, hub_token included
        for file in (written := staging / final.name).iterdir():
            file.rename(staging / file.name)
        written.rmdir()
        if (best := self.find_best()) is not None and (best == final or best.is_dir()):
            self.state.best_model_checkpoint = str(best)
            self.state.save_to_json(str(staging / "trainer_state.json"))
        write_json(staging / PROGRESS_FILE, self.progress())

    def find_best(self) -> Path | None:
        """Return the best checkpoint so far, by its step: its path may have been another when that was noted."""
        step = self.state.best_global_step
        return Path(self.args.output_dir) / f"checkpoint-{step}" if step else None

    def progress(self) -> dict[str, Any]:
        """Return what a checkpoint has to hold beside what Trainer puts there."""
        return {
            "num_tokens": self._total_train_tokens,
            "loss": self._tr_loss.item(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "metrics": self._metrics["train"],
        }

    def take_up(self, progress: dict[str, Any]) -> None:
        """Go on from `progress`; called when a training begins, right after Trainer has set all of it to nothing."""
        self._total_train_tokens = progress["num_tokens"]
        self._tr_loss.fill_(progress["loss"])
        self._total_loss_scalar = progress["total_loss"]
        self._globalstep_last_logged = progress["last_logged"]
        self._metrics["train"].update(progress["metrics"])

    def restore_progress(self, checkpoint: Path) -> None:
        """Let the training that is about to begin log as if it had never been interrupted at `checkpoint`."""
        progress = json.loads((checkpoint / PROGRESS_FILE).read_text(encoding="utf-8"))
        self.add_callback(_TakingUp(self, progress))


class _EpochEnds(TrainerCallback):  # type: ignore[misc]
    """Puts the checkpoint of an epoch's last step off until the epoch's own log event and evaluation are made.

    From one written before them Trainer would go on with the next epoch, and they would never be made.
    """

    def __init__(self) -> None:
        self._is_last_step = self._is_due = False

    def put_off(self, control: TrainerControl) -> None:
        if self._is_last_step:
            self._is_due |= control.should_save
            control.should_save = False

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        self._is_last_step = control.should_training_stop or float(state.epoch).is_integer()
        self.put_off(control)

    def on_evaluate(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        self.put_off(control)

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        control.should_save |= self._is_due
        self._is_last_step = self._is_due = False


class _TakingUp(TrainerCallback):  # type: ignore[misc]
    def __init__(self, trainer: SavingTrainer, progress: dict[str, Any]) -> None:
        self._trainer, self._progress = trainer, progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.take_up(self._progress)
        state.compute_steps(args, state.max_steps)  # the configuration's rhythm, which may be another by now

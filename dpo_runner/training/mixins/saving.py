"""Trainer mixin: atomic checkpoints, and the extra state that a resumed run needs."""

import json
import logging
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import SaveStrategy, rotate_checkpoints
from trl import DPOTrainer

from dpo_runner.errors import RunError
from dpo_runner.io.files import write_json
from dpo_runner.io.upstream import check_names
from dpo_runner.records.checkpoints import list_checkpoints, put_damaged_aside, write_sealed
from dpo_runner.training.ranks.group import do_first

logger = logging.getLogger(__name__)

check_names(
    "transformers",
    DPOTrainer,
    _save_checkpoint="model trial",
    _determine_best_metric="metrics trial",
    _maybe_log_save_evaluate="tr_loss grad_norm model trial epoch ignore_keys_for_eval start_time learning_rate",
    _evaluate="trial ignore_keys_for_eval",
)

PROGRESS_FILE = "progress.json"
"""State in a checkpoint that Trainer and TRL keep only in memory and would reset on resume."""


class EvaluationCut(KeyboardInterrupt):
    """Aborts an evaluation because a signal stops the run; during training a checkpoint is saved."""


class SealedCheckpoints(DPOTrainer):  # type: ignore[misc]
    """Writes each checkpoint under a temporary name first; see `records.checkpoints`.

    Args:
        say: shows one line to the user.
        kwargs: passed to `DPOTrainer`.
    """

    _cut_evaluation: dict[str, Any] | None = None

    def __init__(self, *, say: Callable[[str], None], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.say = say
        self._epoch_ends = _EpochEnds()
        self.add_callback(self._epoch_ends)  # after all others, which request checkpoints

    def _determine_best_metric(self, metrics: Any, trial: Any) -> bool:
        """Return whether to save the step; with `save_strategy=best` Trainer drops other save requests."""
        is_best = bool(super()._determine_best_metric(metrics=metrics, trial=trial))
        if self.args.save_strategy != SaveStrategy.BEST and not self.args.load_best_model_at_end:
            return is_best
        self.control.should_save |= is_best  # a best step between two saves could not be loaded at the end
        self._epoch_ends.defer(self.control)
        return bool(self.control.should_save)

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate without advancing the random generators.

        Training is then the same whether an evaluation ran at its step or was made up on resume.
        """
        with _same_random_numbers():
            return dict(super()._evaluate(*args, **kwargs))

    def _maybe_log_save_evaluate(
        self,
        tr_loss: torch.Tensor,
        grad_norm: torch.Tensor | float | None,
        model: Any,
        trial: Any,
        *args: Any,
        learning_rate: float | None = None,
    ) -> None:
        """Log, save and evaluate; if a signal aborts the evaluation, save the step first.

        The resumed run repeats the evaluation.
        """
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, learning_rate=learning_rate)
        except EvaluationCut:
            self._cut_evaluation = {
                "grad_norm": None if grad_norm is None else float(grad_norm),
                "learning_rate": learning_rate,
                "epoch_end": self._epoch_ends.is_last_step,
            }
            self._save_checkpoint(model, trial)
            raise

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write the checkpoint atomically, then delete old ones beyond `save_total_limit`."""
        self.gather_state()
        do_first(partial(self._write_checkpoint, model, trial))
        self.drop_state()
        self._note_best(self._place_of_checkpoint())  # the other processes have not written it

    def _place_of_checkpoint(self) -> Path:
        return Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"

    def _write_checkpoint(self, model: Any, trial: Any) -> None:
        folder, final = Path(self.args.output_dir), self._place_of_checkpoint()
        self._check_room(folder)
        write_sealed(final, partial(self._fill_checkpoint, model, trial, final))
        put_damaged_aside(folder, self.say)
        self._check_best()
        rotate_checkpoints(str(folder), self.args.save_total_limit, self.state.best_model_checkpoint)

    def _check_best(self) -> None:
        """Fail early if the best checkpoint, needed at the end, was damaged and put aside."""
        best = self.state.best_model_checkpoint
        if best is None or Path(best).is_dir():
            return
        if self.args.load_best_model_at_end:
            raise RunError(f"{best}: the best checkpoint is gone or was damaged; the same command makes it again")
        self.state.best_model_checkpoint = None  # not needed, and rotation would look for it

    def _check_room(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)  # may have been deleted meanwhile
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
        (staging / final.name / TRAINING_ARGS_NAME).unlink()  # a pickle that includes hub_token
        for file in (written := staging / final.name).iterdir():
            file.rename(staging / file.name)
        written.rmdir()
        if self._note_best(final):
            self.state.save_to_json(str(staging / "trainer_state.json"))
        write_json(staging / PROGRESS_FILE, self.progress())

    def _note_best(self, saved: Path) -> bool:
        """Put the best checkpoint's path, if it is there or just `saved`, into the state; return whether it is."""
        best = self.find_best()
        is_there = best is not None and (best == saved or best.is_dir())
        if is_there:
            self.state.best_model_checkpoint = str(best)
        return is_there

    def find_best(self) -> Path | None:
        """Return the best checkpoint so far, by step: the recorded path may be outdated."""
        step = self.state.best_global_step
        return Path(self.args.output_dir) / f"checkpoint-{step}" if step else None

    def progress(self) -> dict[str, Any]:
        """Return the state that a checkpoint needs in addition to Trainer's."""
        return {
            **super().progress(),
            "loss": self._tr_loss.item(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "due": self._cut_evaluation,
        }

    def restore(self, progress: dict[str, Any]) -> None:
        """Restore `progress`; called at the start of training, right after Trainer has reset the state."""
        super().restore(progress)
        self._tr_loss.fill_(progress["loss"])
        self._total_loss_scalar = progress["total_loss"]
        self._globalstep_last_logged = progress["last_logged"]

    def restore_at_start(self, checkpoint: Path) -> None:
        """Make the next training log as if it had not been interrupted at `checkpoint`."""
        self.add_callback(_Restore(self, _read_progress(checkpoint)))

    def finish_pending(self, checkpoint: Path) -> None:
        """Finish the work left after the last step, that of `checkpoint`; no training follows."""
        progress = _read_progress(checkpoint)
        self._tr_loss = torch.zeros((), device=self.args.device)  # as Trainer initializes it at the start of training
        self.restore(progress)
        self.run_cut_evaluation(progress)

    def run_cut_evaluation(self, progress: dict[str, Any]) -> None:
        """Run the evaluation aborted by a signal when the checkpoint was saved; log the end of its epoch."""
        due = progress.get("due")  # missing in older checkpoints
        if due is None:
            return
        self._determine_best_metric(self._evaluate(None, None), None)
        if (best := self.find_best()) is not None and best.is_dir():  # this step may not be saved again
            self.state.best_model_checkpoint = str(best)
        if due["epoch_end"]:
            self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            self.control.should_save = self.control.should_evaluate = False
            figures = (self._tr_loss, due["grad_norm"], self.model, None, self.state.epoch, None, time.time())
            super()._maybe_log_save_evaluate(*figures, learning_rate=due["learning_rate"])
        self.control.should_save = False  # this step already has a checkpoint


class _EpochEnds(TrainerCallback):  # type: ignore[misc]
    """Defers the checkpoint of an epoch's last step until after the epoch's log event and evaluation.

    From an earlier checkpoint Trainer would resume with the next epoch and skip both.
    """

    def __init__(self) -> None:
        self.is_last_step = self._is_due = False

    def defer(self, control: TrainerControl) -> None:
        if self.is_last_step:
            self._is_due |= control.should_save
            control.should_save = False

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        self.is_last_step = control.should_training_stop or float(state.epoch).is_integer()
        self.defer(control)

    def on_evaluate(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        self.defer(control)

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        control.should_save |= self._is_due
        self.is_last_step = self._is_due = False


class _Restore(TrainerCallback):  # type: ignore[misc]
    def __init__(self, trainer: SealedCheckpoints, progress: dict[str, Any]) -> None:
        self._trainer, self._progress = trainer, progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.restore(self._progress)
        state.compute_steps(args, state.max_steps)  # the configured intervals may have changed
        self._trainer.run_cut_evaluation(self._progress)


def _read_progress(checkpoint: Path) -> dict[str, Any]:
    return dict(json.loads((checkpoint / PROGRESS_FILE).read_text(encoding="utf-8")))


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Restore the state of all random generators on exit."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])

"""Trainer mixin: stop at, or skip, steps with a non-finite loss or gradient.

In both cases the step's pairs are written to a file with their origin, and each pair is scored separately, to
distinguish a bad row from diverged weights. The check covers the whole step and runs before the optimizer step.
"""

import logging
import math
from pathlib import Path
from typing import Any

import torch
from trl import DPOTrainer

from dpo_runner.data.preferences import PreferenceData
from dpo_runner.errors import RunError, reason_of
from dpo_runner.io.files import write_json
from dpo_runner.io.upstream import check_names, prepare_inputs
from dpo_runner.training.engine.scores import Batch, Place
from dpo_runner.training.engine.token_batches import select_pairs
from dpo_runner.training.ranks.group import is_first, share
from dpo_runner.training.ranks.sharding import level, whole

logger = logging.getLogger(__name__)

check_names("transformers", DPOTrainer, _get_grad_norm="model grad_norm")

_SHOWN = 3
"""Maximum pairs named in a message."""


class FiniteSteps(DPOTrainer):  # type: ignore[misc]
    """Checks each step's loss and gradient norm.

    Args:
        data: the training rows and their origin.
        dumps: folder for the pairs of non-finite steps.
        max_skipped: maximum skipped steps before the run stops; 0 stops at the first.
        kwargs: passed to the next mixins and `DPOTrainer`.
    """

    _skipped = _interval_steps = _interval_skipped = 0

    def __init__(self, *, data: PreferenceData, dumps: Path, max_skipped: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.data, self.dumps, self.max_skipped = data, dumps, max_skipped

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Return the batches of the next optimizer step, and reset the per-step state."""
        self._loss = torch.zeros((), device=self.args.device)
        self._noted = {name: len(values) for name, values in self.figures["train"].items()}
        self._interval_steps += 1
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return a batch's loss; if steps may be skipped, 0 for a non-finite one.

        Trainer sums the losses for its log.
        """
        loss = super().training_step(*args, **kwargs)
        self._loss += loss
        return torch.where(torch.isfinite(loss), loss, torch.zeros_like(loss)) if self.max_skipped else loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = whole(super()._get_grad_norm(model, grad_norm))
        loss = self._loss.item()
        # In fp16 an infinite gradient is normal: the loss scaler skips the step and lowers the scale.
        if math.isfinite(loss) and (self.args.fp16 or math.isfinite(float(norm))):
            return norm
        with level(self.model):
            told = self._report(model, loss, float(norm)) if is_first() else ""
        told = share(told)
        if self._skipped == self.max_skipped:
            if self.max_skipped:
                told += f"; {self._skipped} steps were skipped before, as many as checks.max_skipped_batches allows"
            raise RunError(
                f"{told}. Nothing after the last checkpoint is kept. Try a smaller training.learning_rate "
                f"(now {self.args.learning_rate:g}) or training.max_grad_norm"
            )
        self._skipped += 1
        self._interval_skipped += 1
        model.zero_grad()  # the optimizer does not touch weights without gradient
        noted = {name: values[: self._noted.get(name, 0)] for name, values in self.figures["train"].items()}
        self.figures["train"].clear()
        self.figures["train"].update({name: values for name, values in noted.items() if values})
        self.say(f"{told}; the step is skipped")
        return None  # then Trainer logs no norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Average losses over the steps that were not skipped."""
        if "loss" in logs:
            taken = self._interval_steps - self._interval_skipped
            if not taken:
                del logs["loss"]
            elif self._interval_skipped:
                logs["loss"] *= self._interval_steps / taken
            self._interval_steps = self._interval_skipped = 0
            if self._skipped:
                logs["skipped_batches"] = self._skipped
        super().log(logs, start_time)

    def progress(self) -> dict[str, Any]:
        skipped = [self._skipped, self._interval_steps, self._interval_skipped]
        return {**super().progress(), "skipped": skipped}

    def restore(self, progress: dict[str, Any]) -> None:
        super().restore(progress)
        self._skipped, self._interval_steps, self._interval_skipped = progress["skipped"]

    def _report(self, model: Any, loss: float, norm: float) -> str:
        """Return a description of the non-finite step and its bad pairs."""
        step = self.state.global_step + 1
        what = f"loss is {loss:g}" if not math.isfinite(loss) else f"grad_norm is {norm:g}"
        told = f"{what} at step {step}"
        try:
            return f"{told}{self._write_down(model, step, loss, norm)}"
        except Exception as error:  # must not mask the original problem
            logger.exception("the pairs of step %d cannot be looked at", step)
            return f"{told}; its pairs cannot be looked at: {reason_of(error)}"

    def _write_down(self, model: Any, step: int, loss: float, norm: float) -> str:
        """Write the step's pairs to a file; return a description of the bad ones and the path."""
        batches = [select_pairs(self._batches, [place]) for place in self._places()]
        pairs = [
            self._describe(model, batch, row) for batch, row in zip(batches, self._find_rows(batches), strict=True)
        ]
        wrong = [pair["source"] or f"training row {pair['row']}" for pair in pairs if not pair["finite"]]
        told = ""
        if len(wrong) == len(pairs):
            told = ", with each of its pairs"
        elif wrong:
            told = f", with {', '.join(wrong[:_SHOWN])}{f' and {len(wrong) - _SHOWN} more' if wrong[_SHOWN:] else ''}"
        self.dumps.mkdir(parents=True, exist_ok=True)
        path = self.dumps / f"step-{step}.json"
        write_json(path, {"step": step, "loss": _to_json(loss), "grad_norm": _to_json(norm), "pairs": pairs})
        return f"{told}; its pairs are in {path}"

    def _places(self) -> list[Place]:
        return [
            Place(index, row)
            for index, batch in enumerate(self._batches)
            for row in range(len(batch["input_ids"]) // 2)
        ]

    def _describe(self, model: Any, batch: Batch, row: int | None) -> dict[str, Any]:
        chosen, rejected = _read_ids(batch)
        with self._unlogged(), torch.no_grad(), self.compute_loss_context_manager():
            loss = float(self.compute_loss(model, prepare_inputs(self, batch)))
        return {
            "row": row,
            "source": self.data.locate("train", row) if row is not None else None,
            "loss": _to_json(loss),
            "finite": math.isfinite(loss),
            "chosen": self.processing_class.decode(chosen),
            "rejected": self.processing_class.decode(rejected),
            "chosen_ids": chosen,
            "rejected_ids": rejected,
        }

    def _find_rows(self, batches: list[Batch]) -> list[int | None]:
        """Return the index of the training row of each one-pair batch; the first of identical rows."""
        wanted = {str(_read_ids(batch)) for batch in batches}
        found: dict[str, int] = {}
        for index, row in enumerate(self.train_dataset):
            if (ids := str(_read_ids(self.data_collator([row])))) in wanted:
                found.setdefault(ids, index)
        return [found.get(str(_read_ids(batch))) for batch in batches]


def _read_ids(batch: Batch) -> tuple[list[int], list[int]]:
    """Return the token ids of a pair's two rows."""
    masks = batch["attention_mask"].bool()
    chosen, rejected = (ids[mask].tolist() for ids, mask in zip(batch["input_ids"], masks, strict=True))
    return chosen, rejected


def _to_json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)

"""`RunTrainer`: TRL's trainer on token ids, with the runner's mixins."""

import math
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from peft import PeftModel
from trl import DPOTrainer

from dpo_runner.data.preferences import ID_COLUMNS
from dpo_runner.errors import RunError
from dpo_runner.io.logs import quiet_imports
from dpo_runner.model.stacking import complete_reference, put_reference
from dpo_runner.model.vocabulary import open_head
from dpo_runner.records.checkpoints import explain_damage, read_step
from dpo_runner.records.resume import read_epoch
from dpo_runner.training.memory.device import EVALUATION, TRAINING, watch_memory
from dpo_runner.training.mixins.nonfinite import FiniteTrainer

with quiet_imports():
    from transformers import TrainerState
    from trl import DPOConfig


class WatchingTrainer(FiniteTrainer):
    """Knows how long its last evaluation has taken, and whether it was in one when memory ran out."""

    _evaluated: tuple[float, int] | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with watch_memory(TRAINING, self.max_tokens):
            return super().train(*args, **kwargs)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        began = time.monotonic()
        with watch_memory(EVALUATION):
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics.pop(f"{metric_key_prefix}_model_preparation_time", None)
        self._evaluated = time.monotonic() - began, output.num_samples
        return output

    def correct_times(self, logs: dict[str, float]) -> None:
        """Put what was measured here in the place of the runtime and speeds of the evaluation that is being logged."""
        if self._evaluated is None or not any(key.endswith("_runtime") for key in logs):
            return
        seconds, rows = self._evaluated
        self._evaluated = None
        batches = math.ceil(rows / (self.args.eval_batch_size * self.args.world_size))
        for key in logs:
            if key.endswith("_runtime"):
                logs[key] = round(seconds, 4)
            elif key.endswith("_samples_per_second"):
                logs[key] = round(rows / seconds, 3)
            elif key.endswith("_steps_per_second"):
                logs[key] = round(batches / seconds, 3)


# Private to TRL, and overridden here: an upgrade that renames it must not pass unnoticed.
for _name in (
    "_prepare_dataset",
    "_precompute_ref_logps",
    "_prepare_inputs",
    "_load_from_checkpoint",
    "_load_best_model",
):
    assert hasattr(DPOTrainer, _name), f"TRL's DPOTrainer.{_name} is gone"


class RunTrainer(WatchingTrainer):
    """TRL's trainer on rows that are tokenized already (`apply_chat_template` is stricter than TRL's templating)."""

    def __init__(
        self,
        model: Any,
        loaded: dict[str, torch.Tensor],
        reference_adapter: str | None = None,
        reference: str = "",
        stores_reference: bool = False,
        **kwargs: Any,
    ) -> None:
        self._stores_reference = stores_reference
        self._loaded = loaded
        self.attention = model.config._attn_implementation
        self._evaluates_part = False
        self._reference_adapter, self._reference = reference_adapter, reference
        super().__init__(model=model, **kwargs)
        self._settle_reference()

    def _settle_reference(self) -> None:
        if isinstance(self.model, PeftModel):
            open_head(self.model)
        if isinstance(self.model, PeftModel) and self.ref_model is None:
            complete_reference(self.model, self._loaded)
            put_reference(self.model, self._reference_adapter)
            self._reference_adapter = None

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        if self._stores_reference:
            return dataset  # the engine adds what its store has
        self._settle_reference()  # TRL calls this from its constructor
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def _prepare_dataset(self, dataset: Dataset, processing_class: Any, args: DPOConfig, dataset_name: str) -> Dataset:
        assert set(ID_COLUMNS) <= set(dataset.column_names), dataset.column_names
        # TRL files precomputed reference log-probabilities under the fingerprint of the rows and the weights alone,
        # though they depend on these too, and returns the wrong ones after any of them has changed.
        prepared = dataset.select_columns(list(ID_COLUMNS))
        settings = (
            args.max_length,
            args.truncation_mode,
            args.ld_alpha,
            args.bf16,
            args.fp16,
            self.attention,
            self._reference,
        )
        prepared._fingerprint = Hasher.hash((dataset._fingerprint, settings))
        return prepared

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate; where there are several sources, each by itself, and all together weighted by their pairs."""
        if eval_dataset is not None or not isinstance(self.eval_dataset, dict):
            return dict(super().evaluate(eval_dataset, ignore_keys, metric_key_prefix))
        self._evaluates_part = True
        try:
            parts = {name: super(RunTrainer, self).evaluate(name, ignore_keys) for name in self.eval_dataset}
        finally:
            self._evaluates_part = False
        metrics = merge_evaluations(parts, {name: len(rows) for name, rows in self.eval_dataset.items()})
        self.log(metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.correct_times(logs)
        if not self._evaluates_part:
            super().log(logs, start_time)
            return
        # TRL adds its averages to the event's metrics here; the event itself is told once, for all parts together.
        logs.update({f"eval_{key}": sum(values) / len(values) for key, values in self._metrics["eval"].items()})
        self._metrics["eval"].clear()

    def _load_best_model(self) -> None:
        """Load the best checkpoint; where it is not what was saved, transformers would go on with the last weights."""
        best = self.find_best()
        assert best is not None
        if damage := explain_damage(best, whole=True):
            raise RunError(f"{best}: the best checkpoint cannot be loaded; {damage}; the same command makes it again")
        self.state.best_model_checkpoint = str(best)
        super()._load_best_model()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none beside checkpoints: the run writes one card, for its result."""


def merge_evaluations(parts: dict[str, dict[str, float]], rows: dict[str, int]) -> dict[str, float]:
    """Join the evaluations of several sources into one event.

    Args:
        parts: by source, metrics under names that begin with `eval_`.
        rows: by source, how many pairs were evaluated.

    Returns:
        Each source's metrics as `eval_<source>_…`, and under their own names the averages weighted by pairs; times
        are sums.
    """
    total = sum(rows.values())
    merged: dict[str, float] = {}
    for key in next(iter(parts.values())):
        values = {name: metrics[key] for name, metrics in parts.items()}
        if key.endswith("_runtime"):
            merged[key] = sum(values.values())
        elif not key.endswith("_per_second"):
            merged[key] = sum(value * rows[name] for name, value in values.items()) / total
    for name, metrics in parts.items():
        merged |= {f"eval_{name}_{key[len('eval_') :]}": metrics[key] for key in metrics if key.startswith("eval_")}
    return merged


def _train_steps(trainer: RunTrainer, steps: int, checkpoint: Path | None) -> dict[str, Any]:
    """Train to the end and return steps, time, speed, and which weights the model now holds."""
    start = time.monotonic()
    epochs_before = read_epoch(checkpoint) if checkpoint else 0.0
    if checkpoint is not None and read_step(checkpoint) >= steps:
        # It was stopped after its last step; Trainer would train one more.
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.conclude(checkpoint)
        if trainer.args.load_best_model_at_end and trainer.find_best() is not None:
            trainer._load_best_model()
    else:
        if checkpoint is not None:
            trainer.restore_progress(checkpoint)
        # Trainer ignores its own resume_from_checkpoint setting: the checkpoint has to be passed here.
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    runtime = time.monotonic() - start
    state = trainer.state
    pairs = (state.epoch - epochs_before) * len(trainer.train_dataset)
    best = trainer.args.load_best_model_at_end and state.best_model_checkpoint
    if trainer.args.load_best_model_at_end and state.best_global_step and not best:  # transformers says nothing
        raise RunError(f"{trainer.find_best()}: the best checkpoint is gone; the same command makes it again")
    return {
        "steps": state.global_step,
        "train_runtime": round(runtime, 3),
        "pairs_per_second": round(pairs / runtime, 4),
        "weights": f"best by {trainer.args.metric_for_best_model}: {Path(best).name}" if best else "last",
    }

"""Trainer mixin: evaluation timing, evaluation per source, and out-of-memory errors by phase."""

import math
import time
from typing import Any

from trl import DPOTrainer

from dpo_runner.training.memory.device import EVALUATION, TRAINING, watch_memory


class TimedEvaluation(DPOTrainer):  # type: ignore[misc]
    """Monotonic evaluation times, evaluation per source, and the phase in out-of-memory errors."""

    _evaluated: tuple[float, int] | None = None
    _evaluates_part = False

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

    def _correct_times(self, logs: dict[str, float]) -> None:
        """Replace runtime and speeds in the log event of the last evaluation by the measured ones, once."""
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

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate; several sources are evaluated separately, then averaged weighted by pairs."""
        if eval_dataset is not None or not isinstance(self.eval_dataset, dict):
            return dict(super().evaluate(eval_dataset, ignore_keys, metric_key_prefix))
        self._evaluates_part = True
        try:
            parts = {name: super(TimedEvaluation, self).evaluate(name, ignore_keys) for name in self.eval_dataset}
        finally:
            self._evaluates_part = False
        metrics = merge_evaluations(parts, {name: len(rows) for name, rows in self.eval_dataset.items()})
        self.log(metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._correct_times(logs)
        if not self._evaluates_part:
            super().log(logs, start_time)
            return
        # Add TRL's averages, as its own log would; one event for all sources follows.
        logs.update({f"eval_{key}": sum(values) / len(values) for key, values in self.figures["eval"].items()})
        self.figures["eval"].clear()


def merge_evaluations(parts: dict[str, dict[str, float]], rows: dict[str, int]) -> dict[str, float]:
    """Merge the evaluations of several sources into one event.

    Args:
        parts: metrics by source; names begin with `eval_`.
        rows: number of evaluated pairs by source.

    Returns:
        Each source's metrics as `eval_<source>_…`, and under the plain names averages weighted by pairs; runtimes are
        summed.
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

"""Trainer mixin: evaluation timing, evaluation per source, and out-of-memory errors by phase."""

import math
import time
from itertools import zip_longest
from typing import Any, NamedTuple

from datasets import Dataset
from transformers.trainer_utils import EvalLoopOutput
from trl import DPOTrainer

from dpo_runner.training.memory.device import EVALUATION, TRAINING, watch_memory
from dpo_runner.training.mixins.saving import EvaluationCut
from dpo_runner.training.ranks.group import count, gather, rank
from dpo_runner.training.ranks.sharding import level


class _Part(NamedTuple):
    """A process's part of an evaluation: Trainer's metrics, rows, TRL's figures by batch, the signal that cut it."""

    metrics: dict[str, Any]
    rows: int
    figures: dict[str, list[float]]
    cut: tuple[Any, ...] | None


class TimedEvaluation(DPOTrainer):  # type: ignore[misc]
    """Monotonic evaluation times, evaluation per source, and the phase in out-of-memory errors."""

    eval_dataset: Any
    _evaluated: tuple[float, int] | None = None
    _evaluates_part = False

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with watch_memory(TRAINING, self.max_tokens):
            return super().train(*args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return the loader of this process's batches: each of a single process's batches goes to one process."""
        if count() == 1:
            return super().get_eval_dataloader(eval_dataset)
        whole = self.eval_dataset
        if isinstance(eval_dataset, str):
            self.eval_dataset = {**whole, eval_dataset: self._select_own(whole[eval_dataset])}
        else:
            self.eval_dataset = self._select_own(whole if eval_dataset is None else eval_dataset)
        try:
            return super().get_eval_dataloader(eval_dataset if isinstance(eval_dataset, str) else None)
        finally:
            self.eval_dataset = whole

    def _select_own(self, rows: Dataset) -> Dataset:
        size = self.args.eval_batch_size
        return rows.select([row for row in range(len(rows)) if row // size % count() == rank()])

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        began, cut = time.monotonic(), None
        output = EvalLoopOutput(None, None, {}, 0)
        with level(self.model):
            try:
                with watch_memory(EVALUATION):
                    output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            except EvaluationCut as error:
                cut = error
        if count() > 1:
            output, cut = self._merge_parts(output, cut, metric_key_prefix)
        if cut is not None:
            raise cut
        output.metrics.pop(f"{metric_key_prefix}_model_preparation_time", None)
        self._evaluated = time.monotonic() - began, output.num_samples
        return output

    def _merge_parts(
        self, output: EvalLoopOutput, cut: EvaluationCut | None, prefix: str
    ) -> tuple[EvalLoopOutput, EvaluationCut | None]:
        """Merge the evaluations of all processes, each over its own batches, into that of all batches."""
        parts = gather(_Part(output.metrics, output.num_samples, dict(self.figures["eval"]), cut.args if cut else None))
        cuts = [EvaluationCut(*part.cut) for part in parts if part.cut is not None]
        if rows := sum(part.rows for part in parts):
            total = sum(part.metrics[f"{prefix}_loss"] * part.rows for part in parts if part.rows)
            output.metrics[f"{prefix}_loss"] = total / rows
        for name in {name: None for part in parts for name in part.figures}:
            turns = zip_longest(*(part.figures.get(name, ()) for part in parts))  # a batch of each process in turn
            self.figures["eval"][name] = [value for turn in turns for value in turn if value is not None]
        return output._replace(num_samples=rows), cuts[0] if cuts else None

    def _correct_times(self, logs: dict[str, float]) -> None:
        """Replace runtime and speeds in the log event of the last evaluation by the measured ones, once."""
        if self._evaluated is None or not any(key.endswith("_runtime") for key in logs):
            return
        seconds, rows = self._evaluated
        self._evaluated = None
        batches = math.ceil(rows / self.args.eval_batch_size)
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

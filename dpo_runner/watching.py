"""What a training takes: memory by its parts, and evaluations' time, by a clock that only goes forward."""

import math
import time
from typing import Any

from dpo_runner.device_memory import EVALUATION, TRAINING, watch_memory
from dpo_runner.finite import FiniteTrainer


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

"""Trainer callback: log events to metrics.jsonl, W&B, other trackers and the console."""

import math
from typing import Any

from transformers import TrainerCallback

from dpo_runner.config.metrics import find_first_update, mark_ties
from dpo_runner.config.run_conf import RunConf
from dpo_runner.errors import RunError
from dpo_runner.io.console import RunConsole
from dpo_runner.records.differences import find_changes
from dpo_runner.records.directory import RunDirectory
from dpo_runner.records.figures import Expected
from dpo_runner.records.reading import read_metrics
from dpo_runner.records.tracking import Tracker
from dpo_runner.training.callbacks.drift import DriftWarnings
from dpo_runner.training.ranks.group import count


class RunEvents(TrainerCallback):  # type: ignore[misc]
    """Writes log events to metrics.jsonl and the trackers and shows them; stops on a non-finite eval_loss.

    Args:
        directory: the run directory, with metrics.jsonl.
        tracker: W&B.
        console: the terminal output.
        conf: the configuration.

    Attributes:
        expected: the published figures that log events are compared with.
    """

    def __init__(
        self,
        directory: RunDirectory,
        tracker: Tracker,
        console: RunConsole,
        conf: RunConf,
    ) -> None:
        self._directory, self._tracker, self._console = directory, tracker, console
        self._model, self._show_progress = conf.model, not conf.training.disable_tqdm
        self.expected = Expected(conf, find_changes(conf, count()))
        self._drift: DriftWarnings | None = None
        self._first_update = 1
        self.silent = False
        """If true, events are neither written nor shown."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._drift = DriftWarnings(args.beta)
        earlier = read_metrics(self._directory.path)  # those before the resume
        self._first_update = find_first_update(earlier)
        for event in earlier:
            if "loss" in event:
                self._drift.note(event)  # its warnings were shown then
        pairs = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        self._console.start_training(state.global_step, state.max_steps, pairs, self._show_progress)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._directory.note_step(state.global_step)
        self._console.show_step(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        # Trainer's final averages cover only the time since the last resume; summary.json has the totals.
        if self.silent or not state.is_world_process_zero or "train_runtime" in logs:
            return
        event = {"step": state.global_step, **logs}
        self._directory.append_metrics(event)
        self._tracker.log(event)
        if self._tracker.further is not None:
            self._tracker.further.log(args, state, control, logs)
        if "loss" in logs:
            self._first_update = max(self._first_update, find_first_update([event]))
            shown = mark_ties(logs, state.global_step, self._model, self._first_update)
            self._console.show_step(state.global_step, shown)
            for warning in self._drift.note(logs) if self._drift is not None else ():
                self._console.warn(warning)
        if (told := self.expected.note(event)) is not None:
            self._console.say(told)
        if "eval_loss" in logs and not math.isfinite(float(logs["eval_loss"])):
            raise RunError(
                f"eval_loss is {logs['eval_loss']} at step {state.global_step}; nothing after the last checkpoint is "
                f"kept. Try a smaller training.learning_rate (now {args.learning_rate:g}) or training.max_grad_norm"
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._console.stop_training()

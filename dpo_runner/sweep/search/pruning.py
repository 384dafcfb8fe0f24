"""Trainer callback that stops a run if the search's pruner says so after an evaluation."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from dpo_runner.config.sections.sweep import SearchConf
from dpo_runner.errors import RunPruned
from dpo_runner.sweep.search.study import id_of, open_trial


class Pruning(TrainerCallback):  # type: ignore[misc]
    """Reports the objective of each evaluation to the study, and ends the run if its pruner says so.

    The run's schedules do not depend on the pruner, so a run that is not stopped is identical to one without it.

    Args:
        run_dir: the job's directory, inside the sweep's.
        search: the search's settings, with pruner and objective.

    Raises:
        RunError: the study has no running trial of this job.
    """

    def __init__(self, run_dir: Path, search: SearchConf) -> None:
        self._trial = open_trial(run_dir.parent, search, run_dir.name)
        self._reported = set(self._trial.storage.get_trial(id_of(self._trial)).intermediate_values)
        self._objective = search.objective
        self._training = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._training = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._training = False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        """Report an evaluation and ask the pruner. TRL passes its own metrics only to `on_log`, not `on_evaluate`.

        Raises:
            RunPruned: the pruner stops the run.
        """
        step = state.global_step
        if not self._training or self._objective not in logs or not state.is_world_process_zero:
            return
        if step not in self._reported:  # a run resumed from a checkpoint repeats evaluations
            self._trial.report(logs[self._objective], step)
            self._reported.add(step)
        if step < state.max_steps and self._trial.should_prune():
            raise RunPruned(step, state.max_steps)

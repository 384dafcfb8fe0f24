"""Trainer callback that stops a run if the search's pruner says so after an evaluation."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from dpo_runner.config.sections.sweep import SearchConf
from dpo_runner.errors import RunPruned
from dpo_runner.sweep.search.database import reporting
from dpo_runner.sweep.search.study import id_of, open_trial
from dpo_runner.training.ranks.group import do_first


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
        self._given = run_dir, search
        self._trial = open_trial(run_dir.parent, search, run_dir.name)
        self._reported = set(self._trial.storage.get_trial(id_of(self._trial)).intermediate_values)
        self._objective, self._storage = search.objective, search.storage
        self._training = False

    def __reduce__(self) -> tuple[type["Pruning"], tuple[Path, SearchConf]]:
        return Pruning, self._given  # each process of a run opens the study

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
        if not self._training or self._objective not in logs:
            return
        if do_first(lambda: self._is_given_up(logs[self._objective], step, state.max_steps)):
            raise RunPruned(step, state.max_steps)

    def _is_given_up(self, value: float, step: int, steps: int) -> bool:
        with reporting(self._storage):
            if step not in self._reported:  # a run resumed from a checkpoint repeats evaluations
                self._trial.report(value, step)
                self._reported.add(step)
            return step < steps and bool(self._trial.should_prune())

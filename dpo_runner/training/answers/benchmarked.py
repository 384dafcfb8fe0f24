"""Benchmarks in a run: before and after training, at chosen steps, and their differences to the reference's."""

from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from peft import PeftModel
from transformers import Trainer, TrainerCallback

from dpo_runner.config.run_conf import RunConf
from dpo_runner.data.preferences import PreferenceData
from dpo_runner.training.answers.benchmarks.scores import Scorer, Scores, add_groups, compare, identify, name_figures
from dpo_runner.training.answers.benchmarks.tasks import load_tasks
from dpo_runner.training.engine.reference.columns import being_reference, evaluating, find_active_adapters
from dpo_runner.training.memory.device import BENCHMARKS, watch_memory
from dpo_runner.training.ranks.group import do_first, is_first
from dpo_runner.training.ranks.watch import note_progress
from dpo_runner.training.trainer import RunTrainer


def measure_benchmarks(
    trainer: RunTrainer, data: PreferenceData, conf: RunConf, reference: Scores | None
) -> tuple[dict[str, float], Scores]:
    """Score the policy in the tasks of `conf.benchmarks`, and log the figures. The first process scores.

    Args:
        trainer: has policy and reference.
        data: has the chat template's end of a turn.
        conf: the run's configuration.
        reference: the reference's scores; None before training.

    Returns:
        The policy's figures, with their differences to the reference's if that was scored; and the reference's scores,
        {} if it is not at hand.
    """
    policy = _score(trainer, data, conf, is_reference=False)
    if reference is None:
        starts = conf.model.starts_as_reference
        reference = policy if starts else _score_reference(trainer, data, conf)
        if conf.benchmarks.steps:
            trainer.add_callback(_AtSteps(trainer, data, conf, reference))
    figures = name_figures(policy)
    if reference and reference is not policy:
        figures |= compare(policy, reference)
    Trainer.log(trainer, dict(figures))  # TRL's own would end the averages of the steps since the last event
    return figures, reference


def _score_reference(trainer: RunTrainer, data: PreferenceData, conf: RunConf) -> Scores:
    if trainer.ref_model is None and not (isinstance(trainer.model, PeftModel) and trainer.reference.is_within):
        return {}  # its log-probabilities were computed before training, and it was not kept
    return _score(trainer, data, conf, is_reference=True)


def _score(trainer: RunTrainer, data: PreferenceData, conf: RunConf, is_reference: bool) -> Scores:
    being: AbstractContextManager[Any] = being_reference(trainer) if is_reference else evaluating(trainer)
    names = do_first(lambda: list(load_tasks(conf.benchmarks).tasks))
    found: Scores = {}
    with watch_memory(BENCHMARKS), being, trainer.accelerator.autocast():
        scorer = _build_scorer(trainer, data, conf, is_reference) if is_first() else None

        def score(name: str) -> Any:
            assert scorer is not None
            return scorer.score(name)

        for name in names:  # one by one, so that the waiting processes see progress
            found[name] = do_first(partial(score, name))
            note_progress()
    return do_first(lambda: add_groups(found, load_tasks(conf.benchmarks)))


def _build_scorer(trainer: RunTrainer, data: PreferenceData, conf: RunConf, is_reference: bool) -> Scorer:
    model = (trainer.ref_model if is_reference else None) or trainer.model
    active: list[str] = []
    if isinstance(model, PeftModel):
        active = find_active_adapters(trainer) if is_reference else list(model.base_model.active_adapters)
    forward = f"autocast {trainer.accelerator.mixed_precision}"
    return Scorer(model, trainer.processing_class, data.stop_id, conf.benchmarks, identify(model, active, forward))


class _AtSteps(TrainerCallback):  # type: ignore[misc]
    """Scores the policy after the optimizer steps of `benchmarks.steps`."""

    def __init__(self, trainer: RunTrainer, data: PreferenceData, conf: RunConf, reference: Scores) -> None:
        self._given = trainer, data, conf, reference

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, data, conf, reference = self._given
        if state.global_step in conf.benchmarks.steps and state.global_step < state.max_steps:
            asked = control.should_log
            measure_benchmarks(trainer, data, conf, reference)
            control.should_log = asked  # logging has answered it, but without the step's loss

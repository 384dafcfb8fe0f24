"""What a model does, before training and after: its evaluation, and its answers to the sample prompts."""

import re
from typing import Any

from dpo_runner.config import RunConf
from dpo_runner.data import PreferenceData
from dpo_runner.device_memory import ANSWERING, watch_memory
from dpo_runner.samples import generate_answers, summarize_answers
from dpo_runner.trainer import RunTrainer

_NO_RESULT = re.compile(r"^epoch$|^step$|_(runtime|per_second|preparation_time|num_tokens)$")
"""Entries of an evaluation that tell of the machine, not of the model."""


def measure_model(
    trainer: RunTrainer, tokenizer: Any, data: PreferenceData, conf: RunConf
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Evaluate the policy as it stands and let it answer the sample prompts."""
    metrics: dict[str, Any] = {}
    if data.eval is not None:
        metrics = {key: value for key, value in _evaluate(trainer).items() if not _NO_RESULT.search(key)}
    batch_size = 4 * conf.training.per_device_eval_batch_size  # an answer needs far less memory than a scored pair
    length = conf.samples.max_new_tokens
    with watch_memory(ANSWERING):
        answers = generate_answers(trainer.model, tokenizer, data.prompts, length, batch_size, data.stop_id)
    return {**metrics, **summarize_answers(answers)}, answers


def _evaluate(trainer: RunTrainer) -> dict[str, Any]:
    """Evaluate, or return the evaluation that the trainer made of these very weights after its last step."""
    events = (event for event in reversed(trainer.state.log_history) if "eval_loss" in event)
    newest = next(events, None)
    if newest is not None and newest["step"] == trainer.state.global_step and not trainer.args.load_best_model_at_end:
        return dict(newest)
    return dict(trainer.evaluate())

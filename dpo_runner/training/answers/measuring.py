"""Evaluation and greedy answers, before and after training."""

import re
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch

from dpo_runner.config.run_conf import RunConf
from dpo_runner.data.preferences import PreferenceData
from dpo_runner.data.prompts import SamplePrompt
from dpo_runner.model.tokenizer import ONE_ANSWER, find_stop_ids
from dpo_runner.training.answers.benchmarked import measure_benchmarks
from dpo_runner.training.answers.benchmarks.scores import Scores
from dpo_runner.training.answers.rewarded import Rewards, measure_reward
from dpo_runner.training.callbacks.movement import WHOLE_MODULE
from dpo_runner.training.memory.device import ANSWERING, watch_memory
from dpo_runner.training.ranks.group import count, gather, rank
from dpo_runner.training.ranks.sharding import level
from dpo_runner.training.ranks.watch import note_progress
from dpo_runner.training.trainer import RunTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_NO_RESULT = re.compile(r"^epoch$|^step$|_(runtime|per_second|preparation_time|num_tokens)$")
"""Evaluation entries about the machine (times, speeds) and progress, not about the model."""


@dataclass(frozen=True)
class Measurement:
    """What was measured of a model.

    Attributes:
        metrics: its figures.
        answers: its greedy answers to the sample prompts.
        rewards: the rewards of its sampled answers.
        reference: the reference's scores in the benchmarks.
    """

    metrics: dict[str, Any]
    answers: list[dict[str, Any]]
    rewards: Rewards = field(default_factory=list)
    reference: Scores | None = None


def measure_model(
    trainer: RunTrainer, data: PreferenceData, conf: RunConf, before: Measurement | None = None
) -> Measurement:
    """Evaluate the current policy, and generate and score its answers to the sample prompts.

    Args:
        trainer: has the policy.
        data: has evaluation rows and prompts.
        conf: the run's configuration.
        before: what was measured before training.
    """
    metrics: dict[str, Any] = {}
    if data.eval is not None:
        metrics = {key: value for key, value in _evaluate(trainer).items() if not _NO_RESULT.search(key)}
    batch_size = 4 * conf.training.per_device_eval_batch_size  # an answer needs far less memory than a scored pair
    length, tokenizer = conf.samples.max_new_tokens, trainer.processing_class
    with watch_memory(ANSWERING), trainer.accelerator.autocast() if _mixes_dtypes(trainer.model) else nullcontext():
        own = [prompt for index, prompt in enumerate(data.prompts) if index // batch_size % count() == rank()]
        with level(trainer.model):
            answers = generate_answers(trainer.model, tokenizer, own, length, batch_size, data.stop_id)
        parts = gather(answers)
    batches = [[part[start : start + batch_size] for start in range(0, len(part), batch_size)] for part in parts]
    turns = zip_longest(*batches, fillvalue=[])
    answers = [answer for turn in turns for batch in turn for answer in batch]
    metrics |= summarize_answers(answers)
    measured = Measurement(metrics, answers)
    if conf.samples.reward and data.prompts:
        figures, rewards = measure_reward(trainer, data, conf, None if before is None else before.rewards)
        measured = replace(measured, metrics=measured.metrics | figures, rewards=rewards)
    if conf.benchmarks.tasks:
        figures, reference = measure_benchmarks(trainer, data, conf, None if before is None else before.reference)
        measured = replace(measured, metrics=measured.metrics | figures, reference=reference)
    return measured


def _mixes_dtypes(model: torch.nn.Module) -> bool:
    """Return whether whole modules are trained in fp32 beside 16-bit layers, which need autocast for their outputs."""
    weights = dict(model.named_parameters())
    return any(WHOLE_MODULE in name for name in weights) and any(
        weight.dtype in (torch.bfloat16, torch.float16) for weight in weights.values()
    )


def _evaluate(trainer: RunTrainer) -> dict[str, Any]:
    """Evaluate, or reuse the trainer's evaluation of the same weights after its last step."""
    events = (event for event in reversed(trainer.state.log_history) if "eval_loss" in event)
    newest = next(events, None)
    if newest is not None and newest["step"] == trainer.state.global_step and not trainer.args.load_best_model_at_end:
        return dict(newest)
    return dict(trainer.evaluate())


def generate_answers(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: list[SamplePrompt],
    max_new_tokens: int,
    batch_size: int,
    stop_id: int | None = None,
) -> list[dict[str, Any]]:
    """Answer each prompt greedily.

    Returns:
        Per prompt: `text`, its length in `tokens` (including the end-of-turn token), and `complete`: ended by the
        model, not by `max_new_tokens`.
    """
    stop_ids = find_stop_ids(model, tokenizer, stop_id)
    answers: list[dict[str, Any]] = []
    training = model.training
    model.eval()
    try:
        for start in range(0, len(prompts), batch_size):
            note_progress()
            ids = [prompt.ids for prompt in prompts[start : start + batch_size]]
            width = max(map(len, ids))
            pad = tokenizer.pad_token_id
            input_ids = torch.tensor([[pad] * (width - len(row)) + row for row in ids], device=model.device)
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=model.device)
            with torch.no_grad():
                output = model.generate(
                    input_ids=input_ids,
                    attention_mask=mask,
                    do_sample=False,
                    max_new_tokens=max_new_tokens,
                    use_cache=True,
                    synced_gpus=False,  # `level` keeps divided models in step
                    eos_token_id=stop_ids,
                    pad_token_id=pad,
                    # override the sampling settings of the model's generation_config
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    **ONE_ANSWER,
                )
            for row in output[:, width:].tolist():
                end = next((i for i, token in enumerate(row) if token in stop_ids), None)
                kept = row if end is None else row[: end + 1]
                text = tokenizer.decode(kept, skip_special_tokens=True).strip()
                answers.append({"text": text, "tokens": len(kept), "complete": end is not None})
    finally:
        model.train(training)
    return answers


def summarize_answers(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Return `response_tokens` (mean length) and `responses_at_cap` (answers that hit the length limit)."""
    if not answers:
        return {}
    return {
        "response_tokens": round(sum(answer["tokens"] for answer in answers) / len(answers), 2),
        "responses_at_cap": sum(not answer["complete"] for answer in answers),
    }


def pair_answers(
    prompts: list[SamplePrompt], before: list[dict[str, Any]], after: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return one record per prompt with the answers before and after training."""
    return [
        {"prompt": prompt.messages, "before": untuned, "after": tuned}
        for prompt, untuned, tuned in zip(prompts, before, after, strict=True)
    ]

"""The reward of sampled answers, before and after training, and their KL divergence from the reference."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from dpo_runner.config.run_conf import RunConf
from dpo_runner.data.preferences import PreferenceData
from dpo_runner.data.prompts import SamplePrompt
from dpo_runner.errors import RowError, RunError
from dpo_runner.model.tokenizer import find_stop_ids
from dpo_runner.training.answers.rewards.reward import build_reward
from dpo_runner.training.answers.rewards.term import Answered
from dpo_runner.training.answers.sampling import Sampling, derive_seed, sample_answers
from dpo_runner.training.engine.reference.columns import being_reference, evaluating, score_batch
from dpo_runner.training.memory.device import ANSWERING, watch_memory
from dpo_runner.training.ranks.group import count, do_first, gather, rank
from dpo_runner.training.ranks.sharding import level
from dpo_runner.training.ranks.watch import note_progress
from dpo_runner.training.trainer import RunTrainer

Rewards = list[list[float | None]]
"""The reward of each answer to each prompt; None if it has none."""


@dataclass(frozen=True)
class _Sampled:
    """The answers to one prompt, and Σ log π/π_ref of each, in nats; empty if the reference is not at hand."""

    texts: list[str]
    ratios: list[float]


def measure_reward(
    trainer: RunTrainer, data: PreferenceData, conf: RunConf, before: Rewards | None
) -> tuple[dict[str, float], Rewards]:
    """Sample `samples.reward` answers to each sample prompt from the policy's own distribution, and score them.

    Args:
        trainer: has policy and reference.
        data: has the prompts.
        conf: the run's configuration.
        before: the rewards before training, of answers with the same random numbers.

    Returns:
        `eval_reward` (the mean), `eval_reward_ci95` (half of its 95% confidence interval over prompts),
        `eval_reward_kl` (mean of Σ log π/π_ref over an answer's tokens, in nats, if the reference is at hand), and
        after training `eval_reward_win_rate` (the share of answers with more than before, a tie counts half); and the
        rewards.

    Raises:
        RunError: no answer has a reward.
    """
    prompts, size = data.prompts, max(1, 4 * conf.training.per_device_eval_batch_size // conf.samples.reward)
    batches = [range(start, min(start + size, len(prompts))) for start in range(0, len(prompts), size)]
    with watch_memory(ANSWERING), trainer.accelerator.autocast(), evaluating(trainer), level(trainer.model):
        sampled = [_sample(trainer, data, batch, conf) for batch in batches[rank() :: count()]]
    parts = gather(sampled)
    answered = [one for at in range(len(batches)) for one in parts[at % count()][at // count()]]
    rewards = do_first(lambda: _score(prompts, answered, conf))
    means = [sum(known) / len(known) for row in rewards if (known := [value for value in row if value is not None])]
    if not means:
        raise RunError("samples.reward: no sampled answer has a reward; `python -m dpo_runner.generate` says why")
    mean = sum(means) / len(means)
    spread = math.sqrt(sum((value - mean) ** 2 for value in means) / max(len(means) - 1, 1))
    metrics = {"eval_reward": mean, "eval_reward_ci95": 1.96 * spread / math.sqrt(len(means))}
    if ratios := [ratio for each in answered for ratio in each.ratios]:
        metrics["eval_reward_kl"] = sum(ratios) / len(ratios)
    if before is not None:
        metrics["eval_reward_win_rate"] = _find_share(rewards, before)
    return {name: round(value, 6) for name, value in metrics.items()}, rewards


def _find_share(rewards: Rewards, before: Rewards) -> float:
    both = [
        (value, earlier)
        for row, first in zip(rewards, before, strict=True)
        for value, earlier in zip(row, first, strict=True)
        if value is not None and earlier is not None
    ]
    return sum((value > earlier) + (value == earlier) / 2 for value, earlier in both) / max(len(both), 1)


def _sample(trainer: RunTrainer, data: PreferenceData, batch: Sequence[int], conf: RunConf) -> list[_Sampled]:
    """Sample the answers to the prompts with these indices, and score their tokens with policy and reference."""
    note_progress()
    tokenizer, model, prompts = trainer.processing_class, trainer.model, [data.prompts[index].ids for index in batch]
    stop_ids = find_stop_ids(model, tokenizer, data.stop_id)
    seeds = [[derive_seed(conf.seed, index, number) for number in range(conf.samples.reward)] for index in batch]
    sampling = Sampling(conf.samples.max_new_tokens)
    sampled = sample_answers(model, prompts, seeds, sampling, stop_ids, tokenizer.pad_token_id)
    return [
        _Sampled(
            [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers],
            _find_ratios(trainer, prompt, answers),
        )
        for prompt, answers in zip(prompts, sampled, strict=True)
    ]


def _find_ratios(trainer: RunTrainer, prompt: Sequence[int], answers: Sequence[list[int]]) -> list[float]:
    """Return Σ log π/π_ref of each answer that training would not cut; none if the reference is not at hand."""
    within = isinstance(trainer.model, PeftModel) and (trainer.reference.is_initial or trainer.reference.is_within)
    if trainer.ref_model is None and not within:
        return []
    longest = trainer.args.max_length or math.inf
    whole = [ids for ids in answers if len(prompt) + len(ids) <= longest]
    # a row has two answers
    pairs = list(zip(whole[::2], [*whole[1::2], *whole[-1:]][: len(whole[::2])], strict=True))
    rows: list[dict[str, Any]] = [
        {"prompt_ids": list(prompt), "chosen_ids": one, "rejected_ids": other} for one, other in pairs
    ]
    ratios: list[float] = []
    for row in rows:
        (policy,) = score_batch(trainer, trainer.model, [row])
        with being_reference(trainer) as model:
            (reference,) = score_batch(trainer, model, [row])
        ratios += [float((mine - theirs).sum()) for mine, theirs in zip(policy, reference, strict=True)]
    return ratios[: len(whole)]


def _score(prompts: Sequence[SamplePrompt], answered: Sequence[_Sampled], conf: RunConf) -> Rewards:
    """Return the rewards; equal answers are scored once."""
    reward = build_reward(conf.reward)
    different = [list(dict.fromkeys(each.texts)) for each in answered]
    asked = [Answered(prompt.messages, texts) for prompt, texts in zip(prompts, different, strict=True)]
    with torch.random.fork_rng(devices=[]):
        scored = reward.score(asked, lambda row, error: note_progress())
    found = [
        {text: None if isinstance(score, RowError) else score.total for text, score in zip(texts, scores, strict=True)}
        for texts, scores in zip(different, scored, strict=True)
    ]
    return [[known[text] for text in each.texts] for each, known in zip(answered, found, strict=True)]

"""The step-0 check: policy = reference before training; weights have moved after the first steps.

Most ways of training nothing, or against the wrong reference, fail one of the two checks."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from trl import DPOTrainer

from dpo_runner.errors import RunError
from dpo_runner.io.upstream import find_attention
from dpo_runner.model.reference import Reference
from dpo_runner.model.result import score_texts
from dpo_runner.training.callbacks.movement import WHOLE_MODULE, find_lora
from dpo_runner.training.engine.logps import completion_logps
from dpo_runner.training.engine.packed.packing import count_tokens
from dpo_runner.training.engine.reference.columns import (
    REF_COLUMNS,
    Row,
    being_reference,
    evaluating,
    score_batch,
    sum_logps,
)
from dpo_runner.training.engine.reference.rounding import ROUNDING, compare_pairs, find_rounding, limit_mean
from dpo_runner.training.engine.reference.store import PairLogps
from dpo_runner.training.memory.device import PREPARING, watch_memory

_LOOKED_AT = 16
"""Rows of which the shortest and the longest are compared: a difference shows in any row."""

_ANSWER = 16
"""Minimum tokens of both answers of the shortest rows, if there are such: over fewer, rounding does not average out."""

_MOST = 64
"""Maximum tokens of a text that is compared after training."""


_HEAD = 5
"""Multiple of `ROUNDING` by which two ways to logits may differ: large logits are rounded coarsely in 16 bits."""


def check_start(trainer: DPOTrainer, reference: Reference, say: Callable[[str], None]) -> None:
    """Verify before the first step that weights are trainable and that the policy equals the reference.

    Raises:
        RunError: a weight is frozen or not in fp32, or policy and reference differ.
    """
    check_trainable(trainer)
    with watch_memory(PREPARING):
        check_head(trainer)
        difference = check_reference(trainer, reference.is_initial)
    say(f"step-0 check: the reference, {reference.described}, differs by {difference:.2g} per token")


def check_head(trainer: DPOTrainer) -> None:
    """Verify that TRL's head gives the log-probabilities of the model's own logits.

    TRL multiplies the last hidden state by the output head, and knows the scales and soft caps of some families.

    Raises:
        RunError: the model computes its logits in another way.
    """
    text, is_fp32 = choose_texts(trainer.train_dataset)[0], _is_fp32(trainer.model)
    ids = torch.tensor([text, text], device=trainer.model.device)  # as of a pair
    nothing = np.empty(0, np.float32)
    with torch.no_grad(), evaluating(trainer), nullcontext() if is_fp32 else trainer.accelerator.autocast():
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        found = PairLogps(completion_logps(trainer.model, inputs)[0].float().cpu().numpy(), nothing)
        own = PairLogps(score_texts(trainer.model, [text])[0].cpu().numpy(), nothing)
    distance = compare_pairs([found], [own]).rms
    if not distance <= _HEAD * ROUNDING[find_rounding(trainer, is_fp32)]:
        raise RunError(
            f"step-0 check: {trainer.model.config.model_type} models do not compute their logits as TRL does, from the "
            f"last hidden state and the output head: log-probabilities differ by {distance:.2g} per token. TRL would "
            "train another model than the one that answers; use a model of another family. checks.step0=false skips "
            "this check"
        )


def check_reference(trainer: DPOTrainer, is_initial: bool = True) -> float:
    """Verify that policy and reference agree before the first step.

    The policy scores a short and a long row in one batch, the reference as it does in this run. Weights in fp32 are
    compared without autocast, whose rounding would hide a small difference.

    Args:
        trainer: the trainer, before training.
        is_initial: whether the reference is the model that training starts from; any other reference may differ.

    Returns:
        The root mean square of the differences, in nats per token.

    Raises:
        RunError: they differ by more than the dtype's rounding explains, or the reference's columns are not its own.
    """
    by_tokens = _sort_by_tokens(trainer.train_dataset)
    rows = by_tokens if len(by_tokens) == 1 else [by_tokens[0], by_tokens[-1]]
    is_scored = REF_COLUMNS[0] in rows[0]
    is_fp32 = _is_fp32(trainer.model)
    with nullcontext() if is_fp32 else trainer.accelerator.autocast():
        with evaluating(trainer):
            policy = score_batch(trainer, trainer.model, rows)
        if is_scored and not is_initial:  # a reference that is another model was freed
            return _compare_columns(trainer, rows, policy)
        with being_reference(trainer) as model:
            batches = [[row] for row in rows] if is_scored else [rows]
            reference = [pair for batch in batches for pair in score_batch(trainer, model, batch)]
    if is_scored:
        _check_columns(trainer, rows, reference)
    difference = compare_pairs(policy, reference)
    dtype = find_rounding(trainer, is_fp32)
    if math.isnan(difference.rms) or (is_initial and difference.exceeds(dtype)):
        raise RunError(
            f"step-0 check: before training policy and reference {difference.describe(dtype)}; likely the reference is "
            "not the model that training starts from, or the forward is not deterministic. checks.step0=false skips "
            "this check"
        )
    return difference.rms


def _check_columns(trainer: DPOTrainer, rows: Sequence[Row], reference: Sequence[PairLogps]) -> None:
    dtype = find_rounding(trainer)
    for name, column, due, tokens in _pair_columns(trainer, rows, reference):
        if not abs(column - due) <= limit_mean(dtype, tokens, 1):
            raise RunError(
                f"step-0 check: `{name}` is {column:.3f}, but the reference gives {due:.3f} over {tokens} tokens; run "
                "again with engine.reference_store=false training.precompute_ref_log_probs=false. checks.step0=false "
                "skips this check"
            )


def _compare_columns(trainer: DPOTrainer, rows: Sequence[Row], policy: Sequence[PairLogps]) -> float:
    """Return the root mean square, over answers, of the differences from the reference's columns per token."""
    pairs = _pair_columns(trainer, rows, policy)
    squares = [((column - due) / max(tokens, 1)) ** 2 for _, column, due, tokens in pairs]
    result = math.sqrt(sum(squares) / len(squares))
    if math.isnan(result):
        raise RunError("step-0 check: policy or reference is NaN before training; checks.step0=false skips this check")
    return result


def _pair_columns(
    trainer: DPOTrainer, rows: Sequence[Row], scored: Sequence[PairLogps]
) -> Iterator[tuple[str, float, float, int]]:
    """Yield, of each answer, the name and value of its reference column, its sum as scored, and its tokens."""
    for row, pair in zip(rows, scored, strict=True):
        for name, logps, due in zip(REF_COLUMNS, pair, sum_logps(pair, trainer.ld_alpha), strict=True):
            yield name, row[name], due, len(logps)


def check_before(trainer: DPOTrainer, is_initial: bool, metrics: Mapping[str, Any]) -> None:
    """Verify that the evaluation before training finds no difference of policy and reference, as a loss of ln 2 does.

    Args:
        trainer: the trainer, before training.
        is_initial: whether the reference is the model that training starts from; any other reference may differ.
        metrics: of the evaluation rows, if there are any.

    Raises:
        RunError: a mean reward is further from 0 than rounding explains.
    """
    rows = trainer.eval_dataset
    if not is_initial or rows is None:
        return
    parts = list(rows.values()) if isinstance(rows, dict) else [rows]
    answers = sum(map(len, parts))
    tokens = sum(len(ids) for part in parts for name in ("chosen_ids", "rejected_ids") for ids in part[name])
    limit = trainer.beta * limit_mean(find_rounding(trainer), tokens, answers)
    for name in ("rewards/margins", "rewards/chosen", "rewards/rejected"):
        value = metrics[f"eval_{name}"]
        if not abs(value) <= limit:
            raise RunError(
                f"step-0 check: before training {name} of the evaluation rows is {value:.3g}; rounding explains "
                f"{limit:.2g}. Likely their reference is not the model that training starts from; "
                "checks.step0=false skips this check"
            )


def _is_fp32(model: Any) -> bool:
    """Return whether a forward without autocast is in fp32; flash attention's kernels need 16 bits."""
    kernels = find_attention(model.config)
    return kernels in ("sdpa", "eager") and all(weight.dtype == torch.float32 for weight in model.parameters())


def choose_texts(rows: Any) -> list[list[int]]:
    """Return token ids of the texts on which the saved result is compared with the policy."""
    short = _sort_by_tokens(rows)[:2]
    texts = [row["prompt_ids"] + row[name] for row in short for name in ("chosen_ids", "rejected_ids")]
    return [text[-_MOST:] for text in texts]


def _sort_by_tokens(rows: Any) -> list[Row]:
    first = [rows[index] for index in range(min(len(rows), _LOOKED_AT))]
    enough = [row for row in first if min(len(row["chosen_ids"]), len(row["rejected_ids"])) >= _ANSWER]
    return sorted(enough or first, key=count_tokens)


def check_trainable(trainer: DPOTrainer) -> None:
    """Verify that weights are trainable and in fp32, and that no part of the adapter is frozen.

    Raises:
        RunError: nothing is trainable, or a weight is frozen or not in fp32; names the first one.
    """
    weights = dict(trainer.model.named_parameters())
    if not any(parameter.requires_grad for parameter in weights.values()):
        raise RunError("step-0 check: no parameter is trainable; likely the adapter was loaded frozen")
    for name in (*find_lora(trainer.model), *(name for name in weights if WHOLE_MODULE in name)):
        if not weights[name].requires_grad:
            raise RunError(f"step-0 check: {name} is frozen; likely the adapter was loaded without is_trainable")
    for name, parameter in weights.items():
        if parameter.requires_grad and parameter.dtype not in (torch.float32, torch.float64):
            raise RunError(
                f"step-0 check: {name} trains in {parameter.dtype}; must be torch.float32, "
                "in less most small updates round to nothing"
            )

"""The step-0 check: policy = reference before training; weights have moved after the first steps.

Most ways of training nothing, or against the wrong reference, fail one of the two checks."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from trl import DPOTrainer

from dpo_runner.errors import RunError
from dpo_runner.model.reference import Reference
from dpo_runner.training.callbacks.movement import WHOLE_MODULE, find_lora
from dpo_runner.training.engine.logps import completion_logps, label_completions
from dpo_runner.training.engine.packed.packing import count_tokens
from dpo_runner.training.memory.device import PREPARING, watch_memory

_COMPARED, _LOOKED_AT = 2, 16
"""Both models score the shortest 2 of the first 16 training rows: a difference shows in any row."""

_ANSWER = 16
"""Minimum tokens of both answers, if such rows exist: over fewer, rounding errors do not average out."""

_MOST = 64
"""Maximum tokens of a text that is compared after training."""

# Largest difference per token between two forwards of the same weights. They differ only by summation order,
# as between a batch with an adapter that adds 0 and one without.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def score_both(
    trainer: DPOTrainer, rows: Sequence[Mapping[str, Any]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Score training rows with the policy and with the reference, both in evaluation mode.

    Args:
        trainer: the trainer that holds both models.
        rows: training rows; their `ref_chosen_logps` and `ref_rejected_logps`, if present, are the reference's scores
            (recomputed if `ld_alpha` is set).

    Returns:
        Policy and reference log-probabilities, summed over each completion, and the number of scored tokens:
        three tensors of shape [2 * rows], chosen first (log pi(y|x) in Eq. 7 of the DPO paper).
    """
    model, training, ld_alpha = trainer.model, trainer.model.training, trainer.ld_alpha
    batch = trainer._prepare_inputs(trainer.data_collator(list(rows)))
    stored = [batch.pop(name) for name in ("ref_chosen_logps", "ref_rejected_logps") if name in batch]
    inputs = label_completions(batch)
    model.eval()
    trainer.ld_alpha = None  # plain sums
    try:
        with torch.no_grad(), trainer.accelerator.autocast():
            policy = completion_logps(model, inputs).sum(dim=1)
        if not stored or ld_alpha is not None:
            stored = trainer.compute_ref_log_probs(trainer.ref_model or model, batch)
    finally:
        trainer.ld_alpha = ld_alpha
        model.train(training)
    return policy, torch.cat(list(stored)), (inputs["labels"] != -100).sum(dim=1)


def check_start(trainer: DPOTrainer, reference: Reference, say: Callable[[str], None]) -> None:
    """Verify before the first step that weights are trainable and that the policy equals the reference.

    Raises:
        RunError: a weight is frozen or not in fp32, or policy and reference differ.
    """
    check_trainable(trainer)
    with watch_memory(PREPARING):
        difference = check_reference(trainer, reference.is_initial)
    say(f"step-0 check: the reference, {reference.described}, differs by {difference:.2g} per token")


def check_reference(trainer: DPOTrainer, is_initial: bool = True) -> float:
    """Verify that policy and reference agree before the first step.

    Args:
        trainer: the trainer, before training.
        is_initial: whether the reference is the model that training starts from; any other reference may differ.

    Returns:
        The largest difference, in nats per token.

    Raises:
        RunError: they differ by more than the dtype's rounding explains.
    """
    policy, reference, tokens = score_both(trainer, _choose_short(trainer.train_dataset))
    dtype = torch.bfloat16 if trainer.args.bf16 else torch.float16 if trainer.args.fp16 else trainer.model.dtype
    difference = ((policy - reference).abs() / tokens.clamp(min=1)).max().item()
    if math.isnan(difference) or (is_initial and difference > TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])):
        raise RunError(
            f"step-0 check: policy and reference differ by {difference:.4g} per token before training (tolerance "
            f"{TOLERANCE.get(dtype):g} for {dtype}); likely the reference is not the model that training starts from, "
            "or the forward is not deterministic. checks.step0=false skips this check"
        )
    return float(difference)


def choose_texts(rows: Any) -> list[list[int]]:
    """Return token ids of the texts on which the saved result is compared with the policy."""
    texts = [
        row["prompt_ids"] + row[answer] for row in _choose_short(rows) for answer in ("chosen_ids", "rejected_ids")
    ]
    return [text[-_MOST:] for text in texts]


def _choose_short(rows: Any) -> list[Mapping[str, Any]]:
    first = [rows[index] for index in range(min(len(rows), _LOOKED_AT))]
    enough = [row for row in first if min(len(row["chosen_ids"]), len(row["rejected_ids"])) >= _ANSWER]
    return sorted(enough or first, key=count_tokens)[:_COMPARED]


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

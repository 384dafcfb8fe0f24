"""Self-check before training: packed against padded forward, on a few tokens of the run's data.

Rules about configs cannot cover every model; comparing two forwards can. The tolerance is measured too: it is a share
of the change in a token's log-probability when its row, a short one, begins differently, which is the effect of a
wrong mask or position.

Dropout need not be a module: calls of `torch.nn.functional.dropout` are detected by scoring the same rows twice in
training mode, unless tests have compared the model type.

Runs of a sweep with the same base model, compared rows and kind of adapter share one comparison.
"""

import sys
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from torch import nn
from trl import DPOTrainer

from dpo_runner.io.upstream import prepare_inputs
from dpo_runner.model.base import base_of
from dpo_runner.training.engine.logps import completion_logps, label_completions
from dpo_runner.training.engine.packed.forward import is_certain, share_prefixes
from dpo_runner.training.engine.packed.packing import count_tokens
from dpo_runner.training.memory.device import is_of_device

_SHORT, _LONG = 16, 128
"""Tokens of each prompt and answer in the two checks; only long rows span several attention blocks."""

_LOOKED_AT = 16
"""Rows searched for the largest one, used in the long check."""

_SHARE = 0.25
"""Tolerance as a share of the effect of another prompt: above 16-bit rounding, below a wrong context."""

_SIZES = ("r", "lora_alpha")
"""Keys of an adapter's config left out of the comparison: rank and scale do not affect masking."""

_agreed: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
"""The cases in which each live base model has passed the comparison with its current weights."""


def find_difference(trainer: DPOTrainer, trains_head: bool, settings: str = "") -> str | None:
    """Return how packed and padded log-probabilities differ by more than rounding; None if they agree.

    Args:
        trainer: still has TRL's own forward.
        trains_head: see `share_prefixes`.
        settings: anything else that affects the forwards. A model that agrees is not compared again under the same
            settings.
    """
    models = [model for model in (trainer.model, trainer.ref_model) if model is not None]
    longest = sys.maxsize if trainer.args.max_length is None else trainer.args.max_length
    room = (longest - 1) // 2  # rows must fit uncut: the collator would cut answers differently under another prompt
    if not room:
        return f"training.max_length={longest} leaves nothing to compare"
    some = [trainer.train_dataset[index] for index in range(min(len(trainer.train_dataset), _LOOKED_AT))]
    few = [_cut(row, min(_SHORT, room)) for row in some[:2]]
    large = [_cut(max(some, key=count_tokens), min(_LONG, room))]
    base = base_of(trainer.model)
    case = repr((few, large, _describe_adapters(trainer.model), _describe_forward(trainer), trains_head, settings))
    if trainer.ref_model is None and case in _agreed.get(base, ()):
        return None
    if not is_certain(base) and _draws_dropout(trainer, few):
        return "the model draws dropout where training.disable_dropout does not reach, once for both rows of a pair"
    for model in models:
        padded, moved = _score_twice(trainer, model, few)
        effect = _distance(moved, padded)
        for rows, expected in ((few, padded), (large, _score(trainer, model, large))):
            take_back = share_prefixes(model, trains_head)
            try:
                packed = _score(trainer, model, rows)
            except (TypeError, ValueError, RuntimeError, IndexError) as refusal:
                if is_of_device(refusal):
                    raise
                return f"the model does not take packed rows ({type(refusal).__name__}: {refusal})"
            finally:
                take_back()
            error = _distance(packed, expected)
            if not error <= _SHARE * effect:
                return f"packed rows change a token's log-probability by {error:.2g}, another prompt by {effect:.2g}"
    _agreed.setdefault(base, set()).add(case)
    return None


def _distance(some: torch.Tensor, others: torch.Tensor) -> float:
    return (some - others).square().mean().sqrt().item()


def _describe_forward(trainer: DPOTrainer) -> tuple[Any, ...]:
    args = trainer.args
    return (
        args.bf16,
        args.fp16,
        args.disable_dropout,
        args.gradient_checkpointing,
        args.max_length,
        args.truncation_mode,
    )


def _describe_adapters(model: Any) -> dict[str, Any]:
    configs = model.peft_config if isinstance(model, PeftModel) else {}
    return {
        name: {key: value for key, value in sorted(config.to_dict().items()) if key not in _SIZES}
        for name, config in configs.items()
    }


def _draws_dropout(trainer: DPOTrainer, rows: Sequence[dict[str, Any]]) -> bool:
    """Return whether training draws random numbers that affect log p; keep the run's random state."""
    kind = trainer.accelerator.device.type
    devices = sorted({p.device.index for p in trainer.model.parameters() if p.device.type == kind != "cpu"})

    def read_states() -> list[torch.Tensor]:
        others = [torch.get_device_module(kind).get_rng_state(device) for device in devices]
        return [torch.get_rng_state(), *others]

    with torch.random.fork_rng(devices, device_type=kind):
        before = read_states()
        first, second = (_score(trainer, trainer.model, rows, training=True) for _ in range(2))
        # both: some GPU kernels sum in varying order, and some models draw numbers that do not affect the result
        return not torch.equal(first, second) and not all(map(torch.equal, before, read_states()))


def _cut(row: dict[str, Any], tokens: int) -> dict[str, list[int]]:
    prompt, chosen, rejected = (list(row[key]) for key in ("prompt_ids", "chosen_ids", "rejected_ids"))
    return {
        "prompt_ids": prompt[-tokens:] or chosen[:1],
        "chosen_ids": chosen[:tokens],
        "rejected_ids": rejected[: tokens // 2],
    }


def _score_twice(trainer: DPOTrainer, model: Any, rows: Sequence[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `_score` of the rows and of the same answers to reversed prompts, all from one batch."""
    elsewhere = [{**row, "prompt_ids": row["prompt_ids"][::-1] + row["prompt_ids"][:1]} for row in rows]
    sizes = [sum(len(row[key]) for row in rows) for key in ("chosen_ids", "rejected_ids") for _ in range(2)]
    parts = _score(trainer, model, [*rows, *elsewhere]).split(sizes)
    return torch.cat(parts[::2]), torch.cat(parts[1::2])


def _score(trainer: DPOTrainer, model: Any, rows: Sequence[dict[str, Any]], training: bool = False) -> torch.Tensor:
    """Return log p of all completion tokens, [N], fp32; `training` enables gradients and dropout."""
    inputs = label_completions(prepare_inputs(trainer, trainer.data_collator(rows)))
    was_training = model.training
    model.train(training)
    try:
        with torch.set_grad_enabled(training), trainer.accelerator.autocast():
            log_probs = completion_logps(model, inputs)
    finally:
        model.train(was_training)
    completions: torch.Tensor = log_probs.detach()[inputs["labels"][:, 1:] != -100].float()
    return completions

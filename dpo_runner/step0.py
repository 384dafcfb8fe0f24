"""The step-0 check: before training the policy is the reference; after the first steps what is trained has moved.

Most ways of training nothing, or training against the wrong reference, show in one of these.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import TrainerCallback
from trl import DPOTrainer

from dpo_runner.engine.packing import count_tokens
from dpo_runner.errors import RunError

Fingerprint = tuple[float, float]

_COMPARED, _LOOKED_AT = 2, 16
"""Training rows that both models score, the shortest of the first ones: what differs shows in any."""

_ANSWER = 16
"""Tokens that both of their answers have, where there are such rows: over fewer, rounding is not averaged out."""

_WHOLE_MODULE = ".modules_to_save.default."
_AT_ONCE = 2**24  # values; a fingerprint's passing copies stay small beside the weights
_MOST_SKIPPED_STEPS = 20  # that fp16's loss scaler needs to find its scale

# Largest difference per token between two forwards of the same weights. They differ at all only where
# the order of additions does, as between a batch with an adapter that adds 0 and one without.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def completion_logps(
    trainer: DPOTrainer, rows: Sequence[Mapping[str, Any]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Score training rows with the policy and with the reference, both in evaluation mode.

    Args:
        trainer: holds both, and `ref_chosen_logps` and `ref_rejected_logps` where its rows have them.
        rows: of its data.

    Returns:
        Policy and reference log-probabilities, summed over each completion, and the number of scored tokens:
        three tensors of shape [2 * number of rows], chosen first (DPO paper, Eq. 7's log pi(y|x)).
    """
    model, training, ld_alpha = trainer.model, trainer.model.training, trainer.ld_alpha
    batch = trainer._prepare_inputs(trainer.data_collator(list(rows)))
    stored = [batch.pop(name) for name in ("ref_chosen_logps", "ref_rejected_logps") if name in batch]
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {key: value for key, value in batch.items() if key != "completion_mask"}
    model.eval()
    trainer.ld_alpha = None  # plain sums
    try:
        with torch.no_grad(), trainer.accelerator.autocast():
            policy = model(**inputs, labels=labels, use_cache=False, fused_lm_head=True).log_probs.sum(dim=1)
        if not stored or ld_alpha is not None:
            stored = trainer.compute_ref_log_probs(trainer.ref_model or model, batch)
    finally:
        trainer.ld_alpha = ld_alpha
        model.train(training)
    return policy, torch.cat(list(stored)), (labels != -100).sum(dim=1)


def check_reference(trainer: DPOTrainer, is_initial: bool = True) -> float:
    """Verify that policy and reference agree before the first step.

    Args:
        trainer: before training.
        is_initial: whether the reference is the model that training starts from; any other one may differ.

    Returns:
        The largest difference, in nats per token.

    Raises:
        RunError: they differ by more than the dtype's rounding explains.
    """
    first = [trainer.train_dataset[index] for index in range(min(len(trainer.train_dataset), _LOOKED_AT))]
    enough = [row for row in first if min(len(row["chosen_ids"]), len(row["rejected_ids"])) >= _ANSWER]
    policy, reference, tokens = completion_logps(trainer, sorted(enough or first, key=count_tokens)[:_COMPARED])
    dtype = torch.bfloat16 if trainer.args.bf16 else torch.float16 if trainer.args.fp16 else trainer.model.dtype
    difference = ((policy - reference).abs() / tokens.clamp(min=1)).max().item()
    if math.isnan(difference) or (is_initial and difference > TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])):
        raise RunError(
            f"step-0 check: policy and reference differ by {difference:.4g} per token before training (tolerance "
            f"{TOLERANCE.get(dtype):g} for {dtype}); likely the reference is not the model that training starts from, "
            "or the forward is not deterministic. checks.step0=false skips this check"
        )
    return float(difference)


def check_trainable(trainer: DPOTrainer) -> None:
    """Verify that there is something to train, that no part of the adapter is frozen, and that all of it is fp32.

    Raises:
        RunError: naming the first weight that is frozen or not in fp32.
    """
    weights = dict(trainer.model.named_parameters())
    if not any(parameter.requires_grad for parameter in weights.values()):
        raise RunError("step-0 check: no parameter is trainable; likely the adapter was loaded frozen")
    for name in (*_find_lora(trainer.model), *(name for name in weights if _WHOLE_MODULE in name)):
        if not weights[name].requires_grad:
            raise RunError(f"step-0 check: {name} is frozen; likely the adapter was loaded without is_trainable")
    for name, parameter in weights.items():
        if parameter.requires_grad and parameter.dtype not in (torch.float32, torch.float64):
            raise RunError(
                f"step-0 check: {name} trains in {parameter.dtype}; must be torch.float32, "
                "in less most small updates round to nothing"
            )


def _find_lora(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return by the names of lora_A and lora_B, in the model's order, the layers that they belong to."""
    return {
        f"{path}.{part}.default.weight": module
        for path, module in model.named_modules()
        for part in ("lora_A", "lora_B")
        if isinstance(getattr(module, part, None), torch.nn.ModuleDict)  # other methods have bare parameters there
        and "default" in getattr(module, part)
    }


class MovementCheck(TrainerCallback):  # type: ignore[misc]
    """Verify that training moves weights, in the first steps with a learning rate above 0.

    Each lora_B must have moved after the first such step and each lora_A after the second: B starts at 0, so A's
    gradient is 0 in the first. Layers that no token reached (idle experts) are exempt. Of everything that is trained,
    and of whole modules beside an adapter (`modules_to_save`), at least one weight must have moved after the second:
    in other methods and in full fine-tuning a single tensor may rightly stay, as what no token uses does.

    Args:
        may_skip: whether the trainer may leave a step out, as the loss scaler of fp16 may too.
    """

    def __init__(self, may_skip: bool = False) -> None:
        self._may_skip = may_skip
        self._steps = 0
        self._skipped = 0
        self._highest_rate = 0.0
        self._start: dict[str, Fingerprint] = {}
        self._last: dict[str, Fingerprint] = {}
        self._reached: set[str] = set()
        self._hooks: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        self._start = self._last = _take_fingerprints(model)
        for name, layer in _find_lora(model).items():
            self._hooks.append(layer.register_forward_pre_hook(self._note(name)))

    def _note(self, name: str) -> Any:
        def hook(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
            if torch.is_grad_enabled() and inputs and inputs[0].numel():
                self._reached.add(name)

        return hook

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: torch.nn.Module, optimizer: Any, **kwargs: Any
    ) -> None:
        rate = optimizer.param_groups[0]["lr"]
        if not self._start or rate == 0:
            return
        now = _take_fingerprints(model)
        if (args.fp16 or self._may_skip) and now == self._last and self._skipped < _MOST_SKIPPED_STEPS:
            self._skipped += 1
            return
        self._steps, self._last = self._steps + 1, now
        self._highest_rate = max(self._highest_rate, rate)
        if self._steps <= 2:
            part = ".lora_B." if self._steps == 1 else ".lora_A."
            stuck = [name for name in now if part in name and name in self._reached and not self._moved(name)]
            self._refuse(args, stuck, f"{len(stuck)} adapter weights have")
        if self._steps < 2:
            return
        trained, whole = list(now), [name for name in now if _WHOLE_MODULE in name]
        still = [group for group in (whole, trained) if group and not any(map(self._moved, group))]
        if not still:
            self._start.clear()
            for handle in self._hooks:
                handle.remove()
        weights = dict(model.named_parameters())
        for group in still:
            # In warm-up a step may be too small for any of them, as for a method's factors that begin at 1.
            highest = self._highest_rate
            if highest >= args.learning_rate or any(_can_move(weights[name], highest) for name in group):
                what = "weights in modules_to_save" if group is whole else "trainable weights"
                self._refuse(args, group, f"all {len(group)} {what} have")

    def _moved(self, name: str) -> bool:
        return self._last[name] != self._start[name]

    def _refuse(self, args: Any, stuck: list[str], which: str) -> None:
        if stuck:
            raise RunError(
                f"step-0 check: {which} not moved in {self._steps} step(s) with a learning rate above 0, the first is "
                f"{stuck[0]}; likely gradients do not reach them, or training.learning_rate={args.learning_rate:g} is "
                "too small to change them. checks.step0=false skips this check"
            )


def _take_fingerprints(model: torch.nn.Module) -> dict[str, Fingerprint]:
    """Return the fingerprint of each weight that is trained, by name."""
    return {name: _fingerprint(weight) for name, weight in model.named_parameters() if weight.requires_grad}


def _fingerprint(weight: torch.Tensor) -> Fingerprint:
    """Sums in fp64: they change if any value does, for all practical purposes, and cost no copy of the weights."""
    total = squares = 0.0
    for part in weight.detach().reshape(-1).split(_AT_ONCE):
        values = part.double()
        total, squares = total + values.sum().item(), squares + values.square().sum().item()
    return total, squares


def _can_move(weight: torch.Tensor, rate: float) -> bool:
    """Whether an update as large as the learning rate, as Adam's are, changes any value."""
    return bool((weight.detach() - rate != weight.detach()).any())

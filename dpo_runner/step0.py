"""The step-0 check: before training the policy is the reference; after the first steps the adapter has moved.

Most ways of training nothing, or training against the wrong reference, show in one of these.
"""

import math
from typing import Any

import torch
from transformers import TrainerCallback
from trl import DPOTrainer

from dpo_runner.errors import RunError

Fingerprint = tuple[float, float]

_MOST_SKIPPED_STEPS = 20  # that fp16's loss scaler needs to find its scale

# Largest difference per token between two forwards of the same weights. They differ at all only where
# the order of additions does, as between a batch with an adapter that adds 0 and one without.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def completion_logps(trainer: DPOTrainer, rows: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Score the first training rows with the policy and with the reference, both in evaluation mode.

    Returns:
        Policy and reference log-probabilities, summed over each completion, and the number of scored tokens:
        three tensors of shape [2 * rows], chosen first (DPO paper, Eq. 7's log pi(y|x)).
    """
    model, training, ld_alpha = trainer.model, trainer.model.training, trainer.ld_alpha
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(min(rows, len(trainer.train_dataset)))])
    batch = trainer._prepare_inputs({key: value for key, value in batch.items() if not key.startswith("ref_")})
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {key: value for key, value in batch.items() if key != "completion_mask"}
    model.eval()
    trainer.ld_alpha = None  # plain sums
    try:
        with torch.no_grad(), trainer.accelerator.autocast():
            policy = model(**inputs, labels=labels, use_cache=False, fused_lm_head=True).log_probs.sum(dim=1)
        reference = torch.cat(trainer.compute_ref_log_probs(trainer.ref_model or model, batch))
    finally:
        trainer.ld_alpha = ld_alpha
        model.train(training)
    return policy, reference, (labels != -100).sum(dim=1)


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
    policy, reference, tokens = completion_logps(trainer)
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
    """Verify that there is something to train, and that each adapted layer trains in fp32.

    Raises:
        RunError: naming the first layer that is frozen or not in fp32.
    """
    if not any(parameter.requires_grad for parameter in trainer.model.parameters()):
        raise RunError("step-0 check: no parameter is trainable; likely the adapter was loaded frozen")
    for name, layer in _adapted_layers(trainer.model):
        for part, parameter in _parts(layer):
            if not parameter.requires_grad:
                raise RunError(
                    f"step-0 check: {name}.{part} is frozen; likely the adapter was loaded without is_trainable"
                )
            if parameter.dtype != torch.float32:
                raise RunError(
                    f"step-0 check: {name}.{part} trains in {parameter.dtype}; must be torch.float32, "
                    "in less most small updates round to nothing"
                )


def _adapted_layers(model: torch.nn.Module) -> list[tuple[str, Any]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and "default" in getattr(module, "lora_A", {})
    ]


def _parts(layer: Any) -> list[tuple[str, torch.nn.Parameter]]:
    return [(part, getattr(layer, part)["default"].weight) for part in ("lora_A", "lora_B")]


class MovementCheck(TrainerCallback):  # type: ignore[misc]
    """Verify that lora_B has moved after the first step with a learning rate above 0, and lora_A after the second.

    B starts at 0, so A's gradient is 0 in the first such step. Layers that no token reached (idle experts) are exempt.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._skipped = 0
        self._start: dict[str, Fingerprint] = {}
        self._reached: set[str] = set()
        self._hooks: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        for name, layer in _adapted_layers(model):
            self._start |= {f"{name}.{part}": _fingerprint(parameter) for part, parameter in _parts(layer)}
            self._hooks.append(layer.register_forward_pre_hook(self._note(name)))

    def _note(self, name: str) -> Any:
        def hook(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
            if torch.is_grad_enabled() and inputs and inputs[0].numel():
                self._reached.add(name)

        return hook

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: torch.nn.Module, optimizer: Any, **kwargs: Any
    ) -> None:
        if not self._start or optimizer.param_groups[0]["lr"] == 0:
            return
        self._steps += 1
        part = "lora_B" if self._steps == 1 else "lora_A"
        stuck = [
            f"{name}.{part}"
            for name, layer in _adapted_layers(model)
            if name in self._reached and _fingerprint(dict(_parts(layer))[part]) == self._start[f"{name}.{part}"]
        ]
        if args.fp16 and len(stuck) == len(self._reached) and self._skipped < _MOST_SKIPPED_STEPS:
            self._steps -= 1  # the loss scaler has skipped the step
            self._skipped += 1
            return
        if self._steps == 2:
            self._start.clear()
            for handle in self._hooks:
                handle.remove()
        if stuck:
            raise RunError(
                f"step-0 check: {len(stuck)} adapter weights have not moved in {self._steps} step(s) with a learning "
                f"rate above 0, the first is {stuck[0]}; likely gradients do not reach them, or "
                f"training.learning_rate={args.learning_rate:g} is too small to change them"
            )


def _fingerprint(parameter: torch.Tensor) -> Fingerprint:
    """Sums in fp64: they change if any weight does, for all practical purposes, and cost no copy of the adapter."""
    values = parameter.detach().double()
    return values.sum().item(), values.square().sum().item()

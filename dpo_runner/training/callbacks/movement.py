"""Trainer callback: check that training moves the trainable weights."""

from typing import Any

import torch
from transformers import TrainerCallback

from dpo_runner.errors import RunError
from dpo_runner.training.ranks.group import gather
from dpo_runner.training.ranks.sharding import is_sharded, local

Fingerprint = tuple[float, float]

WHOLE_MODULE = ".modules_to_save.default."
_AT_ONCE = 2**24  # values per chunk, to keep temporary fp64 copies small
_MOST_SKIPPED_STEPS = 20  # fp16's loss scaler skips steps until it finds its scale


def find_lora(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Map the names of lora_A and lora_B weights, in model order, to their layers."""
    return {
        f"{path}.{part}.default.weight": module
        for path, module in model.named_modules()
        for part in ("lora_A", "lora_B")
        if isinstance(getattr(module, part, None), torch.nn.ModuleDict)  # other methods have plain parameters there
        and "default" in getattr(module, part)
    }


class MovementCheck(TrainerCallback):  # type: ignore[misc]
    """Verify that training moves weights, in the first steps with a learning rate above 0.

    Each lora_B must have moved after the first such step and each lora_A after the second: B starts at 0, so A's
    gradient is 0 in the first. Layers that no token reached (idle experts) are exempt. Of all trainable weights, and of
    `modules_to_save`, at least one weight must have moved after the second step: in other methods and in full
    fine-tuning a single tensor may legitimately stay, for example if no token uses it.

    Args:
        may_skip: whether the trainer may skip steps (as fp16's loss scaler also does).
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
        self._start = self._last = take_fingerprints(model)
        for name, layer in find_lora(model).items():
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
        now = take_fingerprints(model)
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
        trained, whole = list(now), [name for name in now if WHOLE_MODULE in name]
        still = [group for group in (whole, trained) if group and not any(map(self._moved, group))]
        if not still:
            self._start.clear()
            for handle in self._hooks:
                handle.remove()
        weights = dict(model.named_parameters())
        for group in still:
            # During warm-up a step may be too small to change any of them, for example IA3 factors, which start at 1.
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


def take_fingerprints(model: torch.nn.Module) -> dict[str, Fingerprint]:
    """Return the fingerprint of each trainable weight, by name; of a divided one, that of the whole weight."""
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    found = [_fingerprint(local(weight)) for weight in weights.values()]
    if is_sharded(model):
        found = torch.tensor(gather(found), dtype=torch.float64).sum(dim=0).tolist()
    return dict(zip(weights, found, strict=True))


def _fingerprint(weight: torch.Tensor) -> Fingerprint:
    """Return the sum and sum of squares in fp64: practically unique, and without a copy of the weight."""
    total = squares = 0.0
    for part in weight.detach().reshape(-1).split(_AT_ONCE):
        values = part.double()
        total, squares = total + values.sum().item(), squares + values.square().sum().item()
    return total, squares


def _can_move(weight: torch.Tensor, rate: float) -> bool:
    """Return whether an update of the size of the learning rate (as Adam's) changes any value."""
    own = local(weight.detach())
    return bool((own - rate != own).any())

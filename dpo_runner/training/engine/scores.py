"""Scores of the tokens of an optimizer step, recorded pair by pair and replayed for each of TRL's batches."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from trl.trainer.utils import FusedCausalLMOutput

from dpo_runner.model.base import base_of
from dpo_runner.training.ranks.group import count, gather

Batch = dict[str, torch.Tensor]
Forward = Callable[..., Any]


class Place(NamedTuple):
    """Position of a pair: index of its batch in the step, and of the pair in that batch."""

    batch: int
    row: int


class StepScores:
    """Recorded scores of the step's tokens, call by call: the policy's, then any reference's.

    Args:
        batches: TRL's batches of the step.
        device: the trainer's.
    """

    def __init__(self, batches: Sequence[Batch], device: torch.device) -> None:
        self._device = device
        self._shapes = [(batch["input_ids"].size(0), batch["input_ids"].size(1) - 1) for batch in batches]
        self._calls: list[list[FusedCausalLMOutput]] = []

    def record(self, places: Sequence[Place]) -> Callable[[Forward], Forward]:
        """Return a wrapper that records a forward's outputs for a micro-batch."""
        call = 0

        def around(forward: Forward) -> Forward:
            def scored(*args: Any, **kwargs: Any) -> FusedCausalLMOutput:
                nonlocal call
                outputs: FusedCausalLMOutput = forward(*args, **kwargs)
                self._keep(call, places, outputs)
                call += 1
                return outputs

            return scored

        return around

    def replay(self, batch: int) -> Callable[[Forward], Forward]:
        """Return a wrapper whose forward replays the recorded outputs of one of TRL's batches, in call order."""
        calls = iter(self._calls)
        return lambda forward: lambda *args, **kwargs: next(calls)[batch]

    def exchange(self) -> None:
        """Complete the scores with those of the pairs that other processes have scored."""
        if count() == 1:
            return
        mine = [[{name: values.cpu() for name, values in kept.items()} for kept in call] for call in self._calls]
        parts = gather(mine)
        self._calls = [[FusedCausalLMOutput() for _ in self._shapes] for _ in max(parts, key=len)]
        for part in parts:
            for outputs, scored in zip(self._calls, part, strict=False):
                for kept, batch in zip(outputs, scored, strict=True):
                    for name, values in batch.items():
                        kept[name] = kept[name] + values if name in kept else values
        for outputs in self._calls:
            for kept in outputs:
                for name in list(kept):
                    kept[name] = kept[name].to(self._device)

    def _keep(self, call: int, places: Sequence[Place], outputs: FusedCausalLMOutput) -> None:
        if call == len(self._calls):
            self._calls.append([FusedCausalLMOutput() for _ in self._shapes])
        for name, values in outputs.items():
            if values.dim() != 2:
                continue
            for index, place in enumerate(places):
                rows, width = self._shapes[place.batch]
                kept = self._calls[call][place.batch]
                if name not in kept:
                    kept[name] = values.new_zeros(rows, width)
                width = min(width, values.size(1))
                for row, source in ((place.row, index), (rows // 2 + place.row, len(places) + index)):
                    kept[name][row, :width] = values[source, :width].detach()


@contextlib.contextmanager
def forward_of(models: Sequence[Any], around: Callable[[Forward], Forward]) -> Iterator[None]:
    """Wrap the scoring forwards of the base models in `around`."""
    bases = [base_of(model) for model in models]
    forwards = [base.forward for base in bases]
    for base, forward in zip(bases, forwards, strict=True):
        base.forward = around(forward)
    try:
        yield
    finally:
        for base, forward in zip(bases, forwards, strict=True):
            base.forward = forward

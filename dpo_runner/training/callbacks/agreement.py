"""Trainer callback: check that all processes of a run have the same weights."""

from typing import Any

import torch
from transformers import TrainerCallback

from dpo_runner.errors import RunError
from dpo_runner.training.callbacks.movement import take_fingerprints
from dpo_runner.training.ranks.group import gather

_FIRST_STEPS = 2


class AgreementCheck(TrainerCallback):  # type: ignore[misc]
    """Compares the trained weights of all processes after the first steps and before each checkpoint.

    Processes whose gradients are not exchanged train a model each, with losses that look right.

    Raises:
        RunError: the weights differ.
    """

    def __init__(self) -> None:
        self._steps = 0

    def on_step_end(self, args: Any, state: Any, control: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        self._steps += 1
        if self._steps <= _FIRST_STEPS or control.should_save:
            check_agreement(model, state.global_step)


def check_agreement(model: torch.nn.Module, step: int) -> None:
    """Check that the trained weights of all processes are the same.

    Raises:
        RunError: they are not; names the first weight that differs.
    """
    first, *others = gather(take_fingerprints(model))
    for number, other in enumerate(others, 1):
        if differing := [name for name in first if str(first[name]) != str(other[name])]:  # NaN equals NaN
            raise RunError(
                f"after step {step} process {number} has other weights than process 0: {len(differing)} of {len(first)}"
                f", the first is {differing[0]}. Likely their gradients were not summed, or the processes compute "
                "differently: other GPUs, other versions of the libraries, or a callback that acts in one of them"
            )

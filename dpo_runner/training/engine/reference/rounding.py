"""The rule for log-probabilities of the same weights: how far rounding alone may move them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from trl import DPOTrainer

from dpo_runner.training.engine.reference.store import PairLogps

ROUNDING = {torch.float32: 5e-5, torch.bfloat16: 0.05, torch.float16: 0.006}
"""Root mean square of rounding errors in nats per token.

Two forwards of the same weights differ by the order of their sums, as with other rows in the batch. In bf16 single
tokens of a 135M model differ by 0.3, their root mean square by 0.05.
"""

_RMS, _SUM, _BIAS = 3.0, 8.0, 0.04
"""Multiples of `ROUNDING` that are allowed: for the root mean square; for a sum over n tokens, by sqrt(n) and by n.

Rounding errors of tokens are nearly independent, so their mean falls with the root of n. A wrong reference shifts it.
benchmarks/rounding.md has what other ways of scoring come to.
"""


@dataclass(frozen=True)
class Difference:
    """Difference of two scorings of the same completions: root mean square and mean in nats per token."""

    rms: float
    mean: float
    tokens: int

    def exceeds(self, dtype: torch.dtype) -> bool:
        """Return whether rounding in `dtype` does not explain the difference; NaN is not explained."""
        rms, mean = self._allow(dtype)
        return not (self.rms <= rms and abs(self.mean) <= mean)

    def describe(self, dtype: torch.dtype) -> str:
        """Return the difference and its limits, for a message."""
        rms, mean = self._allow(dtype)
        return (
            f"differ by {self.rms:.2g} per token (root mean square; mean {self.mean:.2g} over {self.tokens} tokens); "
            f"rounding in {str(dtype).removeprefix('torch.')} explains {rms:.2g} (mean {mean:.2g})"
        )

    def _allow(self, dtype: torch.dtype) -> tuple[float, float]:
        return _RMS * ROUNDING.get(dtype, ROUNDING[torch.bfloat16]), limit_mean(dtype, self.tokens, self.tokens)


def compare_pairs(some: Sequence[PairLogps], others: Sequence[PairLogps]) -> Difference:
    """Compare two scorings of the same pairs; another number of tokens counts as infinitely different."""
    one, other = (
        np.concatenate([part for pair in pairs for part in pair], dtype=np.float64) for pairs in (some, others)
    )
    if one.shape != other.shape:
        return Difference(math.inf, math.inf, max(one.size, other.size))
    if not one.size:  # both answers were cut off
        return Difference(0.0, 0.0, 1)
    difference = one - other
    return Difference(float(np.sqrt(np.mean(difference**2))), float(difference.mean()), difference.size)


def limit_mean(dtype: torch.dtype, tokens: int, answers: int) -> float:
    """Return how far rounding may move the mean of `answers` log-probabilities that sum over `tokens` in all."""
    rounding = ROUNDING.get(dtype, ROUNDING[torch.bfloat16])
    return rounding * (_SUM * math.sqrt(tokens) + _BIAS * tokens) / answers


def find_rounding(trainer: DPOTrainer, in_fp32: bool = False) -> torch.dtype:
    """Return the dtype whose rounding counts: autocast's, else the weights'; TF32 rounds as fp16 does.

    Args:
        trainer: the trainer.
        in_fp32: whether the forward is in fp32, without autocast.
    """
    if not in_fp32 and (trainer.args.bf16 or trainer.args.fp16):
        return torch.bfloat16 if trainer.args.bf16 else torch.float16
    dtype: torch.dtype = torch.float32 if in_fp32 else trainer.model.dtype
    in_tf32 = trainer.accelerator.device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return torch.float16 if dtype == torch.float32 and in_tf32 else dtype

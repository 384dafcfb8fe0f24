"""Check that two runs did the same job; other runs are not compared."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

_LIMITS = {"loss": 0.05, "rewards/margins": 0.15}
"""Largest allowed difference of a step's metrics in bf16: rounding, amplified by the previous steps."""
_OF_LOGPS = 0.02
"""Largest relative difference of log-probabilities; attention across rows, for instance, exceeds it."""


class DifferentJobs(Exception):
    """The reason why two runs cannot be compared."""


def check_same_job(ours: Mapping[str, Any], theirs: Mapping[str, Any], limits: Mapping[str, float] = _LIMITS) -> str:
    """Compare two runs step by step and return a line on their largest differences.

    Args:
        ours: `Measured.to_dict()` of dpo_runner.
        theirs: `Measured.to_dict()` of the other side; it must log the loss, other metrics are compared if present.
        limits: largest allowed difference by metric.

    Raises:
        DifferentJobs: the runs differ in the number of steps or pairs or in a step's tokens, a first loss is not ln 2,
            or metrics differ by more than rounding.
    """
    name = theirs["side"]
    for key in ("steps", "pairs"):
        if ours[key] != theirs[key]:
            raise DifferentJobs(f"{name} made {theirs[key]:g} {key}, dpo_runner {ours[key]:g}")
    mine, others = ours["history"], theirs["history"]
    if not mine or len(mine) != len(others):
        raise DifferentJobs(f"{name} logged {len(others)} steps, dpo_runner {len(mine)}")
    tokens = [[step["num_tokens"] for step in side if "num_tokens" in step] for side in (mine, others)]
    if tokens[1] and tokens[0] != tokens[1]:
        step = next(i for i, (a, b) in enumerate(zip(*tokens, strict=True), 1) if a != b)
        raise DifferentJobs(
            f"{name} trained {tokens[1][step - 1]:g} tokens by step {step}, dpo_runner {tokens[0][step - 1]:g}"
        )
    for side, history in (("dpo_runner", mine), (name, others)):
        if not math.isclose(first := history[0]["loss"], math.log(2), abs_tol=0.02):
            raise DifferentJobs(f"the first loss of {side} is {first:.4f}, not ln 2")
    worst = {key: _largest_difference(mine, others, key) for key in limits}
    for key, limit in limits.items():
        if (difference := worst[key]) is not None and not difference <= limit:
            raise DifferentJobs(f"{key} of {name} and dpo_runner differ by up to {difference:.3g}, over {limit:g}")
    for key in ("logps/chosen", "logps/rejected"):
        for number, (one, other) in enumerate(zip(mine, others, strict=True), 1):
            if key in one and key in other and not abs(one[key] - other[key]) <= _OF_LOGPS * abs(one[key]):
                raise DifferentJobs(f"{key} of {name} is {other[key]:.1f} at step {number}, not {one[key]:.1f}")
    told = ", ".join(f"{key} {value:.2g}" for key, value in worst.items() if value is not None)
    return f"{'the same tokens in each step; ' if tokens[1] else ''}largest difference in a step: {told}"


def _largest_difference(
    mine: Sequence[Mapping[str, float]], others: Sequence[Mapping[str, float]], key: str
) -> float | None:
    pairs = [(a[key], b[key]) for a, b in zip(mine, others, strict=True) if key in a and key in b]
    differences = [abs(a - b) for a, b in pairs]
    if any(math.isnan(value) for value in differences):
        return math.nan
    return max(differences, default=None)

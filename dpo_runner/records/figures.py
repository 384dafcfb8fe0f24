"""Curves and result figures from a run's log and summary."""

import re
from typing import Any

Curve = tuple[list[float], list[float]]
"""Steps, and the value logged at each."""

_NO_CURVE = re.compile(
    r"^(step|epoch|time|global_step|total_flos)$|_?(runtime|per_second|preparation_time|num_tokens|stderr|diff_ci95)$"
)
_NO_RESULT = re.compile(r"^(grad_norm|learning_rate)$")


def to_number(value: Any) -> float | None:
    """Return a number as a float; None for anything else, also a boolean or too large an integer."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def read_numbers(values: Any) -> dict[str, float]:
    """Return a mapping's numeric entries; {} if `values` is not a mapping."""
    pairs = values.items() if isinstance(values, dict) else ()
    return {str(key): number for key, value in pairs if (number := to_number(value)) is not None}


def collect_curves(events: list[dict[str, Any]]) -> dict[str, Curve]:
    """Return the logged values over optimizer steps, by name, without timings, throughput and counters."""
    curves: dict[str, Curve] = {}
    for index, event in enumerate(events):
        values = read_numbers(event)
        step = values.get("step", values.get("global_step", float(index)))
        for name, value in values.items():
            if not _NO_CURVE.search(name):
                steps, points = curves.setdefault(name, ([], []))
                steps.append(step)
                points.append(value)
    return curves


def collect_results(curves: dict[str, Curve], summary: dict[str, Any], beta: float | None) -> dict[str, float]:
    """Return a run's result figures, without those measured before its first step.

    Args:
        curves: see `collect_curves`.
        summary: the contents of summary.json; empty if the run has not ended.
        beta: the run's β; None if unknown.

    Returns:
        The figures by TRL's names; in addition `chosen_shift` and `rejected_shift`, the change of an answer's
        log-probability from the reference (nats per answer), and `drift`, the absolute value of `chosen_shift`.
    """
    newest = {name: (steps[-1], values[-1]) for name, (steps, values) in curves.items()}
    results = {name: value for name, (step, value) in newest.items() if step > 0 and not _NO_RESULT.search(name)}
    if newest:
        results["steps"] = max(step for step, _ in newest.values())
    results |= read_numbers(summary) | read_numbers(summary.get("after"))
    before = read_numbers(summary.get("before")) or {
        name: values[0] for name, (steps, values) in curves.items() if steps[0] == 0
    }
    for part in ("chosen", "rejected"):
        reward, logps = results.get(f"eval_rewards/{part}"), f"eval_logps/{part}"
        if reward is not None and beta:
            results[f"{part}_shift"] = reward / beta
        elif logps in results and logps in before:
            results[f"{part}_shift"] = results[logps] - before[logps]
    if "chosen_shift" in results:
        results["drift"] = abs(results["chosen_shift"])
    return results

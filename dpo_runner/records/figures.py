"""What a run's log and summary amount to: curves, and the figures that it is judged by."""

import re
from typing import Any

Curve = tuple[list[float], list[float]]
"""Steps, and the values logged at them."""

_NO_CURVE = re.compile(
    r"^(step|epoch|time|global_step|total_flos)$|_?(runtime|per_second|preparation_time|num_tokens)$"
)
_NO_RESULT = re.compile(r"^(grad_norm|learning_rate)$")


def to_number(value: Any) -> float | None:
    """Return a number as a float; None of anything else, such as a Boolean or what a float cannot hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def read_numbers(values: Any) -> dict[str, float]:
    """Return the entries of a mapping that are numbers; of anything else, none."""
    pairs = values.items() if isinstance(values, dict) else ()
    return {str(key): number for key, value in pairs if (number := to_number(value)) is not None}


def collect_curves(events: list[dict[str, Any]]) -> dict[str, Curve]:
    """Return what was logged over optimizer steps, by name, without what tells of the machine only."""
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
    """Return the figures that a run is judged by; what was measured before its first step is none of them.

    Args:
        curves: see `collect_curves`.
        summary: what summary.json holds; empty where the run has not ended.
        beta: the run's β; None where it is not known.

    Returns:
        By name, under TRL's names; beside them `chosen_shift` and `rejected_shift`, how far the log-probability of an
        answer has moved from the reference (nats per answer), and `drift`, the size of the former.
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

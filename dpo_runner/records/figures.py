"""Curves and result figures from a run's log and summary, and those beside the published ones of `expected`."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_runner.config.run_conf import RunConf

Figure = dict[str, Any]
"""One published figure: metric, step, low, high, source; with a run's own also `value` and `verdict`."""

INSIDE, OUTSIDE, OTHER, MISSED = "inside", "outside", "at other settings", "not reached"
_SHOWN = 3

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


def list_figures(conf: RunConf) -> list[Figure]:
    """Return every published figure, those of consecutive steps singly."""
    found = []
    for entry in conf.expected:
        bands = [(round(each - entry.tolerance, 9), round(each + entry.tolerance, 9)) for each in entry.values]
        for index, (low, high) in enumerate(bands or [(entry.low, entry.high)]):
            step = entry.step if isinstance(entry.step, str) else entry.step + index
            found.append({"metric": entry.metric, "step": step, "low": low, "high": high, "source": entry.source})
    return found


class Expected:
    """The published figures of a run's recipe.

    Args:
        conf: the run's configuration.
        changes: the settings in which it differs from the recipe; see `find_changes`.
    """

    def __init__(self, conf: RunConf, changes: Mapping[str, list[Any]]) -> None:
        self._figures, self._changes = list_figures(conf), changes

    def note(self, event: Mapping[str, Any]) -> str | None:
        """Return one line that compares a log event, or None if nothing is published of its step."""
        at = [each for each in self._figures if each["step"] == event["step"] and each["metric"] in event]
        told = "; ".join(describe_figure(self._judge(each, event[each["metric"]])) for each in at)
        return f"step {event['step']}: {told}" if told else None

    def conclude(self, events: Sequence[Mapping[str, Any]], after: Mapping[str, Any]) -> dict[str, Any]:
        """Return the record in summary.json: every figure judged, settings that differ, and lines that tell both.

        Args:
            events: the contents of metrics.jsonl.
            after: the metrics after training.
        """
        logged = {(event["step"], key): value for event in events for key, value in event.items()}
        logged |= {("end", key): value for key, value in after.items()}
        judged = [self._judge(each, logged.get((each["step"], each["metric"]))) for each in self._figures]
        if not judged:
            return {}
        told = [f"the end: {describe_figure(each)}" for each in judged if each["step"] == "end"]
        told.append(_describe_counts(judged, self._changes))
        return {"changes": self._changes, "figures": judged, "told": told}

    def _judge(self, figure: Figure, value: float | None) -> Figure:
        low, high = figure["low"], figure["high"]
        if value is None:
            verdict = MISSED
        elif self._changes:
            verdict = OTHER
        else:
            is_inside = (low is None or low <= value) and (high is None or value <= high)
            verdict = INSIDE if is_inside else OUTSIDE
        return {**figure, "value": value, "verdict": verdict}


def describe_figure(figure: Figure) -> str:
    """Return a judged figure in words, without its step."""
    own = "" if figure["value"] is None else f" {figure['value']:.6g}"
    return f"{figure['metric']}{own}, published {describe_band(figure)}: {figure['verdict']}"


def describe_band(figure: Figure) -> str:
    """Return the band of a published figure in words."""
    low, high = figure["low"], figure["high"]
    if low is None or high is None:
        return f"at most {high:.6g}" if low is None else f"at least {low:.6g}"
    return f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"


def describe_changes(changes: Mapping[str, Sequence[Any]]) -> str:
    """Return the settings that differ from the recipe, in words; the first ones, if there are many."""
    told = [f"{key}={_show(here)} (recipe {_show(there)})" for key, (here, there) in changes.items()]
    more = [f"{len(told) - _SHOWN} more"] if len(told) > _SHOWN else []
    return ", ".join([*told[:_SHOWN], *more])


def _show(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _describe_counts(figures: Sequence[Figure], changes: Mapping[str, Sequence[Any]]) -> str:
    """Return how many figures have each verdict, with the first ones outside or not reached by name."""
    told = []
    for verdict in (INSIDE, OUTSIDE, OTHER, MISSED):
        named = [f"{each['metric']} at {_place(each)}" for each in figures if each["verdict"] == verdict]
        more = ["…"] if len(named) > _SHOWN else []
        names = f" ({', '.join(named[:_SHOWN] + more)})" if verdict in (OUTSIDE, MISSED) else ""
        told += [f"{len(named)} {verdict}{names}"] if named else []
    return f"published figures: {', '.join(told)}{f'; {describe_changes(changes)}' if changes else ''}"


def _place(figure: Figure) -> str:
    return "the end" if figure["step"] == "end" else f"step {figure['step']}"

"""Settings in which runs differ, and a run's figures beside the published ones of `expected`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from dpo_runner.config.keys import Effect, effect_of
from dpo_runner.config.run_conf import RunConf, config_keys
from dpo_runner.records.runs import RunRecord, flatten

Figure = dict[str, Any]
"""One published figure: metric, step, low, high, source; with a run's own also `value` and `verdict`."""

INSIDE, OUTSIDE, OTHER, MISSED = "inside", "outside", "at other settings", "not reached"
_LOGGING = "training.logging_steps"
_NO_MATTER = (
    *("engine.", "checks.", "launch.", "training.eval_", "training.per_device_", "training.gradient_"),
    *("training.dataloader_", "training.precompute_ref_", "training.use_cpu"),
)
"""Beginnings of keys that leave the figures of a step as they are; those that make a batch count by their product."""
_SHOWN = 3


def find_ignored(runs: Sequence[RunRecord]) -> set[str]:
    """Return the keys irrelevant to the experiment: names, outputs, and different paths of the same files.

    Runs used the same files if the fingerprints in their environment.json are equal.
    """
    keys = {key for run in runs for key in run.config}
    in_rounds = any(run.config.get("rounds") for run in runs)
    ignored = {key for key in keys if effect_of(key, in_rounds) is Effect.PLACES}
    configured = [run for run in runs if run.config]
    for section in ("model", "data"):
        prints = {run.fingerprints.get(section) for run in configured}
        if len(prints) == 1 and None not in prints:
            ignored |= {key for key in keys if key.startswith(f"{section}.") and _are_moved(configured, key)}
    return ignored


def _are_moved(runs: list[RunRecord], key: str) -> bool:
    """Return whether a key's values are absolute paths that differ only in their folder."""
    values = [run.config.get(key) for run in runs]
    paths = [PurePath(value) for value in values if isinstance(value, str)]
    return len(paths) == len(values) and all(p.is_absolute() for p in paths) and len({p.name for p in paths}) == 1


def find_differing(configs: list[dict[str, Any]], ignored: set[str]) -> list[str]:
    """Return the keys whose values differ between configurations, without `ignored`.

    A section that is null in one run and set in another counts as a key. A key missing in some runs, for instance
    those of another version, counts only if the other keys do not distinguish all runs.
    """
    configs = [config for config in configs if config]
    keys = list(dict.fromkeys(key for config in configs for key in config if key not in ignored))
    differing, lacked = [], []
    for key in keys:
        values = {json.dumps(look_up(config, key), sort_keys=True) for config in configs if _has(config, key)}
        if len(values) > 1:
            differing.append(key)
        elif not all(_has(config, key) for config in configs):
            lacked.append(key)
    told = {json.dumps([look_up(config, key) for key in differing]) for config in configs}
    return differing if len(told) == len(configs) else differing + lacked


def _has(config: dict[str, Any], key: str) -> bool:
    return key in config or any(other.startswith(f"{key}.") for other in config)


def look_up(config: dict[str, Any], key: str) -> Any:
    """Return a key's value; `set` for a section."""
    return config[key] if key in config else ("set" if _has(config, key) else None)


def list_figures(conf: RunConf) -> list[Figure]:
    """Return every published figure, those of consecutive steps singly."""
    found = []
    for entry in conf.expected:
        bands = [(round(each - entry.tolerance, 9), round(each + entry.tolerance, 9)) for each in entry.values]
        for index, (low, high) in enumerate(bands or [(entry.low, entry.high)]):
            step = entry.step if isinstance(entry.step, str) else entry.step + index
            found.append({"metric": entry.metric, "step": step, "low": low, "high": high, "source": entry.source})
    return found


def find_changes(conf: RunConf, processes: int) -> dict[str, list[Any]]:
    """Return the settings in which a run differs from the recipe that `expected` holds for, each with both values.

    Args:
        conf: the run's configuration.
        processes: the number of processes that share its steps.
    """
    if conf.recipe is None:
        return {}
    here = _collect(config_keys(conf), processes)
    published = conf.recipe["launch"]["processes"] or 1
    there = _collect(conf.recipe, processes if published == "auto" else published)
    if all(entry.step == "end" or entry.metric.startswith("eval_") for entry in conf.expected):
        here.pop(_LOGGING), there.pop(_LOGGING)  # the loss of a step is the mean since the last logged one
    both = {key: [look_up(each, key) for each in (here, there)] for key in find_differing([here, there], set())}
    return {key: values for key, values in both.items() if not _is_copy(*values)}


def _collect(config: dict[str, Any], processes: int) -> dict[str, Any]:
    settings = {
        key: value
        for key, value in flatten(config)
        if key == _LOGGING or (effect_of(key) is Effect.COMPUTES and not key.startswith(_NO_MATTER))
    }
    training = config["training"]
    batches = training["gradient_accumulation_steps"] * processes
    return settings | {"pairs per step": training["per_device_train_batch_size"] * batches}


def _is_copy(here: Any, there: Any) -> bool:
    """Return whether a value is the path of a copy on disk of what the other names."""
    are_texts = isinstance(here, str) and isinstance(there, str)
    return are_texts and PurePath(here).is_absolute() and PurePath(here).name == PurePath(there).name


class Expected:
    """The published figures of a run's recipe.

    Args:
        conf: the run's configuration.
        processes: the number of processes that share its steps.
    """

    def __init__(self, conf: RunConf, processes: int) -> None:
        self._figures, self._changes = list_figures(conf), find_changes(conf, processes)

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

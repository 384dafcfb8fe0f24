"""Settings in which runs differ, or a run from the recipe of its `expected` figures."""

import json
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from dpo_runner.config.keys import Effect, effect_of
from dpo_runner.config.run_conf import RunConf, config_keys
from dpo_runner.records.runs import RunRecord, flatten

_LOGGING = "training.logging_steps"
_NO_MATTER = (
    *("engine.", "checks.", "launch.", "training.eval_", "training.per_device_", "training.gradient_"),
    *("training.dataloader_", "training.precompute_ref_", "training.use_cpu"),
)
"""Beginnings of keys that leave the figures of a step as they are; those that make a batch count by their product."""


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

"""Checks before a run directory is written to or continued, and the progress saved in checkpoints."""

import json
import math
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo_runner.config.keys import REMOVED_KEYS, Effect, effect_of, split_removed
from dpo_runner.config.overrides import write_override
from dpo_runner.config.run_conf import RunConf, config_keys
from dpo_runner.errors import ConfigError, RunBusy, RunInterrupted
from dpo_runner.io.masking import mask_secrets
from dpo_runner.records.checkpoints import find_last_checkpoint
from dpo_runner.records.directory import EVENT_KINDS
from dpo_runner.records.reading import PUT_BACK, read_mapping, read_metrics, read_object
from dpo_runner.records.status import LOCK_FILE, find_death

_EVALUATION_FOLLOWS = "training.logging_steps"
"""The evaluation interval if training.eval_steps is not set."""
_FIRST = (LOCK_FILE, "run.log", "config.yaml", "overrides.yaml")
"""Files written before status.json, next to an empty checkpoints/."""


_SHARES = ("training.gradient_accumulation_steps", "launch.processes")
"""Keys whose product is the number of a step's batches: a run may be continued by another number of processes."""

_CANNOT_TELL = f"the run cannot be continued without it: {PUT_BACK}"

_MOVABLE = ("model.base",)
"""Keys of environment.json with paths, which may change while the files stay the same."""

_FILES = {
    "model.weights": "model.model_name_or_path",
    "model.adapter": "model.adapter",
    "model.reference": "model.reference",
}
"""Keys of environment.json with digests of files, and the keys that name the files. Older runs lack them."""


def interrupted(run_dir: Path, signal_number: int) -> RunInterrupted:
    """Return the error of a run that a signal has stopped, with the way to continue it."""
    return RunInterrupted(
        f"interrupted; continue with the same command and {write_override('run_dir', run_dir)}", signal_number
    )


def read_epoch(checkpoint: Path) -> float:
    """Return the number of epochs done at a checkpoint, with the fraction."""
    return float(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["epoch"])


def read_logged(checkpoint: Path) -> set[str]:
    """Return the `EVENT_KINDS` logged for a checkpoint's step before it was saved."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    events = [event for event in state["log_history"] if event["step"] == state["global_step"]]
    return {kind for kind in EVENT_KINDS if any(kind in event for event in events)}


def check_unused(run_dir: Path) -> None:
    """Check that `run_dir` is missing, empty, or has only the first files of a run that was killed early.

    Raises:
        ConfigError: `run_dir` is a file, or holds anything else.
    """
    if run_dir.exists() and (not run_dir.is_dir() or not all(map(_is_beginning, run_dir.iterdir()))):
        raise ConfigError(
            f"`run_dir={run_dir}`: holds something that is no run of this program; use a new or empty folder"
        )


def _is_beginning(path: Path) -> bool:
    if path.name == "checkpoints":
        return path.is_dir() and not any(path.iterdir())
    return path.name in _FIRST or path.name.startswith(tuple(f".{name}-" for name in (*_FIRST, "status.json")))


def check_free(run_dir: Path, status: dict[str, Any]) -> None:
    """Check that no process is running in the directory.

    The process that holds the lock must not call this: it would lose the lock.

    Raises:
        RunBusy: another process is running there.
    """
    own = status.get("pid") == os.getpid() and status.get("host") == platform.node()  # every container has a process 1
    if status["state"] == "running" and not own and find_death(run_dir, status) is None:
        raise RunBusy(
            f"`run_dir={run_dir}`: process {status.get('pid')} is running there; wait for it, or use another run_dir"
        )


def check_continuable(run_dir: Path, status: dict[str, Any], conf: RunConf) -> None:
    """Check that a run may be continued, with the configuration it was started with.

    Args:
        run_dir: the run's directory.
        status: the contents of its status.json.
        conf: the present configuration.

    Raises:
        ConfigError: one line for each key that differs from run_dir/config.yaml, or is active there and has been
            removed; or `conf` forbids resuming, or a file that resuming reads is missing or damaged.
    """
    if conf.resume == "never":
        raise ConfigError(
            f"`resume=never`: {run_dir} holds a run already; use resume=auto to continue it, or another run_dir"
        )
    in_rounds = bool(conf.rounds)
    begun = (run_dir / "config.yaml").exists() if in_rounds else find_last_checkpoint(run_dir / "checkpoints")
    if status["state"] != "finished" and not begun:
        return  # nothing was trained: the run starts from scratch
    written, active = split_removed(read_mapping(run_dir / "config.yaml", _CANNOT_TELL))
    removed = [
        f"`{key}={value}`: the run in {run_dir} was begun with it, and it was removed; use another run_dir"
        for key, value in active.items()
        if status["state"] != "finished" or REMOVED_KEYS[key].shapes_model
    ]
    if removed:
        raise ConfigError(removed)
    before = _flatten(written)
    now = _flatten(mask_secrets(config_keys(conf)))
    evaluates_as_it_logs = conf.training.eval_strategy == "steps" and not conf.training.eval_steps
    fixed = {_EVALUATION_FOLLOWS} if evaluates_as_it_logs else set()
    mistakes = [
        f"`{key}={now.get(key)}`: the run in {run_dir} has {before.get(key)}; use that value, or another run_dir"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and (effect_of(key, in_rounds) is Effect.COMPUTES or key in fixed)
        if key not in _SHARES
        if key in before or now[key] not in (None, [], {})  # a key that older versions lack
    ]
    steps = [math.prod(each.get(key) or 1 for key in _SHARES) for each in (before, now)]
    if steps[0] != steps[1]:
        pairs = [step * conf.training.per_device_train_batch_size for step in steps]
        mistakes.append(
            f"`training.gradient_accumulation_steps={now[_SHARES[0]]}` and `launch.processes={now[_SHARES[1]]}`: make "
            f"{pairs[1]} pairs a step, and the run in {run_dir} has {pairs[0]}; keep that, or use another run_dir"
        )
    if mistakes:
        raise ConfigError(mistakes)
    if status["state"] != "finished" and not in_rounds:  # fail on a damaged file before the slow model load
        read_object(run_dir / "environment.json", _CANNOT_TELL)
        read_metrics(run_dir)


def check_same_inputs(run_dir: Path, environment: dict[str, Any], say: Callable[[str], None]) -> None:
    """Check that a run continues with the data and the model it began with.

    Args:
        run_dir: the folder of the run's environment.json.
        environment: the present environment; see `collect_environment`.
        say: shows one line to the user; other libraries and hardware are allowed, but may round differently.

    Raises:
        ConfigError: one line for each difference.
    """
    before, now = (
        _flatten({part: each.get(part, {}) for part in ("model", "data", "packages", "hardware")})
        for each in (read_object(run_dir / "environment.json", _CANNOT_TELL), environment)
    )
    changed = {key: (before.get(key), now.get(key)) for key in sorted(before.keys() | now.keys())}
    ignored = {*_MOVABLE, *(key for key in _FILES if key not in before)}
    changed = {key: values for key, values in changed.items() if values[0] != values[1] and key not in ignored}
    mistakes = []
    for key, (old, new) in changed.items():
        if key in _FILES:
            what = f"its files have changed since {run_dir} was begun"
            mistakes.append(f"`{_FILES[key]}`: {what}; put them back, or use another run_dir")
        elif key.startswith(("model.", "data.")):
            mistakes.append(
                f"{run_dir} was begun with {key}={old}, and it is {new} now; put that back, or use another run_dir"
            )
        else:
            say(f"begun with {key}={old}, continued with {new}: the last digits of the results may differ")
    if mistakes:
        raise ConfigError(mistakes)


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix.removesuffix("."): value}
    return {key: leaf for name, item in value.items() for key, leaf in _flatten(item, f"{prefix}{name}.").items()}

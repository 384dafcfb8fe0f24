"""Strict reading of a run's files: a missing or damaged file raises one line with a remedy."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dpo_runner.config.keys import REMOVED_KEYS, split_removed
from dpo_runner.config.run_conf import RunConf
from dpo_runner.errors import ConfigError, reason_of
from dpo_runner.records.status import find_death

PUT_BACK = "put it back as the run wrote it, or use another run_dir"


@contextmanager
def reading_errors(path: Path, remedy: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn errors of the block into one line: the file, the reason, the remedy.

    Args:
        path: the file read in the block.
        remedy: the user's cure.
        kinds: error classes to catch in addition to OSError and those of JSON and YAML.

    Raises:
        ConfigError: the file is missing or unusable.
    """
    caught: tuple[type[Exception], ...] = (OSError, ValueError, RecursionError, yaml.YAMLError, *kinds)
    try:
        yield
    except FileNotFoundError:
        raise ConfigError(f"{path}: is missing; {remedy}") from None
    except caught as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        place = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        raise ConfigError(f"{place}: cannot be used: {problem or reason_of(error)}; {remedy}") from None


def read_object(path: Path, remedy: str = PUT_BACK) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        ConfigError: the file is missing or holds anything else.
    """
    with reading_errors(path, remedy):
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it holds no JSON object")
    return value


def read_mapping(path: Path, remedy: str = PUT_BACK) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        ConfigError: the file is missing or holds anything else.
    """
    with reading_errors(path, remedy):
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it holds no `key: value` lines")
    return value


def read_status(path: Path) -> dict[str, Any] | None:
    """Return status.json of a run directory, or None if it does not exist.

    Raises:
        ConfigError: the file is damaged.
    """
    file = path / "status.json"
    if not file.exists():
        return None
    remedy = (
        'write {"state": "interrupted"} into it to continue the run from its last checkpoint, '
        '{"state": "finished"} where it had ended, or use another run_dir'
    )
    status = read_object(file, remedy)
    if not isinstance(status.get("state"), str):
        raise ConfigError(f"{file}: cannot be used: it has no `state`; {remedy}")
    return status


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the log events of a run directory, without a last line cut off by a kill.

    Raises:
        ConfigError: any other line is not a log event.
    """
    file = path / "metrics.jsonl"
    if not file.exists():
        return []
    events = []
    with reading_errors(file, PUT_BACK):
        lines = file.read_bytes().split(b"\n")[:-1]
    for number, line in enumerate(lines, 1):
        with reading_errors(Path(f"{file}:{number}"), "put it back, or delete this line, whose figures are lost"):
            event = json.loads(line)
            if not isinstance(event, dict) or not isinstance(event.get("step"), int):
                raise ValueError("it is no log event")
            events.append(event)
    return events


def read_summary(path: Path) -> dict[str, Any]:
    """Return summary.json of a finished run's directory.

    Raises:
        ConfigError: the file is missing or damaged.
    """
    remedy = 'put it back, or write {"state": "interrupted"} into status.json: the same command then makes it again'
    return read_object(path / "summary.json", remedy)


def check_finished(run_dir: Path) -> None:
    """Check that a directory holds a finished run, which has a tuned model.

    Raises:
        ConfigError: the directory holds no run, or an unfinished one.
    """
    status = read_status(run_dir)
    if status is None:
        raise ConfigError(f"{run_dir}: holds no run (no status.json)")
    state = status["state"]
    if state == "running" and find_death(run_dir, status) is not None:
        raise ConfigError(f"{run_dir}: the run has died; the command that began it continues it, with this run_dir")
    if state != "finished":
        raise ConfigError(f"{run_dir}: the run is {state}, not finished; there is no tuned model yet")


def read_run_conf(run_dir: Path) -> RunConf:
    """Return a run's configuration from its config.yaml.

    Raises:
        ConfigError: the file is missing, damaged or not a run's, or it sets a removed key that loading the run's model
            requires.
    """
    path = run_dir / "config.yaml"
    with reading_errors(path, PUT_BACK, OmegaConfBaseException):
        written: Any = OmegaConf.load(path)
        active: dict[str, Any] = {}
        if isinstance(written, DictConfig):
            written, active = split_removed(cast(dict[Any, Any], OmegaConf.to_container(written)))
        refused = [
            f"{path}: `{key}={value}`: was removed, and the run's model cannot be loaded without it; use the version "
            "of dpo_runner that made the run"
            for key, value in active.items()
            if REMOVED_KEYS[key].shapes_model
        ]
        if refused:
            raise ConfigError(refused)
        conf = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConf), written))
    assert isinstance(conf, RunConf)
    return conf

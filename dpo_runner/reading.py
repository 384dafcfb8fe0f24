"""The small files of a run directory, read so that a missing or damaged one is a line a person can act on."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from dpo_runner.errors import ConfigError, reason_of

PUT_BACK = "put it back as the run wrote it, or use another run_dir"


@contextmanager
def explain_unreadable(path: Path, remedy: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn what goes wrong with a file inside into one line: the file, the reason, the remedy.

    Args:
        path: the file.
        remedy: what a person can do about it.
        kinds: of errors, beside those of disks, JSON and YAML.

    Raises:
        ConfigError: the file is missing, or cannot be used.
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
    """Return the JSON object that a file holds.

    Raises:
        ConfigError: there is no such file, or it holds anything else.
    """
    with explain_unreadable(path, remedy):
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it holds no JSON object")
    return value


def read_mapping(path: Path, remedy: str = PUT_BACK) -> dict[str, Any]:
    """Return the mapping that a YAML file holds.

    Raises:
        ConfigError: there is no such file, or it holds anything else.
    """
    with explain_unreadable(path, remedy):
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it holds no `key: value` lines")
    return value

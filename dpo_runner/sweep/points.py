"""Points of a sweep: composition, checks, names, keys without effect. Does not import torch."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_runner.config.compose import compose_point
from dpo_runner.config.keys import Effect, add_defaults, effect_of, find_no_op, ignored_keys
from dpo_runner.config.run_conf import RunConf, config_keys
from dpo_runner.config.schema import label_point
from dpo_runner.errors import ConfigError
from dpo_runner.sweep.axes import Axis, combine, read_sweep_conf

_ADDED = (
    *("drop_columns", "roles", "max_length_difference", "max_similarity"),
    *("launch", "processes", "parallelism_config", "reward", "rounds", "prompts"),
)
"""Keys that earlier versions lack."""
_JOB_NAME = re.compile(r"(\d+)-([0-9a-f]{8})")


def digest_config(conf: RunConf, ignored: frozenset[str] = frozenset()) -> str:
    """Return the sha256 of the keys that affect a configuration's results, as 64 hexadecimal digits.

    Removed keys enter with their former defaults, and keys that earlier versions lack only if they are set, so that
    sweeps of earlier versions can be continued.

    Args:
        conf: the configuration.
        ignored: further dotted keys to leave out.
    """

    def keep(value: Any, prefix: str = "") -> Any:
        if not isinstance(value, dict):
            return value
        kept = {
            key: keep(item, f"{prefix}{key}.")
            for key, item in value.items()
            if f"{prefix}{key}" not in (*ignored, "launch.timeout", "training.report_to")
        }
        return {key: item for key, item in kept.items() if item or key not in _ADDED}

    in_rounds = bool(conf.rounds)
    told = {key: value for key, value in config_keys(conf).items() if effect_of(key, in_rounds) is not Effect.PLACES}
    return hashlib.sha256(json.dumps(keep(add_defaults(told)), sort_keys=True).encode()).hexdigest()


def split_name(name: str) -> tuple[int, str] | None:
    """Return index and hash from the name of a job's directory; None for any other name."""
    match = _JOB_NAME.fullmatch(name)
    return (int(match[1]), match[2]) if match else None


def assign_names(digests: Sequence[str], existing: Mapping[str, str]) -> list[str]:
    """Return `<index>-<hash8>` for each job; existing jobs keep their names, new ones get the next indices.

    Args:
        digests: the digest of each job's configuration, all different.
        existing: names in use, with the digests of those jobs.
    """
    known = {digest: name for name, digest in existing.items()}
    taken = [split[0] for name in existing if (split := split_name(name))]
    new = iter(range(max(taken, default=-1) + 1, len(digests) + max(taken, default=-1) + 1))
    return [known.get(digest) or f"{next(new)}-{digest[:8]}" for digest in digests]


@dataclass(frozen=True)
class Point:
    """One configuration of a sweep.

    Attributes:
        overrides: the overrides that it was composed from.
        varied: the overrides that differ within the sweep.
        conf: the configuration; shared, must not be modified.
        digest: the sha256 from `digest_config`.
    """

    overrides: tuple[str, ...]
    varied: tuple[str, ...]
    conf: RunConf
    digest: str

    @property
    def label(self) -> str:
        return label_point(self.varied)

    @property
    def steps(self) -> str:
        training = self.conf.training
        epochs = training.num_train_epochs
        return str(training.max_steps) if training.max_steps > 0 else f"{epochs:g} epoch{'s' if epochs != 1 else ''}"


def build_points(axes: Sequence[Axis], config_dir: str | None) -> tuple[list[Point], int]:
    """Compose and check every point that `axes` span, and merge points that compute the same.

    Returns:
        The points in the order of execution, and the number of duplicates merged into them.

    Raises:
        ConfigError: one line for each broken rule and each axis without effect.
    """
    varied = [axis.key for axis in axes if len(axis.texts) > 1]
    texts = combine(axes, read_sweep_conf(axes, config_dir))
    mistakes: dict[str, None] = {}
    confs = []
    for point in texts:
        try:
            confs.append(compose_point(point, config_dir))
        except ConfigError as error:
            mistakes.update(dict.fromkeys(error.mistakes))
    if not mistakes:
        mistakes = dict.fromkeys(find_axis_mistakes(varied, confs))
    if mistakes:
        raise ConfigError(list(mistakes))
    at = [index for index, axis in enumerate(axes) if axis.key in varied]
    points: dict[str, Point] = {}
    for point, conf in zip(texts, confs, strict=True):
        effect = digest_config(conf, ignored_keys(conf))
        points.setdefault(effect, Point(point, tuple(point[i] for i in at), conf, digest_config(conf)))
    return list(points.values()), len(texts) - len(points)


def find_axis_mistakes(varied: Sequence[str], confs: list[RunConf]) -> list[str]:
    """Return one line for each axis without effect, and for settings that a sweep does not allow."""
    mistakes = [f"`{key}`: {reason}" for key in varied if (reason := find_no_op(key, confs))]
    if any(conf.resume == "never" for conf in confs):
        mistakes.append("`resume=never`: a sweep continues what sweep.dir holds; use a new sweep.dir instead")
    return mistakes

"""The points of a sweep: all composed and checked before anything starts. Imports no torch."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from dpo_runner.config import RunConf
from dpo_runner.config_differences import shorten_keys
from dpo_runner.errors import ConfigError
from dpo_runner.masking import mask_override
from dpo_runner.sweep.axes import Axis, combine, compose_point, read_sweep_conf
from dpo_runner.sweep.names import digest_config
from dpo_runner.sweep.no_ops import find_no_op, ignored_keys

ONLY_POINT = "the only point"
"""The label of a point that varies nothing."""

_LONG_FRACTION = re.compile(r"(?<==)\d+\.\d{6,}(e-?\d+)?(?= |$)")


@dataclass(frozen=True)
class Point:
    """One configuration of a sweep.

    Attributes:
        overrides: what it was composed from.
        varied: those of them that differ within the sweep.
        conf: the configuration; shared, not to be changed.
        digest: the sha256 of what it computes.
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


def label_point(varied: Sequence[str]) -> str:
    """Return what a point varies in short, such as `beta=0.1 r=8`; long fractions are rounded."""
    pairs = [mask_override(text).lstrip("+").partition("=") for text in varied]
    short = shorten_keys([key for key, _, _ in pairs])
    label = " ".join(f"{short[key]}={value}" for key, _, value in pairs)
    return _LONG_FRACTION.sub(lambda match: f"{float(match[0]):.4g}", label) or ONLY_POINT


def build_points(axes: Sequence[Axis], config_dir: str | None) -> tuple[list[Point], int]:
    """Compose and check every point that `axes` span, and merge those that compute the same.

    Returns:
        The points in the order in which they are to be run, and how many duplicates were merged into them.

    Raises:
        ConfigError: with one line for each rule that is broken and each axis that changes nothing.
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
    """Return one line for each axis that changes nothing, and for settings that a sweep cannot have."""
    mistakes = [f"`{key}`: {reason}" for key in varied if (reason := find_no_op(key, confs))]
    if any(conf.resume == "never" for conf in confs):
        mistakes.append("`resume=never`: a sweep continues what sweep.dir holds; use a new sweep.dir instead")
    return mistakes

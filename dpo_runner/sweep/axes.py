"""A sweep's grid: axes from overrides, paired axes, random samples of points. Does not import torch."""

import functools
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from dpo_runner.config.compose import compose_config
from dpo_runner.config.overrides import MOST_POINTS, make_exact
from dpo_runner.config.sections.sweep import SweepConf
from dpo_runner.errors import ConfigError


@dataclass(frozen=True)
class Axis:
    """One key of a command and the values it takes in turn.

    Attributes:
        key: dotted key or config group.
        texts: one override for each value, such as `training.beta=0.1`.
    """

    key: str
    texts: tuple[str, ...]


def read_axis(override: Override) -> Axis:
    """Return an override as an axis, with one override per value."""
    if not override.is_sweep_override():
        return Axis(override.key_or_group, (str(override.input_line),))
    key = str(override.input_line).partition("=")[0]
    return Axis(
        override.key_or_group, tuple(f"{key}={value}" for value in make_exact(override).sweep_string_iterator())
    )


def merge_axes(axes: Sequence[Axis]) -> list[Axis]:
    """Keep the last axis of each key at the position of the first: the command line overrides a sweep file."""
    return list({axis.key: axis for axis in axes}.values())


def defer_sections(texts: Sequence[str]) -> list[str]:
    """Turn fixed fields of `quant` and `lora` into one-value choices, which Hydra applies per point.

    Hydra first composes what all points share, and fails on `quant.X=…` with `quant=nf4,fp4`, because there is no
    `quant` yet. A choice of one value is left out of that composition and does not add an axis.
    """
    return [
        re.sub("=(.*)", lambda value: f"=choice({value[1]})", text, count=1) if _is_fixed_field(text) else text
        for text in texts
    ]


def _is_fixed_field(text: str) -> bool:
    if not re.match(r"\+*(quant|lora)\.", text):
        return False
    return not OverridesParser.create().parse_override(text).is_sweep_override()


def combine(axes: Sequence[Axis], sweep: SweepConf) -> list[tuple[str, ...]]:
    """Return the overrides of each point, in the order of execution.

    The last axis varies fastest. `sweep.sample` draws that many distinct points of the grid in random order; a larger
    sample begins with the smaller one.

    Raises:
        ConfigError: `sweep.paired` names a key without an axis, or axes of different lengths; or too many points.
    """
    groups = _group(axes, sweep)
    total = math.prod(len(group[0].texts) for group in groups)
    if min(total, sweep.sample or total) > MOST_POINTS:
        raise ConfigError(
            f"the axes span {total:,} runs, and each is checked beforehand; sweep.sample=N takes N of them, at most "
            f"{MOST_POINTS:,}"
        )
    count = total if sweep.sample is None else min(sweep.sample, total)
    chosen = range(total) if count == total and sweep.sample is None else _draw(total, count, sweep.sample_seed)
    return [_point(axes, groups, index) for index in chosen]


def read_pairings(sweep: SweepConf) -> list[list[str]]:
    """Return `sweep.paired`, which is one list of keys or a list of lists, as a list of lists."""
    if all(isinstance(item, str) for item in sweep.paired):
        return [list(sweep.paired)] if sweep.paired else []
    return [list(item) for item in sweep.paired]


def _group(axes: Sequence[Axis], sweep: SweepConf) -> list[list[Axis]]:
    varied = {axis.key: axis for axis in axes if len(axis.texts) > 1}
    mistakes: list[str] = []
    partners: dict[str, list[str]] = {}
    for keys in read_pairings(sweep):
        absent = [key for key in keys if key not in varied]
        if absent:
            mistakes.append(f"`sweep.paired`: {absent[0]} has no list of values in this sweep")
            continue
        if len({len(varied[key].texts) for key in keys}) > 1:
            lengths = ", ".join(f"{key} has {len(varied[key].texts)} values" for key in keys)
            mistakes.append(f"`sweep.paired`: axes that move together must be equally long; {lengths}")
        partners |= dict.fromkeys(keys, keys)
    if mistakes:
        raise ConfigError(mistakes)
    groups: list[list[Axis]] = []
    placed: set[str] = set()
    for axis in axes:
        if axis.key not in placed:
            keys = partners.get(axis.key, [axis.key])
            placed |= set(keys)
            groups.append([varied[key] for key in keys] if axis.key in varied else [axis])
    return groups


def _draw(total: int, count: int, seed: int) -> Iterator[int]:
    generator = random.Random(seed)
    drawn: set[int] = set()
    while len(drawn) < count:
        index = generator.randrange(total)
        if index not in drawn:
            drawn.add(index)
            yield index


def _point(axes: Sequence[Axis], groups: Sequence[Sequence[Axis]], index: int) -> tuple[str, ...]:
    texts: dict[str, str] = {}
    for group in reversed(groups):
        index, at = divmod(index, len(group[0].texts))
        texts |= {axis.key: axis.texts[at] for axis in group}
    return tuple(texts[axis.key] for axis in axes)


def read_sweep_conf(axes: Sequence[Axis], config_dir: str | None) -> SweepConf:
    """Return the sweep's settings, which are the same for all points."""
    single = [axis for axis in axes if len(axis.texts) == 1]
    texts = [axis.texts[0] for axis in single if axis.key in ("sweep", "experiment") or axis.key.startswith("sweep.")]
    return _compose_sweep(tuple(texts), config_dir)


@functools.cache
def _compose_sweep(texts: tuple[str, ...], config_dir: str | None) -> SweepConf:
    sweep = OmegaConf.to_object(compose_config(list(texts), config_dir).sweep)
    assert isinstance(sweep, SweepConf)
    return sweep

"""A search's space, read from Hydra's intervals, ranges and choices. Does not import Optuna."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from dpo_runner.config.overrides import make_exact
from dpo_runner.errors import ConfigError, suggest
from dpo_runner.io.masking import mask_override
from dpo_runner.sweep.axes import Axis, read_sweep_conf

NOTHING_TO_SEARCH = (
    "`sweep.search.sampler`: there is nothing to search; give a key several values, such as "
    "training.beta=interval(0.01,0.5)"
)
_TAGS = ("log",)


@dataclass(frozen=True)
class Dimension:
    """One key that is searched: numbers from `low` to `high`, both included, or else `choices`.

    Attributes:
        key: dotted key or config group.
        prefix: the part of its overrides before the `=`.
        choices: the values as texts.
        low: the lower end; an int if only whole numbers are allowed.
        high: the upper end, of the same type.
        step: distance between the numbers; None for a continuous range.
        log: whether to sample uniformly in the logarithm.
    """

    key: str
    prefix: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    log: bool = False

    def suggest(self, trial: Any) -> str:
        """Return the override of an Optuna trial for this key, suggested now or before."""
        if self.choices:
            return f"{self.prefix}={trial.suggest_categorical(self.key, self.choices)}"
        ask = trial.suggest_int if isinstance(self.low, int) else trial.suggest_float
        step = {} if self.step is None else {"step": self.step}
        return f"{self.prefix}={ask(self.key, self.low, self.high, log=self.log, **step)!r}"

    def ends(self) -> list[str]:
        """Return the overrides to check in advance: all choices, or both ends."""
        return [f"{self.prefix}={value}" for value in self.choices or (repr(self.low), repr(self.high))]

    def __str__(self) -> str:
        if self.choices:
            return ", ".join(self.choices)
        step = "" if self.step in (None, 1) else f" in steps of {self.step!r}"
        return f"{self.low!r} to {self.high!r}{step}{' (log)' if self.log else ''}"


@dataclass(frozen=True)
class Space:
    """A search's axes, in the order of its overrides; axes with one value are fixed."""

    axes: tuple[Axis, ...]
    dimensions: Mapping[str, Dimension]

    def suggest(self, trial: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the overrides of a trial's point, and the subset that the search has chosen."""
        chosen = {key: dimension.suggest(trial) for key, dimension in self.dimensions.items()}
        return tuple(chosen.get(axis.key, axis.texts[0]) for axis in self.axes), tuple(chosen.values())

    def corners(self) -> list[tuple[str, ...]]:
        """Return a few points that together contain each end and each choice."""
        ends = {key: dimension.ends() for key, dimension in self.dimensions.items()}
        return [
            tuple(ends[axis.key][at % len(ends[axis.key])] if axis.key in ends else axis.texts[0] for axis in self.axes)
            for at in range(max(map(len, ends.values())))
        ]

    def describe(self) -> dict[str, str]:
        return {key: str(dimension) for key, dimension in self.dimensions.items()}


def is_search(texts: Sequence[str], config_dir: str | None) -> bool:
    """Return whether a command's overrides, or the files they select, set a sampler.

    Raises:
        HydraException, OmegaConfBaseException: they do not compose.
    """
    own = [text for text in texts if re.match(r"\+*(sweep|experiment)[.=]", text)]
    axes = [Axis(text.lstrip("+").partition("=")[0], (text,)) for text in own]
    return read_sweep_conf(axes, config_dir).search.sampler is not None


def read_axis_ends(override: Override) -> Axis:
    """Return an interval as an axis of its two ends."""
    sweep, prefix = override.value(), str(override.input_line).partition("=")[0]
    return Axis(override.key_or_group, tuple(f"{prefix}={end!r}" for end in (sweep.start, sweep.end)))


def read_space(overrides: Sequence[Override], axes: Sequence[Axis]) -> Space:
    """Return the space that the overrides of a search span.

    Args:
        overrides: the parsed overrides; the last of each key counts.
        axes: the same overrides as axes, one per key.

    Raises:
        ConfigError: axes cannot be searched, one line for each; or there is nothing to search.
    """
    dimensions: dict[str, Dimension] = {}
    mistakes: list[str] = []
    last = {override.key_or_group: make_exact(override) for override in overrides}
    for axis in axes:
        override = last[axis.key]
        if not override.is_sweep_override() or len(axis.texts) < 2:
            continue
        if found := _find_mistake(override, axis):
            mistakes.append(f"`{override.input_line}`: {found}")
        elif any(mask_override(text) != text for text in axis.texts):
            mistakes.append(
                f"`{axis.key}`: holds a secret, and a search keeps what it chooses from; it cannot be searched"
            )
        else:
            dimensions[axis.key] = _read_dimension(override, axis)
    if mistakes:
        raise ConfigError(mistakes)
    if not dimensions:
        raise ConfigError(NOTHING_TO_SEARCH)
    return Space(tuple(axes), dimensions)


def _read_dimension(override: Override, axis: Axis) -> Dimension:
    sweep, prefix = override.value(), str(override.input_line).partition("=")[0]
    if isinstance(sweep, IntervalSweep):
        return Dimension(axis.key, prefix, low=sweep.start, high=sweep.end, log="log" in sweep.tags)
    if isinstance(sweep, RangeSweep):
        numbers = list(sweep.range())
        low, high = min(numbers), max(numbers)
        whole = all(isinstance(number, int) for number in numbers)
        low, high, step = (low, high, abs(sweep.step)) if whole else (float(low), float(high), abs(float(sweep.step)))
        return Dimension(axis.key, prefix, low=low, high=high, step=step, log="log" in sweep.tags)
    return Dimension(axis.key, prefix, tuple(dict.fromkeys(text.partition("=")[2] for text in axis.texts)))


def _find_mistake(override: Override, axis: Axis) -> str | None:
    sweep = override.value()
    if unknown := sorted(sweep.tags - set(_TAGS)):
        return f"no such tag: {unknown[0]}{suggest(unknown[0], _TAGS)}"
    if getattr(sweep, "shuffle", False):
        return "a search has an order of its own; leave shuffle out"
    log = "log" in sweep.tags
    if isinstance(sweep, RangeSweep):
        numbers = [float(number) for number in sweep.range()]
        if log and (sweep.step != 1 or not isinstance(sweep.start, int)):
            return "a range with log must have whole numbers and the step 1; use an interval"
    elif isinstance(sweep, IntervalSweep):
        numbers = [sweep.start, sweep.end]
        if not sweep.start < sweep.end:
            return "must begin below its end"
    else:
        return "log is of intervals and ranges; choices have no magnitude" if log else None
    return "with log it must begin above 0" if log and min(numbers) <= 0 else None

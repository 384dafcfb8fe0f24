"""Helper for tests of search spaces."""

from hydra.core.override_parser.overrides_parser import OverridesParser

from dpo_runner.sweep.axes import merge_axes, read_axis
from dpo_runner.sweep.search.space import Space, read_axis_ends, read_space


def space_of(*texts: str) -> Space:
    overrides = OverridesParser.create().parse_overrides(list(texts))
    axes = merge_axes([read_axis_ends(o) if o.is_interval_sweep() else read_axis(o) for o in overrides])
    return read_space(overrides, axes)

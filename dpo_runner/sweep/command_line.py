"""Command-line checks that report every mistake, where Hydra stops at the first.

Writes nothing and imports neither torch nor transformers, so a wrong command fails in a fraction of a second and
leaves no files.
"""

import argparse
import re
from collections.abc import Iterator, Sequence
from typing import NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.types import Glob, Override
from hydra.types import RunMode

from dpo_runner.config.compose import (
    UNCOMPOSABLE,
    compose_config,
    describe_uncomposable,
    drop_consequences,
    expand_overrides,
    try_point,
)
from dpo_runner.config.overrides import CheckedOverrides, check_overrides, values_of
from dpo_runner.config.run_conf import RunConf
from dpo_runner.config.schema import SCHEMA
from dpo_runner.config.yaml_files import ConfigFiles
from dpo_runner.errors import ConfigError, suggest
from dpo_runner.sweep.axes import Axis, combine, defer_sections, merge_axes, read_axis, read_sweep_conf
from dpo_runner.sweep.points import find_axis_mistakes
from dpo_runner.sweep.search.space import NOTHING_TO_SEARCH, is_search, read_axis_ends, read_space

_SECTIONS = [key for key, kind in SCHEMA.items() if kind is not None]
_REFUSED_FLAGS = {
    "config_path": "use --config-dir DIR to add a folder of your own config groups",
    "config_name": "use experiment=NAME, with your own file in DIR/experiment/NAME.yaml and --config-dir DIR",
    "experimental_rerun": "it runs a pickle; repeat a run with the overrides in its overrides.yaml",
}


def check_command_line(argv: list[str]) -> list[str]:
    """Check a whole command: flags, overrides, the YAML files they select, and every point of a sweep.

    Returns:
        One line per mistake; empty if the command is valid.
    """
    try:
        args = _build_parser().parse_args(argv)
    except ConfigError as error:
        return error.mistakes
    mistakes = [
        f"--{flag.replace('_', '-')}: not supported; {instead}"
        for flag, instead in _REFUSED_FLAGS.items()
        if getattr(args, flag)
    ]
    mistakes += _check_flags(args)
    if args.config_dir == "":
        return [*mistakes, "--config-dir=: must not be empty; name a folder, or leave it out"]
    if args.shell_completion:  # its arguments are Hydra's own (install=bash)
        return mistakes
    mistakes += find_override_mistakes(args.overrides, args.config_dir, multirun=args.multirun)
    return mistakes


def shows_config(argv: list[str]) -> bool:
    """Return whether a checked command only shows its configuration (`--cfg`, `--info`)."""
    args = _build_parser().parse_args(argv)
    return bool(args.cfg or args.info)


def _check_flags(args: argparse.Namespace) -> Iterator[str]:
    """Yield mistakes in flags that Hydra would answer with a traceback."""
    chosen = [name for name in ("run", "multirun", "cfg", "info", "shell_completion") if getattr(args, name)]
    if len(chosen) > 1:
        yield f"--{chosen[0].replace('_', '-')}: goes alone, not with --{chosen[1].replace('_', '-')}"
    if args.run and (sweeps := [text for text in args.overrides if re.match(r"\+?sweep=", text)]):
        yield f"--run: makes one run, and `{sweeps[0]}` is a sweep; leave one of them out"
    for flag in ("resolve", "package"):
        if getattr(args, flag) and args.cfg is None:
            yield f"--{flag}: is read by --cfg job alone; add that, or leave it out"
    if args.package and args.package not in SCHEMA:
        yield f"--package={args.package}: no such section{suggest(args.package, _SECTIONS)}"


def complete_sweep(argv: list[str]) -> list[str]:
    """Return a valid sweep command with what it may leave out: `-m` beside `sweep=NAME`, and a search's sweeper."""
    args = _build_parser().parse_args(argv)
    if not (args.run or args.multirun or args.cfg or args.info):
        argv = [*argv, "-m"]
    if not args.overrides or not is_search(args.overrides, args.config_dir):
        return argv
    at = argv.index(args.overrides[0])  # next to the overrides: argparse does not allow flags between them
    return [*argv[:at], "hydra/sweeper=optuna", *argv[at:]]


def _build_parser() -> argparse.ArgumentParser:
    """Return Hydra's argument parser, raising ConfigError on bad flags."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            if flag := re.search(r"unrecognized arguments: (--?[^\s=\d][^\s=]*)", message):
                key = flag[1].lstrip("-").replace("-", "_")
                raise ConfigError(f"{flag[1]}: no such flag; a key is set without dashes ({key}=VALUE), see --help")
            raise ConfigError(f"{message}; flags go before or after all KEY=VALUE, see --help")

    parser: argparse.ArgumentParser = get_args_parser()
    parser.__class__ = Parser
    return parser


def find_override_mistakes(overrides: list[str], config_dir: str | None = None, multirun: bool = False) -> list[str]:
    """Return one line per mistake in `overrides`, in the files they select, and in the points they span."""
    checked = check_overrides(overrides, config_dir)
    if not checked.composable:
        return checked.mistakes
    if mistake := _find_sweep_mistakes(checked, config_dir, multirun):
        return [*checked.mistakes, mistake]
    broken, uncomposable = _find_point_mistakes(checked.sound, checked.files, config_dir)
    # A wrong override can keep the whole from composing; its own line already says why.
    mistakes = checked.mistakes + drop_consequences(broken, checked.mistakes)
    mistakes += [] if checked.mistakes else uncomposable
    keys = [override.key_or_group for override in checked.sound]
    of_sweep = multirun or "sweep" in checked.choices
    if mistakes or not (of_sweep or len(set(keys)) < len(keys)):
        return mistakes
    # Hydra itself composes what is none of the points: what they share, and all values of a key that is set twice.
    texts = expand_overrides(overrides)
    try:
        compose_config(defer_sections(texts) if of_sweep else texts, config_dir, RunMode.MULTIRUN)
    except ConfigError as error:
        return error.mistakes
    except UNCOMPOSABLE as error:
        return [describe_uncomposable(error, overrides)]
    return []


def _find_sweep_mistakes(checked: CheckedOverrides, config_dir: str | None, multirun: bool) -> str | None:
    """Return why the overrides together are neither a single run nor a sweep; None if they are."""
    intervals = checked.find_interval_mistakes()
    if intervals and not _is_search(checked.sound, config_dir):
        return intervals[0]
    several, of_sweep = checked.of_sweep()
    if (several or multirun) and any(override.key_or_group == "run_dir" for override in checked.sound):
        return "`run_dir`: names one run's directory; for a sweep set sweep.dir"
    if not multirun and (alone := checked.find_single_run_mistakes()):
        return alone[0]
    if both := [key for key in several if key in of_sweep or key.startswith("hydra")]:
        return f"`{both[0]}`: is the same for all runs of a sweep; give it one value"
    return None


def _describe_empty(override: Override, files: ConfigFiles) -> str:
    if not isinstance(override.value(), Glob):
        return f"`{override.input_line}`: has no values; a range is (START,STOP,STEP), and leaves STOP out"
    key = override.key_or_group
    options = files.options(key)
    known = f"the options of {key}: {', '.join(options)}" if options else "its options: only groups have some"
    return f"`{key}=glob(…)`: matches none of {known}"


def _find_point_mistakes(
    overrides: list[Override], files: ConfigFiles, config_dir: str | None
) -> tuple[list[str], list[str]]:
    """Compose each point of the valid overrides; return the rules broken, and why points do not compose."""
    read = [_read_axis(override, files) for override in overrides]
    if empty := [override for override, axis in zip(overrides, read, strict=True) if not axis.texts]:
        return [_describe_empty(override, files) for override in empty], []
    axes = merge_axes(read)
    broken: dict[str, None] = {}
    uncomposable: dict[str, None] = {}
    alone = not any(override.is_sweep_override() for override in overrides)
    points: Sequence[tuple[str, ...]] = [tuple(axis.texts[0] for axis in axes)]
    try:
        if not alone:
            sweep = read_sweep_conf(axes, config_dir)
            search = sweep.search.sampler is not None
            points = read_space(overrides, axes).corners() if search else combine(axes, sweep)
    except ConfigError as error:
        return error.mistakes, []
    except UNCOMPOSABLE as error:
        return [], [describe_uncomposable(error, points[0])]
    confs: list[RunConf] = []
    for point in points:
        conf, rules, reasons = try_point(point, config_dir)
        broken.update(dict.fromkeys(rules))
        uncomposable.update(dict.fromkeys(reasons))
        confs += [conf] if conf is not None else []
    if alone and confs and confs[0].sweep.search.sampler is not None:
        uncomposable[NOTHING_TO_SEARCH] = None
    if len(confs) == len(points) > 1:
        varied = [axis.key for axis in axes if len(axis.texts) > 1]
        broken.update(dict.fromkeys(find_axis_mistakes(varied, confs)))
    return list(broken), list(uncomposable)


def _is_search(overrides: Sequence[Override], config_dir: str | None) -> bool:
    try:
        return is_search([str(override.input_line) for override in overrides], config_dir)
    except (ConfigError, *UNCOMPOSABLE):
        return True  # does not compose either way; the check of the points reports why


def _read_axis(override: Override, files: ConfigFiles) -> Axis:
    if override.is_interval_sweep():
        return read_axis_ends(override)
    if not isinstance(override.value(), Glob):
        return read_axis(override)
    return Axis(override.key_or_group, tuple(f"{override.key_or_group}={name}" for name in values_of(override, files)))

"""The check of a command line, which finds every mistake before Hydra stops at the first.

Nothing is written and neither torch nor transformers is imported here, so a wrong command costs a
fraction of a second and leaves nothing behind.
"""

import argparse
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dpo_runner.config_checks import suggest
from dpo_runner.config_files import ConfigFiles
from dpo_runner.config_schema import SCHEMA, find_value_mistakes
from dpo_runner.errors import ConfigError, reason_of
from dpo_runner.hydra_rules import UnsafeConfigError, check_hydra_override
from dpo_runner.removed_keys import explain_removed
from dpo_runner.sweep.axes import MOST_POINTS, Axis, combine, compose_point, merge_axes, read_axis, read_sweep_conf
from dpo_runner.sweep.points import find_axis_mistakes
from dpo_runner.sweep.space import NOTHING_TO_SEARCH, is_search, read_axis_ends, read_space

_SECTIONS = [key for key, kind in SCHEMA.items() if kind is not None]
_LONGEST_OVERRIDE = 20_000  # Hydra takes a second for each such
_QUOTES = """; a value with special characters goes in quotes ('KEY="VALUE"')"""
_REFUSED_FLAGS = {
    "config_path": "use --config-dir DIR to add a folder of your own config groups",
    "config_name": "use experiment=NAME, with your own file in DIR/experiment/NAME.yaml and --config-dir DIR",
    "experimental_rerun": "it runs a pickle; repeat a run with the overrides in its overrides.yaml",
}

_UNCOMPOSABLE = (
    *(HydraException, OmegaConfBaseException, YAMLError, TypeError, ValueError, AssertionError),
    *(ArithmeticError, RecursionError),
)


def check_command_line(argv: list[str]) -> list[str]:
    """Check a whole command: flags, overrides, the YAML files they select, and every point of a sweep.

    Returns:
        One line for each mistake; empty where the command is sound.
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
    mistakes += find_override_mistakes(args.overrides, args.config_dir, multirun=args.multirun)
    return mistakes


def _check_flags(args: argparse.Namespace) -> Iterator[str]:
    """Yield what Hydra would end with a traceback for."""
    chosen = [name for name in ("run", "multirun", "cfg", "info", "shell_completion") if getattr(args, name)]
    if len(chosen) > 1:
        yield f"--{chosen[0].replace('_', '-')}: goes alone, not with --{chosen[1].replace('_', '-')}"
    for flag in ("resolve", "package"):
        if getattr(args, flag) and args.cfg is None:
            yield f"--{flag}: is read by --cfg job alone; add that, or leave it out"
    if args.package and args.package not in SCHEMA:
        yield f"--package={args.package}: no such section; {suggest(args.package, _SECTIONS)}"


def choose_sweeper(argv: list[str]) -> list[str]:
    """Return a sound command of a sweep, with Hydra's sweeper `optuna` in it where it is a search."""
    args = _build_parser().parse_args(argv)
    if not args.overrides or not is_search(args.overrides, args.config_dir):
        return argv
    at = argv.index(args.overrides[0])  # among the overrides, since they and flags must not be mixed
    return [*argv[:at], "hydra/sweeper=optuna", *argv[at:]]


def _build_parser() -> argparse.ArgumentParser:
    """Return Hydra's parser of flags, with its complaints in our form."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ConfigError(f"{message}; flags go before or after all KEY=VALUE, see --help")

    parser: argparse.ArgumentParser = get_args_parser()
    parser.__class__ = Parser
    return parser


def find_override_mistakes(overrides: list[str], config_dir: str | None = None, multirun: bool = False) -> list[str]:
    """Return one line for each mistake in `overrides` and in the files that they select."""
    try:
        files = ConfigFiles.over(config_dir)
        groups = files.groups()
    except OSError as error:
        return [f"--config-dir={config_dir}: {error.strerror}; name a folder"]
    except ValueError as error:
        return [f"--config-dir={config_dir}: {error}"]
    hidden = files.find_hidden_files()
    mistakes: list[str] = [*hidden]
    sound: list[Override] = []
    choices: dict[str, list[str]] = {}
    for text in overrides:
        lines, override = _check_override(text, files, groups)
        mistakes += [line for line in lines if line not in mistakes]
        if override is not None and not lines:
            sound.append(override)
            if override.key_or_group in groups:
                choices[override.key_or_group] = [str(value) for value in _values(override, files) if value is not None]
    of_file: list[Override] = []
    for text in [line for option in choices.get("sweep", []) for line in files.load_sweep_axes(option)]:
        lines, override = _check_override(text, files, groups)
        mistakes += lines
        if override is not None and not lines:
            of_file.append(override)
    sound = [*of_file, *sound]  # the command line outdoes the file
    of_files = files.find_file_mistakes(choices)
    mistakes += of_files
    if hidden or of_files:
        return mistakes  # such files are not to be composed: some would take all memory, some would run code
    intervals = [override for override in sound if override.is_interval_sweep()]
    if intervals and not _is_search(sound, config_dir):
        return [
            *mistakes,
            f"`{intervals[0].input_line}`: an interval has no values to run one by one; use choice(…) or range(…), or "
            "search it (sweep.search.sampler=tpe or random)",
        ]
    sweeps = [override.key_or_group for override in sound if override.is_sweep_override()]
    if (sweeps or multirun) and any(override.key_or_group == "run_dir" for override in sound):
        return [*mistakes, "`run_dir`: names one run's directory; for a sweep set sweep.dir"]
    if sweeps and not multirun and "sweep" not in choices:
        return [*mistakes, f"`{sweeps[0]}`: several values are a sweep; add -m"]
    of_sweep = [override.key_or_group for override in sound if re.match(r"sweep(\.|$)", override.key_or_group)]
    if of_sweep and not sweeps and not multirun and "sweep" not in choices:
        return [*mistakes, f"`{of_sweep[0]}`: is of a sweep, which takes -m or sweep=NAME"]
    if both := [key for key in of_sweep if key in sweeps]:
        return [*mistakes, f"`{both[0]}`: is the same for all runs of a sweep; give it one value"]
    broken, uncomposable = _find_point_mistakes(sound, files, config_dir)
    # Where an override is wrong the whole may not compose, and the override's own line says why.
    return mistakes + broken + ([] if mistakes else uncomposable)


def _check_override(text: str, files: ConfigFiles, groups: list[str]) -> tuple[list[str], Override | None]:
    if text.startswith("-"):
        return [f"`{text}`: no such option; see --help"], None
    if len(text) > _LONGEST_OVERRIDE:
        return [
            f"`{text[:40]}…`: has {len(text):,} characters; put it into a file (experiment=NAME, --config-dir)"
        ], None
    try:
        override = OverridesParser.create().parse_override(text)
    except (HydraException, ValueError, ArithmeticError, RecursionError) as error:
        return [f"`{text}`: not a KEY=VALUE override; {_first_line(error)}{_QUOTES if '=' in text else ''}"], None
    key = override.key_or_group
    if (removed := explain_removed(key)) is not None:
        return [removed], None
    if override.is_delete():
        instead = f"use {key}=none" if key in ("lora", "quant") else f"set it to another value ({key}=VALUE)"
        return [f"`{text}`: nothing can be deleted; {instead}"], None
    if key.split(".")[0].split("/")[0] == "hydra":
        return check_hydra_override(text, override), override
    if override.package is not None:
        return [f"`{text}`: packages (@) are not supported; use {key}=OPTION"], None
    known = key in groups or key in SCHEMA
    if override.is_add() and not override.is_force_add() and known:
        return [f"`{text}`: `{key}` exists already; drop the +"], None
    if not (count := _count_values(override)) <= MOST_POINTS:
        return [f"`{text}`: has {count:,} values; an axis has at most {MOST_POINTS:,}"], None
    check = files.find_option_mistakes if key in groups else find_value_mistakes
    lines = [line for value in _values(override, files) for line in check(key, value)]
    if override.is_interval_sweep() and any("must be a whole number" in line for line in lines):
        return [f"`{text}`: must be whole numbers; write int({text.partition('=')[2]})"], override
    return list(dict.fromkeys(lines)), override


def _count_values(override: Override) -> float:
    """Return how many values a range has; other sweeps have no more than their texts have characters.

    Returns:
        NaN or an infinity where its ends or its step are that, or its step is 0.
    """
    sweep = override.value()
    if not isinstance(sweep, RangeSweep) or sweep.start is None or sweep.stop is None:
        return 0
    count = (sweep.stop - sweep.start) / sweep.step if sweep.step else math.nan
    return math.ceil(count) if math.isfinite(count) else count


def _values(override: Override, files: ConfigFiles) -> Iterator[Any]:
    """Yield an override's value, or all those of a sweep; of an interval its ends."""
    if not override.is_sweep_override():
        yield _unquoted(override.value())
    elif isinstance(glob := override.value(), Glob):
        yield from glob.filter(files.options(override.key_or_group))
    elif isinstance(sweep := override.value(), IntervalSweep):
        yield from (sweep.start, sweep.end)
    else:
        yield from map(_unquoted, override.sweep_iterator())


def _unquoted(value: Any) -> Any:
    if isinstance(value, dict):
        return {_unquoted(key): _unquoted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_unquoted(item) for item in value]
    text = getattr(value, "text", None)  # hydra's QuotedString
    return value if text is None else text


def _describe_options(key: str, files: ConfigFiles) -> str:
    options = files.options(key)
    return f"the options of {key}: {', '.join(options)}" if options else "its options: only groups have some"


def _find_point_mistakes(
    overrides: list[Override], files: ConfigFiles, config_dir: str | None
) -> tuple[list[str], list[str]]:
    """Compose each point that the sound overrides span; return the rules broken, and why points do not compose."""
    axes = merge_axes([_read_axis(override, files) for override in overrides])
    if empty := [axis.key for axis in axes if not axis.texts]:
        return [f"`{key}=glob(…)`: matches none of {_describe_options(key, files)}" for key in empty], []
    broken: dict[str, None] = {}
    uncomposable: dict[str, None] = {}
    alone = not any(override.is_sweep_override() for override in overrides)
    points: Sequence[tuple[str, ...]] = [tuple(axis.texts[0] for axis in axes)]
    try:
        if not alone:
            sweep = read_sweep_conf(axes, config_dir)
            search = sweep.search.sampler is not None
            points = read_space(overrides, axes).corners() if search else combine(axes, sweep)
    except UnsafeConfigError as error:
        return [], error.mistakes
    except ConfigError as error:
        return error.mistakes, []
    except _UNCOMPOSABLE as error:
        return [], [_explain(error, points[0])]
    confs = []
    for point in points:
        try:
            confs.append(compose_point(point, config_dir))
        except UnsafeConfigError as error:
            uncomposable.update(dict.fromkeys(error.mistakes))
        except ConfigError as error:
            broken.update(dict.fromkeys(error.mistakes))
        except _UNCOMPOSABLE as error:
            uncomposable[_explain(error, point)] = None
    if alone and confs and confs[0].sweep.search.sampler is not None:
        uncomposable[NOTHING_TO_SEARCH] = None
    if len(confs) == len(points) > 1:
        varied = [axis.key for axis in axes if len(axis.texts) > 1]
        broken.update(dict.fromkeys(find_axis_mistakes(varied, confs)))
    return list(broken), list(uncomposable)


def _is_search(overrides: Sequence[Override], config_dir: str | None) -> bool:
    try:
        return is_search([str(override.input_line) for override in overrides], config_dir)
    except _UNCOMPOSABLE:
        return True  # it does not compose either way, and the check of the points says why


def _read_axis(override: Override, files: ConfigFiles) -> Axis:
    if override.is_interval_sweep():
        return read_axis_ends(override)
    if not isinstance(override.value(), Glob):
        return read_axis(override)
    return Axis(override.key_or_group, tuple(f"{override.key_or_group}={name}" for name in _values(override, files)))


def _explain(error: Exception, point: Sequence[str]) -> str:
    """Say why a point does not compose; for a launcher, or a field of a section that is null, in our own words."""
    for text in point:
        if text.startswith("hydra/launcher=") and "hydra/launcher" in str(error):
            return f"`{text}`: is no installed launcher; choose from basic, workers, or install its package"
        section = re.match(r"\+*(quant|lora)\.", text)
        if section and not any(re.match(rf"\+*{section[1]}=", other) for other in point):
            return f"`{text}`: {section[1]} is none here; choose an option of the group too ({section[1]}=OPTION)"
    return _first_line(error)


def _first_line(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply, or something that leads back to itself"
    key = getattr(error, "full_key", None)
    return f"`{key}`: {reason_of(error)}" if key else reason_of(error)

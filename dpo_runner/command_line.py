"""The command line: its help, and the check that finds every mistake before Hydra stops at the first.

Nothing is written and neither torch nor transformers is imported here, so a wrong command costs a
fraction of a second and leaves nothing behind.
"""

import argparse
import re
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dpo_runner import __version__
from dpo_runner.config_files import SCHEMA, ConfigFiles, find_value_mistakes
from dpo_runner.errors import ConfigError
from dpo_runner.sweep.axes import Axis, combine, compose_point, merge_axes, read_axis, read_sweep_conf
from dpo_runner.sweep.points import find_axis_mistakes
from dpo_runner.sweep.space import NOTHING_TO_SEARCH, is_search, read_axis_ends, read_space

# What of Hydra's own configuration a command may change. The rest can run code or write elsewhere.
_HYDRA_KEYS = ("hydra.mode", "hydra.verbose", "hydra/launcher")
_HYDRA_PREFIXES = ("hydra.launcher.",)
_REFUSED_FLAGS = {
    "config_path": "use --config-dir DIR to add a folder of your own config groups",
    "config_name": "use experiment=NAME, with your own file in DIR/experiment/NAME.yaml and --config-dir DIR",
    "experimental_rerun": "it runs a pickle; repeat a run with the overrides in its overrides.yaml",
}

_UNCOMPOSABLE = (HydraException, OmegaConfBaseException, YAMLError, TypeError, ValueError, AssertionError)


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
    mistakes += find_override_mistakes(args.overrides, args.config_dir, multirun=args.multirun)
    return mistakes


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
        return [f"--config-dir={config_dir}: {error.strerror}"]
    mistakes: list[str] = files.find_hidden_files()
    sound: list[Override] = []
    choices: dict[str, list[str]] = {}
    for text in overrides:
        lines, override = _check_override(text, files, groups)
        mistakes += lines
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
    mistakes += files.find_file_mistakes(choices)
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
    # Where a file is wrong the whole does not compose, and the file's own line says why.
    return mistakes + broken + ([] if mistakes else uncomposable)


def _check_override(text: str, files: ConfigFiles, groups: list[str]) -> tuple[list[str], Override | None]:
    if text.startswith("-"):
        return [f"`{text}`: no such option; see --help"], None
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        return [f"`{text}`: not a KEY=VALUE override; {_first_line(error)}"], None
    key = override.key_or_group
    if override.is_delete():
        instead = f"use {key}=none" if key in ("lora", "quant") else f"set it to another value ({key}=VALUE)"
        return [f"`{text}`: nothing can be deleted; {instead}"], None
    if key.split(".")[0].split("/")[0] == "hydra":
        return _check_hydra_override(text, key, override), override
    if override.package is not None:
        return [f"`{text}`: packages (@) are not supported; use {key}=OPTION"], None
    known = key in groups or key in SCHEMA
    if override.is_add() and not override.is_force_add() and known:
        return [f"`{text}`: `{key}` exists already; drop the +"], None
    check = files.find_option_mistakes if key in groups else find_value_mistakes
    lines = [line for value in _values(override, files) for line in check(key, value)]
    if override.is_interval_sweep() and any("must be a whole number" in line for line in lines):
        return [f"`{text}`: must be whole numbers; write int({text.partition('=')[2]})"], override
    return list(dict.fromkeys(lines)), override


def _check_hydra_override(text: str, key: str, override: Override) -> list[str]:
    allowed = key in _HYDRA_KEYS or key.startswith(_HYDRA_PREFIXES)
    if allowed and "_target_" not in text:
        return []
    instead = {
        "hydra.run.dir": "use run_dir=PATH",
        "hydra.sweep.dir": "use sweep.dir=PATH",
        "hydra.searchpath": "use --config-dir DIR",
    }.get(key, "these may be changed: " + ", ".join((*_HYDRA_KEYS, *(f"{p}*" for p in _HYDRA_PREFIXES))))
    return [f"`{text}`: not allowed, it could run code or write elsewhere; {instead}"]


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


def _find_point_mistakes(
    overrides: list[Override], files: ConfigFiles, config_dir: str | None
) -> tuple[list[str], list[str]]:
    """Compose each point that the sound overrides span; return the rules broken, and why points do not compose."""
    axes = merge_axes([_read_axis(override, files) for override in overrides])
    broken: dict[str, None] = {}
    uncomposable: dict[str, None] = {}
    try:
        sweep = read_sweep_conf(axes, config_dir)
        if sweep.search.sampler is not None and not any(override.is_sweep_override() for override in overrides):
            return [], [NOTHING_TO_SEARCH]
        points = combine(axes, sweep) if sweep.search.sampler is None else read_space(overrides, axes).corners()
    except ConfigError as error:
        return error.mistakes, []
    except _UNCOMPOSABLE as error:
        return [], [_explain(error, [axis.texts[0] for axis in axes])]
    confs = []
    for point in points:
        try:
            confs.append(compose_point(point, config_dir))
        except ConfigError as error:
            broken.update(dict.fromkeys(error.mistakes))
        except _UNCOMPOSABLE as error:
            uncomposable[_explain(error, point)] = None
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
    """Say why a point does not compose; Hydra's own words fail for a field of a section that is null."""
    for text in point:
        section = re.match(r"\+*(quant|lora)\.", text)
        if section and not any(re.match(rf"\+*{section[1]}=", other) for other in point):
            return f"`{text}`: {section[1]} is none here; choose an option of the group too ({section[1]}=OPTION)"
    return _first_line(error)


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def build_help() -> str:
    """Return the text of `--help`: what there is to choose, and examples to copy."""
    files = ConfigFiles.over(None)
    groups = "\n".join(f"  {group:<12}{'  '.join(files.options(group))}" for group in files.groups())
    fields = "\n".join(
        f"  {section:<12}{', '.join(_field_names(section))}" for section, kind in SCHEMA.items() if kind is not None
    )
    alone = ", ".join(key for key, kind in SCHEMA.items() if "." not in key and kind is None)
    return f"""\
dpo_runner {__version__}: Direct Preference Optimization from a YAML configuration.

Usage: python -m dpo_runner [GROUP=OPTION ...] [KEY=VALUE ...] [-m] [--config-dir DIR]

Without arguments it tunes the default model on the bundled data, offline, and prints a before and after.

Groups (GROUP=OPTION chooses a file of conf/GROUP/):
{groups}

Keys (KEY=VALUE sets one field):
{fields}
  {"":<12}{alone}

Options:
  -m, --multirun      run every combination of comma-separated values
  --cfg job           print the composed configuration and stop
  --config-dir DIR    look for GROUP/OPTION.yaml in DIR first
  --version, --help

Examples:
  python -m dpo_runner
  python -m dpo_runner model=tiny_random training=smoke
  python -m dpo_runner data=local_file data.path=pairs.jsonl training.beta=0.2
  python -m dpo_runner model=mistral quant=nf4
  python -m dpo_runner model.adapter=PATH_OR_HUB_ID
  python -m dpo_runner -m training.beta=0.05,0.1,0.3
  python -m dpo_runner run_dir=outputs/mine          # the same command continues what was interrupted
  python -m dpo_runner dry_run=true                  # the plan, and whether it will fit
  python -m dpo_runner.preview data=local_file data.path=pairs.jsonl   # what it would be trained on
  python -m dpo_runner.chat outputs/mine             # talk with the result
  python -m dpo_runner.compare outputs/sweeps        # runs side by side, the best one marked
  python -m dpo_runner.workspace outputs/sweeps/mine # a view of a sweep in Weights & Biases
  python -m dpo_runner.evaluate outputs/mine         # its evaluation against the model it started from
  python -m dpo_runner.export outputs/mine --out outputs/merged        # one folder to serve or publish
  python -m dpo_runner.cache                         # what is kept between runs, and how to clear it
"""


def _field_names(section: str) -> list[str]:
    names = [key.rpartition(".")[2] for key in SCHEMA if key.rpartition(".")[0] == section]
    if len(names) > 30:
        return ["every field of TRL's DPOConfig, such as beta, loss_type, learning_rate, max_length, max_steps"]
    return names

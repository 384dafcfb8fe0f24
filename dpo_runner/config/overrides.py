"""The check of a command's overrides, one by one, and of the files that they select. Imports no torch."""

import math
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException

from dpo_runner.config.hydra_rules import find_key_mistakes
from dpo_runner.config.keys import find_removed
from dpo_runner.config.schema import SCHEMA, find_value_mistakes, schema_key
from dpo_runner.config.yaml_files import ConfigFiles
from dpo_runner.errors import reason_of

MOST_POINTS = 10_000
"""Of a sweep, and values of one axis; composing a point takes a tenth of a second."""

_LONGEST_OVERRIDE = 20_000  # Hydra takes a second for each such
_QUOTES = """; a value with special characters goes in quotes ('KEY="VALUE"')"""


@dataclass
class CheckedOverrides:
    """What the check of a command's overrides has found.

    Attributes:
        mistakes: one line for each.
        sound: the overrides without a mistake, those of a sweep file first.
        choices: the options that they select in each config group.
        files: the folders of YAML files.
        composable: whether the files may be composed; some others would take all memory or run code.
    """

    mistakes: list[str]
    sound: list[Override] = field(default_factory=list)
    choices: dict[str, list[str]] = field(default_factory=dict)
    files: ConfigFiles = field(default_factory=lambda: ConfigFiles(()))
    composable: bool = True

    def of_sweep(self) -> tuple[list[str], list[str]]:
        """Return the keys that have several values, and the keys of the section `sweep`."""
        keys = [str(override.key_or_group) for override in self.sound]
        several = [str(override.key_or_group) for override in self.sound if override.is_sweep_override()]
        return several, [key for key in keys if key == "sweep" or key.startswith("sweep.")]

    def find_interval_mistakes(self) -> list[str]:
        """Return a line for the first interval, which only a search can take."""
        return [
            f"`{override.input_line}`: an interval has no values to run one by one; use choice(…) or range(…), or "
            "search it (sweep.search.sampler=tpe or random)"
            for override in self.sound
            if override.is_interval_sweep()
        ][:1]

    def find_single_run_mistakes(self) -> list[str]:
        """Return what is wrong with the overrides of one run, which no sweep file and no -m makes a sweep."""
        several, of_sweep = self.of_sweep()
        if not of_sweep and (mistakes := self.find_interval_mistakes()):
            return mistakes
        if several and any(override.key_or_group == "run_dir" for override in self.sound):
            return ["`run_dir`: names one run's directory; for a sweep set sweep.dir"]
        if several and "sweep" not in self.choices:
            return [
                f"`{several[0]}`: several values are a sweep; add -m, or write one list [a,b] or one text '\"a,b\"'"
            ]
        if of_sweep and not several and "sweep" not in self.choices:
            return [f"`{of_sweep[0]}`: is of a sweep, which takes -m or sweep=NAME"]
        return []


def check_overrides(overrides: Sequence[str], config_dir: str | None = None) -> CheckedOverrides:
    """Check overrides one by one, and every YAML file that they select."""
    try:
        files = ConfigFiles.over(config_dir)
        groups = files.groups()
    except OSError as error:
        return CheckedOverrides([f"--config-dir={config_dir}: {error.strerror}; name a folder"], composable=False)
    except ValueError as error:
        return CheckedOverrides([f"--config-dir={config_dir}: {error}"], composable=False)
    hidden = files.find_hidden_files()
    checked = CheckedOverrides([*hidden], files=files)
    checked.sound = _find_sound(overrides, groups, checked)
    for override in checked.sound:
        if override.key_or_group in groups:
            values = [str(value) for value in values_of(override, files) if value is not None]
            checked.choices[override.key_or_group] = values
    axes = [line for option in checked.choices.get("sweep", []) for line in files.load_sweep_axes(option)]
    checked.sound = [*_find_sound(axes, groups, checked), *checked.sound]  # the command line outdoes the file
    of_files = files.find_file_mistakes(checked.choices)
    checked.mistakes += of_files
    checked.composable = not (hidden or of_files)
    return checked


def _find_sound(texts: Sequence[str], groups: list[str], checked: CheckedOverrides) -> list[Override]:
    """Return the overrides that have no mistake; add the others' lines to `checked`."""
    sound = []
    for text in texts:
        lines, override = _check_override(text, checked.files, groups)
        checked.mistakes += [line for line in lines if line not in checked.mistakes]
        if override is not None and not lines:
            sound.append(override)
    return sound


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
        why = f"{first_line(error)}{_QUOTES}" if "=" in text else "see --help"
        return [f"`{text}`: not a KEY=VALUE override; {why}"], None
    key = override.key_or_group
    if (removed := find_removed(key)) is not None:
        return [removed], None
    of_hydra = re.match(r"hydra(?![^./])", key)
    if of_hydra and (forbidden := find_key_mistakes(text, key)):
        return forbidden, None
    if override.is_delete():
        instead = f"use {key}=none" if key in ("lora", "quant") else f"set it to another value ({key}=VALUE)"
        return [f"`{text}`: nothing can be deleted; {instead}"], None
    if override.package is not None:
        return [f"`{text}`: packages (@) are not supported; use {key}=OPTION"], None
    if (override.is_add() and key in SCHEMA) or (re.match(r"\+", text) and key in groups):
        return [f"`{text}`: `{key}` exists already; drop the {'++' if override.is_force_add() else '+'}"], None
    if not (count := _count_values(override)) <= MOST_POINTS:
        return [f"`{text}`: has {count:,} values; an axis has at most {MOST_POINTS:,}"], None
    if of_hydra:
        return [], override
    parts, depth = key.split("."), schema_key(key).count(".")
    if depth < len(parts) - 1:  # an entry of a map, which Hydra would split at its dots
        section, name = ".".join(parts[:depth]), ".".join(parts[depth:])
        return [f"`{text}`: a name with dots is written as a map: '{section}={{{name}: VALUE}}'"], None
    check = files.find_option_mistakes if key in groups else find_value_mistakes
    lines = [line for value in values_of(override, files) for line in check(key, value)]
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


def values_of(override: Override, files: ConfigFiles) -> Iterator[Any]:
    """Yield an override's value, or all those of a sweep; of an interval its ends."""
    if not override.is_sweep_override():
        yield _unquoted(override.value())
    elif isinstance(glob := override.value(), Glob):
        yield from glob.filter(files.options(override.key_or_group))
    elif isinstance(sweep := override.value(), IntervalSweep):
        yield from (sweep.start, sweep.end)
    else:
        yield from map(_unquoted, make_exact(override).sweep_iterator())


def make_exact(override: Override) -> Override:
    """Turn the fractions of a range into decimals, in place: Hydra's sums of binary fractions may include its end."""
    if isinstance(sweep := override.value(), RangeSweep):
        for name in ("start", "stop", "step"):
            if not isinstance(number := getattr(sweep, name), int):
                setattr(sweep, name, Decimal(str(number)))
    return override


def _unquoted(value: Any) -> Any:
    if isinstance(value, dict):
        return {_unquoted(key): _unquoted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_unquoted(item) for item in value]
    text = getattr(value, "text", None)  # hydra's QuotedString
    return value if text is None else text


def write_override(key: str, value: object) -> str:
    """Return `key=value` as one word of a shell, with quotes for Hydra where its grammar needs them."""
    text = str(value)
    if re.fullmatch(r"[A-Za-z0-9_./~-]+", text):
        return f"{key}={text}"
    quoted = text.replace('"', '\\"')
    return shlex.quote(f'{key}="{quoted}"')


def first_line(error: Exception) -> str:
    """Return the first line of why something does not compose, with its key where there is one."""
    if isinstance(error, RecursionError):
        return "nested too deeply, or something that leads back to itself"
    if isinstance(error, HydraException):
        error = HydraException(str(error).replace("composing config:\n", "composing config: "))
    key = getattr(error, "full_key", None)
    return f"`{key}`: {reason_of(error)}" if key else reason_of(error)

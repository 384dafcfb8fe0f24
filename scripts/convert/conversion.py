"""Conversion of another project's DPO configuration to overrides, with a line for each key without counterpart."""

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dpo_runner.config.rules.training import OTHER_FIELDS, OWNED_FIELDS
from dpo_runner.config.schema import SCHEMA
from dpo_runner.errors import ConfigError, reason_of, suggest
from scripts.convert.axolotl import AXOLOTL
from scripts.convert.llamafactory import LLAMA_FACTORY
from scripts.convert.rules import COMMON, Overrides, Project, Rule, same
from scripts.convert.trl import HANDBOOK, TRL

PROJECTS = {"axolotl": AXOLOTL, "llamafactory": LLAMA_FACTORY, "trl": TRL, "handbook": HANDBOOK}
_SIGNS = {
    "axolotl": {"base_model", "micro_batch_size", "rl"},
    "llamafactory": {"stage", "finetuning_type", "pref_beta", "pref_loss"},
    "handbook": {"dataset_mixer", "dataset_mixture", "dataset_splits"},
}


@dataclass(frozen=True)
class Converted:
    """The counterpart of a file.

    Attributes:
        overrides: values by key or group.
        notes: one line for each key without counterpart, or with one that differs.
    """

    overrides: Overrides
    notes: list[str]

    @property
    def words(self) -> list[str]:
        """The overrides as on the command line, groups first."""
        ordered = sorted(self.overrides, key=lambda key: "." in key)
        return [f"{key}={write_value(self.overrides[key])}" for key in ordered]


def read_file(path: Path) -> dict[str, Any]:
    """Read a YAML or JSON file.

    Raises:
        ConfigError: it cannot be read, or holds no mapping.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read; {reason_of(error)}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: holds no mapping of keys to values")
    return {str(key): value for key, value in found.items()}


def recognise(config: dict[str, Any]) -> Project:
    """Return the project whose keys a configuration has; TRL's keys are those that the others share."""
    return next((PROJECTS[name] for name, signs in _SIGNS.items() if signs & config.keys()), TRL)


def convert(config: dict[str, Any], project: Project) -> Converted:
    """Convert a configuration, with the project's defaults where ours differ.

    Raises:
        ConfigError: it is none of DPO.
    """
    given = {project.spellings.get(key, key): _read_number(value) for key, value in config.items() if value is not None}
    if reason := project.refuse(given):
        raise ConfigError(reason)
    whole = project.defaults | given
    overrides: Overrides = {}
    notes = []
    for key in (*(key for key in project.defaults if key not in given), *given):
        rule, value = find_rule(key, project), whole[key]
        shown = textwrap.shorten(f"{key}: {value}", 60)
        if not rule.ours and value not in rule.idle:
            notes.append(f"{shown}: has no counterpart; {rule.note}")
        elif rule.ours:
            made = rule.build(value, whole) if rule.build else {rule.ours: value}
            if key in given and rule.tells(value, made):
                notes.append(f"{shown}: {rule.note}")
            overrides |= {ours: item for ours, item in made.items() if item != "???"}
            notes += [f"{shown}: set {ours}; {rule.note}" for ours, item in made.items() if item == "???"]
    return Converted(overrides, notes)


def find_rule(key: str, project: Project) -> Rule:
    """Return the rule of a key: the project's own, or that of TRL's field of this name."""
    if key in project.rules:
        return project.rules[key]
    if f"training.{key}" in SCHEMA:
        return same(f"training.{key}")
    reason = OWNED_FIELDS.get(key) or OTHER_FIELDS.get(key)
    return Rule(note=reason or f"is no key that is known{suggest(key, project.rules)}")


def _read_number(value: Any) -> Any:
    """Return a number that YAML 1.1 reads as a text, such as 5e-6."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?e[+-]?\d+", value, re.IGNORECASE):
        return float(value)
    return value


def write_value(value: Any) -> str:
    """Return a value in the grammar of Hydra's overrides."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{write_value(key)}:{write_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(write_value, value)) + "]"
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    text = str(value)
    is_plain = re.fullmatch(r"[A-Za-z_.~/][\w./~-]*", text) and text.lower() not in (
        "true",
        "false",
        "null",
        "nan",
        "inf",
    )
    if not isinstance(value, str) or is_plain:
        return text
    return '"' + re.sub(r'(\\*)"', r'\1\1\\"', text) + '"'


TABLES = {
    "common": COMMON,
    **{name: project.rules for name, project in PROJECTS.items()},
}
"""The tables of docs/migration.md; those of projects leave out the common keys."""


def list_rows(rules: dict[str, Rule]) -> Iterator[str]:
    """Yield the rows of one of `TABLES`."""
    known = [COMMON, TRL.rules] if rules is HANDBOOK.rules else [] if rules is COMMON else [COMMON]
    shown = {key: rule for key, rule in rules.items() if not any(other.get(key) is rule for other in known)}
    spelled = {ours: theirs for project in PROJECTS.values() for theirs, ours in project.spellings.items()}
    for key, rule in shown.items():
        theirs = f"`{key}`" + (f", `{spelled[key]}`" if key in spelled else "")
        yield f"| {theirs} | {f'`{rule.ours}`' if rule.ours else '–'} | {rule.note} |"

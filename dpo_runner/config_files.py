"""Checks of keys and values against the schema, for overrides and YAML files alike. Imports no torch."""

import dataclasses
import functools
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dpo_runner.config import CONF_DIR, CONFIG_NAME, RunConf
from dpo_runner.config_checks import suggest
from dpo_runner.data_config import SourceConf
from dpo_runner.errors import reason_of
from dpo_runner.model_config import LoraConf, QuantConf
from dpo_runner.training_rules import OWNED_FIELDS


def _walk_schema(cls: type, prefix: str = "") -> Iterator[tuple[str, type | None]]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        key, hint = f"{prefix}{field.name}", hints[field.name]
        if typing.get_origin(hint) is dict:
            yield key, None
            yield from _walk_field(f"{key}.*", typing.get_args(hint)[1])
        else:
            yield from _walk_field(key, hint)


def _walk_field(key: str, hint: typing.Any) -> Iterator[tuple[str, type | None]]:
    kinds = (hint, *typing.get_args(hint))  # itself, or a union of a section with None
    section = next((kind for kind in kinds if isinstance(kind, type) and dataclasses.is_dataclass(kind)), None)
    yield key, section
    if section is not None:
        yield from _walk_schema(section, f"{key}.")


SCHEMA: dict[str, type | None] = dict(_walk_schema(RunConf))
"""Every dotted key of a run's configuration; a section's value is its dataclass, a field's is None.

A map's entries stand under `*`, such as `data.sources.*.path`.
"""


def schema_key(key: str) -> str:
    """Return a dotted key as SCHEMA has it, with `*` in the place of a map's own names."""
    known = ""
    for name in key.split("."):
        step = f"{known}.{name}" if known else name
        known = f"{known}.*" if step not in SCHEMA and f"{known}.*" in SCHEMA else step
    return known


def find_value_mistakes(key: str, value: Any) -> list[str]:
    """Return what is wrong with setting the dotted `key` to `value`: unknown names and wrong types."""
    known = schema_key(key)
    if known not in SCHEMA:
        return [_describe_unknown(known if "*" in known else key)]
    if f"{known}.*" in SCHEMA and isinstance(value, dict):
        return [line for name, item in value.items() for line in find_value_mistakes(f"{key}.{name}", item)]
    if SCHEMA[known] is not None:
        if isinstance(value, dict):
            return [line for name, item in value.items() for line in find_value_mistakes(f"{key}.{name}", item)]
        if value is None and key in ("quant", "lora"):
            return []
        return [f"`{key}={value}`: is a section; set its fields ({key}.FIELD=VALUE) or choose an option of the group"]
    if isinstance(value, str) and ("${" in value or value == "???"):
        return []  # resolved, or found missing, once the whole configuration is composed
    try:
        if "*" in known:  # a name of the user's own: any will do
            OmegaConf.update(_blank_config(), known.replace("*", _ANY), value, force_add=True)
        else:
            OmegaConf.update(_blank_config(), key, value, force_add=False)
    except OmegaConfBaseException as error:
        return [f"`{key}={value}`: {_describe_type_error(reason_of(error))}"]
    return []


_ANY = "any"


@functools.cache
def _blank_config() -> DictConfig:
    """Return a configuration to try values on; what it holds does not matter, its types do."""
    config = OmegaConf.structured(RunConf)
    config.quant, config.lora = QuantConf(), LoraConf()
    config.data.sources = {_ANY: SourceConf()}
    return typing.cast(DictConfig, config)


def _describe_type_error(message: str) -> str:
    if "is not a valid bool" in message:
        return "must be true or false"
    kinds = {"Float": "a number", "Integer": "a whole number", "String": "a text"}
    kind = message.rpartition(" to ")[2]
    return f"must be {kinds[kind]}" if "could not be converted to" in message and kind in kinds else message


def _describe_unknown(key: str) -> str:
    section, _, name = key.rpartition(".")
    if section == "training" and name in OWNED_FIELDS:
        return f"`{key}`: is not set here; {OWNED_FIELDS[name]}"
    siblings = [known.rpartition(".")[2] for known in SCHEMA if known.rpartition(".")[0] == section]
    if section and section not in SCHEMA:
        return _describe_unknown(section)
    near = suggest(name, siblings)
    elsewhere = [known for known in SCHEMA if known.rpartition(".")[2] == name and "*" not in known]
    if not near.startswith("did you mean") and elsewhere:
        near = f"did you mean `{elsewhere[0]}`?"
    return f"`{key}`: no such field; {near}" if near else f"`{key}`: no such field of `{section}`"


@dataclass(frozen=True)
class ConfigFiles:
    """The folders in which config groups are looked up, the project's before the user's, as Hydra has it.

    Attributes:
        folders: each holds a folder per config group; what is in the first hides what is in the next.
    """

    folders: tuple[Path, ...]

    @classmethod
    def over(cls, config_dir: str | None) -> "ConfigFiles":
        return cls((CONF_DIR, Path(config_dir)) if config_dir else (CONF_DIR,))

    def groups(self) -> list[str]:
        return sorted({path.name for folder in self.folders for path in folder.iterdir() if path.is_dir()})

    def find_hidden_files(self) -> list[str]:
        """Return the user's files that Hydra would never read, or that are for Hydra itself and could run code."""
        mistakes = []
        for path in (path for folder in self.folders[1:] for path in sorted(folder.rglob("*.yaml"))):
            name = path.relative_to(self.folders[1])
            if (CONF_DIR / name).exists():
                mistakes.append(f"{name}: hidden by the project's own file of this name; choose another name")
            elif name.parts[0] == "hydra":
                mistakes.append(f"{name}: not allowed, Hydra's own configuration can run code")
        return mistakes

    def options(self, group: str) -> list[str]:
        return sorted({path.stem for folder in self.folders for path in (folder / group).glob("*.yaml")})

    def find(self, group: str, option: str) -> Path | None:
        paths = [folder / group / f"{option}.yaml" for folder in self.folders]
        return next((path for path in paths if path.is_file()), None)

    def find_option_mistakes(self, group: str, option: Any) -> list[str]:
        """Return what is wrong with choosing `option` in `group`."""
        if isinstance(option, str) and self.find(group, option):
            return []
        if option is None and group in ("experiment", "sweep"):
            return []
        return [f"`{group}={option}`: no such option; {suggest(option, self.options(group))}"]

    def load_sweep_axes(self, option: str) -> list[str]:
        """Return the overrides that a sweep file spans, such as `training.beta=0.05,0.1`; [] where it has none."""
        path = self.find("sweep", option)
        try:
            axes = OmegaConf.select(OmegaConf.load(path), "hydra.sweeper.params") if path else None
        except (yaml.YAMLError, OmegaConfBaseException):
            return []  # find_file_mistakes names the line
        return [f"{key}={value}" for key, value in (axes or {}).items()]

    def find_file_mistakes(self, choices: dict[str, list[str]]) -> list[str]:
        """Check every YAML file that a command selects, the ones that those select included.

        Args:
            choices: the options that the command line selects in each group; an experiment's choice for
                such a group gives way, as it does in Hydra.
        """
        mistakes, defaults = check_file(CONF_DIR / f"{CONFIG_NAME}.yaml", "")
        selected = {**{group: [option] for group, option in defaults if option}, **choices}
        queue = [(group, option) for group, options in selected.items() for option in options]
        seen = set()
        while queue:
            group, option = queue.pop(0)
            path = self.find(group, option)
            if (group, option) in seen:
                continue
            seen.add((group, option))
            if path is None:
                mistakes += self.find_option_mistakes(group, option)
                continue
            lines, nested = check_file(path, group)
            mistakes += lines
            queue += [
                (inner or group, name)
                for inner, name in nested
                if name and (inner in ("", group) or inner not in choices)
            ]
        return list(dict.fromkeys(mistakes))


def check_file(path: Path, group: str) -> tuple[list[str], list[tuple[str, str | None]]]:
    """Check one YAML file's keys and values.

    Returns:
        One line for each mistake, with file and line, and the (group, option) pairs of its defaults list,
        where an empty group stands for the file's own.
    """
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path.name}:{mark.line + 1}" if mark else path.name
        return [f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}"], []
    if root is None:
        return [], []
    if not isinstance(root, yaml.MappingNode):
        return [f"{path.name}:1: must hold `key: value` lines"], []
    package = "" if "@package _global_" in text.split("\n", 1)[0] or not group else group
    try:
        # OmegaConf reads some scalars otherwise than YAML does (1e-4 is a number), and its reading is what counts.
        values = typing.cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(text)))
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or reason_of(error)
        return [f"{path.parent.name}/{path.name}:{mark.line + 1 if mark else 1}: {reason}"], []
    if not isinstance(values.get("defaults", []), list):
        return [f"{path.parent.name}/{path.name}: `defaults` must be a list, such as [dpo, _self_]"], []
    mistakes: list[str] = []
    for key_node, value_node in root.value:
        if key_node.value not in values:
            mistakes.append(f"{path.parent.name}/{path.name}:{key_node.start_mark.line + 1}: a key must be a text")
        elif key_node.value != "defaults":
            mistakes += _check_node(key_node, value_node, values[key_node.value], package, path)
    return mistakes, list(_read_defaults(values.get("defaults", [])))


def _check_node(key_node: yaml.Node, value_node: yaml.Node, value: Any, package: str, path: Path) -> Iterator[str]:
    key = f"{package}.{key_node.value}" if package else str(key_node.value)
    where = f"{path.parent.name}/{path.name}:{key_node.start_mark.line + 1}"
    if key == "hydra" or key.startswith("hydra."):
        yield from _check_hydra_node(value_node, where)
    elif isinstance(value_node, yaml.MappingNode) and _has_entries(schema_key(key)):
        for inner_key, inner_value in value_node.value:
            yield from _check_node(inner_key, inner_value, value[inner_key.value], key, path)
    else:
        yield from (f"{where}: {line}" for line in find_value_mistakes(key, value))


def _has_entries(known: str) -> bool:
    return SCHEMA.get(known) is not None or f"{known}.*" in SCHEMA


def _check_hydra_node(node: yaml.Node, where: str) -> Iterator[str]:
    """Refuse `_target_` in a hydra block: Hydra would import and call whatever it names."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value in ("_target_", "callbacks", "searchpath"):
                yield f"{where}: `hydra…{key.value}`: not allowed, it runs or reads what this program cannot check"
            yield from _check_hydra_node(value, where)


def _read_defaults(items: Any) -> Iterator[tuple[str, str | None]]:
    for item in items:
        if isinstance(item, str):
            if item not in ("_self_", "base_config"):
                yield "", item
        else:
            for group, option in item.items():
                name = str(group).removeprefix("override ").removeprefix("/")
                if not name.startswith("hydra/"):
                    yield name, option

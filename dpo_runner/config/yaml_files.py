"""The YAML files that a command selects, and their check. Imports no torch."""

import functools
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.plugins.config_source import ConfigSource
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dpo_runner.config.hydra_rules import find_key_mistakes, is_axis
from dpo_runner.config.keys import OTHER_OPTIONS, REMOVED_OPTIONS
from dpo_runner.config.schema import SCHEMA, find_value_mistakes, schema_key
from dpo_runner.errors import ConfigError, reason_of, suggest

_OWN = {"model": "model.model_name_or_path", "data": "data=local_file data.path"}
"""What takes a user's own model or data, which some write in the place of the group's option."""
_PACKAGED_CONF = Path(__file__).parents[1] / "conf"
CONF_DIR = _PACKAGED_CONF if _PACKAGED_CONF.is_dir() else Path(__file__).parents[2] / "conf"
CONFIG_NAME = "config"


@dataclass(frozen=True)
class ConfigFiles:
    """The folders in which config groups are looked up, the project's before the user's, as Hydra has it.

    Attributes:
        folders: each holds a folder per config group; what is in the first hides what is in the next.
    """

    folders: tuple[Path, ...]

    @classmethod
    def over(cls, config_dir: str | None) -> "ConfigFiles":
        own = not config_dir or Path(config_dir).resolve() == CONF_DIR.resolve()
        return cls((CONF_DIR,) if own else (CONF_DIR, Path(str(config_dir))))

    def groups(self) -> list[str]:
        return sorted({path.name for folder in self.folders for path in folder.iterdir() if path.is_dir()})

    def find_hidden_files(self) -> list[str]:
        """Return the user's files that Hydra would never read, and a folder for Hydra itself, which could run code."""
        mistakes = []
        patterns = ("*.yaml", "*/*.yaml", "hydra")  # as deep as groups are: it may be anyone's whole disk
        files = {path for folder in self.folders[1:] for pattern in patterns for path in folder.glob(pattern)}
        for path in sorted(files):
            name = path.relative_to(self.folders[1])
            if (CONF_DIR / name).exists():
                mistakes.append(f"{name}: hidden by the project's own file of this name; choose another name")
            elif name == Path("hydra"):
                mistakes.append(f"{name}/: not allowed, Hydra's own configuration can run code")
        return mistakes

    def options(self, group: str) -> list[str]:
        return sorted({path.stem for folder in self.folders for path in (folder / group).glob("*.yaml")})

    def find(self, group: str, option: str) -> Path | None:
        paths = [folder / group / f"{option}.yaml" for folder in self.folders]
        try:
            return next((path for path in paths if path.is_file()), None)
        except OSError:  # a name that no file can have
            return None

    def find_option_mistakes(self, group: str, option: Any) -> list[str]:
        """Return what is wrong with choosing `option` in `group`."""
        if isinstance(option, str) and self.find(group, option):
            return []
        if (advice := REMOVED_OPTIONS.get(f"{group}={option}")) is not None:
            return [f"`{group}={option}`: was removed; {advice}"]
        if (advice := OTHER_OPTIONS.get(f"{group}={option}")) is not None:
            return [f"`{group}={option}`: no such option; {advice}"]
        if not self.options(group):
            return [f"`{group}={option}`: no such group; an absolute name begins with a slash (/training)"]
        hint = suggest(option, self.options(group))
        if group in _OWN and isinstance(option, str) and not hint.endswith("?"):
            hint += f", or set {_OWN[group]}={option}"
        return [f"`{group}={option}`: no such option{hint}"]

    def load_sweep_axes(self, option: str) -> list[str]:
        """Return the overrides that a sweep file spans, such as `training.beta=0.05,0.1`; [] where it has none."""
        path = self.find("sweep", option)
        if path is None or check_file(path, "sweep")[0]:
            return []  # find_file_mistakes names the line
        axes: Any = OmegaConf.to_container(OmegaConf.load(path))
        for key in ("hydra", "sweeper", "params"):
            axes = axes.get(key) if isinstance(axes, dict) else None
        pairs = axes.items() if isinstance(axes, dict) else ()
        return [
            f"{key}={value}" for key, value in pairs if is_axis(str(key), value)
        ]  # others are refused when composed

    def find_file_mistakes(self, choices: dict[str, list[str]]) -> list[str]:
        """Check every YAML file that a command selects, the ones that those select included.

        Args:
            choices: the options that the command line selects in each group; an experiment's choice for
                such a group gives way, as it does in Hydra.
        """
        of_primary, defaults = check_file(CONF_DIR / f"{CONFIG_NAME}.yaml", "")
        mistakes = [*of_primary]
        selected = {**{group: [option] for group, option in defaults if option is not None}, **choices}
        queue: list[tuple[str, Any, list[str]]] = [
            (group, option, []) for group, options in selected.items() for option in options
        ]
        seen = set()
        while queue:
            group, option, through = queue.pop(0)
            name = f"{group}/{option}".removeprefix("/")
            if name in through:
                mistakes.append(f"`defaults`: lead back to where they began; {' > '.join([*through, name])}")
            if (group, option) in seen:
                continue
            seen.add((group, option))
            path = self.find(group, option) if isinstance(option, str) else None
            if path is None:
                mistakes += self.find_option_mistakes(group, option)
                continue
            own = name.rpartition("/")[0]  # `option` may be sub/name
            lines, nested = check_file(path, own)
            mistakes += lines
            queue += [
                (inner, option, [*through, name])
                for inner, option in nested
                if option is not None and (inner == own or inner not in choices)
            ]
        return list(dict.fromkeys(mistakes))


_LARGEST_FILE = 1_000_000
_MOST_VALUES = 100_000
"""Of a file with its aliases written out, which can be more than any memory holds."""
_YAML = "tag:yaml.org,2002:"
_PLAIN_TAGS = ("map", "seq", "str", "int", "float", "bool", "null", "timestamp", "value")


def check_file(path: Path, group: str) -> tuple[list[str], list[tuple[str, Any]]]:
    """Check one YAML file's keys and values.

    Args:
        path: the file.
        group: the config group that it is in, such as `training`; empty for the primary file.

    Returns:
        One line for each mistake, with file and line, and the (group, option) pairs of its defaults list.
    """
    place = f"{path.parent.name}/{path.name}"
    try:
        if path.stat().st_size > _LARGEST_FILE:
            return [f"{place}: holds more than {_LARGEST_FILE // 1000:,} kB, which no configuration does"], []
        return _check_text(path.read_text(encoding="utf-8"), path, group)
    except OSError as error:
        return [f"{place}: cannot be read; {error.strerror}"], []
    except UnicodeDecodeError as error:
        return [f"{path.name}: not valid YAML: {reason_of(error)}"], []


@functools.lru_cache(maxsize=256)
def _check_text(text: str, path: Path, group: str) -> tuple[list[str], list[tuple[str, Any]]]:
    """Check the text of a YAML file; cached, as each composition reads the same files. Do not mutate the result."""
    place = f"{path.parent.name}/{path.name}"
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        header = ConfigSource._get_header_dict(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        line, reason = _locate_error(error)
        return [f"{path.name}{f':{line}' if line else ''}: not valid YAML: {reason}"], []
    if root is None:
        return [], []
    if not isinstance(root, yaml.MappingNode):
        return [f"{path.name}:1: must hold `key: value` lines"], []
    if odd := _find_odd_yaml(root):
        return [f"{place}:{odd}"], []
    package = header.get("package")
    if package not in (None, "_global_", "_group_", group.replace("/", ".")):
        return [f"{place}:1: `@package {package}`: must be _global_, or be left out"], []
    package = "" if package == "_global_" else group.replace("/", ".")
    if package and group.split("/")[0] not in SCHEMA and any(key.value != "defaults" for key, _ in root.value):
        return [f"{place}:1: must begin with the line `# @package _global_`, as its keys are those of a whole run"], []
    try:
        # OmegaConf reads some scalars otherwise than YAML does (1e-4 is a number), and its reading is what counts.
        values = typing.cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(text)))
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError, RecursionError) as error:
        line, reason = _locate_error(error)
        return [f"{place}:{line or 1}: {reason}"], []
    defaults = values.get("defaults", [])
    if not isinstance(defaults, list):
        return [f"{place}: `defaults` must be a list, such as [dpo, _self_]"], []
    mistakes, found = _read_defaults(defaults, group, place)
    for key_node, value_node in root.value:
        if key_node.value != "defaults":
            mistakes += _check_node(key_node, value_node, values, package, path, group)
    return mistakes, found


def _locate_error(error: Exception) -> tuple[int | None, str]:
    """Return the line, counted from 1 and where there is one, and what is wrong there."""
    mark = getattr(error, "problem_mark", None)
    deep = isinstance(error, RecursionError)
    reason = "is nested too deeply" if deep else getattr(error, "problem", None) or reason_of(error)
    return mark.line + 1 if mark else None, reason


def _find_odd_yaml(root: yaml.Node) -> str | None:
    """Return line and reason of the first tag, or of a file that its aliases make endless or very large."""
    sizes: dict[int, int] = {}

    def measure(node: yaml.Node, above: tuple[int, ...]) -> int:
        if id(node) in above:
            raise ConfigError(f"{node.start_mark.line + 1}: an alias (*) stands within what it repeats")
        if node.tag.removeprefix(_YAML) not in _PLAIN_TAGS or not node.tag.startswith(_YAML):
            what = "merge keys (<<)" if node.tag == f"{_YAML}merge" else f"tags ({node.tag.replace(_YAML, '!!')})"
            raise ConfigError(f"{node.start_mark.line + 1}: YAML's {what} are not supported; write plain values")
        if id(node) not in sizes:
            parts = node.value if isinstance(node, yaml.CollectionNode) else ()
            inner = [each for part in parts for each in (part if isinstance(part, tuple) else (part,))]
            sizes[id(node)] = 1 + sum(measure(each, (*above, id(node))) for each in inner)
            if sizes[id(node)] > _MOST_VALUES:
                raise ConfigError(f"{node.start_mark.line + 1}: holds more than {_MOST_VALUES:,} values")
        return sizes[id(node)]

    try:
        measure(root, ())
    except ConfigError as error:
        return str(error)
    return None


def _check_node(
    key_node: yaml.Node, value_node: yaml.Node, values: dict[str, Any], package: str, path: Path, group: str
) -> Iterator[str]:
    """Yield what is wrong with one entry of a mapping, `values` as OmegaConf reads it."""
    key = f"{package}.{key_node.value}" if package else str(key_node.value)
    where = f"{path.parent.name}/{path.name}:{key_node.start_mark.line + 1}"
    if key_node.value not in values:
        yield f"{where}: a key must be a text"
    elif "." in key_node.value and "*" not in schema_key(key) and not key.startswith("hydra."):
        outer, _, inner = key_node.value.rpartition(".")
        yield f"{where}: `{key_node.value}`: in a file, a dot is a level: `{outer.replace('.', ': {')}: {{{inner}: …}}`"
    elif key == "hydra" and not isinstance(value_node, yaml.MappingNode):
        yield f"{where}: `hydra`: must hold `key: value` lines"
    elif key.startswith("hydra."):
        if path != CONF_DIR / f"{CONFIG_NAME}.yaml":
            yield from (f"{where}: {line}" for line in find_key_mistakes(key, key, group))
    elif isinstance(value_node, yaml.MappingNode) and (key == "hydra" or _has_entries(schema_key(key))):
        for inner_key, inner_value in value_node.value:
            yield from _check_node(inner_key, inner_value, values[key_node.value], key, path, group)
    else:
        yield from (f"{where}: {line}" for line in find_value_mistakes(key, values[key_node.value]))


def _has_entries(known: str) -> bool:
    return SCHEMA.get(known) is not None or f"{known}.*" in SCHEMA


def _read_defaults(items: list[Any], group: str, place: str) -> tuple[list[str], list[tuple[str, Any]]]:
    """Read a defaults list as Hydra does, where names are relative to the file's own group, and absolute after a slash.

    Returns:
        One line for each mistake, and the (group, option) pairs.
    """
    mistakes: list[str] = []
    found: list[tuple[str, Any]] = []
    for item in items:
        if item == "_self_" or (item == "base_config" and not group):
            continue
        entries = [(item, "")] if isinstance(item, str) else list(item.items()) if isinstance(item, dict) else []
        if len(entries) != 1 or not entries[0][0]:
            mistakes.append(f"{place}: `defaults`: holds names and `GROUP: OPTION` pairs, not {item!r}")
            continue
        name, option = entries[0]
        name = str(name).removeprefix("optional ").removeprefix("override ")
        target = name[1:] if name.startswith("/") else f"{group}/{name}" if group else name
        if "@" in f"{name}{option}":
            mistakes.append(f"{place}: `defaults: {name}`: packages (@) are not supported; leave it out")
        elif isinstance(item, str):
            found.append((target.rpartition("/")[0], target.rpartition("/")[2]))
        elif not target.startswith("hydra/"):  # Hydra's own are checked when they are composed
            found += [(target, one) for one in (option if isinstance(option, list) else [option])]
    return mistakes, found

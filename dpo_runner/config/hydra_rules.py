"""What commands and files may set of Hydra's own configuration: the rest could run code, or write elsewhere.

Hydra imports and calls what its configuration names (`_target_`, `callbacks`, logging handlers), and OmegaConf joins
texts from anywhere into it (`${…}`). So overrides and files are held against short lists of what is allowed, with a
line for each mistake, and what is composed of them, before Hydra acts on it, against the rest of what it may be.
"""

from collections.abc import Iterator
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from dpo_runner.errors import ConfigError

_WHY = "not allowed, it could run code or write elsewhere"
_ALLOWED = "hydra/launcher, hydra.launcher.*"
_INSTEAD = {
    "hydra.run.dir": "use run_dir=PATH",
    "hydra.sweep.dir": "use sweep.dir=PATH",
    "hydra.searchpath": "use --config-dir DIR",
    "hydra.mode": "use -m",
}
_NO_LOGGING = {"version": 1, "root": None, "disable_existing_loggers": False}
_SWEEPERS = ("hydra_plugins.dpo_runner.GridSweeper", "hydra_plugins.dpo_runner.OptunaSweeper")
_FIXED: dict[str, Any] = {
    "callbacks": {},
    "env": {},
    "hydra_logging": _NO_LOGGING,
    "job_logging": _NO_LOGGING,
    "job.chdir": None,
    "job.env_copy": [],
    "job.env_set": {},
    "output_subdir": None,
    "run": {"dir": "."},
    "sweep": {"dir": "multirun/${now:%Y-%m-%d}/${now:%H-%M-%S}", "subdir": "${hydra.job.num}"},
    "verbose": False,
}
"""What stands in Hydra's configuration as `conf/config.yaml` has it; only the launcher and a sweep's axes may vary."""


class UnsafeConfigError(ConfigError):
    """What was composed would let Hydra run code, or write elsewhere."""


def check_hydra_override(text: str, override: Override) -> list[str]:
    """Return what is wrong with an override of Hydra's own configuration."""
    key = str(override.key_or_group)
    allowed = key == "hydra/launcher" or (key.startswith("hydra.launcher.") and "_target_" not in text)
    if not allowed or override.package is not None:
        return [f"`{text}`: {_WHY}; {_INSTEAD.get(key, f'these may be changed: {_ALLOWED}')}"]
    if override.is_sweep_override():
        return [f"`{text}`: is the same for all runs of a sweep; give it one value"]
    if key != "hydra/launcher" and "${" in text:
        return [f"`{text}`: a launcher's settings hold no interpolations; give the value itself"]
    return []


def check_hydra_block(node: yaml.Node, where: str, group: str) -> Iterator[str]:
    """Yield what is wrong with the `hydra` block of a config file.

    Args:
        node: the block's value.
        where: file and line.
        group: the file's config group; a sweep's may set `mode` and `sweeper.params`.
    """
    if not isinstance(node, yaml.MappingNode):
        yield f"{where}: `hydra`: must hold `key: value` lines"
        return
    for key, value in node.value:
        name = str(key.value)
        at = f"{where.rpartition(':')[0]}:{key.start_mark.line + 1}"
        if target := next(_find_targets(value, f"hydra.{name}."), None):
            yield f"{where}: `{target}`: {_WHY}"
        elif name in ("mode", "sweeper") and group.split("/")[0] == "sweep":
            if name == "mode" and value.value != "MULTIRUN":
                yield f"{at}: `hydra.mode={_show(value)}`: must be MULTIRUN, or be left out"
            if name == "sweeper":
                yield from _check_sweeper(value, at)
        elif name == "launcher" and isinstance(value, yaml.MappingNode):
            for inner, item in value.value:
                if any("${" in str(scalar.value) for scalar in _find_scalars(item)):
                    yield f"{at}: `hydra.launcher.{inner.value}`: holds an interpolation; give the value itself"
        else:
            instead = _INSTEAD.get(f"hydra.{name}", _INSTEAD.get(f"hydra.{name}.dir", "leave it out"))
            yield f"{at}: `hydra.{name}`: {_WHY}; {instead}"


def _check_sweeper(node: yaml.Node, where: str) -> Iterator[str]:
    names = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
    if names != ["params"]:
        yield f"{where}: `hydra.sweeper`: holds `params` alone, the axes of the sweep"
        return
    ((_, params),) = node.value
    if not isinstance(params, yaml.MappingNode):
        yield f"{where}: `hydra.sweeper.params`: must hold `key: values` lines, such as `training.beta: 0.05,0.1`"
        return
    for key, value in params.value:
        if not isinstance(value, yaml.ScalarNode) or "${" in value.value or not value.value:
            yield (
                f"{where.rpartition(':')[0]}:{key.start_mark.line + 1}: `hydra.sweeper.params.{key.value}`: must be "
                "its values as a text, such as 0.05,0.1"
            )


def _find_targets(node: yaml.Node, prefix: str) -> Iterator[str]:
    """Yield each `_target_`, with the dotted key that it has below `prefix`."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == "_target_":
                yield f"{prefix}_target_"
            yield from _find_targets(value, f"{prefix}{key.value}.")
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _find_targets(item, prefix)


def _find_scalars(node: yaml.Node) -> Iterator[yaml.ScalarNode]:
    if isinstance(node, yaml.ScalarNode):
        yield node
    for item in node.value if isinstance(node, yaml.CollectionNode) else ():
        for part in item if isinstance(item, tuple) else (item,):
            yield from _find_scalars(part)


def _show(node: yaml.Node) -> str:
    return str(node.value) if isinstance(node, yaml.ScalarNode) else "…"


def check_composed(config: DictConfig) -> None:
    """Check what Hydra has composed, its own part included, wherever each value came from.

    Raises:
        UnsafeConfigError: with a line for each key that something has set which nothing may set.
    """
    plain = OmegaConf.to_container(config, resolve=False, enum_to_str=True)
    assert isinstance(plain, dict)
    hydra = plain.pop("hydra")
    mistakes = [f"`{key}`: {_WHY}; leave it out" for key in _find_target_keys(plain)]
    mistakes += [f"`hydra.{key}`: {_WHY}; leave it out" for key, fixed in _FIXED.items() if _get(hydra, key) != fixed]
    if hydra["mode"] not in (None, "MULTIRUN"):
        mistakes.append(f"`hydra.mode={hydra['mode']}`: {_WHY}; leave it out")
    sweeper = hydra["sweeper"]
    if (
        not isinstance(sweeper, dict)
        or sweeper.get("_target_") not in _SWEEPERS
        or set(sweeper) - {"_target_", "params"}
    ):
        mistakes.append(f"`hydra.sweeper`: {_WHY}; leave it out")
    mistakes += _check_launcher(hydra)
    if mistakes:
        raise UnsafeConfigError(mistakes)


def _check_launcher(hydra: dict[str, Any]) -> Iterator[str]:
    """Yield what is wrong with a launcher's settings, which are to be those of its plugin, or plain values."""
    name, settings = hydra["runtime"]["choices"]["hydra/launcher"], hydra["launcher"]
    stored = ConfigStore.instance().repo["hydra"]["launcher"].get(f"{name}.yaml")
    if stored is None or not isinstance(settings, dict):
        yield f"`hydra/launcher={name}`: is no installed launcher; leave it out, or install its package"
        return
    own = OmegaConf.to_container(stored.node, resolve=False)
    assert isinstance(own, dict)
    for key, value in settings.items():
        if key not in own:
            fields = ", ".join(sorted(set(map(str, own)) - {"_target_"})) or "none"
            yield f"`hydra.launcher.{key}`: no such setting of hydra/launcher={name}; it has {fields}"
        elif value != own[key] and (key == "_target_" or "${" in str(value) or "_target_" in str(value)):
            yield f"`hydra.launcher.{key}`: {_WHY}; leave it out"


def _find_target_keys(value: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            if key == "_target_":
                yield f"{prefix}{key}"
            yield from _find_target_keys(item, f"{prefix}{key}.")
    elif isinstance(value, list):
        for item in value:
            yield from _find_target_keys(item, prefix)


def _get(hydra: dict[str, Any], key: str) -> Any:
    section, _, name = key.rpartition(".")
    return hydra[section].get(name) if section else hydra.get(key)

"""The check of what Hydra composed, before Hydra acts on it.

Hydra imports and calls what its configuration names (`_target_`, `callbacks`, logging handlers), and OmegaConf joins
texts from anywhere into it (`${…}`). So only the launcher and the axes of a sweep file may differ from
`conf/config.yaml`, whichever override or file a value comes from.
"""

import re
from collections.abc import Iterator
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from dpo_runner.errors import ConfigError

_WHY = "not allowed, it could run code or write elsewhere"
_CURES = {
    "hydra.run": "use run_dir=PATH",
    "hydra.sweep": "use sweep.dir=PATH",
    "hydra.searchpath": "use --config-dir DIR",
    "hydra.mode": "use -m",
}
_ACTIVE = re.compile(r"\$\{|_target_")
_SWEEPER = "hydra_plugins.dpo_runner.GridSweeper"
_NO_LOGGING = {"version": 1, "root": None, "disable_existing_loggers": False}
_FIXED: dict[str, Any] = {
    "callbacks": {},
    "env": {},
    "hydra_logging": _NO_LOGGING,
    "job": {"chdir": None, "env_copy": [], "env_set": {}},  # beside what Hydra fills in
    "job_logging": _NO_LOGGING,
    "output_subdir": None,
    "run": {"dir": "."},
    "sweep": {"dir": "multirun/${now:%Y-%m-%d}/${now:%H-%M-%S}", "subdir": "${hydra.job.num}"},
    "verbose": False,
}
"""Hydra's configuration as `conf/config.yaml` has it."""


class UnsafeConfigError(ConfigError):
    """The composed configuration would let Hydra run code, or write elsewhere."""


def find_key_mistakes(text: str, key: str, group: str = "") -> list[str]:
    """Return why an override, or a file of the config group `group`, may not set this key of Hydra's.

    Checked before composing, which imports packages for `hydra.searchpath=[pkg://…]`; and Hydra's launchers compose
    again, with the overrides in `hydra.overrides`.
    """
    open_keys = r"hydra([./]launcher|\.(mode|sweeper)$)" if group.split("/")[0] == "sweep" else r"hydra[./]launcher"
    cure = _CURES.get(".".join(key.split(".")[:2]), "these may be changed: hydra/launcher, hydra.launcher.*")
    return [] if re.match(open_keys, key) else [f"`{text}`: {_WHY}; {cure}"]


def is_axis(key: str, value: object) -> bool:
    """Return whether an entry of `hydra.sweeper.params` is an axis, and nothing that Hydra itself would act on."""
    plain = isinstance(value, str | int | float) and value != "" and not _ACTIVE.search(f"{key} {value}")
    return plain and not key.lstrip("+~").startswith("hydra")


def check_composed(config: DictConfig) -> None:
    """Check a composed configuration, Hydra's part included, without resolving anything in it.

    Raises:
        UnsafeConfigError: with a line for each mistake.
    """
    plain: Any = OmegaConf.to_container(config, resolve=False, enum_to_str=True)
    hydra = plain.pop("hydra")
    found = {key: hydra[key] for key in _FIXED} | {"job": {key: hydra["job"][key] for key in _FIXED["job"]}}
    unsafe = [f"hydra.{key}" for key in _FIXED if found[key] != _FIXED[key]] + list(_find_targets(plain))
    mistakes = [f"`{key}`: {_WHY}; {_CURES.get(key, 'leave it out')}" for key in unsafe]
    mistakes += [*_check_sweep(hydra["mode"], hydra["sweeper"]), *_check_launcher(hydra)]
    if mistakes:
        raise UnsafeConfigError(mistakes)


def _check_sweep(mode: str | None, sweeper: Any) -> Iterator[str]:
    if mode not in (None, "MULTIRUN"):
        yield f"`hydra.mode={mode}`: must be MULTIRUN, or be left out"
    axes = sweeper.get("params", {}) if isinstance(sweeper, dict) else None
    if not isinstance(axes, dict) or {"params": {}, **sweeper} != {"_target_": _SWEEPER, "params": axes}:
        yield "`hydra.sweeper`: must hold `params` alone, with lines such as `training.beta: 0.05,0.1`"
        return
    for key, value in axes.items():
        if not is_axis(str(key), value):
            yield f"`hydra.sweeper.params.{key}`: must be a run's key and its values as a text, such as 0.05,0.1"


def _check_launcher(hydra: dict[str, Any]) -> Iterator[str]:
    name, settings = hydra["runtime"]["choices"].get("hydra/launcher"), hydra["launcher"]
    stored = ConfigStore.instance().repo["hydra"]["launcher"].get(f"{name}.yaml")
    own: Any = OmegaConf.to_container(stored.node) if stored else None
    if own is None or not isinstance(settings, dict):
        yield f"`hydra/launcher={name}`: is no installed launcher; leave it out, or install its package"
        return
    fields = ", ".join(sorted(set(own) - {"_target_"})) or "none"
    for key, value in settings.items():
        if key not in own:
            yield f"`hydra.launcher.{key}`: no such setting of hydra/launcher={name}; it has {fields}"
        elif value != own[key] and _ACTIVE.search(f"{key} {value}"):
            yield f"`hydra.launcher.{key}`: {_WHY}; give a plain value, without interpolations"


def _find_targets(value: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(value, list):
        value = dict(enumerate(value))
    for key, item in value.items() if isinstance(value, dict) else ():
        yield from [f"{prefix}{key}"] if key == "_target_" else _find_targets(item, f"{prefix}{key}.")

"""Compose Hydra overrides into a validated `RunConf`. Imports no torch."""

import copy
import functools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from hydra.version import VersionBase
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dpo_runner.config.adapter_config import recognise_adapter
from dpo_runner.config.hydra_rules import check_composed
from dpo_runner.config.overrides import MOST_POINTS, check_overrides, first_line
from dpo_runner.config.rules.training import find_missing_trackers, may_have_evaluation
from dpo_runner.config.run_conf import RunConf, config_keys
from dpo_runner.config.yaml_files import CONF_DIR, CONFIG_NAME
from dpo_runner.errors import ConfigError, reason_of

ConfigStore.instance().store(name="base_config", node=RunConf)


def _if_evaluation_rows(strategy: str, *, _root_: DictConfig) -> str:
    return strategy if may_have_evaluation(_root_.data) and not _root_.rounds else "no"


OmegaConf.register_new_resolver("if_evaluation_rows", _if_evaluation_rows, replace=True)
# Names only: the command registers the classes at run time (see dpo_runner/sweep/sweeper.py).
for _group, _name, _class in (
    ("launcher", "workers", "WorkersLauncher"),
    ("sweeper", "grid", "GridSweeper"),
    ("sweeper", "optuna", "OptunaSweeper"),
):
    _target = {"_target_": f"hydra_plugins.dpo_runner.{_class}"}
    ConfigStore.instance().store(group=f"hydra/{_group}", name=_name, node=_target)


_INTO_MAP = re.compile(
    r"(data\.(?:sources\.[^.=]+\.)?(?:columns|roles)|data\.sources|lora\.config|lora\.(?:rank|alpha)_pattern)(\.[^=]+)?="
)


def expand_overrides(overrides: Sequence[str]) -> list[str]:
    """Mark overrides that add map entries (`data.sources`, `lora.config`) with `++`, as Hydra requires.

    `data.sources.mine.path=x` becomes `++data.sources={mine:{}}` and `++data.sources.mine.path=x`.
    """
    names = dict.fromkeys(match[1] for text in overrides if (match := re.match(r"data\.sources\.([^.=]+)[.=]", text)))
    expanded = [f"++{text}" if _INTO_MAP.match(text) else text for text in overrides]
    if names:  # next to the first of them: flags and overrides must not be mixed
        first = next(at for at, text in enumerate(overrides) if re.match(r"data\.sources\.", text))
        expanded.insert(first, f"++data.sources={{{','.join(f'{name}:{{}}' for name in names)}}}")
    return expanded


def compose_config(overrides: list[str], config_dir: str | None = None, run_mode: RunMode = RunMode.RUN) -> DictConfig:
    """Compose `conf/config.yaml` with Hydra overrides, outside a Hydra application.

    Args:
        overrides: as on the command line, such as `["quant=nf4", "training.beta=0.2"]`.
        config_dir: a folder with the user's config groups, searched after `conf/`.
        run_mode: MULTIRUN leaves out overrides with several values, as Hydra does for a sweep's launcher and sweeper.

    Raises:
        UnsafeConfigError: something would set what Hydra acts on, and could run code.
    """
    search_path = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
    with _without_callers_hydra(), initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        texts = [*search_path, *expand_overrides(overrides)]
        config: DictConfig = hydra.compose_config(CONFIG_NAME, texts, run_mode, from_shell=False)
    check_composed(config)
    with open_dict(config):
        del config["hydra"]
    return config


@contextmanager
def _without_callers_hydra() -> Iterator[None]:
    """Take the state of a Hydra program that calls this one out of the way, and put it back."""
    callers, version_base = GlobalHydra.instance(), copy.copy(VersionBase.instance())
    GlobalHydra.set_instance(own := copy.copy(callers))
    own.clear()
    try:
        yield
    finally:
        GlobalHydra.set_instance(callers)
        VersionBase.set_instance(version_base)


def build_run_conf(config: DictConfig, overrides: Sequence[str], config_dir: str | None = None) -> RunConf:
    """Convert a composed config to a typed, validated `RunConf`.

    A continued SFT adapter keeps its own shape, so the default `lora`, which describes a new adapter, is dropped
    unless an override sets `lora` or `experiment`.

    Args:
        config: the composed config.
        overrides: the overrides it was composed from.
        config_dir: a folder with the user's config groups.

    Raises:
        ConfigError: an unset `???`, an unresolvable interpolation, values that `RunConf` rejects, a missing tracker.
    """
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError([f"`{key}`: must be set (`{key}=VALUE`)" for key in missing])
    recognise_adapter(config)
    spoken_of = {re.split(r"[.=]", text.lstrip("+"))[0] for text in overrides}
    continues = config.model.adapter is not None and config.model.adapter_mode == "continue"
    if continues and not {"lora", "experiment"} & spoken_of:
        config.lora = None
    only_a_preset = OmegaConf.is_interpolation(config.training, "eval_strategy")
    try:
        conf = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError(f"`{error.full_key}`: {reason_of(error)}") from None
    assert isinstance(conf, RunConf)
    if missing := find_missing_trackers(conf.training):
        raise ConfigError(missing)
    conf.evaluation_is_optional = only_a_preset
    conf.recipe = _find_recipe(conf, overrides, config_dir)
    return conf


def _find_recipe(conf: RunConf, overrides: Sequence[str], config_dir: str | None) -> dict[str, Any] | None:
    """Return what the chosen experiment is without further overrides, if it is the one that has `expected`."""
    chosen = tuple(text for text in overrides if re.match(r"\+*experiment=", text))
    if not conf.expected or not chosen or len(chosen) == len(overrides):
        return None
    try:
        recipe = compose_point(chosen, config_dir)
    except ConfigError:  # it is made whole by the command line
        return None
    return config_keys(recipe) if recipe.expected == conf.expected else None


@functools.lru_cache(maxsize=MOST_POINTS)
def compose_point(texts: tuple[str, ...], config_dir: str | None) -> RunConf:
    """Compose and validate one point of a sweep; cached.

    The command's check, the plan and the launcher each ask for it. The result is shared: do not mutate it.

    Raises:
        ConfigError, HydraException, OmegaConfBaseException: the point does not compose or is invalid.
    """
    return build_run_conf(compose_config(list(texts), config_dir), texts, config_dir)


UNCOMPOSABLE = (
    *(HydraException, OmegaConfBaseException, YAMLError, TypeError, ValueError, AssertionError),
    *(ArithmeticError, RecursionError),
)
"""Exceptions of Hydra and OmegaConf when overrides and files do not compose."""


def try_point(point: Sequence[str], config_dir: str | None) -> tuple[RunConf | None, list[str], list[str]]:
    """Compose one point.

    Returns:
        The configuration or None; one line per broken rule; the reasons why it does not compose.
    """
    try:
        return compose_point(tuple(point), config_dir), [], []
    except ConfigError as error:
        return None, error.mistakes, []
    except UNCOMPOSABLE as error:
        return None, [], [describe_uncomposable(error, point)]


def describe_uncomposable(error: Exception, point: Sequence[str]) -> str:
    """Return why a point does not compose; has own messages for launchers and fields of null sections."""
    for text in point:
        if text.startswith("hydra/launcher=") and "hydra/launcher" in str(error):
            return f"`{text}`: is no installed launcher; choose from basic, workers, or install its package"
        section = re.match(r"\+*(quant|lora)\.", text)
        if section and not any(re.match(rf"\+*{section[1]}=(?!none)", other) for other in point):
            return f"`{text}`: {section[1]} is none here; choose an option of the group too ({section[1]}=OPTION)"
        if re.match(r"\+*expected\.", text):
            return f"`{text}`: a list is set as a whole, such as expected=[], or in a file"
    if twice := re.match(r"Multiple values for \S+\. .*'override /?(\S+): (\S+)'", str(error)):
        name, option = twice.groups()
        return f"`{name}={option}`: a defaults list chooses `{name}` a second time; write - override /{name}: {option}"
    return first_line(error)


def drop_consequences(broken: Sequence[str], mistakes: Sequence[str]) -> list[str]:
    """Return the broken rules without those of keys that only lack a value because their override was wrong.

    Args:
        broken: one line for each rule.
        mistakes: one line for each wrong override.
    """
    wrong = {re.split(r"[=`:]", line.lstrip("`+"))[0] for line in mistakes if line.startswith("`")}
    return [line for line in broken if not (": must be set" in line and line.split("`")[1] in wrong)]


def load_conf(overrides: list[str] | None = None, config_dir: str | None = None) -> RunConf:
    """Compose and validate a run's configuration from Python, with command-line overrides.

    >>> load_conf(["quant=nf4", "training.beta=0.2"]).training.beta
    0.2

    Raises:
        ConfigError: one line per mistake.
    """
    overrides = list(overrides or [])
    checked = check_overrides(overrides, config_dir)
    mistakes = checked.mistakes + (checked.find_single_run_mistakes() if checked.composable else [])
    point = {override.key_or_group: str(override.input_line) for override in checked.sound}  # the last of each key
    if checked.of_sweep()[0]:  # with sweep=NAME, whose points the command validates
        point = {text: text for text in overrides}
    if not checked.composable or (mistakes and checked.of_sweep()[0]):
        raise ConfigError(mistakes)
    conf, broken, uncomposable = try_point(tuple(point.values()), config_dir)
    # A wrong override may keep the whole from composing; its own line is the better message.
    mistakes += drop_consequences(broken, mistakes) + ([] if mistakes else uncomposable)
    if conf is None or mistakes:
        raise ConfigError(mistakes)
    return copy.deepcopy(conf)

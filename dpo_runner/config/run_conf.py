"""`RunConf`: the complete configuration of one run, validated on construction. Imports no torch."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from dpo_runner.config.rules.benchmarks import check_benchmarks
from dpo_runner.config.rules.data import check_data
from dpo_runner.config.rules.expected import check_expected
from dpo_runner.config.rules.fields import (
    RANGES,
    SOURCE_RANGES,
    check_field,
    check_names,
    check_range,
    walk_fields,
)
from dpo_runner.config.rules.generate import check_generate, check_rounds
from dpo_runner.config.rules.launch import check_launch, check_sharding
from dpo_runner.config.rules.model import check_model_groups
from dpo_runner.config.rules.sweep import check_search, check_sweep
from dpo_runner.config.rules.training import check_evaluation, check_torch_compile, check_training
from dpo_runner.config.sections.run import RunFields
from dpo_runner.errors import ConfigError


@dataclass
class RunConf(RunFields):
    """The complete configuration of one run.

    Raises:
        ConfigError: one line per field that is out of range or contradicts another.
    """

    evaluation_is_optional: bool = field(default=False, compare=False, metadata={"omegaconf_ignore": True})
    """Whether only a preset asks for evaluations within the run (`${if_evaluation_rows:…}`); no key of the YAML."""

    recipe: dict[str, Any] | None = field(default=None, compare=False, metadata={"omegaconf_ignore": True})
    """The experiment without further overrides, if there are some and `expected` is its; no key of the YAML."""

    def __post_init__(self) -> None:
        if mistakes := find_mistakes(self):
            raise ConfigError(mistakes)


def count_processes(conf: RunFields) -> int:
    """Return `launch.processes` as a number; 1 for `auto`, which the run itself replaces by a number."""
    return conf.launch.processes if isinstance(conf.launch.processes, int) else 1


def find_mistakes(conf: RunFields) -> list[str]:
    """Return one line per broken rule; an empty list means that the run may start."""
    values = dict(walk_fields(conf))

    told = {key: list(check_field(key, field, value)) for key, (field, value) in values.items()}
    mistakes = [line for lines in told.values() for line in lines]
    ranges = [*RANGES]
    for name in conf.data.sources:
        ranges += [(f"data.sources.{name}.{key}", *rest) for key, rest in SOURCE_RANGES.items()]
    ranges = [rule for rule in ranges if rule[0] in values and not told[rule[0]]]
    mistakes += [line for rule in ranges for line in check_range(*rule, values[rule[0]][1])]
    if not mistakes:  # rules between fields assume that each field is valid
        mistakes = [
            *check_model_groups(conf),
            *check_data(conf),
            *check_training(conf),
            *check_launch(conf),
            *check_sharding(conf),
            *check_torch_compile(conf),
            *check_evaluation(conf),
            *check_names(conf),
            *check_generate(conf),
            *check_rounds(conf),
            *check_expected(conf),
            *check_benchmarks(conf),
            *check_sweep(conf.sweep),
            *check_search(conf),
        ]
    return mistakes


def config_keys(conf: Any) -> dict[str, Any]:
    """Return a run's configuration as plain containers, for YAML and JSON."""
    fields = [field for field in dataclasses.fields(conf) if not field.metadata.get("omegaconf_ignore")]
    return {field.name: _to_plain(getattr(conf, field.name)) for field in fields}


def _to_plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return config_keys(value)
    if isinstance(value, dict):
        return {key: _to_plain(item) for key, item in value.items()}
    return [_to_plain(item) for item in value] if isinstance(value, (list, tuple)) else value

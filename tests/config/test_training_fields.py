"""The generated training fields match the installed TRL."""

import dataclasses
import enum
from importlib.metadata import version
from pathlib import Path

import pytest

from dpo_runner.config.compose import load_conf
from dpo_runner.config.rules.training import OTHER_FIELDS, OTHER_VALUES, OUR_DEFAULTS, OWNED_FIELDS
from dpo_runner.config.sections.training import TrainingConf
from dpo_runner.errors import ConfigError
from tests.support.programs import run_python

ROOT = Path(__file__).parents[2]
PINS = (ROOT / "constraints.txt").read_text().splitlines()
IS_PINNED = {f"{name}=={version(name)}" for name in ("transformers", "trl")} <= set(PINS)


def test_every_field_of_dpo_config_is_accepted_or_refused_with_a_reason() -> None:
    from trl import DPOConfig

    upstream = {field.name for field in dataclasses.fields(DPOConfig) if field.init}
    ours = {field.name for field in dataclasses.fields(TrainingConf)}
    assert upstream <= ours | set(OWNED_FIELDS)
    assert ours - upstream <= (set() if IS_PINNED else {"activation_checkpointing", "activation_checkpointing_kwargs"})
    assert not ours & set(OWNED_FIELDS)


def test_defaults_are_upstreams_or_have_a_reason() -> None:
    from trl import DPOConfig

    for field in dataclasses.fields(DPOConfig):
        if field.name in OWNED_FIELDS or not field.init:
            continue
        upstream = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        upstream = upstream.value if isinstance(upstream, enum.Enum) else upstream
        ours = getattr(TrainingConf(), field.name)
        if field.name in OUR_DEFAULTS:
            assert ours == OUR_DEFAULTS[field.name][0] != upstream
        else:
            assert ours == upstream, field.name


@pytest.mark.skipif(not IS_PINNED, reason="the module is written with the versions of constraints.txt")
def test_the_module_is_what_the_script_writes() -> None:
    script = ROOT / "scripts" / "make_training_fields.py"
    assert run_python(str(script), "--check").returncode == 0


@pytest.mark.parametrize("name", sorted(OWNED_FIELDS))
def test_owned_fields_name_the_key_to_use_instead(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_conf([f"training.{name}=1"])
    assert caught.value.mistakes == [f"`training.{name}`: is not set here; {OWNED_FIELDS[name]}"]


def test_fields_and_losses_of_others_are_not_trls() -> None:
    fields = {field.name: field for field in dataclasses.fields(TrainingConf)}
    assert not OTHER_FIELDS.keys() & {*fields, *OWNED_FIELDS}
    for name in ("loss_type", "optim"):
        assert not OTHER_VALUES[f"training.{name}"].keys() & set(fields[name].metadata["choices"])

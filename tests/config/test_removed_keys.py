"""Runs and sweeps of earlier versions, with removed keys in their configurations, stay readable."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_runner.config.compose import load_conf
from dpo_runner.config.keys import REMOVED_KEYS, Effect, effect_of, split_removed
from dpo_runner.config.run_conf import config_keys
from dpo_runner.config.schema import SCHEMA
from dpo_runner.errors import ConfigError
from dpo_runner.evaluate.settings import compose
from dpo_runner.records.checkpoints import write_sealed
from dpo_runner.records.differences import find_differing
from dpo_runner.records.directory import RunDirectory
from dpo_runner.records.reading import read_run_conf
from dpo_runner.records.resume import check_continuable
from dpo_runner.records.runs import read_runs
from dpo_runner.sweep.points import digest_config
from tests.support.run_folders import write_run

OFF = {"engine.compile_layers": False, "engine.keep_dequantized": None, "quant.config": {}}
HQQ = {"quant.config": {"quant_method": "hqq", "nbits": 4}}


def write_old_run(path: Path, overrides: list[str], state: str = "finished", **removed: Any) -> None:
    """Write a run with a checkpoint and a config.yaml with removed keys."""
    write_run(path, state=state)
    RunDirectory(path).write_config(load_conf([f"run_dir={path}", *overrides]), [])
    (path / "environment.json").write_text("{}")
    write_sealed(path / "checkpoints" / "checkpoint-2", lambda to: (to / "trainer_state.json").write_text("{}"))
    config = yaml.safe_load((path / "config.yaml").read_text())
    for key, value in {**OFF, **removed}.items():
        section, _, name = key.partition(".")
        if config[section] is not None:
            config[section][name] = value
    (path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def test_the_table_names_no_key_that_there_is() -> None:
    assert OFF.keys() == REMOVED_KEYS.keys() and not REMOVED_KEYS.keys() & SCHEMA.keys()
    assert all(removed.off[0] == OFF[key] for key, removed in REMOVED_KEYS.items())


def test_a_refusal_imports_no_torch() -> None:
    code = """
import sys
from dpo_runner.sweep.command_line import check_command_line
print(check_command_line(["engine.compile_layers=true"]), "torch" in sys.modules)
"""
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
        == "['`engine.compile_layers`: was removed; leave it out'] False\n"
    )


@pytest.mark.parametrize("overrides", [[], ["quant=nf4"]], ids=["unquantized", "nf4"])
@pytest.mark.parametrize("removed", [{}, {"engine.keep_dequantized": False}], ids=["defaults", "off"])
def test_a_key_that_was_off_says_nothing(overrides: list[str], removed: dict[str, Any]) -> None:
    write_old_run(Path("r"), overrides, **removed)
    conf = load_conf(["run_dir=r", *overrides])
    assert read_run_conf(Path("r")) == conf
    assert compose(read_run_conf(Path("r")), []).training.beta == conf.training.beta
    for state in ("finished", "interrupted"):
        check_continuable(Path("r"), {"state": state}, conf)
    with pytest.raises(ConfigError, match=r"^`seed=1`: the run in r has 42; use that value, or another run_dir$"):
        check_continuable(Path("r"), {"state": "interrupted"}, load_conf(["run_dir=r", "seed=1", *overrides]))


@pytest.mark.parametrize("key", ["engine.compile_layers", "engine.keep_dequantized"])
def test_what_was_on_for_speed_counts_for_a_run_that_is_to_go_on_alone(key: str) -> None:
    write_old_run(Path("r"), [], **{key: True})
    conf = load_conf(["run_dir=r"])
    assert read_run_conf(Path("r")) == conf
    check_continuable(Path("r"), {"state": "finished"}, conf)
    with pytest.raises(ConfigError) as refusal:
        check_continuable(Path("r"), {"state": "interrupted"}, conf)
    assert refusal.value.mistakes == [
        f"`{key}=True`: the run in r was begun with it, and it was removed; use another run_dir"
    ]


def test_a_run_on_a_quantizer_that_was_removed_is_one_line() -> None:
    write_old_run(Path("r"), ["quant=nf4"], **HQQ)
    with pytest.raises(ConfigError) as refusal:
        read_run_conf(Path("r"))
    (line,) = refusal.value.mistakes
    assert line.startswith("r/config.yaml: `quant.config={'quant_method': 'hqq', 'nbits': 4}`: was removed, and the ")
    for state in ("finished", "interrupted"):
        with pytest.raises(ConfigError) as refusal:
            check_continuable(Path("r"), {"state": state}, load_conf(["run_dir=r"]))
        (line,) = refusal.value.mistakes
        assert line.startswith("`quant.config={'quant_method': 'hqq', 'nbits': 4}`: the run in r was begun with it, ")


def test_a_comparison_drops_keys_that_were_off_and_keeps_those_that_were_on(tmp_path: Path) -> None:
    write_old_run(tmp_path / "old", ["quant=nf4"])
    write_old_run(tmp_path / "compiled", ["quant=nf4"], **{"engine.compile_layers": True})
    write_run(tmp_path / "new")
    RunDirectory(tmp_path / "new").write_config(load_conf(["quant=nf4", f"run_dir={tmp_path / 'new'}"]), [])
    runs, notes = read_runs([tmp_path])
    configs = {run.name: run.config for run in runs}
    assert not notes
    assert find_differing([configs["old"], configs["new"]], {"run_dir"}) == []
    assert configs["compiled"]["engine.compile_layers"] is True
    assert not any(key.startswith(("engine.keep_dequantized", "quant.config")) for key in configs["compiled"])


@pytest.mark.parametrize("written", [{}, {"engine": None, "quant": [1]}, {1: 2, "engine": {"compile_layers": {}}}])
def test_damage_is_left_to_others(written: dict[Any, Any]) -> None:
    before = json.dumps(written)
    kept, active = split_removed(written)
    assert json.dumps(written) == before
    assert (kept == written) == (not active)


@pytest.mark.parametrize("overrides", [[], ["quant=nf4", "training.beta=0.2"]], ids=["unquantized", "nf4"])
def test_jobs_of_a_sweep_keep_the_names_that_earlier_versions_gave_them(overrides: list[str]) -> None:
    conf = load_conf(overrides)
    told = {key: value for key, value in config_keys(conf).items() if effect_of(key) is not Effect.PLACES}
    del told["launch"], told["training"]["parallelism_config"], told["samples"]["reward"]  # earlier versions lack them
    del told["rounds"], told["samples"]["prompts"], told["training"]["report_to"]
    told["engine"] |= {"compile_layers": False, "keep_dequantized": None}
    if told["quant"] is not None:
        told["quant"]["config"] = {}
    for source in ("data", "eval_data"):
        for key in ("drop_columns", "roles", "max_length_difference", "max_similarity") if told.get(source) else ():
            del told[source][key]
    assert digest_config(conf) == hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

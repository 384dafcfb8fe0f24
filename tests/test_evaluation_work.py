"""Which models an evaluation compares."""

import pytest

from dpo_runner import load_conf, run
from dpo_runner.artifacts import read_summary
from dpo_runner.errors import ConfigError
from dpo_runner.evaluate import evaluate


def test_the_sft_model_is_the_reference_where_the_run_began_with_one(tiny_run, sft_adapter, tmp_path) -> None:
    more = [f"model.adapter={sft_adapter}", "training.learning_rate=1e-2", "training.bf16=false"]
    run(load_conf([*tiny_run, *more, "training.per_device_eval_batch_size=1", "run_dir=r"]))
    after = read_summary(tmp_path / "r")["after"]
    assert evaluate(tmp_path / "r")["reward_margin"]["mean"] == pytest.approx(after["eval_rewards/margins"], abs=1e-4)


def test_a_run_with_another_reference_is_refused(tiny_run, sft_adapter, tmp_path) -> None:
    run(load_conf([*tiny_run, f"model.adapter={sft_adapter}", "model.reference=base", "run_dir=r"]))
    with pytest.raises(ConfigError, match=r"`model\.reference=base`: only runs whose reference"):
        evaluate(tmp_path / "r")

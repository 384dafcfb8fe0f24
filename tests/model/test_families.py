"""Every family completes a run, quantized or not, or is refused before training with a clear message."""

import json
from pathlib import Path

import pytest

from dpo_runner.config.compose import load_conf
from dpo_runner.errors import ConfigError
from dpo_runner.train import run
from tests.support.families import FAMILIES, make_family

IN_NAME_ONLY = {"mixtral": r"experts\.gate_up_proj", "falcon": r"self_attention\.query_key_value\.weight"}


def settings(family: str, tokenizer, tiny_run: list[str], tmp_path: Path) -> list[str]:
    folder = make_family(family, tokenizer, tmp_path / "model")
    return [
        *tiny_run,
        f"model.model_name_or_path={folder}",
        "training.max_steps=2",
        "samples.num_prompts=1",
        "run_dir=r",
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_runs(family: str, tokenizer, tiny_run: list[str], tmp_path: Path) -> None:
    summary = run(load_conf(settings(family, tokenizer, tiny_run, tmp_path)))
    assert summary is not None and summary["steps"] == 2
    # The loss of an untrained policy is ln 2; Mixtral's has the router's loss on top.
    assert summary["before"]["eval_loss"] == pytest.approx(0.6931, abs=0.01 if family == "mixtral" else 1e-3)
    assert (tmp_path / "r" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_runs_in_nf4_or_is_refused(family: str, tokenizer, tiny_run: list[str], tmp_path: Path) -> None:
    """Trap 13: bitsandbytes silently leaves the custom layers of some families unquantized."""
    conf = load_conf([*settings(family, tokenizer, tiny_run, tmp_path), "quant=nf4"])
    if family in IN_NAME_ONLY:
        with pytest.raises(
            ConfigError, match=rf"only \d+ % of the weights .* would be quantized.*{IN_NAME_ONLY[family]}"
        ):
            run(conf)
        assert not (tmp_path / "r").exists()
        return
    summary = run(conf)
    assert summary is not None and summary["before"]["eval_loss"] == pytest.approx(0.6931, abs=1e-3)
    assert json.loads((tmp_path / "r" / "status.json").read_text())["state"] == "finished"

"""A model under each quantization, through train, evaluate, chat and export, as a user would do it."""

import functools
import json
import math
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dpo_runner import run
from dpo_runner.chat import main as chat
from dpo_runner.config.compose import load_conf
from dpo_runner.config.yaml_files import CONF_DIR
from dpo_runner.evaluate.__main__ import main as evaluate
from dpo_runner.export.__main__ import main as export
from dpo_runner.model import result
from dpo_runner.records.reading import read_metrics
from tests.support.common import real_model_dtype, run_main

QUANTIZATIONS = sorted({path.stem for path in (CONF_DIR / "quant").glob("*.yaml")} - {"none"})
CASES = [
    pytest.param("int8", "smollm2", marks=pytest.mark.real_model),
    *(pytest.param(quant, "tiny_random") for quant in QUANTIZATIONS if quant != "int8"),
    *(
        pytest.param(quant, "smollm2", marks=[pytest.mark.real_model, pytest.mark.slow])
        for quant in QUANTIZATIONS
        if quant != "int8"
    ),
]


@pytest.mark.parametrize(("quant", "model"), CASES)
def test_a_quantized_model_goes_through_all_commands(
    quant: str, model: str, pairs: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Outlier columns, of which tiny random models have none, made the default model's run in int8 fail its checks."""
    few = [
        *("data=local_file", f"data.path={pairs}", "data.max_train_samples=2", "data.max_eval_samples=2"),
        *("training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=1", "training.max_steps=2"),
        *("training.warmup_steps=0", "training.learning_rate=4e-4", "training.logging_steps=1"),
        *("training.eval_strategy=no", "samples.num_prompts=0"),
        *("wandb=disabled", f"model.dtype={real_model_dtype()}"),
    ]
    summary = run(load_conf([f"model={model}", f"quant={quant}", "run_dir=r", *few]))
    assert summary is not None and summary["before"]["eval_loss"] == pytest.approx(math.log(2), abs=0.02)
    losses = [event["loss"] for event in read_metrics(Path("r")) if "loss" in event]
    assert losses[0] == pytest.approx(math.log(2), abs=0.02) and losses[1] != losses[0]
    weights = load_file("r/adapter/adapter_model.safetensors")
    assert all(weight.any() for name, weight in weights.items())

    monkeypatch.setattr(result, "load_tuned_model", functools.cache(result.load_tuned_model))  # quantizing takes long
    assert run_main(evaluate, "r", "samples.num_prompts=1", "samples.max_new_tokens=2") == 0
    evaluated = json.loads(next(Path("r/evaluations").glob("*/evaluation.json")).read_text())
    assert evaluated["evaluated"]["pairs"] == 2
    capfd.readouterr()
    assert run_main(chat, "r", "--prompt", "What is 7 plus 7?", "--max-new-tokens", "2") == 0
    said = capfd.readouterr()
    assert said.out.strip() and not said.err
    assert run_main(export, "r", "--out", "merged") == 0
    assert json.loads(Path("merged/lineage.json").read_text())["dpo_run"]["quantization"] == quant

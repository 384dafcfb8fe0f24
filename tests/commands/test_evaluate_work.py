"""The models that an evaluation compares, and the precision of its scores."""

import json
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dpo_runner import run
from dpo_runner.config.compose import load_conf
from dpo_runner.evaluate.evaluation import evaluate
from dpo_runner.records.reading import read_summary
from tests.support.common import make_adapter

SFT = {
    "continue": ["lora=none", "model.adapter=SFT"],
    "stack": ["model.adapter=SFT", "model.adapter_mode=stack"],
    "merge": ["model.adapter=SFT", "model.adapter_mode=merge"],
}
FULL = ["lora=none", "training.learning_rate=1e-3"]
RUNS = {
    "continue, initial": SFT["continue"],
    **{f"{mode}, base": [*start, "model.reference=base"] for mode, start in SFT.items()},
    "full on merged, base": [*SFT["merge"], *FULL, "model.reference=base"],
    "new, adapter": ["model.reference=ADAPTER"],
    "stack, adapter": [*SFT["stack"], "model.reference=ADAPTER"],
    "pissa, adapter": ["lora.init_lora_weights=pissa", "lora.r=4", "model.reference=ADAPTER"],
    "full, adapter": [*FULL, "model.reference=ADAPTER"],
    "new, model": ["model.reference=MODEL"],
}


@pytest.fixture(scope="module")
def paths(tiny_model: str, sft_adapter: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("references")
    adapter = make_adapter(tiny_model, folder / "adapter", seed=7, std=0.2, r=2, target_modules=["q_proj", "v_proj"])
    other = make_adapter(tiny_model, folder / "other", seed=8, std=0.2, r=2, target_modules=["k_proj", "o_proj"])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), other).merge_and_unload()
    model.save_pretrained(folder / "model")
    return {"SFT": sft_adapter, "ADAPTER": adapter, "MODEL": str(folder / "model")}


def train(overrides: list[str], paths: dict[str, str], folder: Path) -> dict[str, float]:
    """Train for a few steps, and return the run's own figures of the tuned model."""
    named = [f"{key}={paths.get(value, value)}" for key, _, value in (text.partition("=") for text in overrides)]
    shared = ["data.eval_fraction=0.4", "training.per_device_eval_batch_size=1"]
    fast = ["training.max_steps=2", "training.learning_rate=1e-2", "training.warmup_steps=0"]
    run(load_conf([*shared, *fast, *named, f"run_dir={folder}"]))
    return read_summary(folder)["after"]


def check(run_dir: Path, after: dict[str, float], autocast: str | None) -> None:
    """Compare an evaluation's figures with the run's own, and those of the reference separately."""
    within = 5e-4 if autocast is None else 2e-3  # in 16 bits, packed and padded rows round differently
    result = evaluate(run_dir)
    assert result["evaluated"]["autocast"] == autocast
    assert result["reward_accuracy"]["mean"] == pytest.approx(after["eval_rewards/accuracies"], abs=1e-6)
    assert result["reward_margin"]["mean"] == pytest.approx(after["eval_rewards/margins"], abs=within)
    [folder] = (run_dir / "evaluations").iterdir()
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    for part in ("chosen", "rejected"):
        measured = sum(pair[part]["reference_logp"] for pair in pairs) / len(pairs)
        own = after[f"eval_logps/{part}"] - after[f"eval_rewards/{part}"] / result["evaluated"]["beta"]
        assert measured == pytest.approx(own, abs=within)


@pytest.mark.parametrize("start", RUNS.values(), ids=RUNS.keys())
def test_the_reference_is_the_runs_own(start, tiny_run, paths, tmp_path) -> None:
    check(tmp_path / "r", train([*tiny_run, "training.bf16=false", *start], paths, tmp_path / "r"), None)


@pytest.mark.parametrize("start", [["model.reference=ADAPTER"], FULL], ids=["new", "full"])
def test_it_scores_in_the_precision_of_the_run(start, tiny_run, paths, tmp_path) -> None:
    check(tmp_path / "r", train([*tiny_run, "training.bf16=true", *start], paths, tmp_path / "r"), "bfloat16")

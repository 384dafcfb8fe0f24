"""Every bundled YAML file composes, is valid, and has the documented values."""

from pathlib import Path

import pytest

from dpo_runner.config.compose import load_conf
from dpo_runner.config.yaml_files import CONF_DIR

FILES = sorted(path.relative_to(CONF_DIR) for path in CONF_DIR.rglob("*.yaml"))
NEEDED = {
    "data=local_file": ["data.path=x.jsonl"],
    "data=prompts": ["data.path=x.jsonl"],
    "model=zephyr_sft": ["lora=none"],
    "generate=endpoint": ["generate.models=[served]"],
    "reward=function": ["reward.function.name=mine:score"],
    "reward=reward_model": ["reward.reward_model.model_name_or_path=x"],
    "reward=judge": ["reward.judge.base_url=http://127.0.0.1:8000/v1", "reward.judge.model=x"],
}
SHIPPED = {
    "model": {"smollm2", "mistral", "zephyr_sft", "llama3", "qwen3", "tiny_random"},
    "quant": {"none", "nf4", "fp4", "int8"},
    "lora": {"none", "r16", "r64_all_linear"},
    "data": {"concise", "local_file", "ultrafeedback", "hh_rlhf"},
    "training": {"dpo", "ipo", "smoke"},
    "wandb": {"offline", "online", "disabled"},
    "experiment": {"zephyr_7b_dpo_qlora", "trl_invariant"},
    "generate": {"in_process", "endpoint"},
    "reward": {"length", "sentiment", "function", "reward_model", "judge"},
    "benchmarks": {"basics"},
}


def test_every_group_has_its_options() -> None:
    for group, options in SHIPPED.items():
        assert options <= {path.stem for path in FILES if path.parent.name == group}


@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_file_composes_and_passes_all_checks(file: Path) -> None:
    overrides = [] if file.parent == Path() else [f"{file.parent}={file.stem}"]
    load_conf(overrides + NEEDED.get(overrides[0] if overrides else "", []))


@pytest.mark.parametrize("file", [path for path in FILES if path.parent.name in ("experiment", "sweep")], ids=str)
def test_experiments_and_sweeps_begin_with_their_command(file: Path) -> None:
    lines = (CONF_DIR / file).read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1].startswith(f"# python -m dpo_runner {file.parent}={file.stem}")


def test_zephyr_recipe_is_the_published_one() -> None:
    conf = load_conf(["experiment=zephyr_7b_dpo_qlora"])
    training, lora, quant = conf.training, conf.lora, conf.quant
    assert lora is not None and quant is not None
    assert conf.run_name == "zephyr_7b_dpo_qlora"
    assert conf.model.model_name_or_path == "mistralai/Mistral-7B-v0.1"
    assert (conf.model.adapter, conf.model.adapter_mode) == ("alignment-handbook/zephyr-7b-sft-qlora", "merge")
    assert (quant.load_in_4bit, quant.bnb_4bit_quant_type, quant.bnb_4bit_use_double_quant) == (True, "nf4", False)
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (128, 128, 0.05)
    assert set(lora.target_modules) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert (training.beta, training.learning_rate, training.lr_scheduler_type) == (0.01, 5e-6, "cosine")
    assert (training.warmup_steps, training.num_train_epochs, training.max_length) == (0.1, 1, 1024)
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 16
    assert (conf.data.path, conf.data.split, conf.data.eval_split) == (
        "HuggingFaceH4/ultrafeedback_binarized",
        "train_prefs",
        "test_prefs",
    )

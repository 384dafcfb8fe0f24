"""Quantization as configured, as defined by a checkpoint, and as found in the loaded model."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from dpo_runner.config.compose import load_conf
from dpo_runner.errors import ConfigError
from dpo_runner.model.blueprint import Blueprint, draw_blueprint
from dpo_runner.model.policy import load_policy
from dpo_runner.model.quantization import (
    build_quantization_config,
    choose_quantization,
    count_quantized,
    describe_quantization,
    name_quantization,
)
from tests.support.families import make_family
from tests.support.trainers import build, first_rows, score_both


def test_exactly_one_kind_is_chosen() -> None:
    with pytest.raises(ConfigError, match="load_in_4bit and load_in_8bit set; use exactly one"):
        load_conf(["quant=nf4", "quant.load_in_8bit=true"])
    with pytest.raises(ConfigError, match="neither load_in_4bit nor load_in_8bit set"):
        load_conf(["quant=nf4", "quant.load_in_4bit=false"])


def test_storage_dtype_reaches_the_layers(tiny_run, tmp_path) -> None:
    trainer = build([*tiny_run, "quant=nf4", "quant.bnb_4bit_quant_storage=bfloat16"], tmp_path)
    layer = trainer.model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.base_layer.weight.dtype == torch.bfloat16
    trainer.train()


@pytest.fixture(scope="session")
def quantized_checkpoint(tiny_model, tmp_path_factory) -> str:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("nf4")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return str(folder)


def test_a_quantized_checkpoint_counts_as_it_is(quantized_checkpoint, tiny_run, tmp_path) -> None:
    overrides = [*tiny_run, f"model.model_name_or_path={quantized_checkpoint}"]
    same = ["quant=nf4", "quant.bnb_4bit_use_double_quant=false"]
    for extra in ([], same):
        trainer = build([*overrides, *extra], tmp_path)
        assert any(type(module).__name__ == "Linear4bit" for module in trainer.model.modules())
        policy, reference, _ = score_both(trainer, first_rows(trainer))
        assert torch.equal(policy, reference)
    trainer.train()
    config = Blueprint(load_conf(overrides).model).config
    assert describe_quantization(load_conf(), config.quantization_config) == "the checkpoint's own (nf4)"
    for wrong in (["quant=nf4"], ["quant=fp4"], ["quant=int8"]):
        with pytest.raises(ConfigError, match=r"is quantized already, with .*; use quant=none"):
            draw_blueprint(load_conf([*overrides, *wrong]))
    with pytest.raises(ConfigError, match="quantized weights need an adapter"):
        draw_blueprint(load_conf([*overrides, "lora=none"]))


def test_a_quantized_checkpoint_is_never_merged_into(quantized_checkpoint, sft_adapter, tiny_run) -> None:
    """Trap 6."""
    overrides = [f"model.model_name_or_path={quantized_checkpoint}", f"model.adapter={sft_adapter}"]
    with pytest.raises(ConfigError, match="merging into it would round"):
        load_policy(Blueprint.of_run(load_conf([*tiny_run, *overrides, "model.adapter_mode=merge"])))


def test_another_method_than_the_checkpoints_is_a_contradiction() -> None:
    own = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ConfigError, match="with quant_method=gptq, not bitsandbytes"):
        choose_quantization(load_conf(["quant=nf4"]).quant, own, "x")
    assert choose_quantization(None, own, "x") is None


def test_the_plan_says_how_int8_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    conf = load_conf(["quant=int8"])
    assert describe_quantization(conf) == "int8 weights, inputs are not rounded on a CPU"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert describe_quantization(conf) == "int8 (LLM.int8())"
    assert "on a CPU" in describe_quantization(load_conf(["quant=int8", "training.use_cpu=true"]))
    assert conf.quant is not None and name_quantization(conf.quant) == "int8", "a card is read on other machines"
    assert describe_quantization(load_conf(), {"load_in_8bit": True}) == "the checkpoint's own (int8)"


def test_a_checkpoint_of_another_method_is_left_to_transformers(tiny_model, tiny_run, tmp_path) -> None:
    folder = tmp_path / "gptq"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    conf = load_conf([*tiny_run, f"model.model_name_or_path={folder}"])
    assert describe_quantization(conf, draw_blueprint(conf).config.quantization_config) == "the checkpoint's own (gptq)"
    with pytest.raises((ConfigError, ImportError), match=r"(?i)optimum|gptq"):
        load_policy(Blueprint.of_run(conf))


def test_what_is_left_out_on_purpose_is_not_held_against_a_model(tokenizer, tiny_run, tmp_path) -> None:
    folder = make_family("llama", tokenizer, tmp_path / "llama")
    overrides = [*tiny_run, f"model.model_name_or_path={folder}", "quant=nf4"]
    draw_blueprint(load_conf([*overrides, "quant.llm_int8_skip_modules=[lm_head,down_proj]"]))


def test_the_count_is_that_of_the_loaded_model(tokenizer, tmp_path) -> None:
    folder = make_family("mixtral", tokenizer, tmp_path / "mixtral")
    conf = load_conf([f"model.model_name_or_path={folder}", "quant=nf4"])
    loaded = AutoModelForCausalLM.from_pretrained(folder, quantization_config=build_quantization_config(conf.quant))
    packed = sum(
        module.weight.quant_state.shape.numel() for module in loaded.modules() if hasattr(module, "quant_state")
    )
    meta = Blueprint(conf.model).meta
    inner = sum(
        p.numel() for name, p in meta.named_parameters() if p.ndim > 1 and "embed" not in name and "head" not in name
    )
    with pytest.raises(ConfigError, match=rf"only {100 * packed / inner:.0f} % of"):
        draw_blueprint(conf)
    assert count_quantized(meta, [])[0] == 0.0  # no layers are replaced without a quantizer


def test_a_pickled_model_needs_permission(tiny_model, tiny_run, tmp_path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_model, folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    overrides = [*tiny_run, f"model.model_name_or_path={folder}"]
    with pytest.raises(ConfigError, match=r"model\.use_safetensors=false"):
        load_policy(Blueprint.of_run(load_conf(overrides)))
    policy = load_policy(Blueprint.of_run(load_conf([*overrides, "model.use_safetensors=false"])))
    assert torch.equal(policy.model.lm_head.weight, model.lm_head.weight)


def test_device_map_reaches_transformers(tiny_run) -> None:
    blueprint = Blueprint.of_run(load_conf(tiny_run))
    policy = load_policy(replace(blueprint, conf=replace(blueprint.conf, device_map="meta")))
    assert policy.model.device == torch.device("meta")  # accelerate interprets it; dpo_runner only passes it on

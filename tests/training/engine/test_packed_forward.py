"""Models for which the packed forward would not be exact are refused, each with its reason."""

from typing import Any

import pytest
import torch
import transformers
from peft import LoHaConfig, LoKrConfig, LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from dpo_runner.config.sections.training import TrainingConf
from dpo_runner.training.engine.packed.forward import why_not_packable
from tests.support.families import make_config

WITH_DROPOUT, WITHOUT = TrainingConf(disable_dropout=False), TrainingConf(disable_dropout=True)


def make_model(config: transformers.PretrainedConfig, attention: str = "sdpa") -> PreTrainedModel:
    """Build a model without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def grown(kind: str, context: int) -> dict[str, Any]:
    """Return config keys of a RoPE that extends `context` tokens to four times as many."""
    rope = {"rope_type": kind, "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": context}
    if kind == "longrope":
        own = {"max_position_embeddings": 256, "original_max_position_embeddings": context}
        return {**own, "rope_parameters": {**rope, **LONG}}
    return {"max_position_embeddings": context, "rope_parameters": rope}


LONG = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}  # one for each two of a head's 16 dimensions

REFUSED: list[tuple[str, dict[str, Any], str | None]] = [
    ("llama", {}, None),
    ("mistral", {"sliding_window": 64}, None),
    ("mistral", {"sliding_window": 63}, "the model's sliding window of 63 tokens is shorter than the longest row, 64"),
    ("gemma3", {"sliding_window": 63}, "the model's sliding window of 63 tokens"),
    ("gemma3", {"sliding_window": 63, "layer_types": ["full_attention"] * 2}, None),
    ("llama", {"attn_logit_softcapping": 50.0}, "the model caps its attention scores"),
    ("mixtral", {"router_aux_loss_coef": 0.001}, "TRL adds the loss of the experts' router"),
    ("mixtral", {"router_aux_loss_coef": 0.0}, None),
    ("mixtral", {"router_aux_loss_coef": 0.0, "router_jitter_noise": 0.1}, "the experts' router adds noise"),
    ("llama", {"attention_dropout": 0.1}, "dropout is on"),
    ("gpt2", {"attn_pdrop": 0.0, "resid_pdrop": 0.0}, "dropout is on"),  # embd_pdrop, a module
    ("gpt2", {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}, None),
    ("opt", {}, "dropout is on"),  # not a module
    ("opt", {"dropout": 0.0}, None),
    ("opt", {"dropout": 0.0, "layerdrop": 0.1}, "dropout is on"),
    ("llama", {"layer_types": ["linear_attention", "full_attention"]}, "the model has layers of the kind linear_att"),
    ("llama", grown("dynamic", 63), "the model's dynamic RoPE depends on the longest row of a batch"),
    ("llama", grown("dynamic", 64), None),
    ("llama", grown("yarn", 63), None),
    ("phi3", grown("longrope", 63), "the model's longrope RoPE depends on the longest row of a batch"),
    ("phi3", grown("longrope", 64), None),
    ("falcon", {}, "FalconForCausalLM does not attend through transformers' AttentionInterface"),
]


@pytest.mark.parametrize("family, changes, reason", REFUSED, ids=str)
def test_what_a_config_tells_is_refused(family: str, changes: dict[str, Any], reason: str | None) -> None:
    refusal = why_not_packable(make_model(make_config(family, **changes)), 64, WITH_DROPOUT)
    assert refusal == reason if reason is None else refusal is not None and refusal.startswith(reason)


def test_disabled_dropout_is_none_and_an_adapters_counts() -> None:
    model = make_model(make_config("gpt2"))
    assert why_not_packable(model, 64, WITHOUT) is None
    model = make_model(make_config("llama"))
    adapter = LoraConfig(lora_dropout=0.1)
    assert "dropout is on" in str(why_not_packable(model, 64, WITH_DROPOUT, adapters=[adapter]))
    assert why_not_packable(model, 64, WITHOUT, adapters=[adapter]) is None


@pytest.mark.parametrize("name", ["rank_dropout", "module_dropout"])
@pytest.mark.parametrize("method", [LoHaConfig, LoKrConfig])
def test_dropout_of_an_adapter_that_is_no_module_is_never_disabled(method: type, name: str) -> None:
    dropping, plain = (method(target_modules=["q_proj"], **more) for more in ({name: 0.5}, {}))
    model = make_model(make_config("llama"))
    for settings in (WITH_DROPOUT, WITHOUT):
        assert "adapter has dropout" in str(why_not_packable(model, 64, settings, [dropping]))
        assert why_not_packable(model, 64, settings, [plain]) is None
    model = get_peft_model(model, dropping)
    assert "adapter has dropout" in str(why_not_packable(model, 64, WITHOUT))


@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_other_attention_is_refused(attention: str) -> None:
    for family in ("llama", "gemma2"):  # gemma2, which caps its scores, supports only these
        model = make_model(make_config(family), attention)
        assert why_not_packable(model, 64, WITH_DROPOUT) == f"model.attn_implementation is {attention}, not sdpa"


def test_prompt_learning_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(make_config("llama", vocab_size=64))
    tuned = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert why_not_packable(tuned, 64, WITH_DROPOUT) == "prompt learning prepends virtual tokens to each row"


def test_models_that_take_images_are_refused() -> None:
    vision = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = make_config("gemma3", vocab_size=64, sliding_window=64)
    config = transformers.Gemma3Config(text_config=text.to_dict(), vision_config=vision)
    assert why_not_packable(make_model(config), 64, WITH_DROPOUT) == "the model takes more than text"


def test_noise_on_embeddings_is_left_to_trl() -> None:
    """NEFTune divides by the padded length, and draws noise for each copy of the prompt."""
    model = make_model(make_config("llama"))
    refusal = str(why_not_packable(model, 64, TrainingConf(neftune_noise_alpha=5.0)))
    assert refusal.startswith("training.neftune_noise_alpha scales its noise")
    assert why_not_packable(model, 64, TrainingConf(neftune_noise_alpha=0.0)) is None

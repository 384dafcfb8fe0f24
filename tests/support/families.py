"""Tiny random models of many families, with the byte tokenizer of `random:tiny-llama`."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

_LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_WITHOUT_GROUPS = {key: value for key, value in _LLAMA_LIKE.items() if key != "num_key_value_heads"}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _LLAMA_LIKE),
    "mistral": ("MistralConfig", _LLAMA_LIKE | {"sliding_window": 64}),
    "mixtral": ("MixtralConfig", _LLAMA_LIKE | {"num_local_experts": 4}),
    "qwen2": ("Qwen2Config", _LLAMA_LIKE),
    "qwen3": ("Qwen3Config", _LLAMA_LIKE | {"head_dim": 16}),
    "gemma2": ("Gemma2Config", _LLAMA_LIKE | {"head_dim": 16, "sliding_window": 64}),
    "gemma3": ("Gemma3TextConfig", _LLAMA_LIKE | {"head_dim": 16, "sliding_window": 64}),
    "phi3": ("Phi3Config", _LLAMA_LIKE),
    "olmo2": ("Olmo2Config", _LLAMA_LIKE),
    "gpt_neox": ("GPTNeoXConfig", _WITHOUT_GROUPS),
    "falcon": ("FalconConfig", {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}),
}
"""transformers' config class and its arguments, by family."""

_FURTHER: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": (
        "OPTConfig",
        {key: value for key, value in _WITHOUT_GROUPS.items() if key != "intermediate_size"}
        | {"ffn_dim": 128, "word_embed_proj_dim": 64},
    ),
    "nemotron": ("NemotronConfig", _LLAMA_LIKE),
    "gpt_neo": (
        "GPTNeoConfig",
        {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
        | {"window_size": 24, "max_position_embeddings": 512},
    ),
    "mpt": ("MptConfig", {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512}),
    "mamba": ("MambaConfig", {"hidden_size": 64, "num_hidden_layers": 2}),
    "lfm2": ("Lfm2Config", _LLAMA_LIKE | {"layer_types": ["conv", "full_attention"]}),
}
"""Further families, for the tests of single parts."""


def make_config(name: str, **arguments: Any) -> transformers.PretrainedConfig:
    """Return the config of a tiny model of a family; `arguments` add to or replace its own."""
    kind, own = (FAMILIES | _FURTHER)[name]
    config = getattr(transformers, kind)(**(own | arguments))
    assert isinstance(config, transformers.PretrainedConfig)
    return config


def make_family(name: str, tokenizer: PreTrainedTokenizerBase, folder: Path, **changes: Any) -> str:
    """Write a tiny random model of a family with `changes` to its config, and return its folder."""
    config = make_config(
        name,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **changes,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)

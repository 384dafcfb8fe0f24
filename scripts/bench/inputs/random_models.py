"""Models with random weights in the shapes of known models, with the default tokenizer; no hub access."""

from pathlib import Path
from typing import Any

_LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
_SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
_MISTRAL = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "sliding_window": None,
}
_TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SIZES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "tiny": ("llama", _TINY, False),
    "tiny, nf4": ("llama", _TINY, True),
    "SmolLM2-135M": ("llama", _SMOLLM2, False),
    "Mistral-7B, nf4": ("mistral", _MISTRAL, True),
    "Mistral-7B": ("mistral", _MISTRAL, False),
    "Llama-3.2-1B": ("llama", _LLAMA_1B, False),
}
"""Architecture, config sizes, and whether the base is quantized to 4 bits, by name.

Most important first, because time may run out."""


def write_random_model(name: str, folder: Path, device: str, dtype: str) -> str:
    """Write a model of size `name` unless it exists, and return its folder.

    Its vocabulary is the larger of its own and the default tokenizer's 49,152, so that every token has an embedding.

    Args:
        name: a key of `SIZES`; entries that differ only in quantization share a folder.
        folder: parent of the model's folder.
        device: device on which the weights are drawn.
        dtype: `bfloat16` or `float32`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from dpo_runner.model.files.gguf import write_model
    from dpo_runner.model.files.packaged import load_default_model_path

    kind, sizes, _ = SIZES[name]
    path = folder / f"{name.partition(',')[0]}-{dtype}"
    if not (path / "config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(load_default_model_path())
        special = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        vocabulary = max(sizes.get("vocab_size", 0), len(tokenizer))
        config = AutoConfig.for_model(kind, **{**sizes, "vocab_size": vocabulary, **special})
        config.max_position_embeddings = 8192
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        folder.mkdir(parents=True, exist_ok=True)
        write_model(path, model, tokenizer)
    return str(path)

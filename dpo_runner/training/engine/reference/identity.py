"""A digest of everything that reference log-probabilities depend on.

It covers the weights themselves, not their origin. Every tensor of the reference is hashed as it lies in memory, after
any quantization, merging or resizing: however it was loaded, the same digest means the same function. With XXH3 at 128
bits this takes 0.1 s per gigabyte. Adapters that are off in the reference belong to the policy and are left out, and so
are untrained ones: with `stack`, TRL's `ref` differs from seed to seed and adds nothing.
"""

import json
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import bitsandbytes as bnb
import torch
import xxhash
from peft import PeftConfig, PeftModel
from torch import nn

from dpo_runner.io.upstream import find_attention
from dpo_runner.model.base import base_of
from dpo_runner.training.ranks.sharding import whole

_PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes")
_IDLE_KEYS = ("_name_or_path", "transformers_version", "architectures", "base_model_name_or_path", "revision")
"""Keys of a model's and an adapter's config that do not affect results."""

_TENSORS = (torch.Tensor, nn.Parameter, bnb.nn.Params4bit, bnb.nn.Int8Params)
"""Tensor types that are fully described by their bytes and those of the other entries of a state dict."""

_PEFT_PREFIX, _WRAPPERS = "base_model.model.", ("base_layer", "original_module")
"""Prefix and parts that PEFT adds to the names of a model's own weights."""


def identify_reference(
    model: nn.Module, active: Sequence[str], forward: str, idle: Sequence[str] = ()
) -> tuple[str, dict[str, Any]]:
    """Return a digest of a reference, and the parts that it covers.

    Args:
        model: holds the reference: a separate model, or the policy's.
        active: the adapters of `model` that are on in the reference, such as a frozen SFT adapter and TRL's `ref`.
        forward: describes how log-probabilities are computed, autocast included.
        idle: further keys of configs that do not affect results.

    Raises:
        TypeError: there are weights of a type whose bytes cannot be read.
    """
    base = base_of(model)
    adapters: dict[str, PeftConfig] = model.peft_config if isinstance(model, PeftModel) else {}
    state = model.state_dict()
    active = [name for name in active if not _adds_nothing(state, name)]
    weights = xxhash.xxh3_128()
    for name, tensor in sorted(state.items()):
        parts = name.split(".")
        if set(adapters) & set(parts) - set(active):
            continue
        name = ".".join(part for part in parts if part not in _WRAPPERS).removeprefix(_PEFT_PREFIX)
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        weights.update(bytes_of(whole(tensor.detach())))
    configs = [base.config.to_dict(), *(adapters[name].to_dict() for name in active)]
    configs = [{key: value for key, value in config.items() if key not in (*_IDLE_KEYS, *idle)} for config in configs]
    device = next(base.parameters()).device
    made_of = {
        "weights": weights.hexdigest(),
        "config": xxhash.xxh3_128_hexdigest(_to_json(configs)),
        "forward": forward,
        "attention": find_attention(base.config),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _describe_cpu(),
        "versions": {name: metadata.version(name) for name in _PACKAGES},
    }
    return xxhash.xxh3_128_hexdigest(_to_json(made_of)), made_of


def _adds_nothing(state: dict[str, torch.Tensor], adapter: str) -> bool:
    """Return whether an adapter is an untrained LoRA: one matrix of each product is random, the other 0."""
    own = [(name, tensor) for name, tensor in state.items() if adapter in name.split(".")]
    return bool(own) and all(
        "lora_A" in name or "lora_embedding_B" in name or not whole(tensor).any() for name, tensor in own
    )


def _describe_cpu() -> str:
    return f"cpu {torch.backends.cpu.get_cpu_capability()}"


def bytes_of(tensor: torch.Tensor) -> Any:
    """Return a tensor's bytes as they lie in memory: a one-dimensional uint8 array.

    Raises:
        TypeError: it is of a type whose bytes cannot be read or do not fully describe it.
    """
    if type(tensor) not in _TENSORS:
        raise TypeError(f"weights of type {type(tensor).__name__}")
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def _to_json(value: Any) -> bytes:
    return json.dumps(
        value, sort_keys=True, default=lambda other: sorted(other) if isinstance(other, set) else str(other)
    ).encode()

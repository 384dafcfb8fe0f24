"""Base models loaded without dpo_runner, tolerances, and overrides of the adapter modes."""

import torch
from transformers import AutoModelForCausalLM

from dpo_runner.config.compose import load_conf
from dpo_runner.model.quantization import build_quantization_config

EXACT = ["training.bf16=false", "model.dtype=float32", "training.eval_strategy=no", "training.save_strategy=no"]


def load_by_hand(tiny_model: str, quant: str = "none"):
    config = build_quantization_config(load_conf([f"quant={quant}"]).quant)
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, quantization_config=config).eval()


def close(one: torch.Tensor, other: torch.Tensor, quant: str = "none") -> bool:
    tolerance = 1e-3 if quant == "none" else 0.2  # sums of about -100; 4-bit products are in bf16
    return torch.allclose(one.float(), other.float(), rtol=1e-5, atol=tolerance)


MODES = {
    "continue": ["lora=none"],
    "stack": ["model.adapter_mode=stack"],
    "merge": ["model.adapter_mode=merge"],
}

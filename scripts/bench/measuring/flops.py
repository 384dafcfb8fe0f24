"""Floating-point operations of a DPO step that scores no token twice, and what the machine does at most.

With N the parameters of the linear layers, N_lora of their adapters, V·h the head's, d the attention's width and L
layers, a pair of P prompt, C chosen and R rejected tokens takes

    F = (4·N + 6·N_lora)·(P+C+R) + 4·V·h·(C+R) + 12·L·d·((P+C)²/2 + P·R + R²/2)

forward and backward: weights that are frozen need no gradient of their own.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelShape:
    """What the formula needs of a model.

    Attributes:
        linear: how often there is a linear layer of (inputs, outputs), the head left out.
        head: (hidden size, vocabulary).
        layers: blocks.
        attention_width: heads × head size.
        lora_rank: of the adapters, which all layers in `linear` have.
    """

    linear: dict[tuple[int, int], int]
    head: tuple[int, int]
    layers: int
    attention_width: int
    lora_rank: int = 16

    def count_flops(self, prompt: int, chosen: int, rejected: int) -> float:
        """Return F of one pair."""
        weights = sum(count * inputs * outputs for (inputs, outputs), count in self.linear.items())
        lora = sum(count * self.lora_rank * (inputs + outputs) for (inputs, outputs), count in self.linear.items())
        tokens = prompt + chosen + rejected
        scored = chosen + rejected
        seen = (prompt + chosen) ** 2 / 2 + prompt * rejected + rejected**2 / 2
        return (
            (4 * weights + 6 * lora) * tokens
            + 4 * self.head[0] * self.head[1] * scored
            + 12 * self.layers * self.attention_width * seen
        )


def read_shape(model: str) -> ModelShape:
    """Read a model's shape from its config alone."""
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    head = built.get_output_embeddings()
    layers = [module for module in built.modules() if isinstance(module, nn.Linear) and module is not head]
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    linear = Counter((layer.in_features, layer.out_features) for layer in layers)
    return ModelShape(dict(linear), (config.hidden_size, config.vocab_size), config.num_hidden_layers, width)


def measure_peak(model: str, tokens: int, device: str, threads: int, repeats: int = 5) -> dict[str, Any]:
    """Measure bf16 matrix products of the model's own layers and head over `tokens` tokens.

    Each shape is multiplied forward and as its two kinds of backward product would be; of `repeats` rounds each shape's
    fastest counts.

    Returns:
        `flops_per_second` of all layers together, weighted as often as they occur, and of each shape.
    """
    import torch

    torch.set_num_threads(threads)
    shape = read_shape(model)
    total_flops, total_seconds, by_shape = 0.0, 0.0, {}
    for (inputs, outputs), count in {**shape.linear, shape.head: 1}.items():
        x = torch.randn(tokens, inputs, device=device, dtype=torch.bfloat16)
        weight = torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16)
        gradient = torch.randn(tokens, outputs, device=device, dtype=torch.bfloat16)
        rounds = max(1, int(2e11 * (100 if device == "cuda" else 1) / (4 * tokens * inputs * outputs)))
        best = float("inf")
        for _ in range(repeats + 1):
            _wait(device)
            start = time.perf_counter()
            for _ in range(rounds):
                torch.nn.functional.linear(x, weight)
                torch.mm(gradient, weight)
            _wait(device)
            best = min(best, (time.perf_counter() - start) / rounds)
        flops = 4 * tokens * inputs * outputs
        by_shape[f"{inputs}x{outputs}"] = flops / best
        total_flops += count * flops
        total_seconds += count * best
    return {"tokens": tokens, "flops_per_second": total_flops / total_seconds, "by_shape": by_shape}


def _wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def mean_flops(model: str, lengths: Sequence[Sequence[int]]) -> float:
    """Return F of a pair, on average over pairs of (prompt, chosen, rejected) tokens."""
    shape = read_shape(model)
    return sum(shape.count_flops(*pair) for pair in lengths) / len(lengths)

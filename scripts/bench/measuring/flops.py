"""Floating-point operations of a DPO step that scores no token twice, and the matmul peak.

With N parameters in the linear layers, N_lora in their adapters, V·h in the head, attention width d and L layers, a
pair of P prompt, C chosen and R rejected tokens takes

    F = (4·N + 6·N_lora)·(P+C+R) + 4·V·h·(C+R) + 12·L·d·((P+C)²/2 + P·R + R²/2)

forward and backward. Frozen weights need no weight gradient.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_ROUNDS = 5


@dataclass(frozen=True)
class ModelShape:
    """Model sizes in the FLOP formula.

    Attributes:
        linear: number of linear layers by (inputs, outputs), without the head.
        head: (hidden size, vocabulary).
        layers: number of transformer blocks.
        attention_width: heads × head size.
        lora_rank: rank of the adapters, on all layers in `linear`.
    """

    linear: dict[tuple[int, int], int]
    head: tuple[int, int]
    layers: int
    attention_width: int
    lora_rank: int = 16

    def count_flops(self, prompt: int, chosen: int, rejected: int) -> float:
        """Return F, the operations of one pair."""
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
    """Read a model's sizes from its config, without weights."""
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


def measure_peak(
    model: str, tokens: int, device: str, threads: int, dtype: str = "bfloat16", work: float = 2e11
) -> dict[str, Any]:
    """Measure matrix products in 16 bits of the model's layers and head over `tokens` tokens.

    Each shape is multiplied as in the forward pass and as in the backward pass for its input; the fastest of five
    rounds counts, after a warm-up round. A round has `work` operations of each shape, on a GPU 100 times as many.

    Returns:
        `tokens`, `flops_per_second` over all layers, weighted by their number, and `by_shape`.
    """
    import torch

    torch.set_num_threads(threads)
    shape = read_shape(model)
    total_flops, total_seconds, by_shape = 0.0, 0.0, {}
    for (inputs, outputs), count in {**shape.linear, shape.head: 1}.items():
        sizes = ((tokens, inputs), (outputs, inputs), (tokens, outputs))
        x, weight, gradient = (torch.randn(*size, device=device, dtype=getattr(torch, dtype)) for size in sizes)
        rounds = max(1, int(work * (100 if device == "cuda" else 1) / (4 * tokens * inputs * outputs)))
        best = float("inf")
        for _ in range(_ROUNDS + 1):
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
    """Return the mean F over pairs of (prompt, chosen, rejected) tokens."""
    shape = read_shape(model)
    return sum(shape.count_flops(*pair) for pair in lengths) / len(lengths)

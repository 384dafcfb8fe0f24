"""Gradients through quantized layers, beside those of the weights they stand for."""

from typing import Any

import torch

from dpo_runner.model.quantization import keep_training_products
from scripts.gpu.inputs import Task
from scripts.gpu.work import Tell

_TOKENS = (2, 33, 700, 2048)
"""bitsandbytes takes other kernels for few and for many tokens."""
_IN, _OUT = 512, 1024
_FARTHER = 1.5
"""Largest allowed distance of a gradient from the product in fp64, in units of that of a bf16 product."""
_INT8 = 0.03
"""Largest allowed distance of int8's output: it rounds the inputs too."""


def check_layers(task: Task, tell: Tell) -> None:
    """Compare output and input gradient of 4-bit and int8 layers with the product of their weights in fp64.

    The gradients come after an evaluation without gradients, which on some CPUs repacks 4-bit weights.
    """
    for kind in ("nf4", "fp4", "int8"):
        layer, weights = build_layer(kind, task.device)
        output, gradient = measure_layer(layer, weights, task.device)
        tell(
            f"{kind}: gradients of the inputs are at most {gradient:.2g} times as far from fp64 as those of a bf16 "
            f"product, allowed {_FARTHER:g}",
            gradient <= _FARTHER,
        )
        limit = _INT8 if kind == "int8" else 0.01
        tell(f"{kind}: outputs {output:.2g} from those of the same weights, allowed {limit:g}", output <= limit)


def build_layer(kind: str, device: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """Return a quantized layer of seeded random weights, and the weights that it stands for, [out, in] in fp64."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(_OUT, _IN, generator=generator, dtype=torch.bfloat16) / _IN**0.5
    layer: Any
    if kind == "int8":
        layer = Linear8bitLt(_IN, _OUT, bias=False, has_fp16_weights=False, threshold=6.0)
        layer.weight = Int8Params(weights, requires_grad=False, has_fp16_weights=False)
        layer = layer.to(device)
        scales = layer.weight.SCB.double().unsqueeze(1) / 127
        return layer, layer.weight.data.double() * scales
    layer = Linear4bit(_IN, _OUT, bias=False, compute_dtype=torch.bfloat16, quant_type=kind)
    layer.weight = Params4bit(weights, requires_grad=False, quant_type=kind)
    layer = layer.to(device)
    keep_training_products(layer)
    return layer, dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()


def measure_layer(layer: torch.nn.Module, weights: torch.Tensor, device: str) -> tuple[float, float]:
    """Return the largest relative distances over several numbers of tokens.

    Returns:
        That of the output, and that of the input's gradient in units of a bf16 product's distance.
    """
    generator = torch.Generator().manual_seed(1)
    outputs, gradients = [], []
    for tokens in _TOKENS:
        inputs = torch.randn(tokens, _IN, generator=generator).bfloat16().to(device).requires_grad_()
        upstream = torch.randn(tokens, _OUT, generator=generator).bfloat16().to(device)
        layer.eval()
        with torch.no_grad():
            layer(inputs)
        layer.train()
        output = layer(inputs)
        output.backward(upstream)
        assert inputs.grad is not None
        exact = upstream.double() @ weights
        rounded = (upstream @ weights.bfloat16()).double()
        outputs.append(_distance(output.detach().double(), inputs.detach().double() @ weights.T))
        gradients.append(_distance(inputs.grad.double(), exact) / _distance(rounded, exact))
    return max(outputs), max(gradients)


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())

"""Frozen 4-bit weights, dequantized once and kept in the dtype in which they are multiplied.

bitsandbytes' 4-bit layer makes its matrix anew each time: y = x D(q)ᵀ + b forward, ∂x = ∂y D(q) backward, where q is
packed, and D looks its values up and scales them block by block. q is frozen and D depends on nothing else, so that
D(q) is the same bits every time. Kept, it goes into the same two products, and all results are the same bits: losses,
gradients, evaluations, what the reference store files, and on a CPU generated answers. The price is the matrix itself,
2 bytes a weight in 16 bits, beside the packed one.

Nobody but the layer's own forward reads what is kept: the packed weight stays where it was for PEFT (DoRA, merging),
for saving and for hashing, and no state dict has the other.

bitsandbytes' own way is taken, so that no bit changes, where

- a weight has been replaced since, as by merging;
- the layer's bias is trained;
- backward, the weights were quantized from another dtype than they are multiplied in: D then rounds twice;
- forward on CUDA, there are so few tokens that a fused kernel may be faster, which adds up in another order.

LLM.int8() is left alone: its forward in evaluation quantizes the input, and is no product with one fixed matrix.
"""

import copy
from typing import Any, NamedTuple

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from bitsandbytes.functional import QuantState, dequantize_4bit
from torch import nn

from dpo_runner.quantization import linear4bit_modules

_DEVICES = ("cpu", "cuda")
"""Where it is known which products bitsandbytes makes."""


class _Kept(NamedTuple):
    packed: torch.Tensor
    """The layer's weight that `matrix` was made of."""
    state: QuantState
    matrix: torch.Tensor
    """[out_features, in_features], in the layer's compute dtype."""


class _Product(torch.autograd.Function):
    """What bitsandbytes' `MatMul4Bit` computes, with D(q) at hand."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, kept: _Kept) -> torch.Tensor:
        ctx.kept = kept  # nothing is saved for backward, as in bitsandbytes, so checkpointing sees the same graph
        if _dequantizes(x):
            return F.linear(x, kept.matrix, bias)
        product: torch.Tensor = bnb.matmul_4bit(x, kept.packed, quant_state=kept.state, bias=bias)
        return product

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        packed, state, matrix = ctx.kept
        if state.dtype != matrix.dtype:
            matrix = dequantize_4bit(packed.view(-1, 1), state)
        return torch.matmul(grads[0], matrix.to(grads[0].dtype)), None, None


def _dequantizes(x: torch.Tensor) -> bool:
    """Whether bitsandbytes is certain to dequantize for a product with `x`, and not to take a fused kernel."""
    if x.device.type == "cpu":
        return True
    from bitsandbytes.backends.cuda import ops

    most: int = ops._gemm_4bit_custom_max_m
    return x.numel() // x.shape[-1] > most


class Linear4bit(bnb.nn.Linear4bit):  # type: ignore[misc]  # bitsandbytes has no types
    """bitsandbytes' layer with its matrix at hand; a layer becomes one, and none is constructed.

    It has the name of bitsandbytes' own, which PEFT goes by.
    """

    kept: _Kept

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        trains_bias = self.bias is not None and self.bias.requires_grad
        # a weight that was replaced has another state, unless only its wrapper is new, as DoRA makes it each time
        if self.weight.quant_state is not self.kept.state or trains_bias or not x.numel():
            output: torch.Tensor = super().forward(x)
            return output
        bias = self.bias
        if bias is not None:
            if bias.dtype != self.compute_dtype:  # bitsandbytes casts it where it lies
                bias.data = bias.data.to(self.compute_dtype)
            bias = bias.to(self.compute_dtype)
        product: torch.Tensor = _Product.apply(x.to(self.compute_dtype), bias, self.kept)  # type: ignore[no-untyped-call]
        return product.to(x.dtype)


def keep_dequantized(model: nn.Module) -> list[torch.Tensor]:
    """Let bitsandbytes' 4-bit layers keep their matrices from now on.

    What is kept goes with the layer's attributes: `Snapshot.put_back` takes it off a base model that is kept between
    runs.

    Args:
        model: its 4-bit weights are frozen.

    Returns:
        The matrices, [out_features, in_features] each, in their layers' `bnb_4bit_compute_dtype`; fewer than there are
        4-bit layers where one is in a form that is not known here.
    """
    return [_keep(layer) for layer in list(linear4bit_modules(model)) if _is_plain(layer)]


def _is_plain(layer: Any) -> bool:
    """Whether a layer's forward is bitsandbytes' own, on a weight that lies as it was quantized."""
    state = getattr(layer.weight, "quant_state", None)
    return (
        type(layer).forward is bnb.nn.Linear4bit.forward
        and "forward" not in vars(layer)
        and layer.compute_dtype is not None
        and state is not None
        and tuple(state.shape) == (layer.out_features, layer.in_features)
        and not getattr(state, "packing_format_for_cpu", False)
        and layer.weight.device.type in _DEVICES
    )


@torch.no_grad()
def _keep(layer: Any) -> torch.Tensor:
    state = copy.copy(layer.weight.quant_state)
    state.dtype = layer.compute_dtype
    matrix: torch.Tensor = dequantize_4bit(layer.weight.detach().view(-1, 1), state)
    layer.kept = _Kept(layer.weight, layer.weight.quant_state, matrix)
    layer.__class__ = Linear4bit
    return matrix

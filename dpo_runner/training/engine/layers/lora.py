"""A LoRA layer on a frozen linear layer as one autograd function, for CPUs.

With y = x Wᵀ + b + s (x Aᵀ) Bᵀ (arXiv 2106.09685, equation 3) and g = ∂L/∂y, the gradients are

    ∂x = g W + s (g B) A,        ∂A = s (g B)ᵀ x,        ∂B = s gᵀ (x Aᵀ)

PEFT materializes s (x Aᵀ) Bᵀ at the size of y, scales it and adds it, and autograd adds both parts of ∂x; here the
matrix product that computes the small term also adds it. W, A and B are multiplied in autocast's dtype, as in PEFT,
and sums are rounded one time less.

Left to PEFT: dropout, variants such as DoRA, several active adapters, merged adapters, quantized layers, layers whose
weights are trained, inputs whose dtype is not the dtype of the product, and generation.
"""

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import nn


class LoraProduct(torch.autograd.Function):
    """x Wᵀ + b + s (x Aᵀ) Bᵀ, with W and b frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Return [..., out].

        x [..., in], W [out, in] and b [out] have one dtype; A [r, in] and B [out, r] may have any.
        """
        rows, down, up = x.reshape(-1, x.size(-1)), lora_A.to(x.dtype), lora_B.to(x.dtype)
        inner = torch.mm(rows, down.t()).mul_(scaling)
        output = F.linear(rows, weight, bias).addmm_(inner, up.t())
        of_x = (weight, down) if ctx.needs_input_grad[0] else (None, None)
        ctx.save_for_backward(rows, up, inner, *of_x)
        ctx.scaling, ctx.dtypes = scaling, (lora_A.dtype, lora_B.dtype)
        return output.view(*x.shape[:-1], weight.size(0))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of x, A and B, in their shapes and dtypes."""
        rows, up, inner, weight, down = ctx.saved_tensors
        outer = gradients[0].reshape(-1, up.size(0))
        of_inner = torch.mm(outer, up).mul_(ctx.scaling)
        of_x = None
        if weight is not None:
            of_x = torch.mm(outer, weight).addmm_(of_inner, down).view(*gradients[0].shape[:-1], rows.size(1))
        of_A, of_B = torch.mm(of_inner.t(), rows), torch.mm(outer.t(), inner)
        return of_x, None, None, of_A.to(ctx.dtypes[0]), of_B.to(ctx.dtypes[1]), None


def is_plain(layer: Any) -> bool:
    """Return whether a layer is PEFT's plain LoRA on a frozen, unmodified linear layer."""
    if type(layer) is not LoraLinear or layer.lora_variant or layer.fan_in_fan_out:
        return False
    base = layer.base_layer
    return (
        type(base) is nn.Linear
        and "forward" not in vars(base)
        and not any(parameter.requires_grad for parameter in base.parameters())
        and all(isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values())
        and not any(lora_B.bias is not None for lora_B in layer.lora_B.values())
    )


def multiply(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Replace the forward of a layer that `is_plain`; fall back to PEFT's own if the call is not plain."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    weight = layer.base_layer.weight
    autocast = torch.is_autocast_enabled("cpu")
    alone = len(active) == 1 and not (args or kwargs or layer.disable_adapters or layer.merged)
    if alone and x.dtype == weight.dtype and (autocast or torch.is_grad_enabled()):
        lora_A, lora_B = layer.lora_A[active[0]].weight, layer.lora_B[active[0]].weight
        if x.dtype == (torch.get_autocast_dtype("cpu") if autocast else lora_A.dtype):
            with torch.autocast("cpu", enabled=False):
                product: torch.Tensor = LoraProduct.apply(  # type: ignore[no-untyped-call]
                    x, weight, layer.base_layer.bias, lora_A, lora_B, layer.scaling[active[0]]
                )
            return product
    output: torch.Tensor = type(layer).forward(layer, x, *args, **kwargs)
    return output

"""Layers that save less for the backward pass and read memory less often, with the same results.

**Casts.** A LoRA layer's weights are fp32; its input under autocast is 16-bit. PEFT makes an fp32 copy of the input,
and autocast casts that copy back to 16 bits, which restores the input's values and is saved for the backward pass.
Without both casts the result and its gradient are bitwise the same. Left alone: layers with dropout, which PEFT draws
and rounds in fp32, and variants such as DoRA.

**RMSNorm**, y = w · x r with r = (mean(x²) + ε)^-½. Autograd saves two fp32 copies of x; the gradient needs only x,
which the residual stream keeps anyway, and r:

    ∂L/∂x = r g - x r³ mean(g x),        g = w · ∂L/∂y

It is computed in fp32, on a CPU a few rows at a time, so that they stay in the processor's cache. y is bitwise the
same; the gradient is the same up to the rounding of fp32 sums. Left alone: norms whose weight is trained.

**Gated SiLU**, silu(gate) · up: autograd saves silu(gate) in addition to its factors; here the backward pass
recomputes it, bitwise the same.

On CPUs a plain LoRA layer also runs as one function (`lora.py`).

RMSNorm and gated SiLU are replaced only in models whose norm and MLP have the same instructions as Llama's (Mistral,
Qwen 2 and 3, SmolLM and others copy them); other models keep their own.
"""

import types
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from dpo_runner.io.upstream import check_names
from dpo_runner.training.engine.layers.lora import is_plain, multiply

check_names("peft", LoraLayer, _cast_input_dtype="x dtype")

_CACHED = 2**19
"""Elements per block in computations that pass over them several times on a CPU."""


class RMSNorm(torch.autograd.Function):
    """RMS normalization (arXiv 1910.07467) with a frozen weight and `LlamaRMSNorm`'s rounding."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Return [..., H] in the dtype that `weight` [H] and `x` [..., H] promote to."""
        rows = x.reshape(-1, x.size(-1))
        result = rows.new_empty(rows.shape, dtype=torch.result_type(x, weight))
        scales = torch.empty(rows.size(0), 1, device=x.device)
        for some in _blocks(rows):
            values = rows[some].float()
            scales[some] = torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps)
            torch.mul(weight, (values * scales[some]).to(x.dtype), out=result[some])
        ctx.save_for_backward(x, weight, scales)
        return result.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Return ∂L/∂x, of the shape and dtype of x."""
        x, weight, scales = ctx.saved_tensors
        rows, outer = x.reshape(-1, x.size(-1)), gradients[0].reshape(-1, x.size(-1))
        result = torch.empty_like(rows)
        for some in _blocks(rows):
            values, scale = rows[some].float(), scales[some]
            gradient = (outer[some] * weight).to(x.dtype).float()
            mean = torch.linalg.vecdot(gradient, values).unsqueeze(1) / values.size(1)
            result[some] = gradient.mul_(scale).addcmul_(values, scale.pow(3).mul_(mean), value=-1)
        return result.view(x.shape), None, None


def _blocks(rows: torch.Tensor) -> list[slice]:
    if rows.device.type != "cpu" or isinstance(rows, FakeTensor):  # one block keeps the memory estimate fast too
        return [slice(None)]
    size = max(_CACHED // rows.size(1), 1)
    return [slice(start, start + size) for start in range(0, rows.size(0), size)]


class GatedSiLU(torch.autograd.Function):
    """silu(gate) · up."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Return a tensor with the shape and dtype of `gate` and `up`."""
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradients of `gate` and `up`."""
        gate, up = ctx.saved_tensors
        (gradient,) = gradients
        return torch.ops.aten.silu_backward(gradient * up, gate), F.silu(gate).mul_(gradient)


def make_lean(model: nn.Module, use_cpu: bool) -> None:
    """Replace the layers of a trainer's model for which the lean version is known to be exact.

    Args:
        model: with its adapter in place and `requires_grad` set.
        use_cpu: whether it trains on a CPU.
    """
    for module in model.modules():
        if use_cpu and is_plain(module):
            _replace(module, "forward", multiply)
        if isinstance(module, LoraLayer) and _casts_needlessly(module):
            _replace(module, "_cast_input_dtype", _keep_input_dtype)
        elif _is_copy(module, LlamaRMSNorm) and not module.weight.requires_grad:
            _replace(module, "forward", _normalize)
        elif _is_copy(module, LlamaMLP) and type(module.act_fn) in (nn.SiLU, SiLUActivation):
            _replace(module, "forward", _feed_forward)


def _replace(module: nn.Module, name: str, function: Any) -> None:
    setattr(module, name, types.MethodType(function, module))


def _casts_needlessly(layer: LoraLayer) -> bool:
    return not layer.lora_variant and all(isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values())


def _is_copy(module: nn.Module, original: type[nn.Module]) -> bool:
    """Return whether a module's forward has the instructions of `original`'s and is not replaced."""
    own, known = (getattr(each.forward, "__code__", None) for each in (type(module), original))
    return "forward" not in vars(module) and own is not None and _read(own) == _read(known)


def _read(code: Any) -> tuple[Any, ...]:
    return code.co_code, code.co_names, code.co_varnames, code.co_freevars, code.co_consts


def _keep_input_dtype(layer: Any, x: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Replace PEFT's `_cast_input_dtype`; under autocast, pass a 16-bit input through."""
    if x is not None and torch.is_autocast_enabled(kind := x.device.type) and x.dtype == torch.get_autocast_dtype(kind):
        return x
    cast: torch.Tensor | None = type(layer)._cast_input_dtype(layer, x, dtype)
    return cast


def _normalize(norm: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    normalized: torch.Tensor = RMSNorm.apply(hidden_states, norm.weight, norm.variance_epsilon)  # type: ignore[no-untyped-call]
    return normalized


def _feed_forward(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    gated: torch.Tensor = GatedSiLU.apply(mlp.gate_proj(x), mlp.up_proj(x))  # type: ignore[no-untyped-call]
    output: torch.Tensor = mlp.down_proj(gated)
    return output

"""LoRA without casts that are taken back at once.

PEFT casts a layer's input to the adapter's dtype, fp32, and autocast casts it to bf16 again in front of the matrix
product; the backward pass does both once more. Under autocast the input is handed over as it is: the product takes
the same numbers.
"""

import functools
from collections.abc import Callable

import torch
from peft.tuners.lora import LoraLayer

assert hasattr(LoraLayer, "_cast_input_dtype"), "PEFT casts inputs elsewhere"


def skip_needless_casts(model: torch.nn.Module) -> None:
    """Let the plain LoRA layers of `model` cast their input only where autocast does not."""
    for module in model.modules():
        if isinstance(module, LoraLayer) and not module.lora_variant:  # DoRA and others compute with it themselves
            module._cast_input_dtype = functools.partial(_cast_input, module._cast_input_dtype)


def _cast_input(cast: Callable[..., torch.Tensor], x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x if torch.is_autocast_enabled(x.device.type) else cast(x, dtype)

"""The size of optimizers' states."""

import math

import torch

_COPIES = {  # 4-byte values that an optimizer keeps per weight
    "adamw_torch": 2,
    "adamw_torch_fused": 2,
    "paged_adamw": 2,
    "paged_adamw_32bit": 2,
    "ademamix": 3,
    "paged_ademamix_32bit": 3,
    "lion": 1,
    "lion_32bit": 1,
    "paged_lion": 1,
    "paged_lion_32bit": 1,
    "rmsprop": 1,
    "rmsprop_bnb": 1,
    "rmsprop_bnb_32bit": 1,
    "adagrad": 1,
    "sgd": 0,
}
_COPIES_8BIT = {  # 1-byte values, with a 4-byte absmax per 256 of them
    "adamw_8bit": 2,
    "adamw_bnb_8bit": 2,
    "paged_adamw_8bit": 2,
    "ademamix_8bit": 3,
    "paged_ademamix_8bit": 3,
    "lion_8bit": 1,
    "paged_lion_8bit": 1,
    "rmsprop_bnb_8bit": 1,
}

KNOWN = {*_COPIES, *_COPIES_8BIT, "adafactor"}
"""Values of `training.optim` whose state's size is known."""


def count_optimizer(name: str, trained: list[torch.nn.Parameter]) -> int:
    """Return the bytes of an optimizer's state for the weights that it trains."""
    sizes = [parameter.numel() for parameter in trained]
    if name in _COPIES:
        return 4 * _COPIES[name] * sum(sizes)
    if name in _COPIES_8BIT:  # state of weights with fewer than 4096 values stays 32-bit
        return _COPIES_8BIT[name] * sum(4 * n if n < 4096 else n + 4 * -(-n // 256) for n in sizes)
    # Adafactor keeps row and column sums and no first moment
    return 4 * sum(sum(p.shape[-2:]) * math.prod(p.shape[:-2]) if p.ndim > 1 else p.numel() for p in trained)

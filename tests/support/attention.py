"""Layouts of packed pairs, and attention under an explicit mask to compare kernels with."""

from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention

from dpo_runner.training.engine.packed.packing import PairLengths

LAYOUTS = [
    [PairLengths(120, 157, 50)],
    [PairLengths(0, 3, 140), PairLengths(5, 5, 0), PairLengths(5, 5, 1), PairLengths(1, 1, 1)],
    [PairLengths(200, 300, 130), PairLengths(127, 128, 129)],
]


def attend_under_mask(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pairs: list[PairLengths], scale: float
) -> torch.Tensor:
    visible = torch.block_diag(*(torch.ones(pair.chosen + pair.tail, pair.chosen + pair.tail) for pair in pairs)).tril()
    start = 0
    for pair in pairs:
        visible[start + pair.chosen : start + pair.chosen + pair.tail, start + pair.prefix : start + pair.chosen] = 0
        start += pair.chosen + pair.tail
    key, value = (tensor.repeat_interleave(query.size(1) // key.size(1), dim=1) for tensor in (key, value))
    output = scaled_dot_product_attention(query, key, value, attn_mask=visible.bool(), scale=scale)
    return output.transpose(1, 2)


def differentiate(
    function: Callable[..., torch.Tensor],
    dtype: torch.dtype,
    pairs: list[PairLengths],
    heads: tuple[int, int],
    value_size: int,
) -> list[torch.Tensor]:
    """Return output and gradients of q, k, v as fp64; each call draws the same values."""
    torch.manual_seed(3)
    length = sum(pair.chosen + pair.tail for pair in pairs)
    sizes = ((heads[0], 64), (heads[1], 64), (heads[1], value_size))
    # as projections return them: tokens first in memory
    inputs = [torch.randn(1, length, *size).bfloat16().to(dtype).transpose(1, 2).requires_grad_() for size in sizes]
    output = function(*inputs)
    output.backward(torch.randn(output.shape).bfloat16().to(dtype))
    return [tensor.detach().double() for tensor in (output, *(tensor.grad for tensor in inputs))]

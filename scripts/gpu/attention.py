"""Attention over packed pairs, and its gradients, beside attention under a mask."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import torch
from torch.nn.functional import scaled_dot_product_attention

from dpo_runner.training.engine.packed import attention
from dpo_runner.training.engine.packed.attention import attend_pairs
from dpo_runner.training.engine.packed.packing import PairLengths, Pairs
from dpo_runner.training.engine.packed.varlen_attention import takes_varlen
from scripts.gpu.inputs import Task
from scripts.gpu.work import Tell

_FARTHER = 3
"""Largest allowed distance from attention in fp64, in units of the distance of torch's attention under a mask."""
_LAYOUTS = (
    ((120, 157, 50), (37, 64, 81), (5, 5, 0), (5, 5, 1)),
    ((0, 3, 140), (1, 1, 1), (200, 300, 130), (127, 128, 129)),
)
"""Packed pairs: tokens of common prefix, chosen row, and rejected row after the prefix."""
_HEADS = ((6, 2, 64), (8, 8, 128), (9, 3, 64))
"""Query heads, key heads and their size; the last ones are SmolLM2's."""


def check_attention(task: Task, tell: Tell) -> None:
    """Compare packed attention with attention under a mask in fp64, forward and backward.

    A card from Ampere on must take the kernel for variable-length rows in 16 bits; anything else fails.
    """
    layouts = [Pairs(PairLengths(*lengths) for lengths in layout) for layout in _LAYOUTS]
    due = task.device == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 0)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        one = torch.zeros(1, 1, 1, 64, dtype=dtype, device=task.device)
        in_one = takes_varlen(one, one, one)
        path = "one call for all rows" if in_one else "pair by pair"
        worst = max(
            compare_with_mask(pairs, dtype, task.device, heads, size) for pairs in layouts for *heads, size in _HEADS
        )
        tell(
            f"attention over packed pairs in {str(dtype).removeprefix('torch.')}, {path}, forward and backward: at "
            f"most {worst:.2g} times as far from fp64 as torch's attention under a mask, allowed {_FARTHER}",
            worst <= _FARTHER,
        )
        if due and dtype != torch.float32 and not in_one:
            tell(f"{dtype}: this card has a kernel for variable-length rows, and it is not taken", False)
    if due:
        _compare_speed(task.device, tell)


def compare_with_mask(pairs: Pairs, dtype: torch.dtype, device: str, heads: Sequence[int], size: int) -> float:
    """Return the largest distance from fp64, of output and gradients, in units of the masked attention's own."""

    def pack(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return attention.attend(torch.nn.Module(), query, key, value, None, pairs=pairs)[0]

    mask = partial(_attend_under_mask, pairs)
    ours, masked, exact = (
        _differentiate(function, pairs, kind, device, heads, size)
        for function, kind in ((pack, dtype), (mask, dtype), (mask, torch.float64))
    )
    return max(
        float((found - expected).norm() / (other - expected).norm())
        for found, other, expected in zip(ours, masked, exact, strict=True)
    )


def _differentiate(
    function: Callable[..., torch.Tensor],
    pairs: Pairs,
    dtype: torch.dtype,
    device: str,
    heads: Sequence[int],
    size: int,
) -> list[torch.Tensor]:
    """Return output and gradients of q, k, v as fp64, computed in `dtype` from fixed 16-bit values."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(pair.chosen + pair.tail for pair in pairs)

    def draw(count: int) -> torch.Tensor:  # token-major in memory, as projections return them
        values = torch.randn(1, tokens, count, size, generator=generator).bfloat16().to(device, dtype)
        return values.transpose(1, 2).requires_grad_()

    inputs = [draw(count) for count in (heads[0], heads[1], heads[1])]
    output = function(*inputs)
    output.backward(torch.randn(output.shape, generator=generator).bfloat16().to(device, dtype))
    gradients = [tensor.grad for tensor in inputs if tensor.grad is not None]
    return [tensor.detach().double() for tensor in (output, *gradients)]


def _attend_under_mask(pairs: Pairs, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    visible = torch.block_diag(*(torch.ones(pair.chosen + pair.tail, pair.chosen + pair.tail) for pair in pairs)).tril()
    start = 0
    for pair in pairs:
        tail = start + pair.chosen
        visible[tail : tail + pair.tail, start + pair.prefix : tail] = 0
        start = tail + pair.tail
    key, value = (tensor.repeat_interleave(query.size(1) // key.size(1), dim=1) for tensor in (key, value))
    mask = visible.bool().to(query.device)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def _compare_speed(device: str, tell: Tell) -> None:
    """Time the attention of one layer of a 7B over HH-shaped pairs; pair by pair must be slower."""
    pairs = Pairs([PairLengths(120, 157, 50)] * 32)
    shapes = [(1, heads, sum(pair.chosen + pair.tail for pair in pairs), 128) for heads in (32, 8, 8)]

    def pack(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return attention.attend(torch.nn.Module(), query, key, value, None, pairs=pairs)[0]

    def one_by_one(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return attend_pairs(query, key, value, pairs, 128**-0.5)

    times = [_time(function, shapes, device) for function in (pack, one_by_one)]
    tell(
        f"attention of 32 pairs of 120, 37 and 50 tokens, forward and backward: {times[0]:.2f} ms in one call, "
        f"{times[1]:.2f} ms pair by pair",
        times[0] < times[1],
    )


def _time(function: Callable[..., torch.Tensor], shapes: Sequence[Sequence[int]], device: str) -> float:
    """Return the median milliseconds of a forward and backward pass on a GPU."""
    times = []
    for _ in range(10):
        inputs = [torch.zeros(*shape, dtype=torch.bfloat16, device=device, requires_grad=True) for shape in shapes]
        torch.cuda.synchronize()
        start = time.perf_counter()
        function(*inputs).sum().backward()
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return median(times[3:])

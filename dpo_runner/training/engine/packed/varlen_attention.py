"""Attention over packed pairs in one call of a variable-length kernel, on a GPU, in 16 bits.

Each attending row is a segment: a pair's chosen row, then the tail of its rejected row. Queries already lie in memory
segment by segment. Keys are gathered once: for a chosen row its own keys, for a tail `k[:p] ++ k[tail]`. The kernel's
causal mask aligns the last query with the last key, so query i of q sees the first k - q + i + 1 of k keys: in a
chosen row (q = k) itself and the keys before it, in a tail (k = p + q) the prefix too. Nothing is padded, no mask is
materialized, and grouped-query heads share their keys here too. A prefix is gathered twice, so its gradient is the
sum of two.

Left to `attend_pairs` in `attention.py`: fp32, head sizes that the kernel does not support, and devices other than
Nvidia GPUs from Ampere on.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn

from dpo_runner.training.engine.packed.packing import Pairs

_LARGEST_HEAD = 192
"""Largest head size whose backward pass every supported card has."""


def takes_varlen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Return whether the kernel supports these heads, their dtype and device; shapes as for `attend`."""
    return supports_heads(query, key, value) and query.device.type == "cuda" and has_kernel(query.device)


def supports_heads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Return whether the kernel supports these heads and their dtype, on any device; shapes as for `attend`."""
    size = query.size(3)
    return (
        query.dtype == key.dtype == value.dtype
        and query.dtype in (torch.bfloat16, torch.float16)
        and size == value.size(3)
        and size % 8 == 0
        and size <= _LARGEST_HEAD
    )


@functools.cache
def has_kernel(device: torch.device) -> bool:
    """Return whether this torch has the kernel for a GPU."""
    return (
        torch.version.hip is None
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


@functools.cache
def _asks_for_groups(kernel: Callable[..., Any]) -> bool:
    """Return whether shared keys must be announced; torch 2.11's kernel finds them by itself."""
    return "enable_gqa" in inspect.signature(kernel).parameters


def attend_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pairs: Pairs,
    scale: float,
    kernel: Callable[..., Any] = varlen_attn,
) -> torch.Tensor:
    """Attend within pairs; shapes as for `attend`."""
    segments = pairs.segments(query.device)
    keys, values = (tensor[0].transpose(0, 1).index_select(0, segments.keys) for tensor in (key, value))
    output: torch.Tensor = kernel(
        query[0].transpose(0, 1),
        keys,
        values,
        segments.cu_seq_q,
        segments.cu_seq_k,
        segments.max_q,
        segments.max_k,
        scale=scale,
        window_size=(-1, 0),  # causal
        **({"enable_gqa": query.size(1) != key.size(1)} if _asks_for_groups(kernel) else {}),
    )
    return output.unsqueeze(0)

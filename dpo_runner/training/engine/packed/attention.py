"""Attention over packed pairs: each token attends to the same tokens as in its own row.

With q, k, v of a pair laid out as `chosen ++ tail` and p the length of the common prefix, the chosen row attends
causally to itself, and the tail, also causally, to `k[:p] ++ k[tail]`. No T × T mask is materialized.
`cpu_attention.py` does this on CPUs and `varlen_attention.py` on GPUs in 16 bits; otherwise `attend_pairs` does it
here, row by row.

transformers looks up the function of `attn_implementation` in its `AttentionInterface`. The one registered here for
`sdpa` calls transformers' own if `pairs` is not passed, so generation and plain forwards are unchanged.
"""

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from dpo_runner.training.engine.packed.cpu_attention import PairAttention
from dpo_runner.training.engine.packed.packing import PairLengths, Pairs
from dpo_runner.training.engine.packed.varlen_attention import attend_varlen, takes_varlen

IMPLEMENTATION = "sdpa"
"""The value of `attn_implementation` whose function supports packed pairs."""


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    pairs: Pairs | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers' `sdpa` does, or within `pairs` if they are given.

    Args:
        module: the attention layer.
        query: [1, heads, T, head size].
        key: [1, key-value heads, T, head size].
        value: shaped like `key`.
        attention_mask: ignored if `pairs` is given.
        pairs: the layout of the T tokens.
        scaling: factor of the scores; None means 1/sqrt(head size).

    Returns:
        [1, T, heads, head size], and None instead of attention weights.
    """
    if pairs is None:
        output: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return output
    scale = query.size(3) ** -0.5 if scaling is None else scaling
    kind = query.device.type
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)  # as torch's attention does
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    if (estimated := getattr(pairs, "attention", None)) is not None:  # on a CPU any list of lengths will do
        return estimated(query, key, value, pairs, scale), None
    if takes_varlen(query, key, value):
        return attend_varlen(query, key, value, pairs, scale), None
    if kind != "cpu":
        return attend_pairs(query, key, value, pairs, scale), None
    outputs: torch.Tensor = PairAttention.apply(query[0], key[0], value[0], pairs, scale)  # type: ignore[no-untyped-call]
    return outputs.unsqueeze(0), None


def attend_pairs(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pairs: list[PairLengths], scale: float
) -> torch.Tensor:
    """Attend within pairs with torch's attention, row by row; shapes as for `attend`."""
    repeats = query.size(1) // key.size(1)
    sizes = [size for pair in pairs for size in (pair.chosen, pair.tail)]
    # Split and concatenate once: each slice would add a tensor of zeros in the backward pass.
    parts = [tensor.split(sizes, dim=2) for tensor in (query, repeat_kv(key, repeats), repeat_kv(value, repeats))]
    outputs = []
    for index, pair in enumerate(pairs):
        (q, q_tail), (k, k_tail), (v, v_tail) = (part[2 * index : 2 * index + 2] for part in parts)
        outputs.append(scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale))
        if pair.tail:
            k, v = (torch.cat([shared[:, :, : pair.prefix], own], dim=2) for shared, own in ((k, k_tail), (v, v_tail)))
            visible = torch.ones(pair.tail, k.size(2), dtype=torch.bool, device=k.device).tril(pair.prefix)
            outputs.append(scaled_dot_product_attention(q_tail, k, v, attn_mask=visible, scale=scale))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def register_attention() -> None:
    """Register `attend` for `attn_implementation="sdpa"` in this process."""
    AttentionInterface.register(IMPLEMENTATION, attend)

"""The variable-length kernel's arguments: with a stand-in as documented, results are right.

The kernel itself runs on GPUs only; `make check-gpu` compares it there.
"""

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from dpo_runner.training.engine.packed import attention, varlen_attention
from dpo_runner.training.engine.packed.attention import attend
from dpo_runner.training.engine.packed.packing import PairLengths, Pairs, pack_pairs
from dpo_runner.training.engine.packed.varlen_attention import attend_varlen, takes_varlen
from tests.support.attention import LAYOUTS, attend_under_mask, differentiate


def attend_segments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """Attend as `varlen_attn` does, segment by segment; its causal mask aligns the last query and key."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and window_size == (-1, 0)
    assert enable_gqa == (query.size(1) != key.size(1)) and query.stride(2) == key.stride(2) == 1
    sizes = [ends.diff().tolist() for ends in (cu_seq_q, cu_seq_k)]
    assert all(sizes[0]) and (max_q, max_k) == tuple(map(max, sizes))
    assert [sum(size) for size in sizes] == [len(query), len(key)] and len(key) == len(value)
    outputs = []
    parts = [tensor.split(size) for tensor, size in zip((query, key, value), (*sizes, sizes[1]), strict=True)]
    for q, k, v in zip(*parts, strict=True):
        visible = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        q, k, v = (part.transpose(0, 1) for part in (q, k, v))
        output = scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=enable_gqa)
        outputs.append(output.transpose(0, 1))
    return torch.cat(outputs)


def attend_segments_2_11(
    *inputs: Any, return_aux: Any = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1)
) -> torch.Tensor:
    """Attend as the kernel of torch 2.11 does, which finds shared keys by their number."""
    assert scale is not None
    shares = inputs[0].size(1) != inputs[1].size(1)
    return attend_segments(*inputs, scale=scale, window_size=window_size, enable_gqa=shares)


@pytest.mark.parametrize("pairs", LAYOUTS, ids=str)
@pytest.mark.parametrize("heads", [(6, 2), (3, 3)])
@pytest.mark.parametrize("kernel", [attend_segments, attend_segments_2_11])
def test_segments_give_what_a_mask_gives(pairs: list[PairLengths], heads: tuple[int, int], kernel: Any) -> None:
    packed = Pairs(pairs)

    def segments(*inputs: torch.Tensor) -> torch.Tensor:
        return attend_varlen(*inputs, packed, 0.3, kernel=kernel)

    def mask(*inputs: torch.Tensor) -> torch.Tensor:
        return attend_under_mask(*inputs, pairs, 0.3)

    exact, ours = (
        differentiate(function, dtype, pairs, heads, 64)
        for function, dtype in ((mask, torch.float64), (segments, torch.float32))
    )
    for expected, found in zip(exact, ours, strict=True):
        assert (found - expected).norm() <= 1e-6 * expected.norm()


def test_segments_are_the_rows_that_attend() -> None:
    pairs = Pairs([PairLengths(2, 4, 3), PairLengths(1, 2, 0), PairLengths(0, 1, 1)])
    segments = pairs.segments(torch.device("cpu"))
    assert segments.keys.tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6, 7, 8, 9, 10]
    assert segments.cu_seq_q.tolist() == [0, 4, 7, 9, 10, 11] and segments.cu_seq_k.tolist() == [0, 4, 9, 11, 12, 13]
    assert (segments.max_q, segments.max_k) == (4, 5)
    assert segments.keys.dtype == torch.int64 and segments.cu_seq_q.dtype == segments.cu_seq_k.dtype == torch.int32
    assert pairs.segments(torch.device("cpu")) is segments  # cached for all layers
    assert pairs.segments(torch.device("meta")).keys.device.type == "meta"
    ids = torch.arange(8).view(2, 4)
    assert isinstance(pack_pairs(ids, torch.ones_like(ids), ids).pairs, Pairs)
    assert type(pairs)(pair for pair in pairs) == pairs  # how accelerate moves arguments to another device


def test_the_kernel_is_taken_where_it_has_code(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGPU(torch.Tensor):
        """A tensor that reports a GPU as its device."""

        device = torch.device("cuda", 0)

    def tensor(size: int, dtype: torch.dtype) -> Any:
        return torch.zeros(1, 2, 3, size, dtype=dtype).as_subclass(OnGPU)

    capability, seen = [(8, 0)], []
    monkeypatch.setattr(varlen_attention, "varlen_attn", attend_segments_2_11)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    for name in ("attend_varlen", "attend_pairs"):
        monkeypatch.setattr(attention, name, lambda *args, name=name: seen.append((name, args[0].dtype)))
    varlen_attention.has_kernel.cache_clear()
    try:
        for size, dtype in ((64, torch.bfloat16), (128, torch.float16), (64, torch.float32), (256, torch.bfloat16)):
            attend(torch.nn.Module(), *[tensor(size, dtype)] * 3, None, pairs=Pairs([PairLengths(1, 2, 1)]))
        assert [name for name, _ in seen] == ["attend_varlen"] * 2 + ["attend_pairs"] * 2
        full, half = tensor(64, torch.bfloat16), tensor(60, torch.bfloat16)
        assert takes_varlen(full, full, full) and not takes_varlen(half, half, half)
        assert not takes_varlen(full, full, tensor(32, torch.bfloat16))
        capability[0] = (7, 5)
        varlen_attention.has_kernel.cache_clear()
        assert not takes_varlen(full, full, full)
    finally:
        varlen_attention.has_kernel.cache_clear()
    plain = torch.zeros(1, 2, 3, 64, dtype=torch.bfloat16)
    assert not takes_varlen(plain, plain, plain)

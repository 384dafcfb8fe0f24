"""Blockwise attention on a CPU equals torch's attention under a mask, forward and backward."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from dpo_runner.training.engine.packed import cpu_attention
from dpo_runner.training.engine.packed.attention import attend, attend_pairs
from dpo_runner.training.engine.packed.packing import PairLengths
from tests.support.attention import LAYOUTS, attend_under_mask, differentiate


@pytest.mark.parametrize("pairs", LAYOUTS, ids=str)
@pytest.mark.parametrize("heads", [(6, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize("kept", [1024, 130, 0])
def test_blocks_give_what_a_mask_gives(
    pairs: list[PairLengths], heads: tuple[int, int], kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_attention, "_KEPT", kept)
    scale = 0.3

    def blocks(*inputs: torch.Tensor) -> torch.Tensor:
        return attend(torch.nn.Module(), *inputs, None, pairs=pairs, scaling=scale)[0]

    def mask(*inputs: torch.Tensor) -> torch.Tensor:
        return attend_under_mask(*inputs, pairs, scale)

    exact, ours = (
        differentiate(function, dtype, pairs, heads, 16)
        for function, dtype in ((mask, torch.float64), (blocks, torch.float32))
    )
    for expected, found in zip(exact, ours, strict=True):
        assert (found - expected).norm() <= 1e-6 * expected.norm()
    # in bf16 about as close to fp64 as torch's own kernel, which requires heads of one size
    exact, theirs, ours = (
        differentiate(function, dtype, pairs, heads, 64)
        for function, dtype in ((mask, torch.float64), (mask, torch.bfloat16), (blocks, torch.bfloat16))
    )
    for expected, other, found in zip(exact, theirs, ours, strict=True):
        assert (found - expected).norm() <= 1.5 * (other - expected).norm()


@st.composite
def layouts(draw: st.DrawFn, most: int = 300) -> list[PairLengths]:
    """Draw one to three pairs whose parts span several blocks, and are often empty or a single token."""
    parts = st.sampled_from([0, 1, 127, 128, 129, 257]) | st.integers(0, most)
    pairs = []
    for _ in range(draw(st.integers(1, 3))):
        prefix = draw(parts)  # 0: no common prefix
        own, tail = (
            draw(parts),
            draw(parts),
        )  # own = 0: the chosen row is a prefix of the rejected one; tail = 0: the reverse
        pairs.append(PairLengths(prefix, max(prefix + own, 1), tail))
    return pairs


@settings(max_examples=25, deadline=None)
@given(layouts(), st.sampled_from([1024, 130]))
def test_whatever_the_layout_is_blocks_give_what_a_mask_gives(pairs: list[PairLengths], kept: int) -> None:
    length = sum(pair.chosen + pair.tail for pair in pairs)
    torch.manual_seed(length)
    inputs = [torch.randn(1, heads, length, 8) for heads in (4, 2, 2)]
    through = torch.randn(1, length, 4, 8)

    def differentiate(function: Callable[..., torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        given = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        output = function(*given)
        output.backward(through.to(dtype))
        return [tensor.detach().double() for tensor in (output, *(tensor.grad for tensor in given))]

    def blocks(*given: torch.Tensor) -> torch.Tensor:
        return attend(torch.nn.Module(), *given, None, pairs=pairs, scaling=0.3)[0]

    exact = differentiate(lambda *given: attend_under_mask(*given, pairs, 0.3), torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_attention, "_KEPT", kept)
        ours = differentiate(blocks, torch.float32)
    for expected, found in zip(exact, ours, strict=True):
        error = (
            (found - expected).norm(dim=-1).max()
        )  # by token: one with a wrong context would be lost in the overall norm
        assert error <= 1e-5 * max(1, expected.norm(dim=-1).max())


def test_what_was_done_on_fake_tensors_leaves_nothing_behind() -> None:
    """The memory estimate runs the same code in the same process before training."""
    pairs = LAYOUTS[2]
    exact = differentiate(lambda *inputs: attend_under_mask(*inputs, pairs, 0.3), torch.float64, pairs, (6, 2), 64)
    with FakeTensorMode():
        sizes = [(1, heads, sum(pair.chosen + pair.tail for pair in pairs), 64) for heads in (6, 2, 2)]
        fakes = [torch.zeros(size, requires_grad=True) for size in sizes]
        attend(torch.nn.Module(), *fakes, None, pairs=pairs, scaling=0.3)[0].sum().backward()

    def blocks(*inputs: torch.Tensor) -> torch.Tensor:
        return attend(torch.nn.Module(), *inputs, None, pairs=pairs, scaling=0.3)[0]

    for expected, found in zip(exact, differentiate(blocks, torch.float32, pairs, (6, 2), 64), strict=True):
        assert (found - expected).norm() <= 1e-6 * expected.norm()


def test_autocast_rounds_as_torchs_attention_does() -> None:
    pairs = [PairLengths(4, 9, 3)]
    inputs = [torch.randn(1, heads, 12, 8) for heads in (4, 2, 2)]
    with torch.autocast("cpu", torch.bfloat16):
        output = attend(torch.nn.Module(), *inputs, None, pairs=pairs)[0]
        expected = attend_under_mask(*inputs, pairs, 8**-0.5)
    assert output.dtype == expected.dtype == torch.bfloat16
    assert torch.allclose(output, expected, atol=2e-2)


@pytest.mark.parametrize("pairs", LAYOUTS, ids=str)
def test_row_by_row_gives_what_a_mask_gives(pairs: list[PairLengths]) -> None:
    """Accelerators use this path."""

    def rows(*inputs: torch.Tensor) -> torch.Tensor:
        return attend_pairs(*inputs, pairs, 0.3)

    def mask(*inputs: torch.Tensor) -> torch.Tensor:
        return attend_under_mask(*inputs, pairs, 0.3)

    exact, ours = (
        differentiate(function, dtype, pairs, (6, 2), 16)
        for function, dtype in ((mask, torch.float64), (rows, torch.float32))
    )
    for expected, found in zip(exact, ours, strict=True):
        assert (found - expected).norm() <= 1e-6 * expected.norm()


def test_products_in_fp32_lose_nothing_and_leave_the_setting_alone() -> None:
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    torch.manual_seed(0)
    factors = torch.randn(2, 3, 90, 64).bfloat16()
    exact = torch.bmm(factors[0].double(), factors[1].double().transpose(1, 2))
    with cpu_attention._products_of(torch.bfloat16):
        inside = torch.bmm(factors[0].float(), factors[1].float().transpose(1, 2))
    assert inside.dtype == torch.float32
    assert (inside - exact).norm() <= 1e-6 * exact.norm()  # it would be 1e-3 for bfloat16 results
    finer = torch.randn(3, 90, 64)  # not representable in 16 bits: nothing may be rounded
    with cpu_attention._products_of(torch.float32):
        product = torch.bmm(finer, finer.transpose(1, 2))
    exact = torch.bmm(finer.double(), finer.double().transpose(1, 2))
    assert (product - exact).norm() <= 1e-6 * exact.norm()
    with pytest.raises(RuntimeError), cpu_attention._products_of(torch.bfloat16):
        raise RuntimeError
    assert settings.fp32_precision == before
    try:
        torch.backends.fp32_precision = "tf32"  # the general setting still applies
        assert settings.fp32_precision != before
        settings.fp32_precision = "bf16"
        with cpu_attention._products_of(torch.float32):
            assert settings.fp32_precision == "bf16"  # an explicit choice is restored
    finally:
        torch.backends.fp32_precision = settings.fp32_precision = "none"

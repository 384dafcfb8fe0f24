"""Attention over packed pairs on a CPU, as matrix products over blocks of queries.

With S = scale · Q Kᵀ, P = softmax(S), O = P V and D = rowsum(dO ∘ O), the gradients are (FlashAttention,
arXiv 2205.14135, appendix B)

    dV = Pᵀ dO,    dS = P ∘ (dO Vᵀ - D),    dQ = scale · dS K,    dK = scale · dSᵀ Q

torch's flash kernel for CPUs computes the same in smaller tiles; for pairs of 100 to 1,000 tokens, larger products
take about half the time, forward and backward together (one core with avx512_bf16). S and dO Vᵀ, whose exponentials
and differences are taken, are fp32 products, as in that kernel: oneDNN accumulates products of bfloat16 factors in
fp32 at the speed of bfloat16. Heads that share keys are computed in one product, and so is a short pair.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from dpo_runner.training.engine.packed.packing import PairLengths

_QUERIES = 128
"""Queries per block: enough for fast products, few enough to compute little beyond the diagonal."""

_WHOLE = 256
"""Largest pair, in tokens, that is one block: masked scores cost less than additional products."""

_KEPT = 1024
"""Most keys for which P is saved for the backward pass; beyond, P is recomputed to save memory."""


class _Block(NamedTuple):
    """Queries `[first, last)` and the ranges of keys that they see.

    They attend to the prefix, `[start, start + prefix)`, and causally to their own row, `[own, last)`. In a pair that
    is one block, the queries of the tail, the last `tail` ones, do not see `hidden`, the part of the chosen row after
    the common prefix.
    """

    first: int
    last: int
    own: int
    start: int
    prefix: int
    tail: int = 0
    hidden: slice = slice(0)

    @property
    def keys(self) -> int:
        """Number of keys in the block, including those that are masked."""
        return self.prefix + self.last - self.own


def _blocks(pairs: list[PairLengths]) -> Iterator[_Block]:
    start = 0
    for pair in pairs:
        end = start + pair.chosen + pair.tail
        if end - start <= _WHOLE:
            yield _Block(start, end, start, start, 0, pair.tail, slice(pair.prefix, pair.chosen))
        else:
            for own, length, prefix in ((start, pair.chosen, 0), (start + pair.chosen, pair.tail, pair.prefix)):
                count = -(-length // _QUERIES)
                for index in range(count):
                    first, last = (own + length * edge // count for edge in (index, index + 1))
                    yield _Block(first, last, own, start, prefix)
        start = end


class PairAttention(torch.autograd.Function):
    """Causal attention of each token of packed pairs to its own row."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pairs: list[PairLengths], scale: float
    ) -> torch.Tensor:
        """Attend.

        Args:
            ctx: autograd's context.
            query: [heads, T, head size].
            key: [key-value heads, T, head size], in the dtype of `query`.
            value: [key-value heads, T, value size], in the dtype of `query`.
            pairs: the layout of the T tokens.
            scale: factor of the scores.

        Returns:
            [T, heads, value size].
        """
        output = query.new_empty(query.size(1), query.size(0), value.size(2))
        grouped = _group(output.transpose(0, 1), key.size(0))
        queries, keys = _group(query, key.size(0)), key.float()
        later = _hide_later(query.device)
        saved = []
        with _products_of(query.dtype):
            for block in _blocks(pairs):
                low = _score(queries, keys, scale, later, block).softmax(dim=-1).to(query.dtype)
                products = torch.bmm(low.flatten(1, 2), _see(value, block))
                grouped[:, :, block.first : block.last] = products.unflatten(1, (grouped.size(1), -1))
                if any(ctx.needs_input_grad) and block.keys <= _KEPT:
                    saved.append(low)
        ctx.save_for_backward(query, key, value, output, *saved)
        ctx.pairs, ctx.scale = pairs, scale
        return output

    @staticmethod
    def backward(ctx: Any, *of_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of query, key and value, in their shapes and dtypes."""
        query, key, value, output, *saved = ctx.saved_tensors
        (gradient,) = of_output
        means = torch.linalg.vecdot(gradient.float(), output.float()).t().unsqueeze(-1)
        queries, gradients, means = (_group(tensor, key.size(0)) for tensor in (query, gradient.transpose(0, 1), means))
        values, keys = value.float(), key.float()
        of_query = torch.empty_like(query)
        of_queries = _group(of_query, key.size(0))
        of_key, of_value = torch.zeros_like(keys), torch.zeros_like(values)
        later = _hide_later(query.device)
        kept = iter(saved)
        with _products_of(query.dtype):
            for block in _blocks(ctx.pairs):
                mine, through, mean = (
                    tensor[:, :, block.first : block.last].flatten(1, 2) for tensor in (queries, gradients, means)
                )
                if block.keys <= _KEPT:
                    weights = next(kept)
                else:
                    weights = _score(queries, keys, ctx.scale, later, block).softmax(dim=-1)
                weights = weights.flatten(1, 2)
                _add(of_value, block, torch.bmm(weights.to(query.dtype).transpose(1, 2), through))
                inner = torch.baddbmm(
                    mean, through.float(), _see(values, block).transpose(1, 2), beta=-ctx.scale, alpha=ctx.scale
                )
                inner = inner.mul_(weights).to(query.dtype)
                products = torch.bmm(inner, _see(key, block))
                of_queries[:, :, block.first : block.last] = products.unflatten(1, (queries.size(1), -1))
                _add(of_key, block, torch.bmm(inner.transpose(1, 2), mine))
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype), None, None


def _group(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """Return [heads, T, size] as [key-value heads, heads of each, T, size]."""
    grouped: torch.Tensor = tensor.unflatten(0, (count, -1))
    return grouped


def _see(tensor: torch.Tensor, block: _Block) -> torch.Tensor:
    """Return the keys or values of a block, [key-value heads, n, size]."""
    own = tensor[:, block.own : block.last]
    return torch.cat([tensor[:, block.start : block.start + block.prefix], own], dim=1) if block.prefix else own


def _add(total: torch.Tensor, block: _Block, part: torch.Tensor) -> None:
    """Add the gradient of a block's keys or values to the total."""
    if block.prefix:
        total[:, block.start : block.start + block.prefix] += part[:, : block.prefix]
    total[:, block.own : block.last] += part[:, block.prefix :]


@contextlib.contextmanager
def _products_of(dtype: torch.dtype) -> Iterator[None]:
    """Set the fastest exact precision for fp32 products whose factors hold values of `dtype`.

    oneDNN's rounding of fp32 factors to bfloat16 leaves bfloat16 values unchanged, and sums are in fp32 either way.
    """
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # set at run time
    before = settings.fp32_precision
    settings.fp32_precision = "none"  # inherit torch's general setting
    restored = "none" if settings.fp32_precision == before else before
    settings.fp32_precision = "bf16" if dtype == torch.bfloat16 else restored
    try:
        with torch.autocast("cpu", enabled=False):
            yield
    finally:
        settings.fp32_precision = restored


def _hide_later(device: torch.device) -> torch.Tensor:
    """Return the causal mask to add to scores, [queries, keys], fp32.

    Not cached: one cached during the memory estimate would be a fake tensor, which masks nothing.
    """
    size = max(_QUERIES, _WHOLE)
    return torch.full((size, size), float("-inf"), device=device).triu_(1)


def _score(queries: torch.Tensor, keys: torch.Tensor, scale: float, later: torch.Tensor, block: _Block) -> torch.Tensor:
    """Return S of a block, -inf at masked keys: [key-value heads, heads of each, queries, keys], fp32.

    Args:
        queries: [key-value heads, heads of each, T, head size].
        keys: [key-value heads, T, head size], fp32.
        scale: factor of the products.
        later: see `_hide_later`.
        block: the block to score.
    """
    own = queries[:, :, block.first : block.last]
    products = torch.bmm(own.flatten(1, 2).float(), _see(keys, block).transpose(1, 2)).mul_(scale)
    scores: torch.Tensor = products.unflatten(1, own.shape[1:3])
    scores[..., -own.size(2) :].add_(later[: own.size(2), : own.size(2)])
    if block.tail:
        scores[..., -block.tail :, block.hidden] = float("-inf")
    return scores

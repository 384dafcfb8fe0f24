"""Attention over packed pairs on a CPU, by matrix products over blocks of queries.

With S = scale · Q Kᵀ, P = softmax(S), O = P V and D = rowsum(dO ∘ O), the gradients are (FlashAttention,
arXiv 2205.14135, appendix B)

    dV = Pᵀ dO,    dS = P ∘ (dO Vᵀ - D),    dQ = scale · dS K,    dK = scale · dSᵀ Q

torch's own flash kernel for CPUs computes the same in smaller tiles; for pairs of 100 to 1,000 tokens larger products
take about half the time, forward and backward together (one core with avx512_bf16). S and dO Vᵀ, which exponentials
and differences are taken of, are products in fp32, as they are in that kernel: of bfloat16 factors oneDNN adds them up
in fp32 at the speed of bfloat16. Heads that share keys are one product, and so is a short pair.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from dpo_runner.training.engine.packed.packing import PairLengths

_QUERIES = 128
"""At a time: enough for fast products; few enough that little is computed beyond the diagonal."""

_WHOLE = 256
"""Tokens of a pair up to which it is one block: what is computed in vain takes less time than more products would."""

_KEPT = 1024
"""Keys up to which P is kept for the backward pass; with more, it takes more memory than computing it anew is worth."""


class _Block(NamedTuple):
    """Queries `[first, last)` see the prefix, `[start, start + prefix)`, and their own row, `[own, last)`, causally.

    Of a pair in one block the queries of the tail, the last `tail` ones, do not see `hidden`, where the chosen row has
    left the common prefix.
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
        """How many keys its last query sees, or could see."""
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
    """Each token of packed pairs attends to its own row up to itself."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pairs: list[PairLengths], scale: float
    ) -> torch.Tensor:
        """Attend.

        Args:
            ctx: autograd's.
            query: [heads, T, head size].
            key: [key-value heads, T, head size], in the dtype of `query`; so is `value`.
            value: [key-value heads, T, value size].
            pairs: the layout of the T tokens.
            scale: of the scores.

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
    """Return the keys or values that a block sees, [key-value heads, n, size]."""
    own = tensor[:, block.own : block.last]
    return torch.cat([tensor[:, block.start : block.start + block.prefix], own], dim=1) if block.prefix else own


def _add(total: torch.Tensor, block: _Block, part: torch.Tensor) -> None:
    """Add the gradient of what a block sees to the gradient of all."""
    if block.prefix:
        total[:, block.start : block.start + block.prefix] += part[:, : block.prefix]
    total[:, block.own : block.last] += part[:, block.prefix :]


@contextlib.contextmanager
def _products_of(dtype: torch.dtype) -> Iterator[None]:
    """Let fp32 products whose factors have values of `dtype` be as fast as they can without losing anything.

    A bfloat16 value survives oneDNN's rounding of fp32 factors to bfloat16, and sums are in fp32 either way.
    """
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # set at run time
    before = settings.fp32_precision
    settings.fp32_precision = "none"  # what torch's general setting says
    restored = "none" if settings.fp32_precision == before else before
    settings.fp32_precision = "bf16" if dtype == torch.bfloat16 else restored
    try:
        with torch.autocast("cpu", enabled=False):
            yield
    finally:
        settings.fp32_precision = restored


def _hide_later(device: torch.device) -> torch.Tensor:
    """Return what to add to scores, so that no query sees keys that come after it: [queries, keys], fp32.

    Made anew each time: kept from the memory estimate, it would be a fake tensor, which hides nothing from anyone.
    """
    size = max(_QUERIES, _WHOLE)
    return torch.full((size, size), float("-inf"), device=device).triu_(1)


def _score(queries: torch.Tensor, keys: torch.Tensor, scale: float, later: torch.Tensor, block: _Block) -> torch.Tensor:
    """Return S of a block, -inf where a key is not seen: [key-value heads, heads of each, queries, keys], fp32.

    Args:
        queries: [key-value heads, heads of each, T, head size].
        keys: [key-value heads, T, head size], fp32.
        scale: of the products.
        later: see `_hide_later`.
        block: which.
    """
    own = queries[:, :, block.first : block.last]
    products = torch.bmm(own.flatten(1, 2).float(), _see(keys, block).transpose(1, 2)).mul_(scale)
    scores: torch.Tensor = products.unflatten(1, own.shape[1:3])
    scores[..., -own.size(2) :].add_(later[: own.size(2), : own.size(2)])
    if block.tail:
        scores[..., -block.tail :, block.hidden] = float("-inf")
    return scores

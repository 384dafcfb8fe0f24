"""Log-probabilities of continuations; what their contexts have in common goes through the model once.

The choices of a question share its context, and all contexts of a task may share the chat template's beginning or the
same solved examples. Their keys and values are kept and repeated.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch

_WORTH_KEEPING = 8
"""Tokens of a common beginning from which on it is put through the model by itself."""

Ids = tuple[int, ...]


@dataclass
class _Read:
    """Contexts that a model has read.

    Attributes:
        cache: their keys and values.
        mask: 1 for each token of theirs, 0 for padding; shape [rows, positions].
        lengths: the number of tokens of each.
        logps: log p of the next token; shape [rows, vocabulary], float32.
    """

    cache: Any
    mask: torch.Tensor
    lengths: list[int]
    logps: torch.Tensor


def score_continuations(
    model: Callable[..., Any], device: torch.device, requests: Sequence[tuple[Ids, Ids]], size: int, pad_id: int
) -> list[tuple[float, bool]]:
    """Return log p of each continuation after its context, and whether it is the greedy one.

    Args:
        model: returns logits and cache.
        device: the model's.
        requests: contexts and continuations, each of at least one token.
        size: at most so many continuations in one forward; those of one context stay together.
        pad_id: any token.
    """
    wanted: dict[Ids, dict[Ids, list[int]]] = {}
    for number, (context, continuation) in enumerate(requests):
        wanted.setdefault(context, {}).setdefault(continuation, []).append(number)
    found = [(0.0, False)] * len(requests)
    contexts = sorted(wanted, key=lambda ids: (-len(ids), ids))
    with torch.no_grad():
        common = _find_common(contexts)
        start = _read(model, device, [common], None, 0, pad_id).cache if common else None
        for batch in _batches(contexts, wanted, size):
            read = _read(model, device, [ids[len(common) :] for ids in batch], start, len(common), pad_id)
            rows = [(row, answer) for row, ids in enumerate(batch) for answer in wanted[ids]]
            for (row, answer), scored in zip(rows, _continue(model, device, read, rows, pad_id), strict=True):
                for number in wanted[batch[row]][answer]:
                    found[number] = scored
    return found


def _find_common(contexts: Sequence[Ids]) -> Ids:
    """Return what all contexts begin with, without the last token of the shortest; () if it is not worth keeping."""
    if len(contexts) < 2:
        return ()
    alike = list(takewhile(lambda tokens: len(set(tokens)) == 1, zip(*contexts, strict=False)))
    common = contexts[0][: min(len(alike), len(contexts[-1]) - 1)]
    return common if len(common) >= _WORTH_KEEPING else ()


def _batches(contexts: Sequence[Ids], wanted: Mapping[Ids, Any], size: int) -> Iterator[list[Ids]]:
    batch: list[Ids] = []
    rows = 0
    for context in contexts:
        if batch and rows + len(wanted[context]) > size:
            yield batch
            batch, rows = [], 0
        batch.append(context)
        rows += len(wanted[context])
    if batch:
        yield batch


def _read(
    model: Callable[..., Any], device: torch.device, rows: Sequence[Ids], start: Any, before: int, pad_id: int
) -> _Read:
    """Put contexts through the model, padded on the left; `start` is the cache of the `before` tokens before them."""
    width = max(map(len, rows))
    cache = copy.deepcopy(start)
    if cache is not None and len(rows) > 1:
        cache.batch_repeat_interleave(len(rows))
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows], device=device)
    own = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    mask = torch.cat([own.new_ones(len(rows), before), own], dim=1)
    places = before + (own.cumsum(dim=1) - 1).clamp(min=0)
    output = model(ids, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True, last=True)
    logps = torch.log_softmax(output.logits[:, -1].float(), dim=-1)
    return _Read(output.past_key_values, mask, [before + len(row) for row in rows], logps)


def _continue(
    model: Callable[..., Any], device: torch.device, read: _Read, rows: Sequence[tuple[int, Ids]], pad_id: int
) -> list[tuple[float, bool]]:
    """Score continuations of contexts that were read, given by their rows."""
    first, best = read.logps, read.logps.argmax(dim=-1)
    scored = [(float(first[row, answer[0]]), bool(best[row] == answer[0])) for row, answer in rows]
    longer = [number for number, (_, answer) in enumerate(rows) if len(answer) > 1]
    if not longer:
        return scored
    width = max(len(rows[number][1]) for number in longer) - 1
    parents = torch.tensor([rows[number][0] for number in longer], device=device)
    inputs = [rows[number][1][:-1] for number in longer]
    ids = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in inputs], device=device)
    own = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in inputs], device=device)
    lengths = torch.tensor(read.lengths, device=device)[parents]
    places = lengths[:, None] + torch.arange(width, device=device)
    read.cache.batch_select_indices(parents)
    mask = torch.cat([read.mask[parents], own], dim=1)
    logits = model(ids, attention_mask=mask, position_ids=places, past_key_values=read.cache, use_cache=True).logits
    for row, number in enumerate(longer):
        rest = torch.tensor(rows[number][1][1:], device=device)
        logps = torch.log_softmax(logits[row, : len(rest)].float(), dim=-1)
        chosen, is_greedy = scored[number]
        chosen += logps.gather(1, rest[:, None]).sum().item()
        scored[number] = chosen, is_greedy and bool((logps.argmax(dim=-1) == rest).all())
    return scored

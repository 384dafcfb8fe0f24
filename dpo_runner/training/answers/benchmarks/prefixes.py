"""Log-probabilities of continuations; what their contexts have in common goes through the model once.

The choices of a question share its context, and all contexts of a task may share the chat template's beginning or the
same solved examples. Their keys and values are kept and repeated.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch

from dpo_runner.training.answers.sampling import read_prompts

_WORTH_KEEPING = 8
"""Tokens of a common beginning from which on it is put through the model by itself."""
_SHORT = 512
"""Requests with fewer tokens may be more in one forward than `benchmarks.batch_size`."""

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
    model: Any, requests: Sequence[tuple[Ids, Ids]], size: int, pad_id: int, shares_start: bool = True
) -> list[tuple[float, bool]]:
    """Return log p of each continuation after its context, and whether it is the greedy one.

    Args:
        model: in evaluation mode.
        requests: contexts and continuations, each of at least one token.
        size: see `count_requests`.
        pad_id: any token.
        shares_start: whether what all contexts begin with goes through the model once.
    """
    wanted: dict[Ids, dict[Ids, list[int]]] = {}
    for number, (context, continuation) in enumerate(requests):
        wanted.setdefault(context, {}).setdefault(continuation, []).append(number)
    found = [(0.0, False)] * len(requests)
    contexts = sorted(wanted, key=lambda ids: (-len(ids), ids))
    with torch.no_grad():
        common = find_common(contexts) if shares_start else 0
        start = read_prompts(model, [contexts[0][:common]], pad_id)[1] if common else None
        for batch, most in _batches(contexts, wanted, size):
            logits, cache, mask = read_prompts(model, [ids[common:] for ids in batch], pad_id, start, common)
            read = _Read(cache, mask, list(map(len, batch)), torch.log_softmax(logits.float(), dim=-1))
            rows = [(row, answer) for row, ids in enumerate(batch) for answer in wanted[ids]]
            for at in range(0, len(rows), most):
                part, is_last = rows[at : at + most], at + most >= len(rows)
                usable = read if is_last else replace(read, cache=copy.deepcopy(cache))
                for (row, answer), scored in zip(part, _continue(model, usable, part, pad_id), strict=True):
                    for number in wanted[batch[row]][answer]:
                        found[number] = scored
    return found


def find_common(contexts: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all contexts begin with, each having one more; 0 if they are not worth keeping."""
    if len(contexts) < 2:
        return 0
    alike = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*contexts, strict=False)))
    common = min(alike, *(len(ids) - 1 for ids in contexts))
    return common if common >= _WORTH_KEEPING else 0


def count_requests(size: int, longest: int) -> int:
    """Return how many requests go through the model together.

    Args:
        size: `benchmarks.batch_size`. Requests below 512 tokens may be more, `size` × 512 tokens together.
        longest: tokens of the longest request.
    """
    return max(size, size * _SHORT // longest)


def _batches(
    contexts: Sequence[Ids], wanted: Mapping[Ids, Mapping[Ids, Any]], size: int
) -> Iterator[tuple[list[Ids], int]]:
    """Divide contexts, the longest first; also return how many requests a forward may have."""
    batch: list[Ids] = []
    rows = answer = most = 0
    for context in contexts:
        longest = max(map(len, wanted[context]))
        if batch and rows + len(wanted[context]) > count_requests(size, len(batch[0]) + max(answer, longest)):
            yield batch, most
            batch, rows, answer = [], 0, 0
        batch.append(context)
        rows, answer = rows + len(wanted[context]), max(answer, longest)
        most = count_requests(size, len(batch[0]) + answer)
    if batch:
        yield batch, most


def _continue(model: Any, read: _Read, rows: Sequence[tuple[int, Ids]], pad_id: int) -> list[tuple[float, bool]]:
    """Score continuations of contexts that were read, given by their rows. The cache is used up."""
    device = model.device
    first, best = read.logps, read.logps.argmax(dim=-1)
    scored = [(float(first[row, answer[0]]), bool(best[row] == answer[0])) for row, answer in rows]
    longer = [number for number, (_, answer) in enumerate(rows) if len(answer) > 1]
    if not longer:
        return scored
    width = max(len(rows[number][1]) for number in longer) - 1
    parents = torch.tensor([rows[number][0] for number in longer])  # on the CPU, since layers may be on several devices
    inputs = [rows[number][1][:-1] for number in longer]
    ids = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in inputs], device=device)
    own = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in inputs], device=device)
    lengths = torch.tensor(read.lengths, device=device)[parents]
    places = lengths[:, None] + torch.arange(width, device=device)
    read.cache.batch_select_indices(parents)
    mask = torch.cat([read.mask[parents], own], dim=1)
    output = model(input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=read.cache, use_cache=True)
    for row, number in enumerate(longer):
        rest = torch.tensor(rows[number][1][1:], device=device)
        logps = torch.log_softmax(output.logits[row, : len(rest)].float(), dim=-1)
        chosen, is_greedy = scored[number]
        chosen += logps.gather(1, rest[:, None]).sum().item()
        scored[number] = chosen, is_greedy and bool((logps.argmax(dim=-1) == rest).all())
    return scored

"""Preference pairs as one row without padding, in which each pair's common prefix stands once.

A pair is laid out as `chosen ++ rejected[p:]`, where p is the length of the longest common prefix of its two rows
(usually the prompt, and however many tokens the answers share). Positions of the rejected tail go on from p, so every
token has the position, and with `attention.py` the context, that it has in its own row.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch


def count_tokens(row: Mapping[str, Sequence[Any]]) -> int:
    """Return how many tokens a pair has, as the trainer's data holds it; the prompt counts once."""
    return sum(len(row[key]) for key in ("prompt_ids", "chosen_ids", "rejected_ids"))


class PairLengths(NamedTuple):
    """Tokens of one packed pair: `prefix` common ones, within `chosen`; then `tail` of the rejected row."""

    prefix: int
    chosen: int
    tail: int


class Segments(NamedTuple):
    """The rows of packed pairs that attend, empty tails left out, as a kernel for rows of many lengths wants them.

    Attributes:
        keys: int64; which of the T tokens are a segment's keys, segment by segment; a prefix is there twice.
        cu_seq_q: [segments + 1], int32; where each segment's queries begin, and where the last ones end.
        cu_seq_k: the same of `keys`.
        max_q: the most queries of a segment.
        max_k: the most keys.
    """

    keys: torch.Tensor
    cu_seq_q: torch.Tensor
    cu_seq_k: torch.Tensor
    max_q: int
    max_k: int


class Pairs(list[PairLengths]):
    """The lengths of packed pairs, in their order, and what attention makes of them: once, not in each layer."""

    def __init__(self, pairs: Iterable[PairLengths] = ()) -> None:
        super().__init__(pairs)
        self._segments: dict[torch.device, Segments] = {}

    def segments(self, device: torch.device) -> Segments:
        if device not in self._segments:
            self._segments[device] = self._build_segments(device)
        return self._segments[device]

    def _build_segments(self, device: torch.device) -> Segments:
        keys: list[int] = []
        queries_of, keys_of, start = [], [], 0
        for pair in self:
            tail = start + pair.chosen
            keys += range(start, tail)
            queries_of.append(pair.chosen)
            keys_of.append(pair.chosen)
            if pair.tail:
                keys += [*range(start, start + pair.prefix), *range(tail, tail + pair.tail)]
                queries_of.append(pair.tail)
                keys_of.append(pair.prefix + pair.tail)
            start = tail + pair.tail
        cu_seq_q, cu_seq_k = (
            torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device) for counts in (queries_of, keys_of)
        )
        return Segments(torch.tensor(keys, device=device), cu_seq_q, cu_seq_k, max(queries_of), max(keys_of))


@dataclass(frozen=True)
class Packing:
    """B pairs as one row of T tokens.

    Attributes:
        input_ids: [1, T], int64.
        position_ids: [1, T], int64; each token's position in its own row.
        pairs: lengths of each pair, in their order.
        source: [N], int64; where the hidden state stands that predicts each label.
        targets: [N], int64; the labels, chosen rows first, as TRL's batches have them.
        mask: [2B, L-1], bool; which places of TRL's batch, shifted by one, the N labels fill, row by row.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    pairs: Pairs
    source: torch.Tensor
    targets: torch.Tensor
    mask: torch.Tensor


def pack_pairs(input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> Packing:
    """Pack a batch as TRL's `DataCollatorForPreference` makes it.

    Args:
        input_ids: [2B, L], int64; B chosen rows, then their B rejected ones, padded on the right.
        attention_mask: [2B, L], 1 where there is a token.
        labels: [2B, L], int64; the token itself where it is scored, -100 elsewhere.
    """
    length = input_ids.size(1)
    ids, real = (tensor.view(2, -1, length) for tensor in (input_ids, attention_mask.bool()))
    same = (ids[0] == ids[1]) & real[0] & real[1]
    prefix = same.long().cumprod(dim=1).sum(dim=1)  # [B]
    own = torch.arange(length, device=ids.device) >= prefix.unsqueeze(1)  # [B, L]: no part of the common prefix

    kept = torch.stack([real[0], real[1] & own], dim=1)  # [B, 2, L]
    place = (kept.flatten().long().cumsum(dim=0) - 1).view_as(kept)
    place = torch.stack([place[:, 0], torch.where(own, place[:, 1], place[:, 0])])  # [2, B, L], as TRL orders rows

    mask = labels[:, 1:] != -100
    sizes = torch.stack([prefix, *kept.sum(dim=2).unbind(dim=1)], dim=1)
    return Packing(
        input_ids=ids.transpose(0, 1)[kept].unsqueeze(0),
        position_ids=torch.arange(length, device=ids.device).expand_as(kept)[kept].unsqueeze(0),
        pairs=Pairs(PairLengths(*lengths) for lengths in sizes.tolist()),
        source=place.view(-1, length)[:, :-1][mask],
        targets=labels[:, 1:][mask],
        mask=mask,
    )

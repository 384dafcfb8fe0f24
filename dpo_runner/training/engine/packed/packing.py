"""Preference pairs packed into one row without padding, with each pair's common prefix stored once.

A pair is laid out as `chosen ++ rejected[p:]`, where p is the length of the longest common prefix of its two rows
(usually the prompt, plus any tokens that the answers share). Positions of the rejected tail continue from p, so every
token has the position, and with `attention.py` the context, that it has in its own row.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch


def count_tokens(row: Mapping[str, Sequence[Any]]) -> int:
    """Return the tokens of a pair from the trainer's dataset; the prompt counts once."""
    return sum(len(row[key]) for key in ("prompt_ids", "chosen_ids", "rejected_ids"))


class PairLengths(NamedTuple):
    """Tokens of one packed pair: `chosen`, of which `prefix` are common; then `tail` of the rejected row."""

    prefix: int
    chosen: int
    tail: int


class Segments(NamedTuple):
    """The attending rows of packed pairs, without empty tails, as arguments of a variable-length kernel.

    Attributes:
        keys: int64; indices into the T tokens of each segment's keys, segment by segment; a prefix is there twice.
        cu_seq_q: [segments + 1], int32; offsets at which each segment's queries begin, and the end of the last one.
        cu_seq_k: the same for `keys`.
        max_q: most queries of a segment.
        max_k: most keys of a segment.
    """

    keys: torch.Tensor
    cu_seq_q: torch.Tensor
    cu_seq_k: torch.Tensor
    max_q: int
    max_k: int


class Pairs(list[PairLengths]):
    """The lengths of packed pairs in their order, with their `Segments` cached so that layers share them.

    Attributes:
        attention: computes the attention; None if the tensors' device decides, which the memory estimate's are not on.
    """

    def __init__(self, pairs: Iterable[PairLengths] = (), attention: Callable[..., torch.Tensor] | None = None) -> None:
        super().__init__(pairs)
        self.attention = attention
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
        source: [N], int64; index of the hidden state that predicts each label.
        targets: [N], int64; the labels, chosen rows first, as in TRL's batches.
        mask: [2B, L-1], bool; the positions of TRL's batch, shifted by one, that the N labels fill, row by row.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    pairs: Pairs
    source: torch.Tensor
    targets: torch.Tensor
    mask: torch.Tensor


def pack_pairs(input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> Packing:
    """Pack a batch of TRL's `DataCollatorForPreference`.

    Args:
        input_ids: [2B, L], int64; B chosen rows, then their B rejected ones, padded on the right.
        attention_mask: [2B, L], 1 at tokens, 0 at padding.
        labels: [2B, L], int64; the token itself where it is scored, -100 elsewhere.
    """
    length = input_ids.size(1)
    ids, real = (tensor.view(2, -1, length) for tensor in (input_ids, attention_mask.bool()))
    same = (ids[0] == ids[1]) & real[0] & real[1]
    prefix = same.long().cumprod(dim=1).sum(dim=1)  # [B]
    own = torch.arange(length, device=ids.device) >= prefix.unsqueeze(1)  # [B, L]: outside the common prefix

    kept = torch.stack([real[0], real[1] & own], dim=1)  # [B, 2, L]
    place = (kept.flatten().long().cumsum(dim=0) - 1).view_as(kept)
    place = torch.stack([place[:, 0], torch.where(own, place[:, 1], place[:, 0])])  # [2, B, L], in TRL's order of rows

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

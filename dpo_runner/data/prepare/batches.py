"""Conversion of a batch of rows to token ids, with the reasons for rows that yield none."""

import functools
import hashlib
import itertools
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from dpo_runner.data.layouts.messages import Pair
from dpo_runner.data.prepare.recipe import Recipe
from dpo_runner.data.rows.decoding import Batch, decode_rows
from dpo_runner.data.templates.chat_template import Encoded
from dpo_runner.errors import LeftOut, RowError

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass
class Outcome:
    """Result of a batch of rows: its pairs as one Arrow batch, and the reasons for the remaining rows."""

    pairs: "pa.RecordBatch"
    rows: int = 0
    bad: list[tuple[int, int, str, str]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    unscored: int = 0
    first_mismatch: tuple[int, int, str] | None = None


def process_batch(batch: Batch, recipe: Recipe) -> Outcome:
    """Convert a batch of rows to token ids, and record the reasons for rows that yield none."""
    outcome = Outcome(pairs=None)
    pairs: list[Pair] = []
    rows: list[int] = []
    numbers = batch.numbers
    for index, (number, row) in enumerate(decode_rows(batch)):
        outcome.rows += 1
        try:
            made = recipe.pairs(row)
        except LeftOut as error:
            outcome.left_out[error.reason] += 1
            continue
        except RowError as error:
            outcome.bad.append((batch.file, number, error.reason, error.detail))
            continue
        pairs += made
        rows += [index] * len(made)
    encoded = recipe.template.encode_batch(pairs)
    failed: dict[int, RowError] = {}
    for index, result in zip(rows, encoded, strict=True):
        if isinstance(result, RowError):
            failed.setdefault(index, result)  # one bad pair makes the whole row bad
    outcome.bad += [(batch.file, numbers[index], error.reason, error.detail) for index, error in failed.items()]
    outcome.bad.sort(key=lambda item: abs(item[1]))
    kept = [
        (pair, numbers[index], result)
        for pair, index, result in zip(pairs, rows, encoded, strict=True)
        if isinstance(result, Encoded) and index not in failed
    ]
    for _, number, result in kept:
        if result.mismatch:
            outcome.first_mismatch = (batch.file, number, result.mismatch)
            break
    outcome.unscored = sum(pair.is_unscored() for pair, _, _ in kept)
    outcome.pairs = _to_arrow(batch.file, kept)
    return outcome


@functools.cache
def schema() -> "pa.Schema":
    import pyarrow as pa

    ids = pa.list_(pa.int32())
    return pa.schema(
        [
            ("prompt_ids", ids),
            ("chosen_ids", ids),
            ("rejected_ids", ids),
            ("prompt", pa.string()),
            ("file", pa.int32()),
            ("number", pa.int64()),
            ("prompt_hash", pa.uint64()),
            ("pair_hash", pa.uint64()),
            ("mismatched", pa.bool_()),
        ]
    )


def _to_arrow(file: int, kept: list[tuple[Pair, int, Encoded]]) -> "pa.RecordBatch":
    import pyarrow as pa

    prompts = [json.dumps(pair.prompt, ensure_ascii=False) for pair, _, _ in kept]
    pair_hashes = [
        _hash(b"/".join(np.array(ids, np.int32).tobytes() for ids in (e.prompt_ids, e.chosen_ids, e.rejected_ids)))
        for _, _, e in kept
    ]
    columns = [
        _id_lists([encoded.prompt_ids for _, _, encoded in kept]),
        _id_lists([encoded.chosen_ids for _, _, encoded in kept]),
        _id_lists([encoded.rejected_ids for _, _, encoded in kept]),
        pa.array(prompts, pa.string()),
        pa.array(np.full(len(kept), file, np.int32)),
        pa.array([number for _, number, _ in kept], pa.int64()),
        pa.array([_hash(prompt.encode()) for prompt in prompts], pa.uint64()),
        pa.array(pair_hashes, pa.uint64()),
        pa.array([bool(encoded.mismatch) for _, _, encoded in kept], pa.bool_()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema())


def _id_lists(lists: list[list[int]]) -> "pa.Array":
    import pyarrow as pa

    offsets = np.zeros(len(lists) + 1, np.int32)
    np.cumsum([len(ids) for ids in lists], out=offsets[1:])
    flat = np.fromiter(itertools.chain.from_iterable(lists), np.int32, count=int(offsets[-1]))
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")

"""Keys of pairs in the reference store, from the columns of many rows at once."""

import struct
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash
from datasets import Dataset

from dpo_runner.data.preferences import ID_COLUMNS


def read_keys(rows: Dataset, collator: Any) -> tuple[list[bytes], list[int]]:
    """Return, of each pair, a digest of its model inputs, and its tokens, with the prompt counted once.

    Args:
        rows: of token ids. Their lists are read from Arrow; as lists of Python numbers they take ten times as long.
        collator: `DataCollatorForPreference`; the digest covers both rows as it cuts them.
    """
    table = rows.select_columns(list(ID_COLUMNS)).with_format("arrow")[:]
    prompts, chosen, rejected = (_split(table.column(name)) for name in ID_COLUMNS)
    keys = [_digest(*pair, collator) for pair in zip(prompts, chosen, rejected, strict=True)]
    return keys, [sum(map(len, pair)) for pair in zip(prompts, chosen, rejected, strict=True)]


def _split(column: pa.ChunkedArray) -> list[npt.NDArray[np.int64]]:
    lists = column.combine_chunks()  # a selection has a chunk for each row
    ids, ends = lists.flatten().to_numpy().astype(np.int64), np.cumsum(lists.value_lengths().to_numpy())
    return [ids[start:end] for start, end in pairwise([0, *ends.tolist()])]


def _digest(prompt: npt.NDArray[Any], chosen: npt.NDArray[Any], rejected: npt.NDArray[Any], collator: Any) -> bytes:
    digest = xxhash.xxh3_128()
    for completion in (chosen, rejected):
        ids, scored = np.concatenate((prompt, completion)), len(completion)
        if collator.max_length is not None and len(ids) > collator.max_length:
            if collator.truncation_mode == "keep_start":
                ids, scored = ids[: collator.max_length], max(collator.max_length - len(prompt), 0)
            else:
                ids, scored = ids[-collator.max_length :], min(scored, collator.max_length)
        digest.update(struct.pack("=qq", len(ids), scored))
        digest.update(ids.data)
    return digest.digest()

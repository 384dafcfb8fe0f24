"""Near-duplicate pairs, and pairs that share text with an evaluation set.

Memory grows with rows, not with tokens.
"""

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dpo_runner.config.sections.data import SourceFields
from dpo_runner.data.rows.decoding import decode_rows
from dpo_runner.data.rows.sources import BUNDLED_PREFIX, is_hub_id, open_sources
from dpo_runner.errors import DataError, RowError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Int64s = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]

_PARTS = ("prompt_ids", "chosen_ids", "rejected_ids")
_SEED = 0
_TOKENS = 5
"""Tokens per n-gram in `find_near_duplicates`."""
_NUM_PERM = 128
_MIN_RECALL = 0.9
"""Minimum share of the pairs at exactly the threshold that LSH must propose."""
_MAX_BANDS = 32
"""With more bands, LSH proposes all rows that share a system prompt, and time grows with the square of the rows."""
_BATCH = 256
"""Rows in memory at a time: while a row is hashed, each of its n-grams is a bytes object of about 60 bytes."""
_MIN_WHOLE = 3
"""Minimum words for a whole-text match: shorter texts ("Yes", "Thank you", the labels of a benchmark) occur in any
conversation."""

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003fffd"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")
_ASCII_WORD = re.compile(r"\w+", re.ASCII)


def find_near_duplicates(rows: "Dataset", threshold: float) -> npt.NDArray[np.bool_]:
    """Mark rows that nearly repeat an earlier kept row (marked rows are not compared against).

    The measure is the Jaccard similarity of the sets of token 5-grams, estimated from 128 MinHash values (standard
    error at most 0.045), for the pairs of rows that LSH proposes. LSH misses at most a tenth of the pairs exactly at
    the threshold (at 0.5 an eighth, below that more), and next to none of those well above it. N-grams are tagged
    with their part, so a pair with its answers swapped is different; a part of fewer than 5 tokens is one n-gram.
    The result is deterministic.

    Shared text of any kind counts: if the system prompt is much longer than the rest, all rows are similar.

    Broder, "On the resemblance and containment of documents" (1997); 5-grams as in Lee et al., "Deduplicating
    Training Data Makes Language Models Better" (2022).

    Args:
        rows: with columns `prompt_ids`, `chosen_ids`, `rejected_ids`, lists of int32.
        threshold: minimum similarity of near-duplicates, in (0, 1].

    Returns:
        bool, shape (rows,).
    """
    from rensa import RMinHashDeduplicator

    kept = RMinHashDeduplicator(threshold, _NUM_PERM, use_lsh=True, num_bands=_count_bands(threshold), seed=_SEED)
    marks = np.zeros(len(rows), dtype=np.bool_)
    start = 0
    for batch in rows.select_columns(list(_PARTS)).with_format("arrow").iter(batch_size=_BATCH):
        parts = [_row_grams(batch[name].combine_chunks(), tag) for tag, name in enumerate(_PARTS)]
        entries = [(str(start + i), list(chain(*grams))) for i, grams in enumerate(zip(*parts, strict=True))]
        marks[start : start + len(entries)] = ~np.array(kept.add_pairs(entries), dtype=np.bool_)
        start += len(entries)
    return marks


def find_contaminated(
    rows: "Dataset", tokenizer: "PreTrainedTokenizerBase", references: Iterable[str], ngram: int
) -> npt.NDArray[np.bool_]:
    """Mark rows that share text with the references.

    A row is marked if its prompt, chosen or rejected answer shares `ngram` consecutive words with a reference, or if
    its last user message equals, word for word, a reference of fewer than `ngram` (and at least 3) words. Words are
    runs of letters and digits, without case or punctuation, in Unicode compatibility form (NFKC); in scripts without
    spaces (Chinese, Japanese) each character is a word.

    Brown et al., "Language Models are Few-Shot Learners" (2020), appendix C, uses `ngram` = 13.

    Args:
        rows: with columns `prompt_ids`, `chosen_ids`, `rejected_ids`, lists of int32, and `prompt`, the messages as a
            JSON list of `{"role": …, "content": …}`.
        tokenizer: decodes the ids.
        references: evaluation texts, iterated once.
        ngram: number of words, at least 1.

    Returns:
        bool, shape (rows,).
    """
    grams, wholes = _index_references(references, ngram)
    marks = np.zeros(len(rows), dtype=np.bool_)
    start = 0
    for batch in rows.select_columns([*_PARTS, "prompt"]).with_format("arrow").iter(batch_size=_BATCH):
        for name in _PARTS:
            texts = tokenizer.batch_decode(batch[name].to_pylist(), skip_special_tokens=True)
            hashes, owners = _hash_ngrams([_words(text) for text in texts], ngram)
            marks[start + owners[_is_in(hashes, grams)]] = True
        if wholes:
            for i, prompt in enumerate(batch["prompt"].to_pylist()):
                marks[start + i] |= tuple(_words(_last_user_message(prompt))) in wholes
        start += len(batch)
    return marks


def load_reference_texts(names: list[str], key: str = "data.decontaminate") -> Iterator[str]:
    """Yield the evaluation texts that `find_contaminated` takes as references.

    Args:
        names: local files or globs (each line of a .txt file is a text; in rows of other files, each string at any
            depth), `bundled:NAME`, or hub datasets as `OWNER/NAME`, `OWNER/NAME:SPLIT` or `OWNER/NAME/SUBSET:SPLIT`;
            the split defaults to `test`. `eval` is skipped: the caller has those rows.
        key: configuration key of the names, for messages.

    Raises:
        DataError: a name is not found or holds no text, or a row cannot be read. Nothing is skipped: with missing
            references, contaminated rows would look clean.
    """
    for name in names:
        if name == "eval":
            continue
        texts = _load_lines(name, key) if Path(name).suffix.lower() == ".txt" else _load_strings(name, key)
        is_empty = True
        for text in texts:
            if text.strip():
                is_empty = False
                yield text
        if is_empty:
            raise DataError(f"`{key}={name}`: holds no text")


def _load_lines(name: str, key: str) -> Iterator[str]:
    try:
        with Path(name).expanduser().open(encoding="utf-8-sig") as file:
            yield from file
    except OSError as error:
        raise DataError(f"`{key}={name}`: cannot be read; {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"`{key}={name}`: is not UTF-8; save it as UTF-8") from None


def _load_strings(name: str, key: str) -> Iterator[str]:
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "state.json").is_file():
        raise DataError(f"`{key}={name}`: is a folder; name its files, such as {name.rstrip('/')}/*.jsonl")
    try:
        train, evaluation = open_sources(_name_source(name), key)
        source = evaluation or train
        for batch in source.batches(1000):
            for number, row in decode_rows(batch):
                if isinstance(row, RowError):
                    raise DataError(f"`{key}={name}`: {source.locate(batch.file, number)}: {row}")
                yield from _strings(row)
    except DataError as error:  # it names fields of a source (`key.path=…`); here there is only a name
        field = re.compile(rf"^`{re.escape(key)}\.\w+=[^`]*`")
        raise DataError([field.sub(lambda _: f"`{key}={name}`", line) for line in error.mistakes]) from None


def _name_source(name: str) -> SourceFields:
    parts = re.fullmatch(r"(?P<path>[^/:]+(?:/[^/:]+)?)(?:/(?P<subset>[^/:]+))?(?::(?P<split>.+))?", name)
    if parts is None or name.startswith(BUNDLED_PREFIX) or not is_hub_id(parts["path"]) or Path(name).exists():
        return SourceFields(path=name)
    return SourceFields(path=parts["path"], subset=parts["subset"], split=parts["split"] or "test")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _count_bands(threshold: float) -> int:
    """Return the fewest LSH bands with enough recall: rensa's default finds a fifth of the pairs at 0.8."""
    bands = 1
    while bands < _MAX_BANDS and 1 - (1 - threshold ** (_NUM_PERM / bands)) ** bands < _MIN_RECALL:
        bands *= 2
    return bands


def _row_grams(column: Any, tag: int) -> list[list[bytes]]:
    """Return the n-grams of each row of an Arrow list array, with repeats; `tag` marks their part."""
    ids = column.flatten().to_numpy(zero_copy_only=False).astype(np.int32)
    lengths = column.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    counts = np.maximum(lengths - _TOKENS + 1, 1)
    first_grams = np.cumsum(counts) - counts
    padded = np.concatenate([ids, np.full(_TOKENS, -1, dtype=np.int32)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, _TOKENS)[_ranges(np.cumsum(lengths) - lengths, counts)]
    short = np.flatnonzero(lengths < _TOKENS)
    at = first_grams[short]
    windows[at] = np.where(np.arange(_TOKENS) < lengths[short, None], windows[at], -1)
    tagged = np.column_stack([np.full(len(windows), tag, dtype=np.int32), windows])
    grams = tagged.view(np.dtype(f"V{tagged.itemsize * tagged.shape[1]}")).ravel().tolist()
    return [grams[first : first + count] for first, count in zip(first_grams.tolist(), counts.tolist(), strict=True)]


def _ranges(starts: Int64s, counts: Int64s) -> Int64s:
    """Return the concatenation of `starts[i], starts[i] + 1, …` (`counts[i]` values) over all i."""
    return np.repeat(starts - (np.cumsum(counts) - counts), counts) + np.arange(int(counts.sum()))


def _words(text: str) -> list[str]:
    if text.isascii():  # same words, several times faster
        return _ASCII_WORD.findall(text.lower())
    return _WORD.findall(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()))


def _hash_ngrams(texts: list[list[str]], ngram: int) -> tuple[UInt64s, Int64s]:
    """Return a hash of each word n-gram, and the index of its text.

    Word hashes differ between processes without affecting the result: the probability that any of 10^9 n-grams
    collides with any of another 10^7 is 10^-3.
    """
    lengths = np.array([len(words) for words in texts], dtype=np.int64)
    flat = np.fromiter((hash(word) for words in texts for word in words), dtype=np.int64).view(np.uint64)
    positions = max(len(flat) - ngram + 1, 0)
    hashes = np.zeros(positions, dtype=np.uint64)
    factors = np.random.default_rng(_SEED).integers(0, 1 << 64, size=ngram, dtype=np.uint64) | np.uint64(1)
    for offset, factor in enumerate(factors):
        hashes += flat[offset : offset + positions] * factor
    counts = np.maximum(lengths - ngram + 1, 0)
    inside = _ranges(np.cumsum(lengths) - lengths, counts)
    return hashes[inside], np.repeat(np.arange(len(texts)), counts)


def _index_references(references: Iterable[str], ngram: int) -> tuple[UInt64s, set[tuple[str, ...]]]:
    """Return the sorted hashes of all n-grams (8 bytes each), and the words of texts too short for one."""
    hashes = [np.empty(0, dtype=np.uint64)]
    wholes: set[tuple[str, ...]] = set()
    texts = iter(references)
    while chunk := [_words(text) for text in islice(texts, 10_000)]:
        hashes.append(np.unique(_hash_ngrams(chunk, ngram)[0]))
        wholes.update(tuple(words) for words in chunk if _MIN_WHOLE <= len(words) < ngram)
    return np.unique(np.concatenate(hashes)), wholes


def _is_in(hashes: UInt64s, grams: UInt64s) -> npt.NDArray[np.bool_]:
    if len(grams) == 0:
        return np.zeros(len(hashes), dtype=np.bool_)
    found = np.searchsorted(grams, hashes)
    return np.asarray(grams[np.minimum(found, len(grams) - 1)] == hashes)


def _last_user_message(prompt: str) -> str:
    contents = (message["content"] for message in reversed(json.loads(prompt)) if message["role"] == "user")
    return next(contents, "")

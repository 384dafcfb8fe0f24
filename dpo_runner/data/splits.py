"""Splits: the prepared pairs of `train` or `eval`, their order, and the reasons for dropped ones."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dpo_runner.config.sections.data import SourceConf
from dpo_runner.data.prepare.cache import Prepared
from dpo_runner.data.report import PARTS, LengthBias, Lengths, SplitReport
from dpo_runner.errors import DataError
from dpo_runner.io.upstream import find_fingerprint

if TYPE_CHECKING:
    from datasets import Dataset

Mask = npt.NDArray[np.bool_]

_KEPT, _UNUSED = 0, 1  # fates; from 2 on, dropped: an index into the reasons


class PairShape(NamedTuple):
    """Lengths of a pair's prompt and its two answers, in tokens."""

    prompt: int
    chosen: int
    rejected: int

    def cut(self, length: int) -> "PairShape":
        """Return the shape after cutting each row to its first `length` tokens."""
        room = max(length - self.prompt, 0)
        return PairShape(min(self.prompt, length), min(self.chosen, room), min(self.rejected, room))


@dataclass(frozen=True)
class DataShape:
    """The largest row sizes of a run.

    Attributes:
        longest: tokens of the longest conversation: prompt plus the longer answer.
        largest: the pair with the most tokens.
        has_evaluation: whether there are evaluation rows.
    """

    longest: int
    largest: PairShape
    has_evaluation: bool = True

    def cut(self, length: int | None) -> "DataShape":
        """Return the sizes after cutting each row to its first `length` tokens; None cuts nothing."""
        longest = self.longest if length is None else min(self.longest, length)
        return replace(self, longest=longest, largest=self.largest.cut(longest))


class Split:
    """The candidate pairs of a split, each kept, dropped or not drawn.

    Args:
        parts: for each source its name, its prepared pairs, and a mask of those that belong to this split.

    Attributes:
        source: index of each pair's source, int16.
        row: index of each pair in its source, int64.
        lengths: by part (prompt, chosen, rejected), tokens of each pair, int32.
        prompt_hash, pair_hash: of each pair, uint64.
    """

    def __init__(self, parts: Sequence[tuple[str, Prepared, Mask]]) -> None:
        self.names = [name for name, _, _ in parts]
        self.sources = [source for _, source, _ in parts]
        rows = [np.flatnonzero(mask) for _, _, mask in parts]
        self.source = np.repeat(np.arange(len(rows), dtype=np.int16), [len(part) for part in rows])
        self.row = np.concatenate([np.zeros(0, np.int64), *rows])
        self.prompt_hash = self._gather("prompt_hash", rows)
        self.pair_hash = self._gather("pair_hash", rows)
        self.lengths = {part: self._gather_lengths(f"{part}_ids", rows) for part in PARTS}
        self.order = np.arange(len(self.row))
        self.truncated: dict[str, int] = {}
        self.repeats = find_repeats(self.pair_hash)
        self._fate = np.zeros(len(self.row), np.int8)
        self._reasons = ["kept", "not drawn"]

    def _gather(self, column: str, rows: list[npt.NDArray[np.int64]]) -> npt.NDArray[np.uint64]:
        parts = [
            source.rows.data.column(column).to_numpy()[part] for source, part in zip(self.sources, rows, strict=True)
        ]
        return np.concatenate([np.zeros(0, np.uint64), *parts])

    def _gather_lengths(self, column: str, rows: list[npt.NDArray[np.int64]]) -> npt.NDArray[np.int32]:
        import pyarrow.compute as pc

        parts = []
        for source, part in zip(self.sources, rows, strict=True):
            chunks = [pc.list_value_length(chunk).to_numpy() for chunk in source.rows.data.column(column).chunks]
            parts.append(np.concatenate([np.zeros(0, np.int32), *chunks])[part])
        return np.concatenate([np.zeros(0, np.int32), *parts])

    @property
    def kept(self) -> Mask:
        """Mask of the pairs that are neither dropped nor left undrawn so far."""
        kept: Mask = self._fate == _KEPT
        return kept

    def drop(self, mask: Mask, reason: str) -> None:
        """Drop the kept pairs selected by `mask`, of shape (all pairs,)."""
        self._fate[mask & self.kept] = len(self._reasons)
        self._reasons.append(reason)

    def drop_repeats(self) -> None:
        """Drop each kept pair that repeats an earlier kept one token for token."""
        kept = np.flatnonzero(self.kept)
        self.drop_among_kept(find_repeats(self.pair_hash[kept]), "exact duplicate")

    def longest(self) -> int:
        """Return the tokens of the longest kept pair (prompt plus longer answer); 0 without pairs."""
        answer = np.maximum(self.lengths["chosen"], self.lengths["rejected"])
        return int((self.lengths["prompt"] + answer)[self.kept].max(initial=0))

    def largest(self) -> PairShape:
        """Return the shape of the kept pair with most tokens, prompt counted once; zeros without pairs."""
        lengths = np.stack([self.lengths[part][self.kept] for part in PairShape._fields])  # [3, pairs]
        return PairShape(*lengths[:, lengths.sum(axis=0).argmax()].tolist()) if lengths.size else PairShape(0, 0, 0)

    def drop_among_kept(self, mask: Mask, reason: str) -> None:
        """Drop the kept pairs selected by `mask`, of shape (kept pairs,)."""
        whole = self.kept
        whole[whole] = mask
        self.drop(whole, reason)

    def drop_equal(self, tables: Sequence["Dataset"]) -> None:
        """Drop pairs whose answers became equal when the sources' rows were cut to `tables`."""
        equal = np.zeros(len(self.row), np.bool_)
        same_length = self.kept & (self.lengths["chosen"] == self.lengths["rejected"])
        for index in np.flatnonzero(same_length):
            row = tables[self.source[index]][int(self.row[index])]
            equal[index] = row["chosen_ids"] == row["rejected_ids"]
        self.drop(equal, "chosen equals rejected once cut to training.max_length")

    def take(self, sources: Sequence[SourceConf], limit: int | None) -> None:
        """Draw pairs from each source by weight and `max_train_samples`, mix evenly, keep the first `limit`.

        Args:
            sources: as configured; weights apply after each source's `max_train_samples`.
            limit: maximum number of pairs in total; None takes all.
        """
        self._take([(conf.max_train_samples, conf.weight, conf.seed) for conf in sources], limit)

    def take_for_evaluation(self, sources: Sequence[SourceConf], limit: int | None) -> None:
        """Draw pairs from each source by `max_eval_samples` and mix them; weights apply to training only."""
        self._take([(conf.max_eval_samples, None, conf.seed) for conf in sources], limit)

    def _take(self, rules: list[tuple[int | None, float | None, int]], limit: int | None) -> None:
        counts = [int((self.kept & (self.source == index)).sum()) for index in range(len(rules))]
        takes = [count if most is None else min(count, most) for count, (most, _, _) in zip(counts, rules, strict=True)]
        weights = [weight for _, weight, _ in rules]
        if weights[0] is not None:  # all sources have a weight, or none has
            scale = min(count / weight for count, weight in zip(takes, weights, strict=True) if weight)
            takes = [int(scale * weight + 1e-9) for weight in weights if weight]
        drawn: list[npt.NDArray[np.int64]] = []
        for index, (take, (_, _, seed)) in enumerate(zip(takes, rules, strict=True)):
            rows = np.flatnonzero(self.kept & (self.source == index))
            if take < len(rows):
                rows = np.sort(np.random.default_rng(seed).permutation(rows)[:take])
            drawn.append(rows)
        # Mixed evenly, so that the first rows have the mixture's shares too; a single source keeps its order.
        places = np.concatenate([(np.arange(len(rows)) + 0.5) / max(len(rows), 1) for rows in drawn])
        self.order = np.concatenate(drawn)[np.argsort(places, kind="stable")][:limit]
        passed_over = self.kept
        passed_over[self.order] = False
        self._fate[passed_over] = _UNUSED

    def build(self, tables: Sequence["Dataset"] | None = None) -> "Dataset":
        """Return the kept pairs, in order, as a memory-mapped dataset.

        Args:
            tables: cut versions of the sources' rows, row for row, to use instead of these.
        """
        from datasets import concatenate_datasets

        tables = tables or [source.rows for source in self.sources]
        starts = np.cumsum([0, *(len(table) for table in tables)])
        taken = self._taken()
        return select_rows(concatenate_datasets(list(tables)), starts[self.source[taken]] + self.row[taken])

    def _taken(self) -> npt.NDArray[np.int64]:
        """Return the indices of the pairs in `build()`, in order."""
        return self.order[self.kept[self.order]]

    def sources_in_order(self) -> npt.NDArray[np.int16]:
        """Return the source of each pair of `build()`."""
        return self.source[self._taken()]

    def fingerprint(self) -> str:
        """Return a digest of the pairs of `build()`, in order."""
        taken = self._taken()
        digest = hashlib.sha256(self.pair_hash[taken].tobytes())
        for part in PARTS:  # a cut pair keeps its hash but changes its lengths
            digest.update(self.lengths[part][taken].tobytes())
        return digest.hexdigest()[:16]

    def count_prompts_shared_with(self, other: "Split") -> int:
        """Return the number of kept pairs whose prompt also occurs among the kept pairs of `other`."""
        return int(np.isin(self.prompt_hash[self.kept], other.prompt_hash[other.kept]).sum())

    def locate(self, row: int) -> str:
        """Return the location of row `row` of `build()` in its source."""
        pair = self._taken()[row]
        index = int(self.source[pair])
        found = self.sources[index].rows[int(self.row[pair])]
        place = self.sources[index].source.locate(found["file"], found["number"])
        return f"{self.names[index]}: {place}" if len(self.names) > 1 else place

    def dropped(self) -> Iterator[tuple[str, dict[str, Any], str]]:
        """Yield source, place and reason of each pair that was dropped."""
        for index, source in enumerate(self.sources):
            files, numbers = (source.rows.data.column(name).to_numpy() for name in ("file", "number"))
            for pair in np.flatnonzero((self._fate > _UNUSED) & (self.source == index)):
                row = self.row[pair]
                place = source.source.place(int(files[row]), int(numbers[row]))
                yield self.names[index], place, self._reasons[self._fate[pair]]

    def report(self) -> SplitReport:
        """Return the counts and lengths of this split."""
        kept, codes = self.kept, np.bincount(self._fate, minlength=len(self._reasons))
        lengths = {part: values[kept] for part, values in self.lengths.items()}
        return SplitReport(
            pairs=len(kept),
            kept=int(kept.sum()),
            by_source={name: int((kept & (self.source == index)).sum()) for index, name in enumerate(self.names)},
            dropped={reason: int(n) for reason, n in zip(self._reasons[2:], codes[2:], strict=True) if n},
            unused=int(codes[_UNUSED]),
            truncated=self.truncated,
            duplicates=int(self.repeats.sum()),
            lengths={part: Lengths.of(values) for part, values in lengths.items()} if kept.any() else {},
            length_bias=LengthBias.of(lengths["chosen"], lengths["rejected"]) if kept.any() else None,
        )


def select_rows(rows: "Dataset", indices: npt.NDArray[np.int64]) -> "Dataset":
    """Return the rows with these indices, at least one; `Dataset.select` makes a list of a Python object a row."""
    import pyarrow as pa
    from datasets import Dataset
    from datasets.fingerprint import Hasher

    first, last = int(indices[0]), int(indices[-1])
    if last - first + 1 == len(indices) and (np.diff(indices) == 1).all():
        return rows.select(range(first, last + 1))
    table = pa.table({"indices": indices.astype(np.uint64)})
    fingerprint = Hasher.hash((find_fingerprint(rows), hashlib.sha256(indices.tobytes()).digest()))
    return Dataset(rows.data, rows.info, rows.split, table, fingerprint)


def find_repeats(hashes: npt.NDArray[np.uint64]) -> Mask:
    """Return a mask of the values that occur earlier in the array."""
    repeats = np.ones(len(hashes), np.bool_)
    repeats[np.unique(hashes, return_index=True)[1]] = False
    return repeats


def hold_out(hashes: Sequence[npt.NDArray[Any]], fraction: float) -> list[Mask]:
    """Choose prompts for evaluation by their hash alone.

    A prompt's side depends on the prompt alone: not on the machine, the seed, or other rows. The exception: a side
    that would be empty gets the prompt whose hash is nearest to the border.

    Args:
        hashes: for each source, the prompt hash of each row, uint64 of shape (rows,).
        fraction: share to hold out, in (0, 1).

    Returns:
        For each source, a mask of the rows held out.

    Raises:
        DataError: there are fewer than two different prompts.
    """
    everything = np.concatenate(hashes)
    if len(everything) == 0 or (everything == everything[0]).all():
        raise DataError(f"`data.eval_fraction={fraction:g}`: needs rows with at least 2 different prompts; set it to 0")
    border = np.uint64(min(int(fraction * 2.0**64), 2**64 - 1))
    second = everything[everything > everything.min()].min()
    border = min(max(border, second), everything.max())
    return [values < border for values in hashes]

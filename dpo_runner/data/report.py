"""The data report: rows kept and dropped by reason, lengths in tokens, and length bias."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_runner.data.layouts.columns import name_columns

PARTS = ("prompt", "chosen", "rejected")
UNSCORED = "with scores that are no finite numbers, used without them"
_BINS = 40


@dataclass
class Lengths:
    """Length statistics of one part of the pairs, in tokens.

    Attributes:
        total: sum over all rows.
        mean, median, p95, max: per row.
        edges: integer bin edges of the histogram, one more than counts; a bin includes its left edge.
        counts: rows per bin.
    """

    total: int
    mean: float
    median: float
    p95: float
    max: int
    edges: list[int]
    counts: list[int]

    @classmethod
    def of(cls, lengths: npt.NDArray[np.integer[Any]]) -> "Lengths":
        """Summarize `lengths` (int, shape (rows,), at least one row)."""
        first, last = int(lengths.min()), int(lengths.max())
        edges = np.arange(first, last + 1 + (width := (last - first) // _BINS + 1), width)
        counts, _ = np.histogram(lengths, bins=edges)
        return cls(
            total=int(lengths.sum(dtype=np.int64)),
            mean=round(float(lengths.mean()), 2),
            median=float(np.median(lengths)),
            p95=float(np.percentile(lengths, 95)),
            max=int(lengths.max()),
            edges=[int(edge) for edge in edges],
            counts=[int(count) for count in counts],
        )


@dataclass
class LengthBias:
    """The length bias of the pairs: if chosen answers are longer, DPO learns length rather than quality.

    Attributes:
        chosen_longer, rejected_longer: share of the pairs, in [0, 1]; the rest have equal lengths.
        mean_difference, median_difference: chosen minus rejected, in tokens.
    """

    chosen_longer: float
    rejected_longer: float
    mean_difference: float
    median_difference: float

    @classmethod
    def of(cls, chosen: npt.NDArray[np.integer[Any]], rejected: npt.NDArray[np.integer[Any]]) -> "LengthBias":
        """Compare two arrays of lengths (int, shape (rows,), at least one row)."""
        difference = chosen.astype(np.int64) - rejected.astype(np.int64)
        return cls(
            chosen_longer=round(float((difference > 0).mean()), 4),
            rejected_longer=round(float((difference < 0).mean()), 4),
            mean_difference=round(float(difference.mean()), 2),
            median_difference=float(np.median(difference)),
        )

    def __str__(self) -> str:
        difference = f"{abs(self.mean_difference):.1f} tokens {'longer' if self.mean_difference > 0 else 'shorter'}"
        return (
            f"chosen is longer in {self.chosen_longer:.0%} of pairs, shorter in {self.rejected_longer:.0%}; "
            f"on average {difference}"
        )


@dataclass
class SourceReport:
    """Row counts of one source, before splitting and mixing.

    Attributes:
        name: name in `data.sources`, or `data`.
        split: `train` or `eval`.
        files: the files or the hub dataset it was read from.
        format: the detected layout.
        rows: rows read.
        pairs: pairs made from them.
        bad: unusable rows, by reason.
        left_out: valid rows that yield no pair, by reason.
        unscored: pairs whose scores are no finite numbers, used as if they had none.
        unread: columns that hold something and that the layout does not read.
        mismatched: pairs whose prompt is cut to the common prefix of the prompt alone and the whole conversation.
        first_mismatch: location of the first of them, and its tokens in both cases.
    """

    name: str
    split: str
    files: list[str]
    format: str
    rows: int
    pairs: int
    bad: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    unscored: int = 0
    unread: list[str] = field(default_factory=list)
    mismatched: int = 0
    first_mismatch: str = ""

    def __str__(self) -> str:
        parts = [f"{self.rows:,} rows", self.format, f"{self.pairs:,} pairs"]
        parts += [f"{count:,} bad: {reason}" for reason, count in self.bad.items()]
        parts += [f"{count:,} left out: {reason}" for reason, count in self.left_out.items()]
        parts += [f"{self.unscored:,} {UNSCORED}"] if self.unscored else []
        if self.mismatched:
            parts.append(f"{self.mismatched:,} with the prompt cut to its common prefix ({self.first_mismatch})")
        return ", ".join(parts + self.describe_unread())

    def describe_unread(self) -> list[str]:
        """Return a line with the columns that are not used, or none if all are."""
        return [f"columns not used: {name_columns(self.unread)}"] if self.unread else []


@dataclass
class SplitReport:
    """Pair counts and lengths of one split.

    Attributes:
        pairs: pairs of all sources; kept + dropped + unused.
        kept: pairs the run uses.
        by_source: kept pairs, by source.
        dropped: dropped pairs, by reason.
        unused: pairs not drawn because of weights, `max_train_samples` or `max_eval_samples`.
        truncated: kept pairs that are cut to `training.max_length`, by the part that is lost.
        duplicates: exact repeats of an earlier pair, dropped or not.
        lengths: of the kept pairs, by part; empty if no pair is kept.
        length_bias: of the kept pairs; None if no pair is kept.
    """

    pairs: int
    kept: int
    by_source: dict[str, int]
    dropped: dict[str, int]
    unused: int
    truncated: dict[str, int]
    duplicates: int
    lengths: dict[str, Lengths]
    length_bias: LengthBias | None

    def __str__(self) -> str:
        tokens = sum(lengths.total for lengths in self.lengths.values())
        parts = [f"{self.kept:,} of {self.pairs:,} pairs", f"{tokens:,} tokens"]
        parts += [f"{count:,} dropped: {reason}" for reason, count in self.dropped.items()]
        parts += [f"{self.unused:,} not drawn"] if self.unused else []
        parts += [f"{count:,} {what}" for what, count in self.truncated.items()]
        if self.duplicates and not any("duplicate" in reason for reason in self.dropped):
            parts.append(f"{self.duplicates:,} exact duplicates kept (data.deduplicate=exact drops them)")
        return ", ".join(parts)


@dataclass
class DataReport:
    """The whole report, written to `data_report.json`.

    Attributes:
        template: the chat template's origin and properties, one line each.
        sources: rows before splitting and mixing.
        splits: `train`, and `eval` if there is one.
        warnings: problems of the data, one line each.
    """

    template: list[str]
    sources: list[SourceReport]
    splits: dict[str, SplitReport]
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as dicts and lists."""
        return dataclasses.asdict(self)

    def histograms(self) -> dict[str, tuple[list[int], list[int]]]:
        """Return the length histograms in tokens, as (counts, edges), by `<split>/<part>`."""
        return {
            f"{split}/{part}": (lengths.counts, lengths.edges)
            for split, pairs in self.splits.items()
            for part, lengths in pairs.lengths.items()
        }

    def lines(self) -> dict[str, str]:
        """Return a summary for the plan, as label and text."""
        lines = {f"  {source.name} ({source.split})": str(source) for source in self.sources}
        lines |= {f"  {name}": str(split) for name, split in self.splits.items()}
        bias = self.splits["train"].length_bias
        lines |= {"  length bias": str(bias)} if bias else {}
        return {**lines, "  chat template": "; ".join(self.template)}

"""The report of a generation: scores, gaps and lengths, for the terminal and as one HTML page."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dpo_runner.data.layouts.messages import Pair
from dpo_runner.generate.ledger import LeftOut
from dpo_runner.generate.scoring import Candidates
from dpo_runner.io.pages import Plot, escape_label, plot_layout, render_page

if TYPE_CHECKING:
    import plotly.graph_objects as go

_TEMPLATE = Path(__file__).with_name("page.html")
_BINS = 40
_MOST_POINTS = 2000
_SHOWN = 5
_MANY_CUT_OFF, _STRONG = 0.2, 0.5
_COLOURS = {"scores": "#3f78c9", "gaps": "#1f9d76", "lengths": "#d9642e"}

Floats = npt.NDArray[np.float64]


@dataclass
class Summary:
    """The figures of a generation.

    Attributes:
        counts: numbers of prompts, rows, answers, pairs and whatever was left out.
        scores: of all answers.
        lengths: of all answers, in characters.
        gaps: the best minus the worst score of each prompt.
        left_out: numbers by reason, and the locations of the first.
        examples: prompts with their best and worst answers.
        warnings: one line each.
    """

    counts: dict[str, int]
    scores: Floats
    lengths: Floats
    gaps: Floats
    left_out: list[tuple[str, int, str]] = field(default_factory=list)
    examples: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def correlation(self) -> float | None:
        """The correlation of length and score; None if one of them does not vary."""
        if len(self.scores) < 3 or self.scores.std() == 0 or self.lengths.std() == 0:
            return None
        return float(np.corrcoef(self.lengths, self.scores)[0, 1])

    def describe(self) -> list[str]:
        """Return the figures as lines."""
        counts = self.counts
        lines = [
            f"{counts['rows']:,} of {counts['prompts']:,} prompts with {counts['answers']:,} scored answers make "
            f"{counts['pairs']:,} pairs",
            f"score       mean {self.scores.mean():.4g}, standard deviation {self.scores.std():.4g}, "
            f"{self.scores.min():.4g} to {self.scores.max():.4g}",
            f"gap         best minus worst {self.gaps.mean():.4g} on average, "
            f"0 for {int((self.gaps == 0).sum()):,} prompts",
        ]
        if self.correlation is not None:
            lines.append(f"length      correlation with the score {self.correlation:+.2f}")
        return [*lines, *(f"left out    {count:,} {why}; the first is {first}" for why, count, first in self.left_out)]


def summarize(
    scored: Sequence[Candidates], pairs: Sequence[Sequence[Pair]], left_out: LeftOut, prompts: int
) -> Summary:
    """Return the figures of scored prompts, at least one, and the pairs that they make."""
    answers = [answer for one in scored for answer in one.answers]
    totals = [[score.total for score in one.scores] for one in scored]
    cut_off = sum(not answer.complete for answer in answers)
    counts = {
        "prompts": prompts,
        "rows": len(scored),
        "answers": len(answers),
        "cut_off": cut_off,
        "pairs": sum(map(len, pairs)),
        "without_pair": sum(not made for made in pairs),
        "left_out": len(left_out.found),
    }
    summary = Summary(
        counts,
        np.array([score for row in totals for score in row], np.float64),
        np.array([len(answer.text) for answer in answers], np.float64),
        np.array([max(row) - min(row) for row in totals], np.float64),
    )
    for reason, count in left_out.count().items():
        first = next(where for where, error in left_out.found if error.reason == reason)
        summary.left_out.append((reason, count, first))
    summary.examples = [_show(one) for one in scored[:: max(1, len(scored) // _SHOWN)][:_SHOWN]]
    if cut_off > _MANY_CUT_OFF * len(answers):
        summary.warnings.append(
            f"{cut_off / len(answers):.0%} of the answers reach generate.max_new_tokens, and training closes them as "
            "if they were whole; raise it, or leave such answers out with generate.on_cut_off=drop"
        )
    if not counts["pairs"]:
        summary.warnings.append("no pair: every prompt's answers score the same, or data leaves their pairs out")
    by_length = "length" in scored[0].scores[0].terms
    if not by_length and (found := summary.correlation) is not None and abs(found) > _STRONG:
        longer = "longer" if found > 0 else "shorter"
        summary.warnings.append(f"{longer} answers score higher (correlation {found:+.2f}): DPO will learn the length")
    return summary


def _show(one: Candidates) -> dict[str, Any]:
    """Return a prompt with its best and worst answer, as texts."""
    ranked = sorted(zip(one.scores, one.answers, strict=True), key=lambda pair: -pair[0].total)
    return {
        "where": one.prompt.where,
        "prompt": "\n\n".join(message["content"] for message in one.prompt.messages),
        "answers": [
            {"rank": rank, "score": f"{score.total:.4g}", "text": answer.text}
            for rank, (score, answer) in (("best", ranked[0]), ("worst", ranked[-1]))
        ],
    }


def build_page(summary: Summary, facts: dict[str, str]) -> str:
    """Return the report as one HTML page that loads nothing.

    Args:
        summary: the figures.
        facts: labels and texts of the lines below the title.
    """
    counts = summary.counts
    cut_off = f"{counts['cut_off']:,} cut off" if counts["cut_off"] else ""
    headline = [
        (f"{counts['rows']:,}", "prompts", f"of {counts['prompts']:,}" if counts["rows"] != counts["prompts"] else ""),
        (f"{counts['answers']:,}", "scored answers", cut_off),
        (
            f"{counts['pairs']:,}",
            "pairs",
            f"{counts['without_pair']:,} prompts without" if counts["without_pair"] else "",
        ),
        (f"{summary.scores.mean():.3g}", "mean score", f"± {summary.scores.std():.3g}"),
        (f"{summary.gaps.mean():.3g}", "best minus worst", "mean"),
        (f"{counts['left_out']:,}", "left out", ""),
    ]
    plots = [
        _plot_histogram("Scores", summary.scores, "scores", "score", "answers"),
        _plot_histogram("Best minus worst score of a prompt", summary.gaps, "gaps", "gap", "prompts"),
        _plot_lengths(summary),
    ]
    return render_page(_TEMPLATE, {}, title=facts["models"], facts=facts, counts=headline, summary=summary, plots=plots)


def _plot_histogram(heading: str, values: Floats, colour: str, unit: str, of: str) -> Plot:
    import plotly.graph_objects as go

    bins = max(1, min(_BINS, len(np.unique(values)), 5 + len(values) // 10))
    counts, edges = np.histogram(values, bins=bins)
    figure = go.Figure(
        go.Bar(
            x=((edges[:-1] + edges[1:]) / 2).tolist(),
            y=counts.tolist(),
            width=np.diff(edges).tolist(),
            marker={"color": _COLOURS[colour]},
            customdata=[f"{low:.4g} to {high:.4g}" for low, high in pairwise(edges)],
            hovertemplate=f"%{{customdata}}: %{{y:,}} {of}<extra></extra>",
        )
    )
    note = f"mean {values.mean():.4g}, standard deviation {values.std():.4g}, median {np.median(values):.4g}"
    return _finish(figure, heading, note, unit, of)


def _plot_lengths(summary: Summary) -> Plot:
    import plotly.graph_objects as go

    every = max(1, -(-len(summary.scores) // _MOST_POINTS))
    figure = go.Figure(
        go.Scatter(
            x=summary.lengths[::every].tolist(),
            y=summary.scores[::every].tolist(),
            mode="markers",
            marker={"color": _COLOURS["lengths"], "size": 5, "opacity": 0.5},
            hovertemplate="%{x:,} characters: %{y:.4g}<extra></extra>",
        )
    )
    found = summary.correlation
    note = "no correlation: one of them does not vary" if found is None else f"correlation {found:+.2f}"
    return _finish(figure, "Length and score", note, "characters", "score")


def _finish(figure: "go.Figure", heading: str, note: str, x: str, y: str) -> Plot:
    figure.update_layout(**plot_layout(left=56, right=10, top=8, bottom=40), bargap=0)
    figure.update_xaxes(title=escape_label(x), zeroline=False, fixedrange=True)
    figure.update_yaxes(title=escape_label(y), zeroline=False, fixedrange=True)
    return Plot(heading, note, figure, 240)

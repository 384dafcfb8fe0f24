"""The data report and sample rows as one HTML page, without network access and with all data as inert text."""

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePath

from dpo_runner.data.report import PARTS, UNSCORED, DataReport, LengthBias, Lengths
from dpo_runner.io.pages import Plot, escape_label, plot_layout, render_page

_TEMPLATE = Path(__file__).with_name("page.html")
_COLOURS = {
    "prompt": "#3f78c9",
    "chosen": "#1f9d76",
    "rejected": "#d9642e",
    "kept": "#1f9d76",
    "unused": "#8b93a1",
    "left out": "#d9a12e",
    "bad": "#c9455b",
}
_LONGEST_NAMES = 3
_BAR_HEIGHT = 44


@dataclass(frozen=True)
class Piece:
    """The shortest sequence of tokens that decodes to whole characters.

    Attributes:
        text: the decoded text.
        token_ids: the tokens, mostly one.
        special: whether it is a special token of the tokenizer, always a separate piece.
    """

    text: str
    token_ids: tuple[int, ...]
    special: bool


@dataclass
class Row:
    """One training pair as the model sees it.

    Attributes:
        where: the source location, such as `pairs.jsonl:12`.
        parts: pieces of `prompt`, `chosen` and `rejected`.
    """

    where: str
    parts: dict[str, list[Piece]]

    def tokens(self, part: str) -> int:
        return sum(len(piece.token_ids) for piece in self.parts[part])


def name_data(report: DataReport) -> str:
    """Return a short name of the data: sources of a mixture, or files without their folders."""
    names = [
        name
        for source in report.sources
        for name in ([PurePath(file).name for file in source.files] if source.name == "data" else [source.name])
    ]
    return shorten_list(list(dict.fromkeys(names)))


def shorten_list(names: list[str]) -> str:
    """Join names; if there are many, the first few and the number of the others."""
    rest = len(names) - _LONGEST_NAMES
    return ", ".join(names[:_LONGEST_NAMES]) + (f" and {rest:,} more" if rest > 0 else "")


def build_page(report: DataReport, rows: list[Row], facts: dict[str, str]) -> str:
    """Return the page as HTML.

    Everything from data or configuration is inert text: Jinja2 escapes it, plot labels are escaped for plotly's own
    markup, and the page's content security policy allows only its own scripts and no loading.

    Args:
        report: the data report.
        rows: the training rows to show.
        facts: labels and texts of the lines below the title, such as the model.
    """
    return render_page(
        _TEMPLATE,
        {"names": shorten_list},
        title=name_data(report),
        facts=facts,
        counts=_count(report),
        report=report,
        unscored=UNSCORED,
        rows=rows,
        mixed=any(len(split.by_source) > 1 for split in report.splits.values()),
        plots=_build_plots(report),
    )


def _count(report: DataReport) -> list[tuple[str, str, str]]:
    """Return the page's headline counts as (number, label, remark)."""
    counts = []
    for name, label in (("train", "training pairs"), ("eval", "evaluation pairs")):
        if name in report.splits:
            split = report.splits[name]
            counts.append((f"{split.kept:,}", label, f"of {split.pairs:,}" if split.kept != split.pairs else ""))
    bad, rows = sum(sum(s.bad.values()) for s in report.sources), sum(s.rows for s in report.sources)
    dropped = sum(sum(split.dropped.values()) for split in report.splits.values())
    truncated = sum(sum(split.truncated.values()) for split in report.splits.values())
    counts += [
        (f"{bad:,}", "bad rows", f"of {rows:,} rows read"),
        (f"{dropped:,}", "pairs dropped", ""),
        (f"{truncated:,}", "pairs truncated", ""),
    ]
    train = report.splits["train"]
    counts.append((f"{sum(lengths.total for lengths in train.lengths.values()):,}", "training tokens", ""))
    if train.length_bias:
        bias = train.length_bias
        counts.append((f"{bias.chosen_longer:.0%}", "chosen is longer", f"by {bias.mean_difference:+.1f} tokens, mean"))
    return counts


def _build_plots(report: DataReport) -> dict[str, list[Plot]]:
    """Return the figures by section: `sources`, `splits`, `lengths` of each split, and `bias`."""
    plots: dict[str, list[Plot]] = {"sources": [], "splits": [], "bias": []}
    for source in report.sources:
        bars = [("pairs", source.pairs, "kept")]
        bars += [(f"left out: {reason}", count, "left out") for reason, count in source.left_out.items()]
        bars += [(f"bad: {reason}", count, "bad") for reason, count in source.bad.items()]
        plots["sources"].append(_plot_counts(f"{source.name} ({source.split}): {source.rows:,} rows", bars))
    for name, split in report.splits.items():
        bars = [("kept", split.kept, "kept")]
        bars += [(f"dropped: {reason}", count, "left out") for reason, count in split.dropped.items()]
        bars += [("not drawn", split.unused, "unused")] if split.unused else []
        plots["splits"].append(_plot_counts(f"{name}: {split.pairs:,} pairs", bars))
        answers = max((split.lengths[part].max for part in PARTS[1:] if part in split.lengths), default=0)
        plots[f"lengths {name}"] = [
            _plot_lengths(part, lengths, lengths.max if part == "prompt" else answers)
            for part, lengths in split.lengths.items()
        ]
    biased = {name: split.length_bias for name, split in report.splits.items() if split.length_bias}
    if biased:
        plots["bias"].append(_plot_bias(biased))
    return plots


def _plot_counts(heading: str, bars: list[tuple[str, int, str]]) -> Plot:
    """Plot one bar for each (label, count, colour)."""
    import plotly.graph_objects as go

    counts = [count for _, count, _ in bars]
    places = list(reversed(range(len(bars))))
    figure = go.Figure(
        go.Bar(
            x=counts,
            y=[place - 0.2 for place in places],
            width=[0.34] * len(bars),
            marker={"color": [_COLOURS[colour] for *_, colour in bars]},
            orientation="h",
            hoverinfo="skip",
        )
    )
    for (label, count, _), place in zip(bars, places, strict=True):
        # Above its bar, not next to it: a reason is too long for a phone's screen.
        text = f"<b>{count:,}</b>  {escape_label(label)}"
        figure.add_annotation(x=0, y=place, text=text, showarrow=False, xanchor="left", yanchor="bottom", yshift=-3)
    figure.update_layout(**plot_layout(left=2, right=8, top=4, bottom=4))
    figure.update_xaxes(visible=False, range=[0, max(*counts, 1)], fixedrange=True)
    figure.update_yaxes(visible=False, range=[-0.5, len(bars) - 0.4], fixedrange=True)
    return Plot(heading, "", figure, _BAR_HEIGHT * len(bars) + 12)


def _plot_lengths(part: str, lengths: Lengths, longest: int) -> Plot:
    """Plot a histogram on an axis up to `longest`, which is shared by plots to be compared."""
    import plotly.graph_objects as go

    bins = list(pairwise(lengths.edges))
    figure = go.Figure(
        go.Bar(
            x=[(low + high) / 2 for low, high in bins],
            y=lengths.counts,
            width=[high - low for low, high in bins],
            marker={"color": _COLOURS[part]},
            customdata=[_describe_bin(low, high, last=(low, high) == bins[-1]) for low, high in bins],
            hovertemplate="%{customdata} tokens: %{y:,} pairs<extra></extra>",
        )
    )
    figure.update_layout(**plot_layout(left=52, right=10, top=8, bottom=40), bargap=0)
    figure.update_xaxes(title="tokens", range=[0, longest + max(1, longest * 0.02)], zeroline=False, fixedrange=True)
    figure.update_yaxes(title="pairs", rangemode="tozero", zeroline=False, fixedrange=True, tickformat=",~d")
    note = f"median {lengths.median:,.0f}, mean {lengths.mean:,.1f}, p95 {lengths.p95:,.0f}, max {lengths.max:,}"
    return Plot(part, note, figure, 220)


def _describe_bin(low: float, high: float, last: bool) -> str:
    """Return the integers of a bin from `low` to below `high`, or to `high` in the last bin, as a label."""
    first, end = math.ceil(low), math.floor(high) if last else math.ceil(high) - 1
    return f"{first:,} to {end:,}" if end > first else f"{first:,}"


def _plot_bias(biases: dict[str, LengthBias]) -> Plot:
    """Plot for each split the shares of pairs with a longer chosen answer, equal lengths, a longer rejected answer."""
    import plotly.graph_objects as go

    equal = [max(0.0, 1 - bias.chosen_longer - bias.rejected_longer) for bias in biases.values()]
    shares = {
        "chosen is longer": ([bias.chosen_longer for bias in biases.values()], _COLOURS["chosen"]),
        "equally long": (equal, _COLOURS["unused"]),
        "rejected is longer": ([bias.rejected_longer for bias in biases.values()], _COLOURS["rejected"]),
    }
    figure = go.Figure(
        [
            go.Bar(
                x=values,
                y=[escape_label(name) for name in biases],
                name=label,
                marker={"color": colour},
                orientation="h",
                text=[f"{value:.0%}" if value else "" for value in values],
                textposition="inside",
                insidetextanchor="middle",
                insidetextfont={"color": "white"},
                textangle=0,
                hovertemplate=f"{label}: %{{x:.1%}}<extra></extra>",
            )
            for label, (values, colour) in shares.items()
        ]
    )
    legend = {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "traceorder": "normal", "itemclick": False}
    figure.update_layout(
        **{**plot_layout(left=10, right=10, top=34, bottom=10), "showlegend": True},
        barmode="stack",
        bargap=0.3,
        legend=legend,
    )
    figure.update_xaxes(visible=False, range=[0, 1], fixedrange=True)
    figure.update_yaxes(autorange="reversed", automargin=True, fixedrange=True, ticks="", type="category")
    note = "; ".join(f"{name}: {bias}" for name, bias in biases.items())
    return Plot("", note, figure, 70 + 56 * len(biases))

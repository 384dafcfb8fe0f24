"""Plots of a run's curves as PNG files for its model card. matplotlib is imported only for drawing."""

from collections.abc import Iterable, Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo_runner.config.metrics import TIE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TRAIN, _EVAL, _CHOSEN, _REJECTED = "#78838f", "#1f5fa8", "#1b7f6b", "#b4472e"
_INK, _FAINT = "#333a41", "#d9dde1"
_WIDTH, _HEIGHT, _DPI = 7.0, 2.9, 200  # inches; at a display width of 700 pixels, 9-point type is 12.5 pixels high
_ACCURACY = "Reward accuracy"
_SMOOTHED_FROM = 60
"""From this many points on, training batches are drawn faintly under their running mean."""
_MARKED_UNTIL = 30
"""Up to this many evaluations, each is marked with a dot."""
_LABEL_GAP = 11.0
"""Least distance between the labels of two lines, in points."""


class Plot(NamedTuple):
    """A file written by `write_plots`.

    Attributes:
        file: its name in the folder.
        description: alternative text.
    """

    file: str
    description: str


class _Line(NamedTuple):
    label: str
    color: str
    points: list[tuple[int, float]]
    evaluated: bool


def write_plots(folder: Path, events: Sequence[dict[str, Any]]) -> list[Plot]:
    """Draw loss, rewards and log-probabilities over the optimizer steps, if there are events for them.

    Args:
        folder: the target; created if it is missing and there is something to draw.
        events: contents of metrics.jsonl, under TRL's names.

    Returns:
        The files written. Equal events give equal bytes.
    """
    panels = {
        "loss.png": [("Loss", _train_and_eval(events, "loss"))],
        "rewards.png": [
            ("Reward margin", _train_and_eval(events, "rewards/margins")),
            (_ACCURACY, _train_and_eval(events, "rewards/accuracies")),
        ],
        "logps.png": [("Change of the answers' log-probability in evaluation (nats)", _shifts(events))],
    }
    descriptions = {
        "loss.png": "loss over the optimizer steps",
        "rewards.png": "reward margin and reward accuracy over the optimizer steps",
        "logps.png": "change of the log-probability of chosen and rejected answers over the optimizer steps",
    }
    written = []
    for file, drawn in panels.items():
        if shown := [(title, lines) for title, lines in drawn if lines]:
            folder.mkdir(exist_ok=True)
            _draw(folder / file, shown)
            written.append(Plot(file, descriptions[file]))
    return written


def _train_and_eval(events: Sequence[dict[str, Any]], key: str) -> list[_Line]:
    train, evaluated = _series(events, key), _series(events, f"eval_{key}")
    lines = [_Line("training", _TRAIN, train, False), _Line("evaluation", _EVAL, evaluated, True)]
    return [line for line in lines if len(line.points) > 1]


def _shifts(events: Sequence[dict[str, Any]]) -> list[_Line]:
    """Return evaluation log-probabilities minus their first value; training batches differ anyway."""
    lines = []
    for label, color in (("chosen", _CHOSEN), ("rejected", _REJECTED)):
        points = _series(events, f"eval_logps/{label}")
        shifts = [(step, value - points[0][1]) for step, value in points]
        lines += [_Line(label, color, shifts, True)] if len(points) > 1 else []
    return lines


def _series(events: Iterable[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """Return (step, value) points without ties; a second evaluation at a step is of the best weights and left out."""
    points: dict[int, float] = {}
    for event in events:
        if key in event and event[key] != TIE and isfinite(event[key]):
            points.setdefault(event["step"], float(event[key]))
    return sorted(points.items())


def _draw(path: Path, panels: list[tuple[str, list[_Line]]]) -> None:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06)
    figure = Figure(figsize=(_WIDTH, _HEIGHT), dpi=_DPI, layout=layout)
    every = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, lines) in zip(every, panels, strict=True):
        _fill(axes, title, lines)
    layout.execute(figure)  # fixes the distances between the labels
    for axes, (_, lines) in zip(every, panels, strict=True):
        _label_ends(axes, lines)
    layout.execute(figure)
    figure.set_layout_engine("none")  # otherwise savefig lays out and draws the figure again
    figure.savefig(path, metadata={"Software": None})


def _fill(axes: "Axes", title: str, lines: list[_Line]) -> None:
    from matplotlib.ticker import MaxNLocator

    for line in lines:
        steps, values = [step for step, _ in line.points], [value for _, value in line.points]
        if line.evaluated:
            marker = "o" if len(values) <= _MARKED_UNTIL else None
            axes.plot(steps, values, color=line.color, linewidth=1.8, marker=marker, markersize=3.5, zorder=3)
        elif len(values) < _SMOOTHED_FROM:
            axes.plot(steps, values, color=line.color, linewidth=1.5)
        else:
            axes.plot(steps, values, color=line.color, linewidth=0.6, alpha=0.45)
            axes.plot(steps, _smooth(values), color=line.color, linewidth=1.8)
    axes.set_title(title, loc="left", fontsize=10, color=_INK, fontweight="bold")
    axes.set_xlabel("optimizer step", fontsize=9, color=_INK)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="y", color=_FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9, labelcolor=_INK, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_FAINT)
    axes.margins(x=0.02, y=0.08)
    if title == _ACCURACY:
        axes.set_ylim(-0.04, 1.04)


def _smooth(values: list[float]) -> list[float]:
    """Return the running mean over a window of about a twentieth of all values."""
    reach = len(values) // 40
    windows = (values[max(0, at - reach) : at + reach + 1] for at in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _label_ends(axes: "Axes", lines: list[_Line]) -> None:
    """Write each line's name next to its end; move two labels apart if they would overlap."""
    right = axes.get_xlim()[1]
    ends = []
    for line in lines:
        values = [value for _, value in line.points]
        smoothed = not line.evaluated and len(values) >= _SMOOTHED_FROM
        ends.append(((_smooth(values) if smoothed else values)[-1], line))
    ends.sort(key=lambda end: end[0])
    heights = [axes.transData.transform((right, value))[1] * 72 / _DPI for value, _ in ends]  # in points
    aside = max(0.0, _LABEL_GAP - (heights[-1] - heights[0])) / 2 if len(ends) > 1 else 0.0
    for (value, line), offset in zip(ends, (-aside, aside), strict=False):
        axes.annotate(
            line.label,
            (right, value),
            xytext=(4, offset),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=line.color,
            annotation_clip=False,
        )

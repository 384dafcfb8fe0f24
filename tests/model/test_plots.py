"""The plots of a model card: drawn from log events, legible, and identical for identical events."""

import struct
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from dpo_runner.model.card.plots import write_plots

Events = list[dict[str, Any]]


def make_events(steps: int = 16, every: int = 4, end: float = 1.0) -> Events:
    """Return a training event per step and an evaluation every few steps, in the format of metrics.jsonl."""
    events: Events = []
    for step in range(steps + 1):
        done = end * step / steps
        figures = {"loss": 0.69 - 0.3 * done, "rewards/margins": done, "rewards/accuracies": 0.5 + done / 2}
        if step:
            events.append({"step": step, **figures})
        if step % every == 0:
            logps = {"logps/chosen": -90 + done, "logps/rejected": -95 - 4 * done}
            events.append({"step": step, **{f"eval_{key}": value for key, value in (figures | logps).items()}})
    return events


def draw(name: str, events: Events) -> dict[str, bytes]:
    return {plot.file: Path(name, plot.file).read_bytes() for plot in write_plots(Path(name), events)}


def test_three_files_are_drawn_at_twice_the_width_they_are_shown_at() -> None:
    drawn = draw("a", make_events())
    assert (
        sorted(drawn) == sorted(path.name for path in Path("a").iterdir()) == ["logps.png", "loss.png", "rewards.png"]
    )
    for file in drawn.values():
        assert file.startswith(b"\x89PNG\r\n\x1a\n")
        assert struct.unpack(">II", file[16:24]) == (1400, 580)


def test_equal_events_give_equal_bytes_and_other_ones_others() -> None:
    drawn, again, other = draw("a", make_events()), draw("b", make_events()), draw("c", make_events(end=0.5))
    assert drawn == again
    assert all(drawn[name] != other[name] for name in drawn)
    assert not any(b"Software" in file or b"tIME" in file for file in drawn.values())


def test_what_has_no_events_is_not_drawn() -> None:
    assert write_plots(Path("none"), []) == [] and not Path("none").exists()
    only_training = [event for event in make_events() if "loss" in event]
    assert sorted(draw("a", only_training)) == ["loss.png", "rewards.png"]
    only_loss = [{"step": event["step"], "loss": event["loss"]} for event in only_training]
    assert sorted(draw("b", only_loss)) == ["loss.png"]
    assert draw("c", only_loss[:1]) == {}  # one point is not a curve


def test_log_probabilities_are_drawn_as_changes() -> None:
    moved = [{key: value - 50 if "logps" in key else value for key, value in event.items()} for event in make_events()]
    assert draw("a", moved) == draw("b", make_events())


def test_the_evaluation_of_the_best_weights_and_what_is_no_number_are_no_points_of_the_curve() -> None:
    events = make_events()
    best = {
        "step": events[-1]["step"],
        "eval_loss": 0.1,
        "eval_rewards/margins": 5.0,
    }  # evaluated with an earlier step's weights
    broken = {"step": 5, "eval_loss": float("nan"), "eval_rewards/margins": float("inf")}
    assert draw("a", [*events, best, broken]) == draw("b", events)


@pytest.mark.parametrize("steps", [16, 400])
@pytest.mark.parametrize("end", [1.0, 0.0])  # 0: both curves end at the same height
def test_every_line_is_labelled_and_labels_do_not_overlap(
    steps: int, end: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: figures.append(self) or save(self, *args, **kw))
    write_plots(Path("a"), make_events(steps, steps // 4, end))
    found = []
    for figure in figures:
        for axes in figure.axes:
            labels = [text for text in axes.texts if isinstance(text, Annotation)]
            boxes = [label.get_window_extent() for label in labels]
            assert all(not one.overlaps(other) for one, other in combinations(boxes, 2))
            assert all(figure.bbox.contains(*corner) for box in boxes for corner in (box.min, box.max))
            assert {label.get_color() for label in labels} <= {line.get_color() for line in axes.lines}
            found.append([label.get_text() for label in labels])
    assert [sorted(labels) for labels in found] == [*[["evaluation", "training"]] * 3, ["chosen", "rejected"]]


def test_matplotlib_is_imported_only_to_draw_and_pyplot_never() -> None:
    code = """
import sys
from pathlib import Path
from dpo_runner.model.card.card import write_card
from dpo_runner.model.card.plots import write_plots
assert "matplotlib" not in sys.modules
write_plots(Path("a"), [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}])
assert "matplotlib.figure" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert Path("a/loss.png").exists()

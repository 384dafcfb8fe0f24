"""Training that goes wrong without any number being wrong: a loss that explodes, answers that are unlearnt.

DPO's loss looks at the margin alone. It also falls where both answers become less likely, as long as the rejected one
does so faster; chosen answers that the model no longer gives are the known price (Smaug, arXiv 2402.13228).
"""

from collections import deque
from collections.abc import Mapping
from itertools import pairwise
from statistics import mean

_WINDOW = 5
"""Log events that are averaged."""

_WINDOWS = 4
"""In a row that have to show the same."""

_UNLEARNT = 10.0
"""Nats by which the mean chosen answer is less likely than under the reference, before anything is said."""

_EXPLODED = 2.0
"""Times the best loss so far, and by that many nats above it at least half."""


class DriftWarnings:
    """Watches a training's log events, and says each thing once.

    Args:
        beta: the loss's; rewards are beta times log ratios (DPO paper, section 4).
    """

    def __init__(self, beta: float) -> None:
        self._beta = beta
        self._events: deque[Mapping[str, float]] = deque(maxlen=_WINDOW * _WINDOWS)
        self._best = float("inf")
        self._said: set[str] = set()

    def note(self, logs: Mapping[str, float]) -> list[str]:
        """Return what there is to say after one more log event of the training."""
        self._events.append(logs)
        found = {"loss": self._find_explosion(), "chosen": self._find_unlearning()}
        told = [text for kind, text in found.items() if text and kind not in self._said]
        self._said |= {kind for kind, text in found.items() if text}
        return told

    def _windows(self, key: str) -> list[float]:
        """Return the averages of the last windows, the oldest first; none before there are enough events."""
        values = [event[key] for event in self._events if key in event]
        if len(values) < _WINDOW * _WINDOWS:
            return []
        return [mean(values[start : start + _WINDOW]) for start in range(0, len(values), _WINDOW)]

    def _find_explosion(self) -> str | None:
        losses = [event["loss"] for event in self._events if "loss" in event]
        if len(losses) < _WINDOW:
            return None
        now = mean(losses[-_WINDOW:])
        self._best = min(self._best, now)
        if now < _EXPLODED * self._best or now - self._best < _EXPLODED / 4:
            return None
        return (
            f"the loss has risen from {self._best:.3g} to {now:.3g} (means of {_WINDOW} log events): "
            "training.learning_rate is probably too large"
        )

    def _find_unlearning(self) -> str | None:
        chosen, margins = self._windows("rewards/chosen"), self._windows("rewards/margins")
        if not chosen or not margins or not self._beta:
            return None
        falls = all(later < earlier for earlier, later in pairwise(chosen))
        grows = all(later > earlier for earlier, later in pairwise(margins))
        nats = -chosen[-1] / self._beta
        if not (falls and grows and nats > _UNLEARNT):
            return None
        return (
            f"chosen answers become less likely step by step, by {nats:.0f} nats on average now, while the margin "
            "grows: the model unlearns what it should prefer. A larger training.beta, a smaller "
            "training.learning_rate or training.loss_type=[sigmoid,sft] hold against it"
        )

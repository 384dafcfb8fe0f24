"""Warnings about training that fails with finite numbers: exploding loss, unlearnt chosen answers.

DPO's loss depends on the margin only. It also falls if both answers become less likely, as long as the rejected one
does so faster; the known failure is that the model unlearns the chosen answers (Smaug, arXiv 2402.13228).
"""

from collections import deque
from collections.abc import Mapping
from itertools import pairwise
from statistics import mean

_WINDOW = 5
"""Log events per average."""

_WINDOWS = 4
"""Consecutive averages that must show the same trend."""

_UNLEARNT = 10.0
"""Nats that the mean chosen answer must lose against the reference before a warning."""

_EXPLODED = 2.0
"""Factor over the best loss so far; the loss must also exceed it by a quarter of this number."""


class DriftWarnings:
    """Watches the log events of a training; gives each warning once.

    Args:
        beta: beta of the loss; rewards are beta times log ratios (DPO paper, section 4).
    """

    def __init__(self, beta: float) -> None:
        self._beta = beta
        self._events: deque[Mapping[str, float]] = deque(maxlen=_WINDOW * _WINDOWS)
        self._best = float("inf")
        self._said: set[str] = set()

    def note(self, logs: Mapping[str, float]) -> list[str]:
        """Return new warnings after one more log event."""
        self._events.append(logs)
        found = {"loss": self._find_explosion(), "chosen": self._find_unlearning()}
        told = [text for kind, text in found.items() if text and kind not in self._said]
        self._said |= {kind for kind, text in found.items() if text}
        return told

    def _windows(self, key: str) -> list[float]:
        """Return the averages of the last windows, oldest first; empty until there are enough events."""
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
            "grows: the model unlearns the chosen answers. Try a larger training.beta, a smaller "
            "training.learning_rate or training.loss_type=[sigmoid,sft]"
        )

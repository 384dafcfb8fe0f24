"""The terms of a reward: ways to score answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from dpo_runner.data.layouts.messages import Message
from dpo_runner.errors import RowError

Scores = list[float | RowError]
"""The scores of a prompt's answers; in place of one, why there is none."""

Watch = Callable[[int, RowError | None], None]
"""Called with the number of an answered prompt for each answer that is scored, and why it has no score, if so."""


@dataclass(frozen=True)
class Answered:
    """A prompt and its answers.

    Attributes:
        messages: the prompt, which ends with a user or tool turn.
        answers: different texts.
    """

    messages: list[Message]
    answers: list[str]


class Term(Protocol):
    """A way to score answers."""

    def count_steps(self, answered: Sequence[Answered]) -> int:
        """Return how often `score` calls `watch`."""

    def count_calls(self, answered: Sequence[Answered]) -> int:
        """Return the number of requests to an endpoint that scoring would take."""

    def score(self, answered: Sequence[Answered], watch: Watch) -> list[Scores]:
        """Return the scores of each prompt's answers."""

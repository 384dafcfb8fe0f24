"""Terms of the reward that are computed from an answer's text: length, a function, sentiment."""

import importlib.util
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from dpo_runner.config.sections.generate import FunctionRewardConf, LengthRewardConf
from dpo_runner.data.layouts.formats import load_formatter
from dpo_runner.data.layouts.messages import Message
from dpo_runner.errors import ConfigError, RowError
from dpo_runner.training.answers.rewards.term import Answered, Scores, Watch

_VADER = "vaderSentiment"


class _TextTerm(ABC):
    """A term that scores one answer at a time, without requests."""

    def count_steps(self, answered: Sequence[Answered]) -> int:
        return sum(len(one.answers) for one in answered)

    def count_calls(self, answered: Sequence[Answered]) -> int:
        return 0

    def score(self, answered: Sequence[Answered], watch: Watch) -> list[Scores]:
        scores: list[Scores] = []
        for number, one in enumerate(answered):
            scores.append([])
            for answer in one.answers:
                score = self.score_one(one.messages, answer)
                watch(number, score if isinstance(score, RowError) else None)
                scores[-1].append(score)
        return scores

    @abstractmethod
    def score_one(self, messages: list[Message], answer: str) -> float | RowError:
        """Return the score of an answer, or why it has none."""


class LengthTerm(_TextTerm):
    """The length of an answer in characters, or minus its distance from a target."""

    def __init__(self, conf: LengthRewardConf) -> None:
        self._target = conf.target

    def score_one(self, messages: list[Message], answer: str) -> float | RowError:
        length = float(len(answer))
        return length if self._target is None else -abs(length - self._target)


class FunctionTerm(_TextTerm):
    """The user's function of the prompt's messages and the answer's text."""

    def __init__(self, conf: FunctionRewardConf) -> None:
        self._function = load_formatter(str(conf.name), "reward.function.name")

    def score_one(self, messages: list[Message], answer: str) -> float | RowError:
        try:
            return to_score(self._function([dict(message) for message in messages], answer), "reward.function")
        except Exception as error:  # the user's code may raise anything; it affects this answer only
            return RowError("reward.function failed", " ".join(f"{type(error).__name__}: {error}".split()))


class SentimentTerm(_TextTerm):
    """VADER's compound score (Hutto and Gilbert, ICWSM 2014), from -1 to 1."""

    def __init__(self) -> None:
        if importlib.util.find_spec(_VADER) is None:
            raise ConfigError(f"`reward=sentiment`: needs the package {_VADER}; install it (pip install {_VADER})")
        self._analyzer: Any = None

    def score_one(self, messages: list[Message], answer: str) -> float | RowError:
        if self._analyzer is None:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

            self._analyzer = SentimentIntensityAnalyzer()
        return float(self._analyzer.polarity_scores(answer)["compound"])


def to_score(value: Any, source: str) -> float | RowError:
    """Return a scorer's result as a finite number, or why it is none. Takes numbers of numpy and torch too."""
    try:
        if isinstance(value, str):
            raise TypeError
        score = float(value)
    except (TypeError, ValueError, OverflowError):
        return RowError("reward is not a number", f"{source} returned {value!r:.60}")
    return score if math.isfinite(score) else RowError("reward is not finite", f"{source} returned {score}")

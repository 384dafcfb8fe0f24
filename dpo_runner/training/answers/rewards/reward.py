"""The reward of answers: the weighted sum of its terms."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_runner.config.rules.generate import used_terms
from dpo_runner.config.run_conf import config_keys
from dpo_runner.config.sections.generate import RewardConf
from dpo_runner.errors import ConfigError, RowError
from dpo_runner.training.answers.rewards.classifier import ClassifierTerm
from dpo_runner.training.answers.rewards.judge import JudgeTerm
from dpo_runner.training.answers.rewards.term import Answered, Term, Watch
from dpo_runner.training.answers.rewards.texts import FunctionTerm, LengthTerm, SentimentTerm


@dataclass(frozen=True)
class Score:
    """The score of one answer.

    Attributes:
        total: the reward.
        terms: the terms by name, before they are weighted.
    """

    total: float
    terms: dict[str, float]


@dataclass(frozen=True)
class Reward:
    """A reward.

    Attributes:
        terms: by name.
        weights: their weights, by name.
    """

    terms: Mapping[str, Term]
    weights: Mapping[str, float]

    def count_steps(self, answered: Sequence[Answered]) -> int:
        """Return how often `score` calls `watch`."""
        return sum(term.count_steps(answered) for term in self.terms.values())

    def count_calls(self, answered: Sequence[Answered]) -> int:
        """Return the number of requests to endpoints that scoring would take; kept scores take none."""
        return sum(term.count_calls(answered) for term in self.terms.values())

    def score(self, answered: Sequence[Answered], watch: Watch) -> list[list[Score | RowError]]:
        """Return the score of each answer, or why it has none.

        Args:
            answered: prompts with their answers.
            watch: called for each answer and term, or for each reply of a judge; an error that it raises ends the
                scoring.
        """
        by_term = {name: term.score(answered, watch) for name, term in self.terms.items()}
        return [
            [self._add({name: by_term[name][row][at] for name in by_term}) for at in range(len(one.answers))]
            for row, one in enumerate(answered)
        ]

    def _add(self, scores: dict[str, float | RowError]) -> Score | RowError:
        terms: dict[str, float] = {}
        for name, score in scores.items():
            if isinstance(score, RowError):
                return score
            terms[name] = score
        return Score(sum(self.weights[name] * score for name, score in terms.items()), terms)


def describe_reward(conf: RewardConf) -> dict[str, Any]:
    """Return the terms of a reward that have a weight, and their settings, without addresses and keys."""
    private = ("base_url", "api_key_env", "timeout", "concurrency", "requests_per_minute", "batch_size")
    terms = {name: config_keys(term) for name, term in used_terms(conf).items()}
    return {name: {key: value for key, value in term.items() if key not in private} for name, term in terms.items()}


def build_reward(conf: RewardConf) -> Reward:
    """Return the reward that a configuration describes. Nothing large is loaded before the first score.

    Raises:
        ConfigError: no term has a weight, or one cannot be used: its function, model, package or file.
    """
    weights = {name: term.weight for name, term in used_terms(conf).items()}
    if not weights:
        raise ConfigError(
            "`reward`: must be chosen, it scores the answers (reward=length, sentiment, function, reward_model or "
            "judge; several with reward.NAME.weight=NUMBER)"
        )
    builders: dict[str, Callable[[], Term]] = {
        "length": lambda: LengthTerm(conf.length),
        "function": lambda: FunctionTerm(conf.function),
        "reward_model": lambda: ClassifierTerm(conf.reward_model),
        "sentiment": SentimentTerm,
        "judge": lambda: JudgeTerm(conf.judge),
    }
    terms, mistakes = dict[str, Term](), list[str]()
    for name in weights:
        try:
            terms[name] = builders[name]()
        except ConfigError as error:
            mistakes += error.mistakes
    if mistakes:
        raise ConfigError(mistakes)
    return Reward(terms, weights)

"""Scored rows from answers: what can be used of them, their rewards, and the pairs that they make."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dpo_runner.config.run_conf import RunConf
from dpo_runner.config.sections.data import SourceFields
from dpo_runner.data.layouts.messages import Pair, check_text, to_messages
from dpo_runner.data.layouts.scored import read_scored, select_pairs
from dpo_runner.data.prompts import Prompt
from dpo_runner.errors import LeftOut as NoPair
from dpo_runner.errors import RowError
from dpo_runner.generate.ledger import Answer, Ledger, LeftOut
from dpo_runner.training.answers.rewards.reward import Reward, Score
from dpo_runner.training.answers.rewards.term import Answered


@dataclass
class Candidates:
    """A prompt with the answers that can be used.

    Attributes:
        prompt: the prompt.
        answers: the answers.
        models: the name of each answer's model.
        scores: the score of each answer, once it is known.
    """

    prompt: Prompt
    answers: list[Answer]
    models: list[str]
    scores: list[Score] = field(default_factory=list)

    def ask(self) -> Answered:
        """Return what is to be scored: each different text once."""
        return Answered(self.prompt.messages, list(dict.fromkeys(answer.text for answer in self.answers)))


def collect(
    prompts: Sequence[Prompt], models: Sequence[str], ledger: Ledger, conf: RunConf, left_out: LeftOut
) -> list[Candidates]:
    """Return the prompts whose answers are all there, with the answers that can be used.

    Prompts without answers have been counted before.

    Raises:
        RunError: too many answers are empty or no text.
    """
    found = []
    for prompt in prompts:
        made = [(answer, model) for model in models for answer in ledger.find(prompt, model)]
        if len(made) < len(models) * conf.generate.num_answers:
            continue
        usable = []
        for answer, model in made:
            try:
                if not answer.text:
                    raise RowError("empty answer", f"of {model}")
                check_text(answer.text, "answer")
            except RowError as error:
                left_out.add(prompt, error)
            else:
                if answer.complete or conf.generate.on_cut_off == "keep":
                    usable.append((answer, model))
        found.append(Candidates(prompt, [answer for answer, _ in usable], [model for _, model in usable]))
    return found


def count_steps(candidates: Sequence[Candidates], reward: Reward) -> int:
    """Return how often `score` counts progress."""
    return reward.count_steps([one.ask() for one in candidates])


def score(
    candidates: Sequence[Candidates], reward: Reward, left_out: LeftOut, progress: Callable[[int], None]
) -> list[Candidates]:
    """Score all answers, and return the prompts that have at least two scored answers, without the others.

    Raises:
        RunError: too many answers cannot be scored, or a judge's endpoint cannot be used.
    """
    soon, lost = replace(left_out, found=list(left_out.found)), Counter[int]()

    def watch(number: int, error: RowError | None) -> None:
        """Stop as soon as too many answers are lost; comparisons that fail may be more than the answers they cost."""
        progress(1)
        if error is not None and lost[number] < len(candidates[number].answers):
            lost[number] += 1
            soon.add(candidates[number].prompt, error)

    answered = [one.ask() for one in candidates]
    for one, asked, scores in zip(candidates, answered, reward.score(answered, watch), strict=True):
        by_text = dict(zip(asked.answers, scores, strict=True))
        kept = []
        for answer, model in zip(one.answers, one.models, strict=True):
            found = by_text[answer.text]
            if isinstance(found, Score):
                kept.append((answer, model, found))
            else:
                left_out.add(one.prompt, found)
        one.answers, one.models = [answer for answer, *_ in kept], [model for _, model, _ in kept]
        one.scores = [found for *_, found in kept]
    return [one for one in candidates if len(one.answers) > 1]


def build_row(one: Candidates, conf: RunConf) -> dict[str, Any]:
    """Return a prompt's row in the layout `scored`, with where its answers come from."""
    generate = conf.generate
    sampling = {"temperature": generate.temperature, "top_p": generate.top_p, "max_new_tokens": generate.max_new_tokens}
    return {
        "prompt": one.prompt.messages,
        **one.prompt.columns,
        "responses": [_to_column(answer.text) for answer in one.answers],
        "scores": [found.total for found in one.scores],
        "terms": {name: [found.terms[name] for found in one.scores] for name in one.scores[0].terms},
        "models": one.models,
        "complete": [answer.complete for answer in one.answers],
        "sampling": {**sampling, "stop": generate.stop, "seed": generate.seed},
        "source": one.prompt.where,
    }


def _to_column(text: str) -> Any:
    """Return an answer as a row holds it: as a message where a reader would take the text for JSON of messages."""
    message = {"role": "assistant", "content": text}
    try:
        plain = to_messages(text, "assistant", "responses") == [message]
    except RowError:
        plain = False
    return text if plain else [message]


def make_pairs(rows: Sequence[dict[str, Any]], conf: SourceFields) -> Iterator[list[Pair]]:
    """Yield the pairs that `data` makes of each row, [] where it makes none."""
    for row in rows:
        try:
            yield select_pairs(read_scored(row, conf.pairing), conf)
        except NoPair:
            yield []

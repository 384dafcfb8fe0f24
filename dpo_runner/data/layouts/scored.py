"""Layouts with scored, ranked or labelled answers, and the pairs made from them."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from dpo_runner.config.sections.data import SourceFields
from dpo_runner.data.layouts.columns import (
    PROMPTS,
    Row,
    first,
    has,
    require,
    to_number,
    with_history,
    with_system,
)
from dpo_runner.data.layouts.messages import Message, Pair, to_messages
from dpo_runner.data.layouts.transcripts import read_prompt
from dpo_runner.errors import LeftOut, RowError

_RESPONSES = ("responses", "completions", "generations", "answers", "candidates")
_SCORES = ("scores", "ratings", "rating", "rewards", "ranks")
_TEXTS = ("response", "text", "content", "answer", "completion")
_SCORE = ("score", "overall_score", "rating", "reward", "rank")
_RANKS = ("ranks", "rank")
"""Places among the answers: the lowest is the best."""
_LABELS = {"true": 1, "false": 0, "1": 1, "0": 0, "1.0": 1, "0.0": 0}
_WORDS = 3
"""Length of the sequences of words by which answers are compared."""
_CONTEXT = ("prompt", "system", "system_prompt", "tools", "chat_template_kwargs", "history")


def is_scored(row: Row) -> bool:
    """Return whether a row has a prompt, a list of answers, and scores (or ranks) in a column or in the answers.

    Beside chosen and rejected, ranks do not count: they are where the pair comes from.
    """
    is_pair = has(row, "chosen", "rejected")
    responses = row.get(first(row, _RESPONSES) or "")
    if first(row, PROMPTS) is None or not isinstance(responses, list):
        return False
    in_column, in_answer = (_SCORES[:-1], _SCORE[:-1]) if is_pair else (_SCORES, _SCORE)
    return first(row, in_column) is not None or all(isinstance(i, dict) and first(i, in_answer) for i in responses)


def read_scored(row: Row, pairing: str) -> list[Pair]:
    """Return a row's pairs by `data.pairing`; none if all scores are equal."""
    prompt_column, responses_column = first(row, PROMPTS) or "prompt", first(row, _RESPONSES) or "responses"
    require(row, prompt_column, responses_column)
    responses, scores = _read_responses(row, responses_column)
    prompt = with_system(row, _read_prompt(row, prompt_column))
    ranked = sorted(range(len(scores)), key=lambda i: -scores[i])  # stable: equal scores keep their order
    best, worst = ranked[0], ranked[-1]
    if pairing == "best_vs_worst":
        chosen_and_rejected = [(best, worst)]
    elif pairing == "best_vs_rest":
        chosen_and_rejected = [(best, other) for other in ranked[1:]]
    elif pairing == "best_vs_random":
        lower = [other for other in ranked if scores[other] < scores[best]]
        chosen_and_rejected = [(best, lower[_draw([prompt, responses], len(lower))])] if lower else []
    else:
        chosen_and_rejected = [(one, other) for at, one in enumerate(ranked) for other in ranked[at + 1 :]]
    return [
        Pair(
            [*prompt],
            to_messages(responses[one], "assistant", "chosen"),
            to_messages(responses[other], "assistant", "rejected"),
            score_gap=scores[one] - scores[other],
        )
        for one, other in chosen_and_rejected
        if scores[one] > scores[other]
    ]


def _draw(content: Any, count: int) -> int:
    """Return a number below `count` that depends on the content alone, so that a row always makes the same pair."""
    text = json.dumps(content, sort_keys=True, default=str)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") % count


def select_pairs(pairs: Sequence[Pair], conf: SourceFields) -> list[Pair]:
    """Return the pairs of a row that `data` wants: by their scores, lengths and similarity; at least one.

    Raises:
        LeftOut: none is left.
    """
    if not pairs:
        raise LeftOut("all answers score the same")
    gap = conf.min_score_gap
    kept = [pair for pair in pairs if pair.score_gap is None or pair.is_unscored() or pair.score_gap >= gap]
    if not kept and all(pair.score_gap is not None and pair.score_gap < 0 for pair in pairs):
        raise LeftOut("rejected scores higher than chosen")
    if not kept:
        raise LeftOut(f"the scores differ by less than {gap:g}")
    if (most := conf.max_length_difference) is not None:
        kept = [pair for pair in kept if abs(len(_text(pair.chosen)) - len(_text(pair.rejected))) <= most]
        if not kept:
            raise LeftOut(f"the answers differ by more than {most:,} characters")
    if (alike := conf.max_similarity) is not None:
        kept = [pair for pair in kept if compare_words(_text(pair.chosen), _text(pair.rejected)) <= alike]
        if not kept:
            raise LeftOut(f"the answers are more alike than {alike:g}")
    return kept


def _text(answer: list[Message]) -> str:
    return "\n".join(message["content"] for message in answer)


def compare_words(one: str, other: str) -> float:
    """Return how alike two texts are, from 0 to 1: the Jaccard similarity of their sequences of three words."""

    def sequences(text: str) -> set[tuple[str, ...]]:
        words = text.lower().split()
        return {tuple(words[at : at + _WORDS]) for at in range(max(1, len(words) - _WORDS + 1))}

    ours, theirs = sequences(one), sequences(other)
    return len(ours & theirs) / len(ours | theirs)


def _read_prompt(row: Row, column: str) -> list[Message]:
    prompt = read_prompt(row[column], column)
    if column == "instruction" and isinstance(row.get("input"), str) and row["input"].strip():  # the Alpaca form
        prompt[-1] = {**prompt[-1], "content": f"{prompt[-1]['content']}\n{row['input']}"}
    return with_history(row, prompt)


def _read_responses(row: Row, column: str) -> tuple[list[Any], list[float]]:
    responses = row[column]
    name = first(row, _SCORES) or "scores"
    scores = row.get(name)
    if not isinstance(responses, list) or len(responses) < 2:
        count = len(responses) if isinstance(responses, list) else 0
        raise RowError("fewer than two answers", f"{count}; a pair needs two")
    if scores is None and all(isinstance(item, dict) and first(item, _SCORE) for item in responses):
        names = [str(first(item, _SCORE)) for item in responses]
        if len({name in _RANKS for name in names}) > 1:
            raise RowError("scores do not match the answers", f"`{column}` holds both scores and ranks")
        name, scores = names[0], [item[name] for item, name in zip(responses, names, strict=True)]
        responses = [item.get(first(item, _TEXTS)) for item in responses]
    if not isinstance(scores, list) or len(scores) != len(responses):
        found = f"{len(scores)} scores" if isinstance(scores, list) else "no list of scores"
        raise RowError("scores do not match the answers", f"{len(responses)} answers, {found}")
    sign = -1 if name in _RANKS else 1
    return responses, [sign * to_number(score, "scores") for score in scores]


LISTS = (*_RESPONSES, *_SCORES)
"""Columns that hold a list."""


def read_helpsteer(row: Row, pairing: str) -> list[Pair]:
    """Return the pairs of grouped responses (HelpSteer 2) or two responses and a preference (HelpSteer 3)."""
    if first(row, ("context", "response1", "response2")) is None:
        require(row, "prompt", "response")
        return read_scored(row, pairing)
    require(row, "context", "response1", "response2", "overall_preference")
    answers = [to_messages(row[column], "assistant", column) for column in ("response1", "response2")]
    preference = to_number(row["overall_preference"], "overall_preference")  # -3: first is much better; 3: second
    if preference == 0:
        return []
    better, worse = answers if preference < 0 else answers[::-1]
    prompt = with_system(row, read_prompt(row["context"], "context"))
    return [Pair(prompt, better, worse, score_gap=abs(preference))]


def is_kto(row: Row) -> bool:
    """Return whether a row is one answer that is good or bad, and nothing else."""
    if first(row, ("chosen", "rejected", "response")) is not None or is_scored(row):
        return False
    return has(row, "prompt", "completion") and str(row.get("label")).lower() in _LABELS


def read_kto(row: Row, pairing: str) -> list[Pair]:
    """Return the pairs of grouped answers, good ones against bad ones.

    Raises:
        RowError: a label is neither true nor false, or no other row with this prompt is adjacent.
    """
    require(row, "prompt", "completion", "label")
    labels = row.get("scores") or []
    for label in labels:
        if str(label).lower() not in _LABELS:
            raise RowError("score is not a number", f"`label`: {label!r:.40}; expected true or false")
    if len(labels) < 2:
        rule = "a pair needs a good and a bad one in adjacent rows; sort the rows by prompt"
        raise RowError("fewer than two answers", f"{len(labels)} to this prompt; {rule}")
    return read_scored(row | {"scores": [_LABELS[str(label).lower()] for label in labels]}, pairing)


def group_responses(rows: Iterable[tuple[int, Row | RowError]]) -> Iterator[tuple[int, Row | RowError]]:
    """Group rows of one answer each: adjacent rows with one prompt, system text and tools become one scored row.

    Incomplete and unreadable rows are passed on unchanged and do not separate a group.
    """
    start, group = 0, None
    for number, row in rows:
        if isinstance(row, RowError) or not has(row, "prompt") or first(row, ("response", "completion")) is None:
            yield number, row
            continue
        if has(row, "completion", "label"):
            answer, score = "completion", row["label"]
        else:
            answer = "completion" if row.get("response") is None else "response"
            score = row.get("helpfulness") if row.get("score") is None else row["score"]
        if group is not None and all(group.get(column) == row.get(column) for column in _CONTEXT):
            group["responses"].append(row[answer])
            group["scores"].append(score)
            continue
        if group is not None:
            yield start, group
        start, group = number, row | {"responses": [row[answer]], "scores": [score]}
    if group is not None:
        yield start, group

"""Layouts with scored or ranked answers, and the pairs made from them."""

from collections.abc import Iterable, Iterator
from typing import Any

from dpo_runner.data.layouts.columns import PROMPTS, Row, first, require, to_number, with_system
from dpo_runner.data.layouts.messages import Message, Pair, to_messages
from dpo_runner.errors import RowError

_RESPONSES = ("responses", "completions", "generations", "answers", "candidates")
_SCORES = ("scores", "ratings", "rating", "rewards")
_TEXTS = ("response", "text", "content", "answer", "completion")
_SCORE = ("score", "overall_score", "rating", "reward")


def is_scored(row: Row) -> bool:
    """Return whether a row has a prompt, a list of answers, and scores in a column or in the answers."""
    responses = row.get(first(row, _RESPONSES) or "")
    if first(row, PROMPTS) is None or not isinstance(responses, list):
        return False
    return first(row, _SCORES) is not None or all(isinstance(i, dict) and first(i, _SCORE) for i in responses)


def read_scored(row: Row, pairing: str) -> list[Pair]:
    """Return a row's pairs by `data.pairing`; none if all scores are equal."""
    prompt_column, responses_column = first(row, PROMPTS), first(row, _RESPONSES)
    require(row, prompt_column or "prompt", responses_column or "responses")
    responses, scores = _read_responses(row[str(responses_column)], row.get(first(row, _SCORES) or "scores"))
    prompt = with_system(row, _read_prompt(row, str(prompt_column)))
    ranked = sorted(range(len(scores)), key=lambda i: -scores[i])  # stable: equal scores keep their order
    best, worst = ranked[0], ranked[-1]
    if pairing == "best_vs_worst":
        chosen_and_rejected = [(best, worst)]
    elif pairing == "best_vs_rest":
        chosen_and_rejected = [(best, other) for other in ranked[1:]]
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


def _read_prompt(row: Row, column: str) -> list[Message]:
    prompt = to_messages(row[column], "user", column)
    if column == "instruction" and isinstance(row.get("input"), str) and row["input"].strip():  # the Alpaca form
        prompt[-1] = {**prompt[-1], "content": f"{prompt[-1]['content']}\n{row['input']}"}
    return prompt


def _read_responses(responses: Any, scores: Any) -> tuple[list[Any], list[float]]:
    if not isinstance(responses, list) or len(responses) < 2:
        count = len(responses) if isinstance(responses, list) else 0
        raise RowError("fewer than two answers", f"{count}; a pair needs two")
    if scores is None and all(isinstance(item, dict) and first(item, _SCORE) for item in responses):
        scores = [item[first(item, _SCORE)] for item in responses]
        responses = [item.get(first(item, _TEXTS)) for item in responses]
    if not isinstance(scores, list) or len(scores) != len(responses):
        found = f"{len(scores)} scores" if isinstance(scores, list) else "no list of scores"
        raise RowError("scores do not match the answers", f"{len(responses)} answers, {found}")
    return responses, [to_number(score, "scores") for score in scores]


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
    return [Pair(to_messages(row["context"], "user", "context"), better, worse, score_gap=abs(preference))]


def group_responses(rows: Iterable[tuple[int, Row | RowError]]) -> Iterator[tuple[int, Row | RowError]]:
    """Group HelpSteer rows of one response each: adjacent rows with one prompt become one scored row.

    Incomplete and unreadable rows are passed on unchanged and do not separate a group.
    """
    start, group = 0, None
    for number, row in rows:
        if isinstance(row, RowError) or row.get("prompt") is None or row.get("response") is None:
            yield number, row
            continue
        score = row.get("helpfulness") if row.get("score") is None else row["score"]
        if group is not None and group["prompt"] == row["prompt"]:
            group["responses"].append(row["response"])
            group["scores"].append(score)
            continue
        if group is not None:
            yield start, group
        start, group = number, {**row, "responses": [row["response"]], "scores": [score]}
    if group is not None:
        yield start, group

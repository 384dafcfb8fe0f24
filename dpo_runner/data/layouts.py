"""The layouts in which people keep preference rows: what tells each, and how a row of it becomes pairs."""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from dpo_runner.data.messages import ALIASES, Message, Pair, split_conversations, to_messages
from dpo_runner.errors import RowError

Row = dict[str, Any]

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_PROMPTS = ("prompt", "instruction", "question", "input")
_RESPONSES = ("responses", "completions", "generations", "answers", "candidates")
_SCORES = ("scores", "ratings", "rating", "rewards")
_TEXTS = ("response", "text", "content", "answer", "completion")
_SCORE = ("score", "overall_score", "rating", "reward")
_SCORE_PAIRS = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen_avg_rating", "rejected_avg_rating"),
)


@dataclass(frozen=True)
class Layout:
    """One way of keeping preferences.

    Attributes:
        name: as `data.format` has it.
        needs: the columns, in words.
        matches: whether a row is laid out so.
        read: a row's pairs, given `data.pairing`.
    """

    name: str
    needs: str
    matches: Callable[[Row], bool]
    read: Callable[[Row, str], list[Pair]]

    def describe(self, row: Row) -> str:
        """Return the name, and what of its variants `row` is."""
        if self.name != "preference":
            return self.name
        texts = all(isinstance(row.get(key) or "", str) for key in ("prompt", "chosen", "rejected"))
        kind = "texts" if texts else "messages"
        parts = [kind, "implicit prompt"] if row.get("prompt") is None else [kind]
        parts += ["scores"] if any(_has(row, *columns) for columns in _SCORE_PAIRS) else []
        return f"preference ({', '.join(parts)})"


def _has(row: Row, *columns: str) -> bool:
    return all(row.get(column) is not None for column in columns)


def _first(row: Row, columns: Iterable[str]) -> str | None:
    return next((column for column in columns if row.get(column) is not None), None)


def _require(row: Row, *columns: str) -> None:
    for column in columns:
        if row.get(column) is None:
            found = name_columns(key for key, value in row.items() if value is not None)
            raise RowError("missing column", f"`{column}`; the row has: {found}")


def name_columns(names: Iterable[Any]) -> str:
    """Return columns' names for a message of one line: they may be whole texts, as in a CSV file without header."""
    shown = [text if (text := str(name)[:40]).isprintable() else ascii(text) for name in names]
    return ", ".join(shown[:25]) + (", …" if len(shown) > 25 else "") if shown else "nothing"


def _is_transcript(value: Any) -> bool:
    return isinstance(value, str) and _HH_TURN.match(value) is not None


def _find_scores(row: Row) -> float | None:
    """Return chosen's score minus rejected's where a row has both."""
    for chosen, rejected in _SCORE_PAIRS:
        if _has(row, chosen, rejected):
            return _number(row[chosen], chosen) - _number(row[rejected], rejected)
    return None


def _number(value: Any, column: str) -> float:
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError
        number = float(value)  # of a text too: CSV holds nothing else
    except ValueError:
        raise RowError("score is no number", f"`{column}`: {value!r:.40}") from None
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RowError("score is not finite", f"`{column}`: {number}")
    return number


def _read_preference(row: Row, pairing: str) -> list[Pair]:
    _require(row, "chosen", "rejected")
    chosen = to_messages(row["chosen"], "assistant", "chosen")
    rejected = to_messages(row["rejected"], "assistant", "rejected")
    prompt = row.get("prompt")
    if all(answer[0]["role"] in ("assistant", "tool") for answer in (chosen, rejected)):
        _require(row, "prompt")
        return [
            Pair(
                _with_system(row, to_messages(prompt, "user", "prompt")),
                chosen,
                rejected,
                None,
                None,
                _find_scores(row),
            )
        ]
    shared, chosen, rejected = split_conversations(chosen, rejected)
    if prompt is not None and not _is_same_prompt(prompt, shared):
        raise RowError("two different prompts", "`prompt` differs from the beginning of `chosen`; give one of them")
    return [Pair(_with_system(row, shared), chosen, rejected, score_gap=_find_scores(row))]


def _is_same_prompt(prompt: Any, shared: list[Message]) -> bool:
    """Whether an explicit prompt says the same as a conversation's beginning; a text stands for its user turns."""
    if isinstance(prompt, str):
        return prompt in [message["content"] for message in shared if message["role"] == "user"]
    return to_messages(prompt, "user", "prompt") == shared


def _with_system(row: Row, prompt: list[Message]) -> list[Message]:
    """Put a row's own `system` text before its prompt, unless that has a system turn or the text is blank."""
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise RowError("not a text", f"`system` holds {system!r:.60}; a text is due")
    if system and system.strip() and prompt[0]["role"] != "system":
        return [{"role": "system", "content": system}, *prompt]
    return prompt


def _read_hh(row: Row, pairing: str) -> list[Pair]:
    _require(row, "chosen", "rejected")
    if row.get("prompt") is None:
        both = _parse_transcript(row, "chosen"), _parse_transcript(row, "rejected")
        prompt, chosen, rejected = split_conversations(*both)
    else:  # the transcript apart, often up to the open "Assistant:", and only the last answers beside it
        prompt = _parse_transcript(row, "prompt")
        prompt = prompt[:-1] if prompt[1:] and prompt[-1] == {"role": "assistant", "content": ""} else prompt
        chosen, rejected = _read_answers(row)
    return [Pair(_with_system(row, prompt), chosen, rejected, score_gap=_find_scores(row))]


def _parse_transcript(row: Row, column: str) -> list[Message]:
    if not _is_transcript(row[column]):
        raise RowError("no transcript", f"`{column}` must begin with \\n\\nHuman:; got {row[column]!r:.60}")
    parts = _HH_TURN.split(row[column])
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": content.strip()}
        for speaker, content in zip(parts[1::2], parts[2::2], strict=True)
    ]


def _read_sharegpt(row: Row, pairing: str) -> list[Pair]:
    _require(row, "conversations", "chosen", "rejected")
    prompt = to_messages(row["conversations"], "user", "conversations")
    chosen, rejected = (to_messages(row[column], "assistant", column) for column in ("chosen", "rejected"))
    return [Pair(_with_system(row, prompt), chosen, rejected, score_gap=_find_scores(row))]


def _read_alpaca(row: Row, pairing: str) -> list[Pair]:
    _require(row, "instruction")
    answers = row.get("output")
    if isinstance(answers, list):
        if len(answers) != 2:
            raise RowError("not two answers", f"`output` holds {len(answers)}; the chosen and the rejected one are due")
        row = {**row, "chosen": answers[0], "rejected": answers[1]}
    _require(row, "chosen", "rejected")
    prompt: list[Message] = []
    history = row.get("history") or []
    for turn in history if isinstance(history, list) else [history]:
        if not isinstance(turn, list) or len(turn) != 2:
            raise RowError("not a text", f"`history` holds {turn!r:.60}; pairs of question and answer are due")
        prompt += [*to_messages(turn[0], "user", "history"), *to_messages(turn[1], "assistant", "history")]
    texts = [row["instruction"], row.get("input")]
    if not all(text is None or isinstance(text, str) for text in texts):
        raise RowError("not a text", f"`instruction` and `input` must be texts; got {texts!r:.80}")
    prompt.append({"role": "user", "content": "\n".join(text for text in texts if text)})
    return [Pair(_with_system(row, prompt), *_read_answers(row), score_gap=_find_scores(row))]


def _read_orca(row: Row, pairing: str) -> list[Pair]:
    question = _first(row, ("question", "input"))
    _require(row, question or "question", "chosen", "rejected")
    prompt = to_messages(row[str(question)], "user", str(question))
    return [Pair(_with_system(row, prompt), *_read_answers(row), score_gap=_find_scores(row))]


def _read_answers(row: Row) -> tuple[list[Message], list[Message]]:
    return to_messages(row["chosen"], "assistant", "chosen"), to_messages(row["rejected"], "assistant", "rejected")


def _read_scored(row: Row, pairing: str) -> list[Pair]:
    prompt_column, responses_column = _first(row, _PROMPTS), _first(row, _RESPONSES)
    _require(row, prompt_column or "prompt", responses_column or "responses")
    responses, scores = _read_responses(row[str(responses_column)], row.get(_first(row, _SCORES) or "scores"))
    prompt = _with_system(row, to_messages(row[str(prompt_column)], "user", str(prompt_column)))
    ranked = sorted(range(len(scores)), key=lambda i: -scores[i])  # stable: of equal scores the first comes first
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


def _read_responses(responses: Any, scores: Any) -> tuple[list[Any], list[float]]:
    if not isinstance(responses, list) or len(responses) < 2:
        count = len(responses) if isinstance(responses, list) else 0
        raise RowError("fewer than two answers", f"{count}; a pair needs two")
    if scores is None and all(isinstance(item, dict) and _first(item, _SCORE) for item in responses):
        scores = [item[_first(item, _SCORE)] for item in responses]
        responses = [item.get(_first(item, _TEXTS)) for item in responses]
    if not isinstance(scores, list) or len(scores) != len(responses):
        found = f"{len(scores)} scores" if isinstance(scores, list) else "no list of scores"
        raise RowError("scores do not match the answers", f"{len(responses)} answers, {found}")
    return responses, [_number(score, "scores") for score in scores]


def _read_helpsteer(row: Row, pairing: str) -> list[Pair]:
    if _first(row, ("context", "response1", "response2")) is None:
        _require(row, "prompt", "response")
        return _read_scored(row, pairing)
    _require(row, "context", "response1", "response2", "overall_preference")
    answers = [to_messages(row[column], "assistant", column) for column in ("response1", "response2")]
    preference = _number(row["overall_preference"], "overall_preference")  # -3: the first is much better; 3: the second
    if preference == 0:
        return []
    better, worse = answers if preference < 0 else answers[::-1]
    return [Pair(to_messages(row["context"], "user", "context"), better, worse, score_gap=abs(preference))]


def _is_pair(row: Row) -> bool:
    return _has(row, "chosen", "rejected") and not _has(row, "conversations")


def _is_pair_of_transcripts(row: Row) -> bool:
    return _is_pair(row) and any(_is_transcript(row.get(column)) for column in ("prompt", "chosen"))


def _is_pair_of_answers(row: Row) -> bool:
    return _is_pair(row) and not _is_conversation(row["chosen"])


def _is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages that does not begin with an answer."""
    first = value[0] if isinstance(value, list) and value else None
    role = (first.get("role") or first.get("from")) if isinstance(first, dict) else "assistant"
    return not isinstance(role, str) or ALIASES.get(role.lower()) != "assistant"


def _is_scored(row: Row) -> bool:
    responses = row.get(_first(row, _RESPONSES) or "")
    if _first(row, _PROMPTS) is None or not isinstance(responses, list):
        return False
    return _first(row, _SCORES) is not None or all(isinstance(i, dict) and _first(i, _SCORE) for i in responses)


LAYOUTS = (
    Layout(
        "preference",
        "prompt, chosen, rejected: texts or messages; without prompt, chosen and rejected hold the conversation",
        lambda row: (
            _is_pair(row)
            and not _is_pair_of_transcripts(row)
            and (_has(row, "prompt") or _is_conversation(row["chosen"]))
        ),
        _read_preference,
    ),
    Layout(
        "hh",
        "chosen, rejected: transcripts of \\n\\nHuman: and \\n\\nAssistant: turns; or answers to a prompt that is one",
        _is_pair_of_transcripts,
        _read_hh,
    ),
    Layout(
        "sharegpt",
        "conversations, chosen, rejected: messages of from and value",
        lambda row: _has(row, "conversations", "chosen", "rejected"),
        _read_sharegpt,
    ),
    Layout(
        "alpaca",
        "instruction, with chosen and rejected or an output of two; perhaps input, system, history",
        lambda row: _has(row, "instruction") and (_is_pair_of_answers(row) or isinstance(row.get("output"), list)),
        _read_alpaca,
    ),
    Layout(
        "orca",
        "question or input, chosen, rejected; perhaps system",
        lambda row: (
            _is_pair_of_answers(row)
            and (_has(row, "question") or (_has(row, "input") and not _has(row, "instruction")))
        ),
        _read_orca,
    ),
    Layout("scored", "a prompt, a list of responses and a list of scores", _is_scored, _read_scored),
    Layout(
        "helpsteer",
        "prompt, response, helpfulness, a row per response; or context, response1, response2, overall_preference",
        lambda row: (
            (_has(row, "prompt", "response") and (_has(row, "helpfulness") or _has(row, "score")))
            or _has(row, "context", "response1", "response2", "overall_preference")
        ),
        _read_helpsteer,
    ),
)

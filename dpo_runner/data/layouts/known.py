"""The known layouts of preference rows: how each is detected and converted to pairs."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dpo_runner.data.layouts.columns import SCORE_PAIRS, Row, find_scores, first, has, require, with_system
from dpo_runner.data.layouts.messages import ALIASES, Message, Pair, split_conversations, to_messages
from dpo_runner.data.layouts.scored import is_scored, read_helpsteer, read_scored
from dpo_runner.errors import RowError

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True)
class Layout:
    """A layout of preference rows.

    Attributes:
        name: value of `data.format`.
        needs: the required columns, in words.
        matches: returns whether a row has this layout.
        read: returns a row's pairs, given `data.pairing`.
    """

    name: str
    needs: str
    matches: Callable[[Row], bool]
    read: Callable[[Row, str], list[Pair]]

    def describe(self, row: Row) -> str:
        """Return the name, with the variant that `row` has."""
        if self.name != "preference":
            return self.name
        texts = all(isinstance(row.get(key) or "", str) for key in ("prompt", "chosen", "rejected"))
        kind = "texts" if texts else "messages"
        parts = [kind, "implicit prompt"] if row.get("prompt") is None else [kind]
        parts += ["scores"] if any(has(row, *columns) for columns in SCORE_PAIRS) else []
        return f"preference ({', '.join(parts)})"


def _is_transcript(value: Any) -> bool:
    return isinstance(value, str) and _HH_TURN.match(value) is not None


def _read_preference(row: Row, pairing: str) -> list[Pair]:
    require(row, "chosen", "rejected")
    chosen = to_messages(row["chosen"], "assistant", "chosen")
    rejected = to_messages(row["rejected"], "assistant", "rejected")
    prompt = row.get("prompt")
    if all(answer[0]["role"] in ("assistant", "tool") for answer in (chosen, rejected)):
        require(row, "prompt")
        messages = to_messages(prompt, "user", "prompt")
        return [Pair(with_system(row, messages), chosen, rejected, score_gap=find_scores(row))]
    shared, chosen, rejected = split_conversations(chosen, rejected)
    if prompt is not None and not _is_same_prompt(prompt, shared):
        raise RowError("two different prompts", "`prompt` differs from the beginning of `chosen`; give one of them")
    return [Pair(with_system(row, shared), chosen, rejected, score_gap=find_scores(row))]


def _is_same_prompt(prompt: Any, shared: list[Message]) -> bool:
    """Return whether an explicit prompt equals the shared turns, or, if a text, one of their user turns."""
    if isinstance(prompt, str):
        return prompt in [message["content"] for message in shared if message["role"] == "user"]
    return to_messages(prompt, "user", "prompt") == shared


def _read_hh(row: Row, pairing: str) -> list[Pair]:
    require(row, "chosen", "rejected")
    if row.get("prompt") is None:
        both = _parse_transcript(row, "chosen"), _parse_transcript(row, "rejected")
        prompt, chosen, rejected = split_conversations(*both)
    else:  # `prompt` holds the transcript, often ending with an open "Assistant:"; the others hold only the answers
        prompt = _parse_transcript(row, "prompt")
        prompt = prompt[:-1] if prompt[1:] and prompt[-1] == {"role": "assistant", "content": ""} else prompt
        chosen, rejected = _read_answers(row)
    return [Pair(with_system(row, prompt), chosen, rejected, score_gap=find_scores(row))]


def _parse_transcript(row: Row, column: str) -> list[Message]:
    if not _is_transcript(row[column]):
        raise RowError("not a transcript", f"`{column}` must begin with \\n\\nHuman:; got {row[column]!r:.60}")
    parts = _HH_TURN.split(row[column])
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": content.strip()}
        for speaker, content in zip(parts[1::2], parts[2::2], strict=True)
    ]


def _read_sharegpt(row: Row, pairing: str) -> list[Pair]:
    require(row, "conversations", "chosen", "rejected")
    prompt = to_messages(row["conversations"], "user", "conversations")
    chosen, rejected = (to_messages(row[column], "assistant", column) for column in ("chosen", "rejected"))
    return [Pair(with_system(row, prompt), chosen, rejected, score_gap=find_scores(row))]


def _read_alpaca(row: Row, pairing: str) -> list[Pair]:
    require(row, "instruction")
    answers = row.get("output")
    if isinstance(answers, list):
        if len(answers) != 2:
            raise RowError("not two answers", f"`output` holds {len(answers)}; expected chosen and rejected")
        row = {**row, "chosen": answers[0], "rejected": answers[1]}
    require(row, "chosen", "rejected")
    prompt: list[Message] = []
    history = row.get("history") or []
    for turn in history if isinstance(history, list) else [history]:
        if not isinstance(turn, list) or len(turn) != 2:
            raise RowError("not a text", f"`history` holds {turn!r:.60}; expected pairs of question and answer")
        prompt += [*to_messages(turn[0], "user", "history"), *to_messages(turn[1], "assistant", "history")]
    texts = [row["instruction"], row.get("input")]
    if not all(text is None or isinstance(text, str) for text in texts):
        raise RowError("not a text", f"`instruction` and `input` must be texts; got {texts!r:.80}")
    prompt.append({"role": "user", "content": "\n".join(text for text in texts if text)})
    return [Pair(with_system(row, prompt), *_read_answers(row), score_gap=find_scores(row))]


def _read_orca(row: Row, pairing: str) -> list[Pair]:
    question = first(row, ("question", "input"))
    require(row, question or "question", "chosen", "rejected")
    prompt = to_messages(row[str(question)], "user", str(question))
    return [Pair(with_system(row, prompt), *_read_answers(row), score_gap=find_scores(row))]


def _read_answers(row: Row) -> tuple[list[Message], list[Message]]:
    return to_messages(row["chosen"], "assistant", "chosen"), to_messages(row["rejected"], "assistant", "rejected")


def _is_pair(row: Row) -> bool:
    return has(row, "chosen", "rejected") and not has(row, "conversations")


def _is_pair_of_transcripts(row: Row) -> bool:
    return _is_pair(row) and any(_is_transcript(row.get(column)) for column in ("prompt", "chosen"))


def _is_pair_of_answers(row: Row) -> bool:
    return _is_pair(row) and not _is_conversation(row["chosen"])


def _is_conversation(value: Any) -> bool:
    """Return whether a value is a list of messages that does not begin with an assistant turn."""
    begin = value[0] if isinstance(value, list) and value else None
    role = (begin.get("role") or begin.get("from")) if isinstance(begin, dict) else "assistant"
    return not isinstance(role, str) or ALIASES.get(role.lower()) != "assistant"


LAYOUTS = (
    Layout(
        "preference",
        "prompt, chosen, rejected: texts or messages; without prompt, chosen and rejected hold the conversation",
        lambda row: (
            _is_pair(row)
            and not _is_pair_of_transcripts(row)
            and (has(row, "prompt") or _is_conversation(row["chosen"]))
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
        lambda row: has(row, "conversations", "chosen", "rejected"),
        _read_sharegpt,
    ),
    Layout(
        "alpaca",
        "instruction, with chosen and rejected or an output of two; perhaps input, system, history",
        lambda row: has(row, "instruction") and (_is_pair_of_answers(row) or isinstance(row.get("output"), list)),
        _read_alpaca,
    ),
    Layout(
        "orca",
        "question or input, chosen, rejected; perhaps system",
        lambda row: (
            _is_pair_of_answers(row) and (has(row, "question") or (has(row, "input") and not has(row, "instruction")))
        ),
        _read_orca,
    ),
    Layout("scored", "a prompt, a list of responses and a list of scores", is_scored, read_scored),
    Layout(
        "helpsteer",
        "prompt, response, helpfulness, a row per response; or context, response1, response2, overall_preference",
        lambda row: (
            (has(row, "prompt", "response") and (has(row, "helpfulness") or has(row, "score")))
            or has(row, "context", "response1", "response2", "overall_preference")
        ),
        read_helpsteer,
    ),
)

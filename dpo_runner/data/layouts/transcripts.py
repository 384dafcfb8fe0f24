"""Transcripts: dialogues in one text, as in Anthropic HH, with turns that begin with Human: and Assistant:."""

import re
from typing import Any

from dpo_runner.data.layouts.conversations import is_alike
from dpo_runner.data.layouts.messages import Message, to_messages
from dpo_runner.errors import RowError

_TURN = re.compile(r"(?:\r?\n){2}(Human|Assistant):")
_STRIPPED = re.compile(r"\s*Human:")
_ANSWER = re.compile(r"(?:\r?\n){2}Assistant:")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def is_transcript(value: Any) -> bool:
    """Return whether a value is a text that begins with a turn; if its leading line breaks are lost, with two."""
    if is_unstripped(value):
        return True
    return isinstance(value, str) and _STRIPPED.match(value) is not None and _ANSWER.search(value) is not None


def is_unstripped(value: Any) -> bool:
    """Return whether a value is a transcript with its leading line breaks."""
    return isinstance(value, str) and _TURN.match(value) is not None


def parse_transcript(value: Any, column: str) -> list[Message]:
    """Return the turns of a transcript.

    Raises:
        RowError: the value is none.
    """
    if not is_transcript(value):
        raise RowError("not a transcript", f"`{column}` must begin with \\n\\nHuman:; got {value!r:.60}")
    parts = _TURN.split(value if is_unstripped(value) else "\n\n" + value.lstrip())
    return [
        {"role": _ROLES[speaker], "content": content.strip()}
        for speaker, content in zip(parts[1::2], parts[2::2], strict=True)
    ]


def parse_prompt(value: Any, column: str) -> list[Message]:
    """Return the turns of a transcript without the open `Assistant:` that it often ends with."""
    turns = parse_transcript(value, column)
    return turns[:-1] if turns[1:] and turns[-1] == {"role": "assistant", "content": ""} else turns


def read_prompt(value: Any, column: str) -> list[Message]:
    """Return the messages of a prompt that is a text, messages or a transcript."""
    return parse_prompt(value, column) if is_transcript(value) else to_messages(value, "user", column)


def unfold_answer(answer: list[Message], prompt: list[Message], column: str) -> list[Message]:
    """Return an answer to a transcript, without the blank after `Assistant:`.

    It may be a transcript too, of its own turns or of the whole dialogue.

    Raises:
        RowError: it is the transcript of a dialogue that begins differently.
    """
    if len(answer) != 1:
        return answer
    if not is_transcript(answer[0]["content"]):
        return [{**answer[0], "content": answer[0]["content"].strip()}]
    turns = parse_transcript(answer[0]["content"], column)
    if turns[0]["role"] == "assistant":
        return turns
    if len(turns) <= len(prompt) or not is_alike(turns[: len(prompt)], prompt):
        raise RowError("two different prompts", f"`prompt` differs from the beginning of `{column}`; give one of them")
    return turns[len(prompt) :]

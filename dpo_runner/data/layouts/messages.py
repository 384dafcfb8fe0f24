"""Conversations as role/content messages, and the checks on preference pairs."""

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from dpo_runner.config.sections.data import ROLES
from dpo_runner.data.layouts.media import find_kind, holds_media
from dpo_runner.data.layouts.serialized import decode_calls, decode_messages, decode_tool
from dpo_runner.errors import RowError

Message = dict[str, Any]
"""`role`, `content`, and further keys a chat template may use: tool_calls, name, reasoning_content, …"""

ALIASES = {
    **{role: role for role in ROLES},
    "developer": "system",
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "tool_response": "tool",
    "function": "tool",
    "ipython": "tool",
}
_CALLS = ("function_call", "tool_call")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass
class Pair:
    """A preference pair: two completions of one prompt.

    Attributes:
        prompt: ends with a user or tool turn.
        chosen, rejected: assistant turns, possibly with tool turns between them; each ends with an assistant turn.
        tools: tool definitions passed to the chat template.
        chat_template_kwargs: further variables of the chat template.
        score_gap: score of chosen minus score of rejected; None if the row has no scores, NaN if they are unusable.
    """

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    score_gap: float | None = None

    def is_unscored(self) -> bool:
        """Return whether the row has scores that are no finite numbers."""
        return self.score_gap is not None and math.isnan(self.score_gap)


def to_messages(value: Any, role: str, column: str) -> list[Message]:
    """Convert a text (one turn of `role`), a message or a list of messages (or its JSON) to messages.

    Role and key names become those of `Message`.

    Raises:
        RowError: the value is none of these, or a message lacks its role or content.
    """
    if isinstance(value, str):
        value = decode_messages(value, column, ALIASES)
        if isinstance(value, str):
            return [{"role": role, "content": value}]
    if isinstance(value, dict):
        value = [value]
    if value is None:
        raise RowError("missing column", f"`{column}`")
    if not isinstance(value, list):
        raise RowError(
            "not a text", f"`{column}` is {_kind(value)} {value!r:.60}; expected a text or a list of messages"
        )
    if not value:
        raise RowError(f"empty {column}", "an empty list of messages")
    return _join_calls(value, [_to_message(message, column) for message in value])


def _join_calls(raw: list[Any], messages: list[Message]) -> list[Message]:
    """Join parallel calls, several turns of `function_call` in a row, to one turn with a call on each line."""
    roles = [one.get("role") or one.get("from") for one in raw]
    if not any(roles.count(role) > 1 for role in _CALLS):
        return messages
    joined = messages[:1]
    for before, role, message in zip(roles, roles[1:], messages[1:], strict=False):
        if before == role and role in _CALLS and len(message) == len(joined[-1]) == 2:
            joined[-1] = {**joined[-1], "content": f"{joined[-1]['content']}\n{message['content']}"}
        else:
            joined.append(message)
    return joined


def _to_message(message: Any, column: str) -> Message:
    if not isinstance(message, dict):
        raise RowError("not a message", f"`{column}` holds {_kind(message)} {message!r:.60}")
    role, content = message.get("role"), message.get("content")  # Parquet may have both names, one of them None
    role = message.get("from") if role is None else role
    content = message.get("value") if content is None else content
    others = {key: value for key, value in message.items() if key not in ("role", "content", "from", "value")}
    if role is None or (content is None and others.get("tool_calls") is None):
        raise RowError("not a message", f"`{column}`: a message needs `role` and `content`; got {message!r:.80}")
    if not isinstance(role, str) or role.lower() not in ALIASES:
        is_name = re.fullmatch(r"\w{1,30}", str(role))
        cure = f'"data.roles={{{role}: user}}" takes it for user' if is_name else "data.roles maps others"
        raise RowError("unknown role", f"`{column}`: {role!r:.40}; known are {', '.join(ROLES)}, human and gpt; {cure}")
    for key in others:
        if find_kind(key) and holds_media(others[key]):
            raise RowError("not a text", f"`{column}`: a message holds `{key}`; only text can be trained on")
    return {**decode_calls(_plain(others), column), "role": ALIASES[role.lower()], "content": _to_text(content, column)}


def _to_text(content: Any, column: str) -> str:
    if content is None:
        return ""
    if isinstance(content, list):  # OpenAI's content parts
        for part in content:
            if (
                not isinstance(part, dict)
                or (part.get("type") or "text") != "text"
                or not isinstance(part.get("text"), str)
            ):
                raise RowError("not a text", f"`{column}`: content part {part!r:.60}; only text can be trained on")
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise RowError("not a text", f"`{column}`: content is {_kind(content)} {content!r:.60}")
    return content


def _plain(value: Any) -> Any:
    """Convert a Parquet value to JSON types (times become text), without the None of absent fields."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    return [_plain(item) for item in value] if isinstance(value, list) else str(value)


def _kind(value: Any) -> str:
    names = {"dict": "an object", "list": "a list", "int": "a number", "float": "a number", "bool": "a boolean"}
    return names.get(type(value).__name__, type(value).__name__)


def check_pair(pair: Pair) -> None:
    """Check the rules for pairs of any layout.

    Raises:
        RowError: a turn is out of order or on the wrong side, a prompt or completion is empty, text is broken, or
            chosen and rejected are equal.
    """
    _check_turns(pair.prompt)
    for column, completion in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if any(message["role"] in ("user", "system") for message in completion):
            raise RowError(
                "completion with a foreign turn",
                f"`{column}` has a user or system turn after the prompt; it would be trained on",
            )
        if not completion or completion[-1]["role"] != "assistant":
            raise RowError("ends on the wrong turn", f"`{column}` must end with an assistant turn after the prompt")
        _check_order(pair.prompt + completion, column)
        if not completion[-1]["content"].strip() and not completion[-1].get("tool_calls"):
            raise RowError(f"empty {column}")
    for column, messages in (("prompt", pair.prompt), ("chosen", pair.chosen), ("rejected", pair.rejected)):
        _check_texts(messages, column)
    if pair.chosen == pair.rejected:
        raise RowError("chosen equals rejected")


def check_prompt(prompt: list[Message]) -> None:
    """Check the rules for the prompt of a pair, alone.

    Raises:
        RowError: a turn is out of order, the last turn is not user or tool or is empty, or text is broken.
    """
    _check_turns(prompt)
    _check_texts(prompt, "prompt")


def _check_turns(prompt: list[Message]) -> None:
    _check_order(prompt, "prompt")
    if prompt[-1]["role"] not in ("user", "tool"):
        raise RowError("ends on the wrong turn", f"`prompt` ends with {prompt[-1]['role']}; expected user or tool")


def _check_texts(messages: list[Message], column: str) -> None:
    if column == "prompt" and not messages[-1]["content"].strip():
        raise RowError("empty prompt")
    for message in messages:
        check_text(message["content"] if len(message) == 2 else message, column)


def check_text(value: Any, column: str) -> None:
    """Check that a text or JSON value can be written as JSON in UTF-8.

    Lone surrogates cannot: halves of a surrogate pair, or bytes that were not valid UTF-8 when read.

    Raises:
        RowError: the value cannot be written.
    """
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:  # values from Parquet or a formatter may be of any type
        raise RowError("not JSON", f"`{column}`: {error}") from None
    if _SURROGATE.search(text):
        raise RowError("invalid UTF-8", f"`{column}` holds bytes that are not text")


_FOLLOWERS = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


def _check_order(messages: list[Message], column: str) -> None:
    before = None
    for number, message in enumerate(messages, start=1):
        if message["role"] not in _FOLLOWERS[before]:
            raise RowError(
                "roles out of order",
                f"`{column}`: turn {number} is {message['role']} after {before or 'nothing'}; "
                f"expected {' or '.join(_FOLLOWERS[before])}",
            )
        before = message["role"]


def parse_json(value: Any, kind: type, column: str) -> Any:
    """Return a column's list of tools or its object, given as such or as JSON text; None if absent or empty.

    Nulls inside are kept only from JSON text.

    Raises:
        RowError: the value is neither.
    """
    if isinstance(value, kind):
        value = _plain(value)
    while isinstance(value, str):  # JSON may be encoded twice
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError) as error:
            raise RowError(f"no usable {column}", f"`{column}` is not JSON: {error}") from None
    if value is not None and not isinstance(value, kind):
        due = "a list" if kind is list else "an object"
        raise RowError(f"no usable {column}", f"`{column}` is {_kind(value)}; expected {due} or its JSON")
    if isinstance(value, list):
        value = [decode_tool(item) for item in value]
    check_text(value, column)
    return value or None

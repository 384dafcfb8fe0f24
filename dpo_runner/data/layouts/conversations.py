"""Comparison of messages, the split of two conversations, and roles by other names."""

from collections.abc import Mapping
from typing import Any

from dpo_runner.data.layouts.messages import Message
from dpo_runner.errors import RowError

RENDERED = (
    *("role", "content", "tool_calls", "function_call", "name", "recipient", "channel", "prefix", "citations"),
    *("reasoning_content", "reasoning", "thinking", "tool_plan", "tools", "documents"),
)
"""Keys of a message that chat templates write; by these two messages are compared, not by times or ids.

Templates that write the ids of tool calls do so to link a result to its call, which any id does.
"""


def split_conversations(
    chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """Split two whole conversations into their shared prompt, as `chosen` has it, and the two completions.

    Raises:
        RowError: they have no common prompt.
    """
    shared = 0
    for one, other in zip(chosen[:-1], rejected[:-1], strict=False):
        if one != other and not is_alike([one], [other]):
            break
        shared += 1
    while shared and chosen[shared - 1]["role"] == "assistant":
        shared -= 1
    if not shared:
        raise RowError(
            "no common prompt",
            "`chosen` and `rejected` do not begin alike; give whole conversations in both or only the answers, or "
            "name a conversation with the chosen answer `messages` and a bare answer `rejected_response`",
        )
    return chosen[:shared], chosen[shared:], rejected[shared:]


def is_alike(one: list[Message], other: list[Message]) -> bool:
    """Return whether messages are the same in what a chat template writes, but for blanks around a question."""
    return one == other or [_visible(message) for message in one] == [_visible(message) for message in other]


def _visible(message: Message) -> Message:
    seen = {key: message[key] for key in RENDERED if key in message}
    if isinstance(calls := seen.get("tool_calls"), list):
        seen["tool_calls"] = [call | {"id": None} if isinstance(call, dict) else call for call in calls]
    return seen | {"content": seen["content"].strip()} if seen["role"] in ("system", "user") else seen


def map_roles(row: dict[str, Any], roles: Mapping[str, str]) -> dict[str, Any]:
    """Return a decoded row with the roles of the messages in its columns renamed by `data.roles`."""
    return {column: _map_roles(value, roles) for column, value in row.items()}


def _map_roles(value: Any, roles: Mapping[str, str]) -> Any:
    if isinstance(value, list):
        return [_map_roles(item, roles) for item in value]
    if isinstance(value, dict):
        named = {key: value[key] for key in ("role", "from") if isinstance(value.get(key), str)}
        return {**value, **{key: roles.get(role, role) for key, role in named.items()}}
    return value

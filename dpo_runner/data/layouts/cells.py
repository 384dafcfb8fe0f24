"""The cells of a row whose text is the JSON of what its column holds, decoded."""

import json
from collections.abc import Container, Iterable
from typing import Any

from dpo_runner.data.layouts.columns import PROMPTS, Row
from dpo_runner.data.layouts.messages import ALIASES, parse_json
from dpo_runner.data.layouts.scored import LISTS
from dpo_runner.data.layouts.serialized import WRAPPERS, decode_messages
from dpo_runner.data.layouts.spelling import guess_name
from dpo_runner.errors import RowError

_MESSAGES = {
    *(*PROMPTS, "chosen", "rejected", *WRAPPERS, "system", "system_prompt", "context", "completion"),
    *("response", "response1", "response2", "rejected_response", "rejected_messages"),
}


def decode_cells(row: Row, roles: Iterable[str] = ()) -> Row:
    """Return a row whose messages, lists of answers, scores and turns are no longer JSON text.

    An object of `messages` and `tools` is replaced by its messages; its tools become the row's.

    Args:
        row: its columns may have our names in another spelling.
        roles: names of roles beside the known ones.

    Raises:
        RowError: messages are text in another form than JSON, or two cells bring different tools.
    """
    try:
        return _decode(row, {*ALIASES, *(role.lower() for role in roles)} if roles else ALIASES)
    except RecursionError:
        raise RowError("not JSON", "nested too deeply") from None


def _decode(row: Row, roles: Container[str]) -> Row:
    changed: Row = {}
    tools: dict[str, Any] = {}
    names = {column: guess_name(column) or column for column, value in row.items() if value is not None}
    lists = {"history", *(() if {"chosen", "rejected"} <= {*names.values()} else (*LISTS, "output"))}
    for column, name in names.items():
        value = row[column]
        decoded = value
        if name in _MESSAGES:
            decoded = _decode_messages(value, column, roles)
            if isinstance(decoded, dict) and "role" not in decoded and (wrapper := _find_wrapped(decoded)):
                tools[column] = parse_json(decoded.get("tools"), list, "tools")
                decoded = decoded[wrapper]
        elif name in lists:
            decoded = _decode_list(value, name, roles)
        if decoded is not value:
            changed[column] = decoded
    if tools:
        changed["tools"] = _agree(tools, row.get("tools"))
    return {**row, **changed} if changed else row


def _decode_messages(value: Any, column: str, roles: Container[str]) -> Any:
    if isinstance(value, str):
        return decode_messages(value, column, roles)
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        decoded = [decode_messages(item, column, roles) for item in value]
        return decoded if all(isinstance(item, dict) for item in decoded) else value
    return value


def _find_wrapped(value: dict[str, Any]) -> str | None:
    given = {key for key, item in value.items() if item is not None}
    return next((name for name in WRAPPERS if given <= {name, "tools"} and isinstance(value.get(name), list)), None)


def _agree(tools: dict[str, Any], own: Any) -> Any:
    given = {**tools, "tools": parse_json(own, list, "tools")} if own else tools
    first = next(iter(given))
    for column, value in given.items():
        if value != given[first]:
            raise RowError(
                "two different tools", f"`{first}` and `{column}` bring different tools; a pair has one list"
            )
    return given[first]


def _decode_list(value: Any, column: str, roles: Container[str]) -> Any:
    if isinstance(value, list) and any(isinstance(item, str) for item in value):
        return [_decode_messages(item, column, roles) for item in value]
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        decoded = json.loads(value)
    except (ValueError, RecursionError):
        decoded = None
    if isinstance(decoded, list):
        return value if column == "output" and len(decoded) != 2 else _decode_list(decoded, column, roles)
    if column in LISTS and value.rstrip().endswith("]"):
        raise RowError(
            "not JSON",
            f"`{column}` is a list that is not JSON: {value!r:.60}; write it with json.dumps, or decode it in a "
            "data.formatter",
        )
    return value

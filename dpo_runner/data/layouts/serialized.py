"""Structure that stands as text in a cell or a message: JSON of messages, of tools, of a tool call's arguments."""

import json
import re
from collections.abc import Callable, Container
from typing import Any

from dpo_runner.errors import RowError

_MAY_BE_STRUCTURE = re.compile(r"""\s*(?:[\[({"]|(?:np\.|numpy\.)?array\(|OrderedDict\(|\w{0,40}Message\w{0,40}\()""")
_LOOKS_LIKE_MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](role|from|content|value)["']\s*:""")
"""The beginning of a list of messages as text, as in a CSV file; JSON or not, and perhaps cut short."""
_BRACKETS = re.compile(r"(?:(?:np\.|numpy\.)?array\(|OrderedDict\(|[\[({\s])*")
_KEY = re.compile(r"""['"]\w+['"]\s*[:,]""")
_ROLE = re.compile(r"""['"](?:role|from)['"]\s*[:,]\s*['"](\w+)['"]""")
_CONTENT = re.compile(r"""['"](?:content|value|tool_calls)['"]\s*[:,]""")
_MESSAGE_OBJECT = re.compile(r"\w{0,40}Message\w{0,40}\((?=.*\bcontent=)", re.DOTALL)
_NAMES = {"role", "from", "content", "value"}
WRAPPERS = ("messages", "conversations")
"""The key under which an object, perhaps with `tools` beside it, holds messages."""


class Arguments(dict[str, Any]):
    """The arguments of a tool call, with the JSON text in which they were given."""

    def __init__(self, values: dict[str, Any], text: str | None = None) -> None:
        super().__init__(values)
        self._text = text

    def as_text(self) -> str:
        return json.dumps(self, ensure_ascii=False) if self._text is None else self._text


def decode_messages(text: str, column: str, roles: Container[str]) -> Any:
    """Return the messages that a whole text is the JSON of, else the text itself.

    Args:
        text: a cell.
        column: its name, for messages.
        roles: known names of roles, in lower case.

    Returns:
        A message, a list of messages, an object of `messages` (and `tools`), none of them checked; or `text`.

    Raises:
        RowError: the text is messages in another form: printed by Python, or JSON that is cut short.
    """
    if not _MAY_BE_STRUCTURE.match(text):
        return text
    value: Any = text
    while isinstance(value, str):  # JSON may be encoded twice
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            break
    if isinstance(value, str):
        if _LOOKS_LIKE_MESSAGES.match(value) or _is_printed(value.strip(), roles):
            raise RowError(
                "not a text",
                f"`{column}` holds messages that are not JSON: {text!r:.60}; write them with json.dumps, or decode "
                "them in a data.formatter",
            )
        return text
    return value if _is_messages(value, roles) or _is_wrapper(value, roles) else text


def _is_messages(value: Any, roles: Container[str]) -> bool:
    if not isinstance(value, list):
        return _is_message(value, roles)
    if any(_is_message(item, roles) for item in value):
        return True
    if not value or not all(isinstance(item, dict) for item in value):
        return False
    are_like_messages = all(isinstance(item.get(key), str) for item in value for key in ("role", "content"))
    return are_like_messages or (bool(value[0]) and value[0].keys() <= _NAMES)


def _is_message(value: Any, roles: Container[str]) -> bool:
    """Return whether an object is a message, which may have an unknown role, rather than an answer in JSON."""
    if not isinstance(value, dict):
        return False
    role = value.get("role") or value.get("from")
    if not isinstance(role, str) or not value.keys() & {"content", "value", "tool_calls"}:
        return False
    return role.lower() in roles or (
        value.keys() <= _NAMES and isinstance(value.get("content", value.get("value")), str)
    )


def _is_wrapper(value: Any, roles: Container[str]) -> bool:
    if not isinstance(value, dict) or not value.keys() <= {*WRAPPERS, "tools"}:
        return False
    lists = [value[name] for name in WRAPPERS if name in value]
    return len(lists) == 1 and isinstance(lists[0], list) and _is_messages(lists[0], roles)


def _is_printed(text: str, roles: Container[str]) -> bool:
    """Return whether a whole text is messages as Python or numpy prints them."""
    begin = _BRACKETS.match(text)
    assert begin is not None
    if not text.endswith(("]", "}", ")")):
        return False
    if _MESSAGE_OBJECT.match(text, begin.end()):
        return True
    role = _ROLE.search(text)
    return bool(begin.group() and _KEY.match(text, begin.end()) and role and role.group(1).lower() in roles) and bool(
        _CONTENT.search(text)
    )


def decode_calls(message: dict[str, Any], column: str) -> dict[str, Any]:
    """Return the further keys of a message, with the arguments of its tool calls as `Arguments`.

    Raises:
        RowError: arguments are a text that is not an object's JSON, or `tool_calls` one that is not a list's.
    """
    calls = message.get("tool_calls")
    if isinstance(calls, str):
        calls = _decode(calls, list, column, "tool_calls")
    changed = {"tool_calls": [_decode_call(call, column) for call in calls]} if isinstance(calls, list) else {}
    if isinstance(message.get("function_call"), dict):  # OpenAI's older form
        changed["function_call"] = _decode_call(message["function_call"], column)
    return {**message, **changed} if changed else message


def _decode_call(call: Any, column: str) -> Any:
    if isinstance(call, str):
        call = _decode(call, dict, column, "tool call")
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _decode_call(call["function"], column)}
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        decoded = _decode(arguments, dict, column, "arguments") if arguments.strip() else {}
        return {**call, "arguments": Arguments(decoded, arguments if arguments.strip() else None)}
    return {**call, "arguments": Arguments(arguments)} if isinstance(arguments, dict) else call


def render_calls(render: Callable[[list[dict[str, Any]]], str], messages: list[dict[str, Any]]) -> str:
    """Render messages with the arguments of tool calls as objects, or as JSON texts if the template expects these.

    Templates write `arguments | tojson`, or test whether they are a string; but some join them to a text, which fails
    with an object, or print them, which would show Python's form of it. Servers pass the object that OpenAI's API gives
    as text.
    """
    calls = [call for message in messages for call in _calls_of(message)]
    given = [call["arguments"] for call in calls if isinstance(call.get("arguments"), Arguments)]
    if not given:
        return render(messages)
    as_texts = [_with_texts(message) for message in messages]
    try:
        text = render(messages)
    except Exception as error:
        try:
            return render(as_texts)
        except Exception:
            raise error from None
    return render(as_texts) if any(arguments and str(dict(arguments)) in text for arguments in given) else text


def _calls_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    calls = message.get("tool_calls")
    found = [*(calls if isinstance(calls, list) else []), message.get("function_call")]
    found = [call.get("function", call) if isinstance(call, dict) else call for call in found]
    return [call for call in found if isinstance(call, dict)]


def _with_texts(value: Any) -> Any:
    if isinstance(value, Arguments):
        return value.as_text()
    if isinstance(value, dict):
        return {key: _with_texts(item) for key, item in value.items()}
    return [_with_texts(item) for item in value] if isinstance(value, list) else value


def decode_tool(tool: Any) -> Any:
    """Return a tool definition, given as such or as JSON text; its `function` and `parameters` likewise.

    Raises:
        RowError: one of them is a text, but not the JSON of an object.
    """
    if isinstance(tool, str):
        tool = _decode(tool, dict, "tools", "tools")
    if isinstance(tool, dict):
        for name in ("function", "parameters"):
            part = tool.get(name)
            if isinstance(part, dict) or (isinstance(part, str) and part.lstrip().startswith("{")):
                tool = {**tool, name: decode_tool(part)}
    return tool


def _decode(text: str, kind: type, column: str, part: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, kind):
        due = "a list" if kind is list else "an object"
        raise RowError(f"no usable {part}", f"`{column}`: {text!r:.60} is not the JSON of {due}")
    return value

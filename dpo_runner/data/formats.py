"""From the rows that people have to messages: prompt, chosen and rejected as role/content lists."""

import re
from typing import Any

from dpo_runner.errors import ConfigError

Message = dict[str, str]
ROLES = ("system", "user", "assistant", "tool")

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def to_messages(row: dict[str, Any]) -> dict[str, list[Message]]:
    """Return a preference row as three message lists.

    Accepted are `prompt`, `chosen` and `rejected` as texts or as role/content lists, in any mix; `chosen`
    and `rejected` as whole conversations that share their beginning, with or without `prompt`; and
    Anthropic's HH transcripts. A text stands for one user turn (prompt) or one assistant turn (completion).

    Returns:
        `prompt` (ending with a user or tool turn), `chosen` and `rejected` (assistant turns, at least one).

    Raises:
        ConfigError: a column is missing, empty, or of no known form.
    """
    for column in ("chosen", "rejected"):
        if row.get(column) is None:
            found = ", ".join(key for key, value in row.items() if value is not None)
            raise ConfigError(
                f"no `{column}`: a row needs chosen and rejected, and prompt unless they hold it; has: {found}"
            )
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        chosen, rejected = _parse_transcript(chosen, "chosen"), _parse_transcript(rejected, "rejected")
    chosen = _to_list(chosen, "assistant", "chosen")
    rejected = _to_list(rejected, "assistant", "rejected")
    if chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant":  # whole conversations
        shared = _shared_prefix(chosen, rejected)
        if not shared:
            raise ConfigError(
                "`chosen` and `rejected`: two conversations that do not begin alike have no common prompt"
            )
        messages = {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}
        if prompt is not None and not _is_same_prompt(prompt, messages["prompt"]):
            raise ConfigError("`prompt`: differs from the beginning of `chosen`; give one of them, or the same")
    else:
        if prompt is None:
            raise ConfigError("no `prompt`: chosen and rejected hold answers alone")
        messages = {"prompt": _to_list(prompt, "user", "prompt"), "chosen": chosen, "rejected": rejected}
    if messages["prompt"][-1]["role"] not in ("user", "tool"):
        raise ConfigError(
            f"`prompt`: ends with a turn of `{messages['prompt'][-1]['role']}`; must end with user or tool"
        )
    for column in ("chosen", "rejected"):
        if not messages[column] or messages[column][-1]["role"] != "assistant":
            raise ConfigError(f"`{column}`: must end with an assistant turn after the prompt")
        if any(message["role"] in ("user", "system") for message in messages[column]):
            raise ConfigError(
                f"`{column}`: holds a turn that is not the assistant's after the prompt; it would be learned"
            )
    return messages


def _to_list(value: Any, role: str, column: str) -> list[Message]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise ConfigError(f"`{column}`: must be a text or a list of messages, not {type(value).__name__} {value!r:.60}")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str) or "role" not in message:
            raise ConfigError(f"`{column}`: a message needs `role` and a text `content`; got {message!r:.80}")
        if message["role"] not in ROLES:
            raise ConfigError(f"`{column}`: no such role `{message['role']}`; choose from {', '.join(ROLES)}")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _is_same_prompt(prompt: Any, shared: list[Message]) -> bool:
    """Whether an explicit prompt says the same as a conversation's beginning; a text stands for its user turns."""
    if isinstance(prompt, str):
        return prompt in [message["content"] for message in shared if message["role"] == "user"]
    return _to_list(prompt, "user", "prompt") == shared


def _parse_transcript(text: str, column: str) -> list[Message]:
    parts = _HH_TURN.split(text)
    if len(parts) < 3 or parts[0].strip():
        raise ConfigError(f"no `prompt`, and `{column}` is no transcript of \\n\\nHuman: and \\n\\nAssistant: turns")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": content.strip()}
        for speaker, content in zip(parts[1::2], parts[2::2], strict=True)
    ]


def _shared_prefix(chosen: list[Message], rejected: list[Message]) -> int:
    """Return how many first turns both conversations share, the last assistant turn of each left out."""
    shared = 0
    for one, other in zip(chosen[:-1], rejected[:-1], strict=False):
        if one != other:
            break
        shared += 1
    while shared and chosen[shared - 1]["role"] == "assistant":
        shared -= 1
    return shared

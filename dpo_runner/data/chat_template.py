"""From messages to token ids, exactly as the tokenizer's own chat template has it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_runner.data.formats import Message, to_messages
from dpo_runner.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT_TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
        "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "zephyr": (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    ),
}
"""Templates for models whose tokenizer has none (`model.chat_template`)."""


def resolve_chat_template(name: str) -> str:
    """Return the Jinja text that `model.chat_template` names.

    Raises:
        ConfigError: it is neither the name of a template nor a readable file.
    """
    if name in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[name]
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        known = ", ".join(CHAT_TEMPLATES)
        raise ConfigError(f"`model.chat_template={name}`: {error.strerror}; use a file, or one of {known}") from None


def apply_chat_template(row: dict[str, Any], tokenizer: "PreTrainedTokenizerBase") -> dict[str, list[int]]:
    """Tokenize a preference row: the conversation is rendered and tokenized once and split by position.

    Args:
        row: `prompt`, `chosen` and `rejected` in any form that `to_messages` takes.
        tokenizer: with a chat template; without one, a row of single turns is taken as plain text.

    Returns:
        `prompt_ids`, `chosen_ids` and `rejected_ids`. prompt_ids begin with exactly one BOS where the tokenizer
        uses one and end with the generation prompt; each completion holds exactly one end-of-turn token per
        assistant turn; prompt_ids + chosen_ids are the tokens of the whole conversation.

    Raises:
        ConfigError: the row has no known form, or the template breaks one of these promises.
    """
    messages = to_messages(row)
    prompt_ids = _render(messages["prompt"], tokenizer, generation_prompt=True)
    ids = {"prompt_ids": prompt_ids}
    for column in ("chosen", "rejected"):
        whole = _render(messages["prompt"] + messages[column], tokenizer)
        if whole[: len(prompt_ids)] != prompt_ids:
            at = next(i for i, token in enumerate(prompt_ids) if whole[i : i + 1] != [token])
            raise ConfigError(
                f"`{column}`: the prompt becomes other tokens before an answer than alone, "
                f"from token {at} on: {tokenizer.decode(prompt_ids[at:])!r:.60} became "
                f"{tokenizer.decode(whole[at : len(prompt_ids) + 4])!r:.60}"
            )
        ids[f"{column}_ids"] = _close(whole[len(prompt_ids) :], messages[column], column, tokenizer)
    return ids


def render_prompt(prompt: list[Message], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the token ids of a prompt that ends with the generation prompt, as `apply_chat_template` has them."""
    return _render(prompt, tokenizer, generation_prompt=True)


def _render(
    messages: list[Message], tokenizer: "PreTrainedTokenizerBase", generation_prompt: bool = False
) -> list[int]:
    if tokenizer.chat_template is None:
        if any(message["role"] not in ("user", "assistant") for message in messages) or len(messages) > 2:
            raise ConfigError(
                "the tokenizer has no chat template, which a conversation needs; set model.chat_template=chatml, "
                "zephyr or a Jinja file"
            )
        text = "".join(message["content"] for message in messages)
    else:
        try:
            rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)
        except Exception as error:  # a template's own raise_exception, or a Jinja error: it concerns this row
            raise ConfigError(f"the chat template refuses the row: {error}") from None
        text = str(rendered)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] and ids[:1] != [bos]:
        ids = [bos, *ids]
    if bos is not None and ids[:2] == [bos, bos]:
        raise ConfigError(f"`prompt`: begins with {tokenizer.bos_token} twice; the text must not hold it, it is added")
    return ids


def _close(ids: list[int], messages: list[Message], column: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Make sure that a completion's turns are closed: exactly one end-of-turn token each."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ConfigError("the tokenizer has no EOS token, so a model could not learn where an answer ends")
    turns = sum(message["role"] == "assistant" for message in messages)
    if len(messages) == turns and ids.count(eos) > turns:
        raise ConfigError(f"`{column}`: the text holds the end-of-turn token {tokenizer.eos_token} itself; it is added")
    if not any(token == eos or token in tokenizer.all_special_ids for token in ids[-2:]):
        ids = [*ids, eos]  # plain text, or a template that leaves the last turn open
    return ids

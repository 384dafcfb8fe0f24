"""Rendering of messages with a chat template, and built-in templates for models without one."""

import functools
import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_runner.data.layouts.messages import Message, Pair
from dpo_runner.data.layouts.serialized import decode_calls, render_calls
from dpo_runner.errors import ConfigError, RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_PROBE = "Zq7pxv"
"""A text that no template contains."""


@dataclass(slots=True)
class Rendered:
    """One pair as text: the prompt including the generation prompt, and both whole conversations."""

    prompt: str
    chosen: str
    rejected: str


class Renderer:
    """A tokenizer's chat template.

    Args:
        tokenizer: with the template; without one, a single question and its answer are joined as plain text.
        system_prompt: system turn for conversations without one.
        on_no_system_role: if the template has no system role, `fold` system turns into the first user turn or `error`.

    Attributes:
        knows_system: whether the template renders a system turn.
        generation_prompt: text that the template adds at the end of a prompt.
        ending: text that the template adds after an answer.

    Raises:
        ConfigError: the template cannot render one question and answer, or the system prompt holds a control token.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", system_prompt: str | None = None, on_no_system_role: str = "fold"
    ) -> None:
        self.tokenizer = tokenizer
        self._system_prompt, self._on_no_system_role = system_prompt, on_no_system_role
        self._control = any_of(tokenizer.convert_ids_to_tokens(sorted(find_special_ids(tokenizer))))
        if found := self._control.search(system_prompt or ""):
            raise ConfigError(
                f"`data.system_prompt`: holds the control token {found.group()!r}, which would be encoded as such; "
                "leave it out, the chat template writes those it needs"
            )
        self.knows_system, self.generation_prompt, self.ending = False, "", ""
        if tokenizer.chat_template is not None:
            self._probe()

    def describe_system_role(self) -> list[str]:
        """Return a line on the treatment of system turns if the template has no system role, else none."""
        if self.knows_system or self.tokenizer.chat_template is None:
            return []
        then = "folded into the first user turn" if self._on_no_system_role == "fold" else "refused"
        return [f"has no system role: a system turn is {then}"]

    def render_prompt(self, messages: list[Message], variables: dict[str, Any]) -> str:
        """Return the text of a prompt, including the generation prompt.

        Raises:
            RowError: the template refuses the prompt.
        """
        messages = [decode_calls(message, "prompt") for message in messages]  # read from a file, they are plain JSON
        return self._render(self._place_system(messages), True, variables)

    def _place_system(self, prompt: list[Message]) -> list[Message]:
        """Add the configured system turn if there is none; without a system role, fold it, or leave it out if blank.

        A template with a system role may write another text without a system turn, so there a blank turn stays.
        """
        if self._system_prompt is not None and prompt[0]["role"] != "system":
            prompt = [{"role": "system", "content": self._system_prompt}, *prompt]
        if self.knows_system or prompt[0]["role"] != "system":
            return prompt
        if not prompt[0]["content"].strip():
            return prompt[1:]
        if self.tokenizer.chat_template is None:
            return prompt
        if self._on_no_system_role == "error":
            raise RowError(
                "system turn", "the chat template has no system role; data.on_no_system_role=fold folds the turn"
            )
        system, first, *rest = prompt
        return [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest]

    def render_pair(self, pair: Pair) -> Rendered:
        """Render the three texts of a pair.

        Raises:
            RowError: the template refuses the pair, or it has control tokens in its text.
        """
        for column, messages in (("prompt", pair.prompt), ("chosen", pair.chosen), ("rejected", pair.rejected)):
            for message in messages:
                self._refuse_control(message["content"] if len(message) == 2 else message, column)
        for column, value in (("tools", pair.tools), ("chat_template_kwargs", pair.chat_template_kwargs)):
            if value:
                self._refuse_control(value, column)
        prompt = self._place_system(pair.prompt)
        variables = dict(pair.chat_template_kwargs or {})
        if pair.tools:
            variables["tools"] = pair.tools
        return Rendered(
            self._render(prompt, True, variables),
            self._render(prompt + pair.chosen, False, variables),
            self._render(prompt + pair.rejected, False, variables),
        )

    def _refuse_control(self, value: Any, column: str) -> None:
        """Raise a RowError if a text, or one anywhere in a JSON value, holds a control token."""
        if isinstance(value, str):
            if found := self._control.search(value):
                raise RowError("control token in the text", f"`{column}` holds {found.group()!r}")
        elif isinstance(value, (dict, list)):
            for item in itertools.chain(value, value.values()) if isinstance(value, dict) else value:
                self._refuse_control(item, column)

    def _render(self, messages: list[Message], generation_prompt: bool, variables: dict[str, Any]) -> str:
        if self.tokenizer.chat_template is None:
            if any(message["role"] not in ("user", "assistant") for message in messages) or len(messages) > 2:
                raise RowError(
                    "no chat template",
                    "a conversation needs one; set model.chat_template=chatml, zephyr, llama3 or a Jinja file",
                )
            return "".join(message["content"] for message in messages)
        try:
            apply = functools.partial(
                self.tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=generation_prompt, **variables
            )
            return render_calls(lambda given: str(apply(given)), messages)
        except Exception as error:  # raise_exception of the template, or a Jinja error: it affects this row only
            raise RowError("the chat template refuses the row", str(error)) from None

    def _probe(self) -> None:
        question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}
        try:
            alone, prompt = self._render([question], False, {}), self._render([question], True, {})
            whole = self._render([question, answer], False, {})
        except RowError as error:
            raise ConfigError(f"the chat template cannot render one question and answer: {error.detail}") from None
        if _PROBE not in whole:
            raise ConfigError("the chat template leaves out the answer")
        self.generation_prompt = prompt.removeprefix(alone) if prompt.startswith(alone) else ""
        self.ending = whole.rpartition(_PROBE)[2]
        try:
            self.knows_system = _PROBE in self._render([{"role": "system", "content": _PROBE}, question], True, {})
        except RowError:
            self.knows_system = False


def find_special_ids(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Return the ids of all special tokens: BOS, EOS etc., and those added for a chat template."""
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(token_id for token_id, token in added if token.special)}


def any_of(tokens: Iterable[str]) -> "re.Pattern[str]":
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


CHAT_TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
        "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "zephyr": (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim }}"
        "{{ '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "hh": (  # the dialogues of Anthropic/hh-rlhf, as the DPO paper's code reads them
        "{% for message in messages if message['role'] != 'system' %}"
        "{{ '\\n\\nHuman: ' if message['role'] == 'user' else '\\n\\nAssistant: ' }}{{ message['content'] }}"
        "{% if loop.last and message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
    ),
}


def resolve_chat_template(name: str) -> str:
    """Return the Jinja text for `model.chat_template`, a built-in name or a file.

    Raises:
        ConfigError: the value is neither a built-in name nor a readable file.
    """
    if name in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[name]
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        known = ", ".join(CHAT_TEMPLATES)
        raise ConfigError(f"`model.chat_template={name}`: {error.strerror}; use a file, or one of {known}") from None

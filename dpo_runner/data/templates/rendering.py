"""Messages as text by a chat template; templates for models that have none."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_runner.data.layouts.messages import Message, Pair
from dpo_runner.errors import ConfigError, RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_PROBE = "Zq7pxv"
"""A text that no template writes by itself."""


@dataclass(slots=True)
class Rendered:
    """One pair as texts: the prompt up to its generation prompt, and both whole conversations."""

    prompt: str
    chosen: str
    rejected: str


class Renderer:
    """A tokenizer's chat template.

    Args:
        tokenizer: with the template; without one, a single question and its answer are joined as plain text.
        system_prompt: the system turn for conversations that have none.
        on_no_system_role: `fold` a system turn into the first user turn where the template knows none, or `error`.

    Attributes:
        knows_system: whether the template renders a system turn.
        generation_prompt: what it writes at a prompt's end for the model to go on from.
        ending: what it writes after an answer.

    Raises:
        ConfigError: the template cannot render one question and answer.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", system_prompt: str | None = None, on_no_system_role: str = "fold"
    ) -> None:
        self.tokenizer = tokenizer
        self._system_prompt, self._on_no_system_role = system_prompt, on_no_system_role
        self._control = any_of(tokenizer.convert_ids_to_tokens(sorted(find_special_ids(tokenizer))))
        self.knows_system, self.generation_prompt, self.ending = False, "", ""
        if tokenizer.chat_template is not None:
            self._probe()

    def describe_system_role(self) -> list[str]:
        """Return what becomes of system turns where the template knows none, as a line; else no line."""
        if self.knows_system or self.tokenizer.chat_template is None:
            return []
        then = "folded into the first user turn" if self._on_no_system_role == "fold" else "refused"
        return [f"knows no system role: a system turn is {then}"]

    def render_prompt(self, messages: list[Message], variables: dict[str, Any]) -> str:
        """Return a prompt's text with the generation prompt.

        Raises:
            RowError: the template refuses it.
        """
        return self._render(self._place_system(messages), True, variables)

    def _place_system(self, prompt: list[Message]) -> list[Message]:
        """Add the system turn that is missing, and fold one that the template does not know."""
        if self._system_prompt is not None and prompt[0]["role"] != "system":
            prompt = [{"role": "system", "content": self._system_prompt}, *prompt]
        if self.knows_system or prompt[0]["role"] != "system" or self.tokenizer.chat_template is None:
            return prompt
        if self._on_no_system_role == "error":
            raise RowError(
                "system turn", "the chat template knows no system role; data.on_no_system_role=fold folds it"
            )
        system, first, *rest = prompt
        return [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest]

    def render_pair(self, pair: Pair) -> Rendered:
        """Return a pair's three texts.

        Raises:
            RowError: the template refuses it, or it holds control tokens as text.
        """
        for column, messages in (("prompt", pair.prompt), ("chosen", pair.chosen), ("rejected", pair.rejected)):
            for message in messages:
                found = self._control.search(message["content"])
                if found:
                    raise RowError("control token in the text", f"`{column}` holds {found.group()!r}")
        prompt = self._place_system(pair.prompt)
        variables = dict(pair.chat_template_kwargs or {})
        if pair.tools:
            variables["tools"] = pair.tools
        return Rendered(
            self._render(prompt, True, variables),
            self._render(prompt + pair.chosen, False, variables),
            self._render(prompt + pair.rejected, False, variables),
        )

    def _render(self, messages: list[Message], generation_prompt: bool, variables: dict[str, Any]) -> str:
        if self.tokenizer.chat_template is None:
            if any(message["role"] not in ("user", "assistant") for message in messages) or len(messages) > 2:
                raise RowError(
                    "no chat template",
                    "a conversation needs one; set model.chat_template=chatml, zephyr, llama3 or a Jinja file",
                )
            return "".join(message["content"] for message in messages)
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=generation_prompt, **variables
                )
            )
        except Exception as error:  # a template's own raise_exception, or a Jinja error: it concerns this row
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
    """Return the ids of all special tokens: of BOS, EOS and such, and of a chat template's own."""
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
}


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

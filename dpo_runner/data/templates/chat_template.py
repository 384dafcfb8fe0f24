"""Tokenization of pairs with the tokenizer's chat template.

Each row has one BOS if the tokenizer uses one, the generation prompt once, and each answer closed once;
prompt_ids + completion_ids are the tokens of the whole conversation, tokenized as one text and split by position.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dpo_runner.data.layouts.cells import decode_cells
from dpo_runner.data.layouts.formats import find_layout, read_pairs
from dpo_runner.data.layouts.messages import Message, Pair
from dpo_runner.data.templates.rendering import Rendered, Renderer, any_of, find_special_ids
from dpo_runner.errors import ConfigError, DpoRunnerError, RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = list[int]

_NEAR_END = 256
"""Characters at the end of a prompt that are searched for its last control token."""


@dataclass(slots=True)
class Encoded:
    """One pair as token ids.

    Attributes:
        prompt_ids: BOS to generation prompt.
        chosen_ids, rejected_ids: the completions, closed.
        mismatch: empty, or a description of the differing tokens if the prompt is tokenized differently before an
            answer than alone; prompt_ids are then the common prefix.
    """

    prompt_ids: Ids
    chosen_ids: Ids
    rejected_ids: Ids
    mismatch: str = ""


class ChatTemplate:
    """A tokenizer and the properties of its chat template, found once by rendering a few conversations.

    Args:
        tokenizer: with a chat template; without one, single turns are used as plain text.
        system_prompt: system turn for conversations without one.
        on_no_system_role: if the template has no system role, `fold` system turns into the first user turn or `error`.

    Attributes:
        bos: id of the BOS token that rows begin with, or None.
        eos: id of the tokenizer's EOS token.
        end_of_turn: id of the token with which the template closes an answer; None if it leaves answers open.
        generation_prompt_length: length of the template's generation prompt, in tokens.

    Raises:
        ConfigError: the tokenizer has no EOS token, or the template cannot render one question and answer.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        system_prompt: str | None = None,
        on_no_system_role: str = "fold",
    ) -> None:
        self.tokenizer = tokenizer
        self._renderer = Renderer(tokenizer, system_prompt, on_no_system_role)
        if tokenizer.eos_token_id is None:
            raise ConfigError("the tokenizer has no EOS token, so a model could not learn where an answer ends")
        self.eos: int = tokenizer.eos_token_id
        bos = tokenizer.bos_token_id
        self.bos: int | None = bos if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None
        added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
        # Tokenizers always split at these tokens: the text before and after can be tokenized separately.
        self._marks = any_of(
            token
            for token, kind in added.items()
            if kind.special and not kind.normalized and not kind.single_word
            if not any(token in other for other in added if other != token)
        )
        self._tails: dict[tuple[str, str], Ids] = {}
        special = find_special_ids(tokenizer)
        self.end_of_turn = next((i for i in self._tokenize([self._renderer.ending])[0] if i in special), None)
        self.generation_prompt_length = len(self._tokenize([self._renderer.generation_prompt])[0])

    def describe(self) -> list[str]:
        """Return the properties of the template that matter to the user, one line each."""
        name = self.tokenizer.convert_ids_to_tokens
        if self.tokenizer.chat_template is None:
            return [f"none: prompt and answer are joined as plain text, {name(self.eos)} is added"]
        notes = []
        if self.end_of_turn is None:
            notes.append(f"leaves an answer open, so {name(self.eos)} is added")
        elif self.end_of_turn != self.eos:
            notes.append(f"ends an answer with {name(self.end_of_turn)}, not with the tokenizer's EOS {name(self.eos)}")
        else:
            notes.append(f"ends an answer with {name(self.eos)}")
        if "strftime_now" in str(self.tokenizer.chat_template):
            notes.append("writes the date of tokenization into the rows")
        return notes + self._renderer.describe_system_role()

    def encode(self, pair: Pair) -> Encoded:
        """Tokenize one pair, each of its three texts as a whole.

        Raises:
            RowError: the template refuses the pair, or it has control tokens in its text.
        """
        texts = self._renderer.render_pair(pair)
        prompt, chosen, rejected = self._tokenize([texts.prompt, texts.chosen, texts.rejected])
        return self._split(pair, self._with_bos(prompt), self._with_bos(chosen), self._with_bos(rejected))

    def encode_batch(self, pairs: Sequence[Pair]) -> list[Encoded | RowError]:
        """Tokenize many pairs with the same result as `encode`, but each prompt once instead of three times.

        A prompt ends with control tokens (its generation prompt), and tokenizers split a text at these first. So the
        tokens up to the last control token, shared by all three texts, do not depend on the text after it.

        Raises:
            DpoRunnerError: the tokenizer violates this assumption.
        """
        results: list[Encoded | RowError | None] = [None] * len(pairs)
        shared: list[tuple[int, Rendered, int, str]] = []
        texts: list[str] = []
        for index, pair in enumerate(pairs):
            try:
                rendered = self._renderer.render_pair(pair)
            except RowError as error:
                results[index] = error
                continue
            prompt, mark = rendered.prompt, self._find_last_mark(rendered.prompt)
            if mark is None or not rendered.chosen.startswith(prompt) or not rendered.rejected.startswith(prompt):
                results[index] = self._attempt(pair)
                continue
            end, token = mark.end(), mark.group()
            shared.append((index, rendered, end, token))
            texts += [prompt[:end], token + rendered.chosen[end:], token + rendered.rejected[end:]]
        ids = iter(self._tokenize(texts))
        checked = False
        for index, rendered, end, token in shared:
            head, chosen, rejected = self._with_bos(next(ids)), next(ids)[1:], next(ids)[1:]
            tail = self._tokenize_tail(token, rendered.prompt[end:])
            try:
                results[index] = self._split(pairs[index], head + tail, head + chosen, head + rejected)
            except RowError as error:
                results[index] = error
            if not checked:
                self._check_sharing(pairs[index], results[index])
                checked = True
        return [result for result in results if result is not None]

    def render_prompt(self, messages: list[Message], **variables: Any) -> Ids:
        """Return the token ids of a prompt that ends with the generation prompt."""
        return self._with_bos(self._tokenize([self._renderer.render_prompt(messages, variables)])[0])

    def _attempt(self, pair: Pair) -> Encoded | RowError:
        try:
            return self.encode(pair)
        except RowError as error:
            return error

    def _check_sharing(self, pair: Pair, shared: Encoded | RowError | None) -> None:
        alone = self._attempt(pair)
        if str(alone) != str(shared):
            raise DpoRunnerError(
                f"the tokenizer {type(self.tokenizer).__name__} tokenizes a prompt in parts differently; "
                f"please report this: {pair.prompt!r:.200}"
            )

    def _find_last_mark(self, prompt: str) -> "re.Match[str] | None":
        last = None
        for match in self._marks.finditer(prompt, max(0, len(prompt) - _NEAR_END)):
            last = match
        return last

    def _tokenize_tail(self, token: str, text: str) -> Ids:
        """Tokenize the text after a prompt's last control token, cached: nearly all rows share it."""
        if (token, text) not in self._tails:
            if len(self._tails) > 1000:
                self._tails.clear()
            self._tails[token, text] = self._tokenize([token + text])[0][1:]
        return self._tails[token, text]

    def _tokenize(self, texts: list[str]) -> list[Ids]:
        if not texts:
            return []
        if self.tokenizer.is_fast:  # without offsets and attention masks
            encodings = self.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            return [encoding.ids for encoding in encodings]
        return [list(ids) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]

    def _with_bos(self, ids: Ids) -> Ids:
        if self.bos is None:
            return ids
        if ids[:2] == [self.bos, self.bos]:
            raise RowError("BOS twice", f"the chat template writes {self.tokenizer.bos_token} twice")
        return ids if ids[:1] == [self.bos] else [self.bos, *ids]

    def _split(self, pair: Pair, prompt: Ids, chosen: Ids, rejected: Ids) -> Encoded:
        """Split two conversations at the end of the prompt, and check that each answer is closed once."""
        length, mismatch = len(prompt), ""
        if chosen[:length] != prompt or rejected[:length] != prompt:
            other = chosen if chosen[:length] != prompt else rejected
            length = min(_common_prefix(prompt, chosen), _common_prefix(prompt, rejected))
            if length == 0:
                raise RowError("template mismatch", "prompt and conversation have no token in common")
            mismatch = (
                f"from token {length} on, {self.tokenizer.decode(prompt[length:])!r:.60} became "
                f"{self.tokenizer.decode(other[length : len(prompt) + 4])!r:.60}"
            )
        encoded = Encoded(
            prompt[:length],
            self._close(chosen[length:], pair.chosen, "chosen"),
            self._close(rejected[length:], pair.rejected, "rejected"),
            mismatch,
        )
        if encoded.chosen_ids == encoded.rejected_ids:
            raise RowError("chosen equals rejected", "once they are rendered")
        return encoded

    def _close(self, ids: Ids, messages: list[Message], column: str) -> Ids:
        if self.end_of_turn is None:
            return [*ids, self.eos]
        turns = sum(message["role"] == "assistant" for message in messages)
        closed = ids.count(self.end_of_turn)
        if closed < turns or (turns == len(messages) and closed > turns):
            token = self.tokenizer.convert_ids_to_tokens(self.end_of_turn)
            raise RowError("answer not closed once", f"`{column}` has {closed} of {token} for {turns} answers")
        return ids


def _common_prefix(one: Ids, other: Ids) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def apply_chat_template(
    row: dict[str, Any],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    format: str = "auto",
    system_prompt: str | None = None,
    on_no_system_role: str = "fold",
    on_template_mismatch: str = "error",
) -> dict[str, Ids]:
    """Tokenize one preference row as a run would.

    Args:
        row: in any known layout of `data.format`; only its first pair is used.
        tokenizer: with the chat template to apply; without one, a row of single turns is used as plain text.
        format, system_prompt, on_no_system_role, on_template_mismatch: as in the `data` group.

    Returns:
        `prompt_ids`, `chosen_ids` and `rejected_ids`. prompt_ids begin with exactly one BOS if the tokenizer uses
        one and end with the generation prompt; each completion has exactly one end-of-turn token per assistant turn;
        prompt_ids + chosen_ids are the tokens of the whole conversation (plus EOS if the template leaves an answer
        open).

    Raises:
        ConfigError: the row has no known layout, cannot be used, or the template breaks one of these guarantees.
    """
    row = decode_cells(row)
    pairs = read_pairs(row, find_layout([row], format), "best_vs_worst")
    if not pairs:
        raise RowError("no pair", "all answers have the same score")
    encoded = ChatTemplate(tokenizer, system_prompt, on_no_system_role).encode(pairs[0])
    if encoded.mismatch and on_template_mismatch == "error":
        raise RowError("template mismatch", describe_mismatch(encoded.mismatch))
    return {"prompt_ids": encoded.prompt_ids, "chosen_ids": encoded.chosen_ids, "rejected_ids": encoded.rejected_ids}


def describe_mismatch(mismatch: str) -> str:
    """Return the error message for an `Encoded.mismatch`, with its remedy."""
    return (
        f"the prompt is tokenized differently before an answer than alone: {mismatch}; "
        "data.on_template_mismatch=longest_common_prefix uses the common prefix as the prompt"
    )

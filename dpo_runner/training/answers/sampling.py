"""Sampling of several answers to each prompt, with one pass over the prompt and the KV cache."""

import copy
import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_runner.errors import RunError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_LIKELY = 1024
"""Tokens that are sorted first for `top_p`; if their probabilities do not add up to it, all are."""
_SELECTABLE = {"DynamicLayer", "DynamicSlidingWindowLayer", "DynamicIndexedLayer", "DummyLayer"}
"""transformers' cache layers whose rows can be repeated and selected. Their subclasses may have further states."""
_WORTH_SHRINKING = 0.25
"""Share of ended rows from which on they are taken out of the batch, which copies the cache."""


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling.

    Attributes:
        max_new_tokens: length limit of an answer in tokens.
        temperature: 0 is greedy.
        top_p: the most probable tokens with this sum of probabilities are sampled from.
        stop: texts that end an answer.
        decode: returns the text of token ids; needed for `stop`.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    decode: Callable[[list[int]], str] | None = None

    def is_stopped(self, ids: list[int]) -> bool:
        """Return whether an answer that has just grown by a token ends with one of the texts, or with more."""
        if not self.stop or self.decode is None:
            return False
        text = self.decode(ids[-max(map(len, self.stop)) - 8 :])
        return any(stop in text for stop in self.stop)


def sample_answers(
    model: "PreTrainedModel",
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    sampling: Sampling,
    stop_ids: Sequence[int],
    pad_id: int,
    common: int = 0,
) -> list[list[list[int]]]:
    """Sample answers to a batch of prompts from the model's own distribution.

    `generate` would apply the model's published generation config (top_k, a repetition penalty, …). Each answer has
    its own random numbers, so it does not depend on its batch, up to rounding. Prompts go through the model once, and
    rows that have ended leave the batch, except with linear attention.

    Args:
        model: in evaluation mode.
        prompts: the tokens of each prompt.
        seeds: for each prompt one seed per answer, from 0 up to 2**63; equally many for all prompts.
        sampling: the settings.
        stop_ids: tokens that end an answer.
        pad_id: any token.
        common: tokens that all prompts begin with, fewer than any has, to go through the model once. Must be 0 if it
            counts distances by places in the cache.

    Returns:
        For each prompt its answers' tokens, a stop token included.
    """
    import torch

    count, device = len(seeds[0]), model.device
    answers: list[list[int]] = [[] for _ in range(len(prompts) * count)]
    draws = np.stack([np.random.default_rng(seed).random(sampling.max_new_tokens) for row in seeds for seed in row])
    rows = list(range(len(answers)))  # of the batch, by their answers
    ended = [False] * len(answers)
    with torch.no_grad():
        selects = can_select(_base_of(model))
        if selects:
            logits, cache, mask = _read_each_once(model, prompts, count, pad_id, common)
        else:
            logits, cache, mask = read_prompts(model, [ids for ids in prompts for _ in range(count)], pad_id)
        position = mask.sum(dim=1, keepdim=True) - 1
        for step in range(sampling.max_new_tokens):
            drawn = torch.tensor(draws[rows, step], device=device)
            ids = choose_tokens(logits, drawn, sampling.temperature, sampling.top_p)[:, None]
            for row, token in zip(rows, ids[:, 0].tolist(), strict=True):
                if not ended[row]:
                    answers[row].append(token)
                    ended[row] = token in stop_ids or sampling.is_stopped(answers[row])
            going = [at for at, row in enumerate(rows) if not ended[row]]
            if not going or step + 1 == sampling.max_new_tokens:
                break
            if selects and len(rows) - len(going) >= max(1, _WORTH_SHRINKING * len(rows)):
                kept = torch.tensor(going)  # on the CPU, since layers may be on several devices
                cache.batch_select_indices(kept)
                ids, mask, position = ids[kept], mask[kept], position[kept]
                rows = [rows[at] for at in going]
            mask, position = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1), position + 1
            logits, cache = _forward(model, ids, mask, position, cache)
    return [answers[start : start + count] for start in range(0, len(answers), count)]


def find_cache_layers(base: "PreTrainedModel") -> set[str]:
    """Return the classes of the layers of a model's KV cache; an empty set if it keeps none, or another one."""
    from transformers import DynamicCache

    if "past_key_values" not in inspect.signature(base.forward).parameters:
        return set()
    try:
        return {type(layer).__name__ for layer in DynamicCache(config=base.config).layers}
    except (KeyError, AttributeError, ValueError):  # layers that transformers does not know
        return set()


def can_select(base: "PreTrainedModel") -> bool:
    """Return whether rows of a model's cache can be repeated and selected; states of linear attention cannot."""
    return bool(layers := find_cache_layers(base)) and layers <= _SELECTABLE


def _read_each_once(model: Any, prompts: Sequence[Sequence[int]], count: int, pad_id: int, common: int) -> Any:
    """Return what `read_prompts` does, each row `count` times."""
    start = read_prompts(model, [prompts[0][:common]], pad_id)[1] if common else None
    logits, cache, mask = read_prompts(model, [ids[common:] for ids in prompts], pad_id, start, common)
    if count > 1:
        cache.batch_repeat_interleave(count)
    return logits.repeat_interleave(count, dim=0), cache, mask.repeat_interleave(count, dim=0)


def read_prompts(
    model: Any, prompts: Sequence[Sequence[int]], pad_id: int, start: Any = None, before: int = 0
) -> "tuple[torch.Tensor, Any, torch.Tensor]":
    """Put prompts through the model once, padded on the left.

    Args:
        model: in evaluation mode.
        prompts: the tokens of each prompt, or what follows the tokens in `start`.
        pad_id: any token.
        start: the KV cache of what all prompts begin with, with one row; it is left as it is.
        before: the number of its tokens.

    Returns:
        The logits after each prompt, shape [rows, vocabulary]; the KV cache; the attention mask, with the tokens of
        `start`.

    Raises:
        RunError: the model keeps no KV cache.
    """
    import torch

    width, device = max(map(len, prompts)), model.device
    cache = copy.deepcopy(start)
    if cache is not None and len(prompts) > 1:
        cache.batch_repeat_interleave(len(prompts))
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in prompts], device=device)
    own = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=device)
    mask = torch.cat([own.new_ones(len(prompts), before), own], dim=1)
    position = before + (own.cumsum(dim=1) - 1).clamp(min=0)
    known = inspect.signature(_base_of(model).forward).parameters
    if "past_key_values" not in known:
        raise RunError(
            f"answers cannot be sampled from {type(_base_of(model)).__name__}, which keeps no `past_key_values`; leave "
            "out samples.reward, rounds and `python -m dpo_runner.generate`"
        )
    last = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    return *_forward(model, ids, mask, position, cache, **last), mask


def _base_of(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _forward(model: Any, ids: Any, mask: Any, position: Any, cache: Any, **settings: Any) -> tuple[Any, Any]:
    """Return the logits of the last position, and the cache."""
    output = model(
        input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True, **settings
    )
    return output.logits[:, -1], output.past_key_values


def choose_tokens(logits: "torch.Tensor", draws: "torch.Tensor", temperature: float, top_p: float) -> "torch.Tensor":
    """Return a token for each row: the most probable one, or one by inverse transform sampling.

    Args:
        logits: shape [rows, vocabulary].
        draws: uniform random numbers in [0, 1), float64, shape [rows].
        temperature: 0 is greedy.
        top_p: as transformers' TopPLogitsWarper has it.

    Returns:
        Token ids, shape [rows].
    """
    import torch

    if temperature == 0:
        return logits.float().argmax(dim=-1)
    probabilities = torch.softmax(logits.double() / temperature, dim=-1)  # so that rare tokens keep their probability
    if top_p >= 1:
        cumulated = probabilities.cumsum(dim=-1)
        drawn = draws[:, None] * cumulated[:, -1:]
        return torch.searchsorted(cumulated, drawn, right=True).clamp(max=cumulated.shape[1] - 1)[:, 0]
    size = probabilities.shape[1]
    ordered, tokens = probabilities.topk(min(_LIKELY, size), dim=-1)
    if size > _LIKELY and bool((ordered.sum(dim=-1) < top_p).any()):
        ordered, tokens = probabilities.sort(dim=-1, descending=True)
    cumulated = ordered.cumsum(dim=-1)
    kept = (cumulated - ordered < top_p).sum(dim=-1, keepdim=True)  # the first that reach top_p
    drawn = draws[:, None] * cumulated.gather(1, kept - 1)
    place = torch.searchsorted(cumulated, drawn, right=True)
    return tokens.gather(1, torch.minimum(place, kept - 1))[:, 0]


def derive_seed(*parts: Any) -> int:
    """Return a seed below 2**56 that differs for all other parts, such as a run's seed and the number of a sample."""
    text = " ".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")

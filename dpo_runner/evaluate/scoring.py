"""Log-probabilities of completions and samples, from a policy and its reference."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass
class Compared:
    """A policy and its reference.

    Attributes:
        policy: the tuned model, in evaluation mode.
        own: the reference if it is a separate model; None otherwise.
        adapter: if `own` is None, the adapter of `policy` that gives the reference; None for `policy` without adapter.
        autocast: the autocast dtype of the run's own scoring; None without autocast.
    """

    policy: "PreTrainedModel"
    own: "PreTrainedModel | None" = None
    adapter: str | None = None
    autocast: "torch.dtype | None" = None

    @contextmanager
    def reference(self) -> "Iterator[PreTrainedModel]":
        """Yield the reference; `policy` is restored afterwards."""
        from dpo_runner.model.result import switched

        if self.own is not None:
            yield self.own
            return
        with switched(self.policy, self.adapter):
            yield self.policy

    def as_in_the_run(self) -> AbstractContextManager[None]:
        """Return the autocast context of the run's own scoring."""
        from dpo_runner.training.engine.precision import autocast

        return autocast(self.policy.device, self.autocast)


def score_completions(
    model: "PreTrainedModel", rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int
) -> list[float]:
    """Return log pi(y|x) of each row in nats, summed over the completion's tokens (DPO paper, arXiv 2305.18290, Eq. 7).

    Args:
        model: in evaluation mode.
        rows: prompt and completion tokens; scored as one right-padded batch of shape [rows, longest].
        pad_id: any token; padding is masked.

    Returns:
        One sum per row. The softmax is computed in float32, whatever the model's dtype.
    """
    import torch

    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids = torch.full((len(rows), width), pad_id, device=model.device)
    mask = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(rows):
        length = len(prompt) + len(completion)
        ids[row, :length] = torch.tensor([*prompt, *completion], device=model.device)
        mask[row, :length] = 1
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        sums = []
        for row, (prompt, completion) in enumerate(rows):  # row by row: all float32 logits would set the memory peak
            first, end = len(prompt), len(prompt) + len(completion)
            logps = torch.log_softmax(logits[row, first - 1 : end - 1].float(), dim=-1)
            chosen = logps.gather(1, ids[row, first:end].unsqueeze(1))
            sums.append(chosen.double().sum().item())
    return sums


def sample_completions(
    model: "PreTrainedModel",
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
) -> list[list[int]]:
    """Sample one completion of each prompt at temperature 1, from the model's full distribution.

    `generate` would apply the model's published generation config (top_k, a repetition penalty, …), and the samples
    would not follow the policy. Each row has its own random numbers, so its sample does not depend on its batch.

    Args:
        model: in evaluation mode.
        prompts: the tokens of each prompt.
        seeds: one per prompt, from 0 up to 2**63.
        max_new_tokens: the length limit of a completion in tokens.
        stop_ids: tokens that end a completion.
        pad_id: any token.

    Returns:
        Each completion's tokens, the stop token included.
    """
    import torch

    width, device = max(map(len, prompts)), model.device
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=device)
    position = (mask.cumsum(dim=1) - 1).clamp(min=0)
    draws = np.stack([np.random.default_rng(seed).random(max_new_tokens) for seed in seeds])
    completions: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    cache = None
    with torch.no_grad():
        for step in range(max_new_tokens):
            output = model(
                input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
            )
            cache = output.past_key_values
            # inverse transform sampling, in float64 so that rare tokens keep their probability
            cumulated = torch.softmax(output.logits[:, -1].double(), dim=-1).cumsum(dim=-1)
            drawn = torch.tensor(draws[:, step : step + 1], device=device) * cumulated[:, -1:]
            ids = torch.searchsorted(cumulated, drawn, right=True).clamp(max=cumulated.shape[1] - 1)
            for row, token in enumerate(ids[:, 0].tolist()):
                if not ended[row]:
                    completions[row].append(token)
                    ended[row] = token in stop_ids
            if all(ended):
                break
            mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
            position = position[:, -1:] + 1
    return completions


def derive_seed(seed: int, number: int) -> int:
    """Return the seed of sample `number`, different for every sample and run seed."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:7], "big")

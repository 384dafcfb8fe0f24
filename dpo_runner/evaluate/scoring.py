"""What a model says of tokens: log-probabilities of completions, and samples; of a policy and of its reference."""

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
        own: the reference where it is a model of its own.
        adapter: where it is not, the adapter of `policy` that is the reference in the place of the tuned one; None:
            it is `policy` without any.
        autocast: what the run has cast to when it scored; None: to nothing.
    """

    policy: "PreTrainedModel"
    own: "PreTrainedModel | None" = None
    adapter: str | None = None
    autocast: "torch.dtype | None" = None

    @contextmanager
    def reference(self) -> "Iterator[PreTrainedModel]":
        """Lend the reference; afterwards `policy` is as it was."""
        from dpo_runner.model.result import switched

        if self.own is not None:
            yield self.own
            return
        with switched(self.policy, self.adapter):
            yield self.policy

    def as_in_the_run(self) -> AbstractContextManager[None]:
        """Compute in the precision that the run was scored in."""
        from dpo_runner.training.precision import autocast

        return autocast(self.policy.device, self.autocast)


def score_completions(
    model: "PreTrainedModel", rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int
) -> list[float]:
    """Return log pi(y|x) of each row in nats, summed over the completion's tokens (DPO paper, arXiv 2305.18290, Eq. 7).

    Args:
        model: in evaluation mode.
        rows: prompt and completion tokens; scored as one right-padded batch of shape [rows, longest].
        pad_id: any token; what stands there is masked.

    Returns:
        One sum for each row. The softmax is taken in float32, whatever the model computes in.
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
        for row, (prompt, completion) in enumerate(rows):  # one by one: float32 logits of all would be the peak
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
    """Sample one completion of each prompt at temperature 1, from the model's whole distribution.

    `generate` would apply what the model was published with (top_k, a repetition penalty, …), and the samples would
    not be the policy's. Each row has its own random numbers, so its sample does not depend on its batch.

    Args:
        model: in evaluation mode.
        prompts: tokens.
        seeds: one for each prompt, from 0 up to 2**63.
        max_new_tokens: where a completion is cut off.
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
            # the inverse of the distribution function, in float64 so that rare tokens keep their share
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
    """Return the seed of sample `number`, unlike that of any other sample or run."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:7], "big")

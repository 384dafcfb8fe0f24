"""Log-probabilities of completions and samples, from a policy and its reference."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

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

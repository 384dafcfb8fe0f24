"""Log-probabilities of completion tokens under a model with TRL's fused head."""

from collections.abc import Mapping
from typing import Any

import torch


def label_completions(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what a model takes for a batch of TRL's collator: `labels` in place of `completion_mask`."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    return {**{key: value for key, value in batch.items() if key != "completion_mask"}, "labels": labels}


def completion_logps(model: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    """Return log pi(y_t | x, y_<t) of each completion token (DPO paper, arXiv 2305.18290, Eq. 7).

    Args:
        model: with TRL's fused head, which scores labelled tokens alone.
        inputs: see `label_completions`.

    Returns:
        [rows, length - 1], at the place before each token; 0 where the next token is no completion's.
    """
    log_probs = model(**inputs, use_cache=False, fused_lm_head=True).log_probs
    assert isinstance(log_probs, torch.Tensor)
    return log_probs

"""Log-probabilities of completion tokens under a model with TRL's fused head."""

from collections.abc import Mapping
from typing import Any

import torch


def label_completions(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a model's inputs for a batch of TRL's collator: `labels` instead of `completion_mask`."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    return {**{key: value for key, value in batch.items() if key != "completion_mask"}, "labels": labels}


def completion_logps(model: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    """Return log pi(y_t | x, y_<t) of each completion token (DPO paper, arXiv 2305.18290, Eq. 7).

    Args:
        model: has TRL's fused head, which scores only labelled tokens.
        inputs: from `label_completions`.

    Returns:
        [rows, length - 1]; each value is at the position before its token, and 0 before tokens outside the completion.
    """
    log_probs = model(**inputs, use_cache=False, fused_lm_head=True).log_probs
    assert isinstance(log_probs, torch.Tensor)
    return log_probs

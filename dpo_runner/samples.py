"""Greedy answers to a fixed handful of prompts, before and after training."""

from typing import TYPE_CHECKING, Any

import torch

from dpo_runner.data import SamplePrompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def find_stop_ids(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", stop_id: int | None = None
) -> list[int]:
    """Return the tokens that end an answer: the tokenizer's, the chat template's, and those of the published model."""
    stops = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, stop_id, *(stops if isinstance(stops, list) else [stops])} - {None})


def generate_answers(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: list[SamplePrompt],
    max_new_tokens: int,
    batch_size: int,
    stop_id: int | None = None,
) -> list[dict[str, Any]]:
    """Answer each prompt greedily.

    Returns:
        For each prompt its `text`, its length in `tokens` (the end-of-turn token included), and whether it is
        `complete`, that is, ended by the model and not by `max_new_tokens`.
    """
    stop_ids = find_stop_ids(model, tokenizer, stop_id)
    answers: list[dict[str, Any]] = []
    training = model.training
    model.eval()
    try:
        for start in range(0, len(prompts), batch_size):
            ids = [prompt.ids for prompt in prompts[start : start + batch_size]]
            width = max(map(len, ids))
            pad = tokenizer.pad_token_id
            input_ids = torch.tensor([[pad] * (width - len(row)) + row for row in ids], device=model.device)
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=model.device)
            with torch.no_grad():
                output = model.generate(
                    input_ids=input_ids,
                    attention_mask=mask,
                    do_sample=False,
                    max_new_tokens=max_new_tokens,
                    use_cache=True,
                    eos_token_id=stop_ids,
                    pad_token_id=pad,
                    # greedy means greedy, whatever sampling settings the model was published with
                    temperature=None,
                    top_p=None,
                    top_k=None,
                )
            for row in output[:, width:].tolist():
                end = next((i for i, token in enumerate(row) if token in stop_ids), None)
                kept = row if end is None else row[: end + 1]
                text = tokenizer.decode(kept, skip_special_tokens=True).strip()
                answers.append({"text": text, "tokens": len(kept), "complete": end is not None})
    finally:
        model.train(training)
    return answers


def summarize_answers(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Return `response_tokens`, the mean length, and `responses_at_cap`, how many hit the length limit."""
    if not answers:
        return {}
    return {
        "response_tokens": round(sum(answer["tokens"] for answer in answers) / len(answers), 2),
        "responses_at_cap": sum(not answer["complete"] for answer in answers),
    }


def pair_answers(
    prompts: list[SamplePrompt], before: list[dict[str, Any]], after: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return one record for each prompt, with the answers to it before and after training."""
    return [
        {"prompt": prompt.messages, "before": untuned, "after": tuned}
        for prompt, untuned, tuned in zip(prompts, before, after, strict=True)
    ]

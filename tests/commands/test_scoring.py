"""Scores and samples against naive computations, and the reference within a policy."""

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dpo_runner.evaluate.scoring import Compared, score_completions
from dpo_runner.model.result import untuned


@pytest.fixture
def model(tiny_model: str, sft_adapter: str):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), sft_adapter).eval()


def test_batches_score_as_rows_do_one_by_one(model, tokenizer) -> None:
    generator = np.random.default_rng(0)
    rows = [
        (generator.integers(3, 200, prompt).tolist(), generator.integers(3, 200, completion).tolist())
        for prompt, completion in ((5, 3), (1, 9), (12, 1), (3, 20))
    ]
    slow = []
    for prompt, completion in rows:
        total, ids = 0.0, list(prompt)
        for token in completion:
            with torch.no_grad():
                total += torch.log_softmax(model(torch.tensor([ids])).logits[0, -1].float(), -1)[token].item()
            ids.append(token)
        slow.append(total)
    assert score_completions(model, rows, tokenizer.pad_token_id) == pytest.approx(slow, abs=1e-4)
    assert len({round(value, 3) for value in slow}) == len(rows)


def test_the_reference_leaves_the_policy_as_it_was(model) -> None:
    ids = torch.tensor([[1, 2, 3, 4]])
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with torch.no_grad():
        tuned = model(ids).logits
        with untuned(model):
            expected = model(ids).logits
        with pytest.raises(KeyError), Compared(model).reference() as reference:
            assert torch.equal(reference(ids).logits, expected)
            raise KeyError
        assert torch.equal(model(ids).logits, tuned)
    assert not torch.allclose(tuned, expected, atol=1e-3)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert not model.training

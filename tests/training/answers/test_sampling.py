"""Sampling against plain `generate`, against the model's distribution, and the work that it takes."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, TopPLogitsWarper

from dpo_runner.errors import RunError
from dpo_runner.training.answers.sampling import Sampling, choose_tokens, derive_seed, sample_answers
from tests.support.families import make_family

PROMPTS = [[5, 6, 7], [9], [10, 11, 12, 13, 14, 15, 16, 17], [200, 3]]


@pytest.fixture
def model(tiny_model: str, sft_adapter: str):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), sft_adapter).eval()


def generate(model: Any, prompt: list[int], length: int, stop_ids: list[int]) -> list[int]:
    """Return the greedy answer of transformers' own `generate` to one prompt."""
    ids = torch.tensor([prompt])
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=length,
        eos_token_id=stop_ids or None,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("count", [1, 3])
def test_greedy_answers_are_those_of_generate(model: Any, count: int) -> None:
    """Prompts of unequal lengths, whose answers end at different steps, so that rows leave the batch."""
    free = [generate(model, prompt, 12, []) for prompt in PROMPTS]
    stop_ids = sorted({free[0][1], free[2][4], free[3][7]})
    expected = [generate(model, prompt, 12, stop_ids) for prompt in PROMPTS]
    assert len({len(answer) for answer in expected}) > 2
    seeds = [[0] * count] * len(PROMPTS)
    found = sample_answers(model, PROMPTS, seeds, Sampling(12, temperature=0), stop_ids, 0)
    assert found == [[answer] * count for answer in expected]


def test_a_model_with_linear_attention_answers_as_by_generate(tokenizer: Any, tmp_path: Path) -> None:
    """Its states can neither be repeated nor selected."""
    model = AutoModelForCausalLM.from_pretrained(make_family("lfm2", tokenizer, tmp_path)).eval()
    free = [generate(model, prompt, 12, []) for prompt in PROMPTS]
    stop_ids = sorted({free[0][1], free[2][4], free[3][7]})
    expected = [generate(model, prompt, 12, stop_ids) for prompt in PROMPTS]
    assert len({len(answer) for answer in expected}) > 1
    found = sample_answers(model, PROMPTS, [[0, 1]] * len(PROMPTS), Sampling(12, temperature=0), stop_ids, 0)
    assert found == [[answer] * 2 for answer in expected]


def test_a_model_without_a_cache_of_keys_is_refused_in_one_line(tokenizer: Any, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_family("mamba", tokenizer, tmp_path)).eval()
    with pytest.raises(RunError, match=r"cannot be sampled from MambaForCausalLM.*; leave out samples\.reward"):
        sample_answers(model, PROMPTS, [[0]] * len(PROMPTS), Sampling(2, temperature=0), [], 0)


def test_each_prompt_goes_through_the_model_once_and_ended_rows_leave(model: Any) -> None:
    shapes: list[tuple[int, int]] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        shapes.append(tuple(kwargs["input_ids"].shape))

    model.get_base_model().register_forward_pre_hook(note, with_kwargs=True)
    seeds = [[derive_seed(row, number) for number in range(4)] for row in range(len(PROMPTS))]
    answers = sample_answers(model, PROMPTS, seeds, Sampling(30), list(range(40, 80)), 0)
    assert shapes[0] == (4, 8)  # 4 prompts, not 16
    assert all(width == 1 for _, width in shapes[1:]) and shapes[1][0] <= 16
    rows = [count for count, _ in shapes[1:]]
    assert all(one >= other for one, other in pairwise(rows)) and rows[-1] <= 4
    longest = [max(len(answer) for row in answers for answer in row)]
    assert len(rows) == longest[0] - 1
    assert len({tuple(answer) for row in answers for answer in row}) == 16


def test_samples_follow_the_models_distribution_whatever_their_batch(model: Any, tokenizer: Any) -> None:
    model.generation_config.top_k, model.generation_config.repetition_penalty = 1, 5.0  # must have no effect

    def sample(prompts: Any, seeds: Any, length: int, stop_ids: Any) -> list[list[int]]:
        rows = sample_answers(model, prompts, [[seed] for seed in seeds], Sampling(length), stop_ids, 0)
        return [answer for [answer] in rows]

    prompts = [[5, 6, 7], [9], [10, 11]]
    together = sample(prompts, [1, 2, 3], 6, [])
    for prompt, seed, expected in zip(prompts, [1, 2, 3], together, strict=True):
        assert sample([prompt], [seed], 6, []) == [expected]
    stop = together[0][2]
    first = together[0].index(stop)
    assert sample(prompts, [1, 2, 3], 6, [stop])[0] == together[0][: first + 1]

    with torch.no_grad():
        wanted = torch.softmax(model(torch.tensor([[5, 6, 7]])).logits[0, -1].float(), -1).numpy()
    drawn = np.concatenate([sample([[5, 6, 7]] * 500, range(i, i + 500), 1, []) for i in range(0, 1500, 500)])
    found = np.bincount(drawn.ravel(), minlength=len(wanted)) / len(drawn)
    assert np.abs(found - wanted).max() < 5 * np.sqrt(wanted.max() / len(drawn))
    assert (found > 0).sum() > 50


@pytest.mark.parametrize(("size", "spread", "top_p"), [(50, 2.0, 0.7), (50, 2.0, 0.05), (3000, 0.1, 0.9)])
def test_top_p_is_that_of_transformers(size: int, spread: float, top_p: float) -> None:
    """Also of a flat distribution over more tokens than are sorted first."""
    logits = spread * torch.randn(1, size, generator=torch.Generator().manual_seed(0))
    warped = torch.softmax(TopPLogitsWarper(top_p)(None, logits / 0.8).double(), -1)[0]
    draws = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    tokens = torch.cat([choose_tokens(logits.expand(500, -1), part, 0.8, top_p) for part in draws.split(500)])
    found = torch.bincount(tokens, minlength=size) / len(draws)
    assert (found - warped).abs().max() <= 1.1 / len(draws)
    assert set(tokens.tolist()) <= set(warped.nonzero()[:, 0].tolist())


def test_a_text_ends_an_answer(model: Any) -> None:
    free = sample_answers(model, PROMPTS[:1], [[1, 2]], Sampling(12), [], 0)[0]

    def decode(ids: list[int]) -> str:
        return "".join(chr(0x4E00 + token) for token in ids)

    stop = decode(free[0][4:6])
    found = sample_answers(model, PROMPTS[:1], [[1, 2]], Sampling(12, stop=(stop,), decode=decode), [], 0)[0]
    assert found == [free[0][:6], free[1]]

"""Greedy answers match transformers and are counted correctly, for any batch size."""

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from dpo_runner.data.preferences import SamplePrompt
from dpo_runner.data.templates.chat_template import ChatTemplate
from dpo_runner.training.answers import generate_answers, pair_answers, summarize_answers

MESSAGES = [[{"role": "user", "content": text}] for text in ("Hello.", "What is a very long question, and why?")]


def prompts_for(tokenizer: PreTrainedTokenizerBase) -> list[SamplePrompt]:
    template = ChatTemplate(tokenizer)
    return [SamplePrompt(messages, template.render_prompt(messages)) for messages in MESSAGES]


def test_lengths_and_completeness_are_counted(tiny_model: str, tokenizer) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model).train()
    answers = generate_answers(model, tokenizer, prompts_for(tokenizer), max_new_tokens=5, batch_size=2)
    assert [answer["tokens"] for answer in answers] == [5, 5]
    assert summarize_answers(answers) == {"response_tokens": 5.0, "responses_at_cap": 2}
    assert model.training

    stop = model.generation_config.eos_token_id
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tokenizer)))
    model.lm_head.bias.data[stop] = 1.0
    answers = generate_answers(model, tokenizer, prompts_for(tokenizer), max_new_tokens=5, batch_size=2)
    assert [(a["text"], a["tokens"], a["complete"]) for a in answers] == [("", 1, True)] * 2


@pytest.mark.real_model
def test_answers_do_not_depend_on_the_batch(default_model: str, tokenizer) -> None:
    model = AutoModelForCausalLM.from_pretrained(default_model, dtype=torch.float32)
    together = generate_answers(model, tokenizer, prompts_for(tokenizer), max_new_tokens=8, batch_size=2)
    alone = generate_answers(model, tokenizer, prompts_for(tokenizer), max_new_tokens=8, batch_size=1)
    assert together == alone
    assert len(together[0]["text"]) > 3


def test_pairs_of_answers() -> None:
    before, after = [{"text": "a"}, {"text": "b"}], [{"text": "c"}, {"text": "d"}]
    prompts = [SamplePrompt(messages, [1]) for messages in MESSAGES]
    paired = pair_answers(prompts, before, after)
    assert paired[1] == {"prompt": MESSAGES[1], "before": before[1], "after": after[1]}
    assert summarize_answers([]) == {}

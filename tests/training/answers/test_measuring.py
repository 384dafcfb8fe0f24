"""Greedy answers match transformers and are counted correctly, for any batch size."""

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from dpo_runner import run
from dpo_runner.config.compose import load_conf
from dpo_runner.data.prompts import SamplePrompt
from dpo_runner.data.templates.chat_template import ChatTemplate
from dpo_runner.training.answers.measuring import generate_answers, pair_answers, summarize_answers
from tests.support.programs import run_python

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
    model.generation_config.update(num_return_sequences=2, num_beams=2, return_dict_in_generate=True)
    assert generate_answers(model, tokenizer, prompts_for(tokenizer), max_new_tokens=5, batch_size=2) == answers

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


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_whole_modules_in_fp32_answer_beside_16_bit_layers(quant: str, tiny_run: list[str]) -> None:
    whole = ["lora.modules_to_save=[embed_tokens,lm_head]", "model.dtype=bfloat16", "training.bf16=true"]
    summary = run(load_conf([*tiny_run, *whole, f"quant={quant}", "run_dir=whole", "training.max_steps=1"]))
    assert summary is not None and summary["before"]["response_tokens"] == summary["after"]["response_tokens"] == 4
    chat = run_python("-m", "dpo_runner.chat", "whole", "--prompt", "Hello.")
    assert chat.returncode == 0, chat.stderr


def test_pairs_of_answers() -> None:
    before, after = [{"text": "a"}, {"text": "b"}], [{"text": "c"}, {"text": "d"}]
    prompts = [SamplePrompt(messages, [1]) for messages in MESSAGES]
    paired = pair_answers(prompts, before, after)
    assert paired[1] == {"prompt": MESSAGES[1], "before": before[1], "after": after[1]}
    assert summarize_answers([]) == {}

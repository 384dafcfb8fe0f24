"""Greedy answers of a result, by transformers and PEFT alone and by dpo_runner's chat."""

import json
import subprocess
import sys

from dpo_runner.chat import Chat

PLAIN_PROGRAM = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
dtype, base, *adapters = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
if adapters:
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, *adapters)
messages = [{"role": "user", "content": "What is 7 plus 7?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
output = model.generate(**inputs, do_sample=False, max_new_tokens=24)
assert "dpo_runner" not in sys.modules and ("peft" in sys.modules) == bool(adapters)
print(json.dumps(output[0].tolist()))
"""


def answer_plainly(*folders: str, dtype: str = "auto") -> list[int]:
    """Return all tokens of an answer by a model and its adapter, if any, without dpo_runner's code."""
    command = [sys.executable, "-c", PLAIN_PROGRAM, dtype, *folders]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    tokens: list[int] = json.loads(result.stdout)
    return tokens


def answer_in_chat(chat: Chat) -> list[int]:
    """Return all tokens of the answer to PLAIN_PROGRAM's question in a new conversation."""
    generated: list[list[int]] = []
    generate = chat.model.generate
    chat.model.generate = lambda **arguments: generated.append(generate(**arguments)[0].tolist())
    try:
        chat.reset()
        chat.ask("What is 7 plus 7?", lambda piece: None)
    finally:
        chat.model.generate = generate
    return generated[0]

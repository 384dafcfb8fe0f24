"""Python code of a model card that loads a run's result and generates an answer."""

import json
from typing import Any

from dpo_runner.io.masking import mask_secrets
from dpo_runner.model.card.facts import RunFacts, hub_base
from dpo_runner.model.files.packaged import PYPI_PREFIX, RANDOM_PREFIX
from dpo_runner.model.quantization import name_quantization

_ASK = [
    'messages = [{"role": "user", "content": "Why do we sleep?"}]',
    "inputs = tokenizer.apply_chat_template(",
    '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
    ").to(model.device)",
    "output = model.generate(**inputs, max_new_tokens=256)",
    'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
]
_ON_SFT = {
    "continue": "The adapter is {sft}, trained further: it includes those weights and goes on the bare base.",
    "stack": "The adapter joins {sft} and the adapter trained on top of it into one; it goes on the bare base.",
    "merge": "The adapter goes on the base with {sft} merged into it, as above, not on the bare base.",
}


def describe_use(facts: RunFacts, name: str, adapter: dict[str, Any] | None) -> list[str]:
    """Return code that answers a question, and notes on it, as lines of Markdown.

    Args:
        facts: the run's.
        name: the folder in the code.
        adapter: contents of adapter_config.json; None if the folder holds a whole model.
    """
    code = _load_adapter(facts, name) if adapter is not None else _load_model(facts, name)
    notes = [] if adapter is None else _note_base(facts, adapter)
    if facts.conf.quant is not None:
        notes.append(
            f"Trained on a base quantized to {name_quantization(facts.conf.quant)}, which is not part of this "
            "folder: answers on the unquantized base may differ from the run's own."
        )
    return ["```python", *code, "", *_ASK, "```", *(f"\n{note}" for note in notes)]


def _load_model(facts: RunFacts, name: str) -> list[str]:
    trust = ", trust_remote_code=True" if facts.conf.model.trust_remote_code else ""
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({_quote(name)}{trust})",
        f'model = AutoModelForCausalLM.from_pretrained({_quote(name)}, dtype="auto"{trust})',
    ]


def _load_adapter(facts: RunFacts, name: str) -> list[str]:
    model = facts.conf.model
    trust = ", trust_remote_code=True" if model.trust_remote_code else ""
    revision = facts.environment["model"]["commit"] or model.revision  # the branch may have moved
    base, pinned = _quote(model.model_name_or_path), "" if revision is None else f", revision={json.dumps(revision)}"
    imports = ["from peft import PeftModel", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if _is_made(facts):
        imports[:0] = [
            "from dpo_runner.config.sections.model import ModelConf",
            "from dpo_runner.model.files.locations import resolve_model_path",
        ]
        file = "" if model.gguf_file is None else f", gguf_file={_quote(model.gguf_file)}"
        base, pinned = f"resolve_model_path(ModelConf({base}{pinned}{file}))", ""
    # In the dtype of training: merging an SFT adapter in another dtype would give another base.
    load = [
        f"tokenizer = AutoTokenizer.from_pretrained({_quote(name)}{trust})",
        f"model = AutoModelForCausalLM.from_pretrained({base}{pinned}, dtype={_quote(model.dtype)}{trust})",
    ]
    rows = facts.environment["model"]["embedding_rows"]
    if rows["sft_adapter"]:
        load.append(f"model.resize_token_embeddings({rows['sft_adapter']})  # as the SFT adapter has it")
    if model.adapter is not None and model.adapter_mode == "merge":
        of = "" if model.adapter_revision is None else f", revision={json.dumps(model.adapter_revision)}"
        load.append(f"model = PeftModel.from_pretrained(model, {_quote(model.adapter)}{of}).merge_and_unload()")
    if rows["result"] != rows["sft_adapter"]:
        load.append(f"model.resize_token_embeddings({rows['result']})  # the adapter has the new rows")
    return [*imports, *load, f"model = PeftModel.from_pretrained(model, {_quote(name)})"]


def _note_base(facts: RunFacts, adapter: dict[str, Any]) -> list[str]:
    model, notes = facts.conf.model, []
    base = f"`{mask_secrets(model.model_name_or_path)}`"
    if model.adapter is not None:
        notes.append(_ON_SFT[model.adapter_mode].format(sft=f"`{mask_secrets(model.adapter)}`"))
    if _is_made(facts):
        notes.append(f"The base, {base}, is created by dpo_runner, which has to be installed for that.")
    elif hub_base(facts.conf, facts.environment) is None:
        notes.append(f"The base, {base}, is a folder on the training machine; replace it with the path of your copy.")
    if adapter["base_model_name_or_path"] != model.model_name_or_path:
        notes.append(
            "`adapter_config.json` names its base as on the training machine, so "
            "`AutoPeftModelForCausalLM` does not find it elsewhere; the code above does."
        )
    return notes


def _is_made(facts: RunFacts) -> bool:
    """Return whether the base is created by dpo_runner, so that transformers cannot load it by name."""
    name = facts.conf.model.model_name_or_path
    return name.startswith((PYPI_PREFIX, RANDOM_PREFIX)) or name.endswith(".gguf") or bool(facts.conf.model.gguf_file)


def _quote(text: str) -> str:
    return json.dumps(mask_secrets(text), ensure_ascii=False)

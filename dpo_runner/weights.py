"""The result one can serve: the tuned adapter (or model) with tokenizer, chat template and model card."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from peft import PeftModel

from dpo_runner import __version__
from dpo_runner.adapters import combined_adapter
from dpo_runner.artifacts import RunDirectory, mask_secrets, write_folder
from dpo_runner.config import RunConf
from dpo_runner.data_config import resolve_sources
from dpo_runner.model import Policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_weights(
    directory: RunDirectory,
    model: "PreTrainedModel | PeftModel",
    tokenizer: "PreTrainedTokenizerBase",
    conf: RunConf,
    policy: Policy,
    summary: dict[str, Any],
) -> Path:
    """Write adapter/ as safetensors (full fine-tuning: model/), whole or not at all.

    Returns:
        The folder, loadable with plain transformers and peft.
    """
    is_adapter = isinstance(model, PeftModel)
    folder = directory.adapter if is_adapter else directory.path / "model"

    def fill(staging: Path) -> None:
        if is_adapter:
            # TRL keeps the reference as a second adapter beside ours; it is no result.
            with combined_adapter(model, policy.result) as name:
                model.save_pretrained(staging, selected_adapters=[name])
            if name != "default":  # PEFT puts it into a folder of its name
                for file in (staging / name).iterdir():
                    file.rename(staging / file.name)
                (staging / name).rmdir()
        else:
            model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        (staging / "README.md").write_text(_build_card(conf, policy, summary, is_adapter), encoding="utf-8")

    write_folder(folder, fill)
    return folder


def _build_card(conf: RunConf, policy: Policy, summary: dict[str, Any], is_adapter: bool) -> str:
    front = {
        "base_model": conf.model.model_name_or_path,
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dpo", "trl", "dpo_runner", *(["lora"] if is_adapter else [])],
    }
    rows = "\n".join(
        f"| {key} | {summary['before'].get(key, '')} | {value} |" for key, value in summary["after"].items()
    )
    settings = {
        "data": ", ".join(str(source.path) for source in resolve_sources(conf.data).values()),
        "loss_type": conf.training.loss_type,
        "beta": conf.training.beta,
        "learning_rate": conf.training.learning_rate,
        "steps": summary["steps"],
        "seed": conf.seed,
    }
    load = (
        f'base = AutoModelForCausalLM.from_pretrained("{policy.base}")\n'
        'model = PeftModel.from_pretrained(base, "adapter")'
        if is_adapter
        else 'model = AutoModelForCausalLM.from_pretrained("model")'
    )
    return f"""---
{yaml.safe_dump(mask_secrets(front), sort_keys=False)}---

# {conf.run_name}

Tuned by Direct Preference Optimization ([paper](https://arxiv.org/abs/2305.18290)) with dpo_runner {__version__}
and TRL's DPOTrainer.

{chr(10).join(f"- {key}: {value}" for key, value in mask_secrets(settings).items())}

| on the evaluation rows | before | after |
|---|---|---|
{rows}

```python
{load}
```
"""

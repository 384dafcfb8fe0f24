"""Preference rows, a LoRA adapter, child processor time, and commands run in this process."""

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROWS = [
    {"prompt": f"What is {n} plus {n}?", "chosen": f"It is {2 * n}.", "rejected": f"I would rather say {n}, or so."}
    for n in range(1, 25)
]


def write_pairs(folder: Path) -> str:
    """Write ROWS to pairs.jsonl, and return its path."""
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def make_tiny_run(pairs: str) -> list[str]:
    """Return the overrides of a run that takes a second or two."""
    return [
        "model=tiny_random",
        "training=smoke",
        "data=local_file",
        f"data.path={pairs}",
        "samples.num_prompts=2",
        "samples.max_new_tokens=4",
        "wandb=disabled",
    ]


def real_model_dtype() -> str:
    """Return a `model.dtype` in which the default model is fast here: bf16 takes ten times as long without hardware."""
    from dpo_runner.training.engine.precision import has_bf16

    return "auto" if has_bf16() else "float32"


def make_adapter(model: str, folder: Path, seed: int, std: float, **settings: Any) -> str:
    """Write a LoRA adapter with random lora_B weights of standard deviation `std`, and return its folder."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = LoraConfig(lora_alpha=8, task_type="CAUSAL_LM", **settings)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    adapted.save_pretrained(folder)
    return str(folder)


def children_seconds() -> float:
    """Return the processor seconds of all ended children; unlike the clock, unaffected by other load."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run_main(main: Callable[[list[str]], None], *arguments: str) -> int:
    """Run a command in this process and return its exit code."""
    try:
        main(list(arguments))
    except SystemExit as stopped:
        assert isinstance(stopped.code, int)
        return stopped.code
    return 0

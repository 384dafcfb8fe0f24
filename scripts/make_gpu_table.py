"""Write the table of docs/gpu.md: the estimated memory of DPO on one GPU, for models of several sizes.

    python scripts/make_gpu_table.py

Takes no GPU, no weights and no hub: each model is a config, and `dpo_runner.training.memory.estimate` runs it on
tensors without memory, as `dry_run=true` does. A few minutes on one core.
"""

import argparse
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "gpu.md"

_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "tie_word_embeddings"),
)
SHAPES = {
    "135M (SmolLM2)": ("llama", 576, 1536, 30, 9, 3, 49152, True),
    "1B (Llama 3.2)": ("llama", 2048, 8192, 16, 32, 8, 128256, True),
    "3B (Llama 3.2)": ("llama", 3072, 8192, 28, 24, 8, 128256, True),
    "7B (Mistral)": ("mistral", 4096, 14336, 32, 32, 8, 32000, False),
    "8B (Llama 3)": ("llama", 4096, 14336, 32, 32, 8, 128256, False),
    "13B (Llama 2)": ("llama", 5120, 13824, 40, 40, 40, 32000, False),
    "32B (Qwen 3)": ("qwen3", 5120, 25600, 64, 64, 8, 151936, False),
    "70B (Llama 3)": ("llama", 8192, 28672, 80, 64, 8, 128256, False),
}
"""Architecture and sizes of the models after which the rows are named."""

METHODS = {
    "LoRA, bf16": ["model.dtype=bfloat16"],
    "QLoRA, nf4": ["model.dtype=bfloat16", "quant=nf4"],
    "full, fp32": ["lora=none"],
}
WAYS = [[], ["engine.max_tokens_per_micro_batch=2048"], ["training.gradient_checkpointing=true"]]
"""What a run tries in turn until it fits."""

PROMPT, ANSWER = 512, 512
CARDS = (8, 12, 16, 24, 32, 48, 80, 96, 141, 180)
"""Memory of cards in GB."""
_CONTEXT = 0.5e9
"""Bytes that CUDA's context takes of a card."""


def build_rows(shapes: Iterable[str]) -> Iterator[str]:
    """Yield the table's rows for some of `SHAPES`."""
    from transformers import AutoConfig

    for name in shapes:
        kind, *sizes = SHAPES[name]
        named = dict(zip(_SIZES, sizes, strict=True))
        config = AutoConfig.for_model(kind, **named, max_position_embeddings=8192, dtype="bfloat16")
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            for method, overrides in METHODS.items():
                needs = [estimate([f"model.model_name_or_path={folder}", *overrides, *way]) for way in WAYS]
                figures = [f"{peak / 1e9:.1f}" for peak, _ in needs]
                yield f"| {' | '.join([name, method, *figures, find_card(min(need for _, need in needs))])} |"


def estimate(overrides: list[str]) -> tuple[int, int]:
    """Return a run's estimated peak on a GPU, and what it needs to be free, in bytes."""
    from dpo_runner.config.compose import load_conf
    from dpo_runner.data.splits import DataShape, PairShape
    from dpo_runner.model.blueprint import Blueprint
    from dpo_runner.training.build import build_dpo_config
    from dpo_runner.training.memory.device import Device
    from dpo_runner.training.memory.estimate import estimate_memory

    conf = load_conf(["training.bf16=true", *overrides])
    args = build_dpo_config(conf, Path("checkpoints"))
    shape = DataShape(PROMPT + ANSWER, PairShape(PROMPT, ANSWER, ANSWER))
    card = Device("a GPU", 0, 0, is_gpu=True, has_varlen=True)
    found = estimate_memory(conf, args, Blueprint.of_run(conf), shape, card)
    return found.total, found.needed


def find_card(need: int) -> str:
    """Return the smallest card that has so many bytes free, in words."""
    return next((f"{size} GB" for size in CARDS if need + _CONTEXT <= size * 1e9), "none")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = []
    for row in build_rows(SHAPES):
        print(row, flush=True)
        rows.append(row)
    text = PAGE.read_text(encoding="utf-8")
    pattern = rf"(?:^\| (?:{'|'.join(map(re.escape, SHAPES))}) \|.*\n)+"
    table = "".join(f"{row}\n" for row in rows)
    text, count = re.subn(pattern, lambda _: table, text, flags=re.MULTILINE)
    assert count == 1, "the page has one such table"
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

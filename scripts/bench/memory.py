"""Compare the peak memory of training runs with `dpo_runner.training.memory.estimate`.

    python -m scripts.bench.memory --only nf4

Each setting runs in a fresh process: it writes rows as long as max_length, loads the default model and makes two
optimizer steps. *Measured* is the kernel's peak of the process's resident memory (VmHWM, reset right before the model
is loaded) less what was resident at the reset. It includes mapped files, because unquantized weights stay mapped from
their safetensors file, and it catches short peaks that sampling would miss.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_runner.model.blueprint import Blueprint
from scripts import ROOT

if TYPE_CHECKING:
    from dpo_runner.training.memory.estimate import MemoryEstimate

SETTINGS = {
    "LoRA r=16, batch 4, 512 tokens": ["training.max_length=512"],
    "the same, gradient_checkpointing": ["training.max_length=512", "training.gradient_checkpointing=true"],
    "nf4, batch 4, 512 tokens": ["quant=nf4", "training.max_length=512"],
    "int8, batch 2, 256 tokens": ["quant=int8", "training.max_length=256", "training.per_device_train_batch_size=2"],
    "LoRA r=16, batch 2, 256 tokens": ["training.max_length=256", "training.per_device_train_batch_size=2"],
    "LoRA r=16, batch 2, 1024 tokens": ["training.max_length=1024", "training.per_device_train_batch_size=2"],
    "LoRA r=16, batch 1, 256 tokens": ["training.max_length=256", "training.per_device_train_batch_size=1"],
    "full fine-tuning, batch 2, 256 tokens": [
        "lora=none",
        "training.max_length=256",
        "training.per_device_train_batch_size=2",
        "training.learning_rate=1e-6",
    ],
}
BUDGETS = {
    f"max_tokens_per_micro_batch={tokens}": [
        "training.max_length=128",
        "training.per_device_train_batch_size=8",
        f"engine.max_tokens_per_micro_batch={tokens}",
    ]
    for tokens in (256, 512, 1024, 2048)
}
"""The same optimizer step of 8 pairs of about 220 tokens each."""
QUANTS = {
    "none (bf16)": [],
    "nf4": ["quant=nf4", "quant.bnb_4bit_use_double_quant=false"],
    "nf4, double quantization": ["quant=nf4", "quant.bnb_4bit_use_double_quant=true"],
    "fp4": ["quant=fp4", "quant.bnb_4bit_use_double_quant=false"],
    "int8": ["quant=int8"],
}
COMMON = [
    "data=local_file",
    "data.on_overlong=truncate_completion",
    "training.max_steps=2",
    "training.gradient_accumulation_steps=1",
    "training.eval_strategy=no",
    "training.per_device_eval_batch_size=1",  # nothing is evaluated here
    "training.save_strategy=no",
    "wandb=disabled",
]


def measure(overrides: list[str], load_only: bool) -> dict[str, int]:
    """Return the peak bytes of loading the model, and of training it for two steps, in this process."""
    from dpo_runner.config.compose import load_conf
    from dpo_runner.data.preferences import load_preferences
    from dpo_runner.model.policy import load_policy
    from dpo_runner.training.build import build_dpo_config, build_trainer

    with tempfile.TemporaryDirectory() as folder:
        conf = load_conf([*COMMON, *overrides, f"data.path={_write_rows(Path(folder))}"])
        args, blueprint = build_dpo_config(conf, Path(folder) / "checkpoints"), Blueprint.of_run(conf)
        data = load_preferences(conf, blueprint.tokenizer)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the current resident memory
        before = _read_status("VmRSS")
        policy = load_policy(blueprint)
        for tensor in policy.model.parameters():
            tensor.detach().max()  # reads every page of a mapped weight into memory
        gc.collect()
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)  # memory that loading used and freed does not count
        loaded = _read_status("VmRSS") - before
        if load_only:
            return {"loaded": loaded, "longest": 0}
        build_trainer(conf, args, blueprint, policy, data).train()
        measured, shape = _read_status("VmHWM") - before, data.shape()
        return {"loaded": loaded, "measured": measured, "longest": shape.longest, **shape.largest._asdict()}


def estimate(overrides: list[str], shape: dict[str, int]) -> "MemoryEstimate":
    """Estimate the memory of a run on rows of the shape that `measure` returns."""
    from dpo_runner.config.compose import load_conf
    from dpo_runner.data.splits import DataShape, PairShape
    from dpo_runner.training.build import build_dpo_config
    from dpo_runner.training.memory.estimate import estimate_memory

    conf = load_conf([*COMMON, *overrides])
    rows = DataShape(shape["longest"], PairShape(*(shape[part] for part in PairShape._fields)))
    return estimate_memory(conf, build_dpo_config(conf, Path("checkpoints")), Blueprint.of_run(conf), rows)


def _write_rows(folder: Path) -> Path:
    """Write pairs and return their path.

    The chosen answer is longer than any max_length here; the rejected one is shorter and starts differently.
    """
    path = folder / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for n in range(40):
            words = [f"word{n}" if at % 7 == 0 else "memory" for at in range(1200)]
            row = {
                "prompt": f"Question {n}?",
                "chosen": " ".join(words),
                "rejected": " ".join(["No", *words[: 200 - n]]),
            }
            file.write(json.dumps(row) + "\n")
    return path


def _read_status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def run_child(overrides: list[str], load_only: bool = False) -> dict[str, int]:
    """Run `measure` in a fresh process."""
    flags = ["--load-only"] if load_only else []
    command = [sys.executable, "-m", "scripts.bench.memory", "--measure", *flags, *overrides]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{' '.join(overrides)}: {result.stderr[-2000:]}")
    measured = json.loads(result.stdout.splitlines()[-1])
    assert isinstance(measured, dict)
    return measured


def compare(settings: dict[str, list[str]], only: str) -> list[str]:
    """Measure and estimate each of `settings` whose name contains `only`; return the table rows."""
    rows = []
    for name, overrides in settings.items():
        if only in name:
            measured = run_child(overrides)
            estimated = estimate([*overrides, "data.path=rows.jsonl"], measured).total
            ratio = estimated / measured["measured"]
            rows.append(f"| {name} | {estimated / 1e9:.2f} | {measured['measured'] / 1e9:.2f} | {ratio:.2f} |")
            print(rows[-1], flush=True)
    return rows


def compare_weights() -> list[str]:
    """Measure and estimate the loaded model under each quantization; return the table rows."""
    rows = []
    for name, overrides in QUANTS.items():
        shape = {"longest": 64, "prompt": 0, "chosen": 64, "rejected": 64}
        parts = estimate([*overrides, "data.path=rows.jsonl"], shape).rows
        held = parts["weights"] + parts["quantization state"]
        loaded = run_child(overrides, load_only=True)["loaded"]
        rows.append(f"| {name} | {held / 1e6:.0f} | {loaded / 1e6:.0f} |")
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Print the tables and write them to a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", action="store_true", help="measure one setting in this process, as JSON")
    parser.add_argument("--load-only", action="store_true", help="with --measure: load the model and stop")
    parser.add_argument("--only", default="", help="settings whose name contains this; writes no file")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "memory.md")
    parser.add_argument("overrides", nargs="*", help="with --measure: Hydra overrides")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.overrides, arguments.load_only)))
        return
    runs, budgets = (compare(settings, arguments.only) for settings in (SETTINGS, BUDGETS))
    if arguments.only:
        return
    arguments.out.write_text(_format_report(runs, budgets, compare_weights()), encoding="utf-8")


def _format_report(runs: list[str], budgets: list[str], weights: list[str]) -> str:
    from importlib import metadata

    from dpo_runner.training.environment import read_cpu_name

    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "bitsandbytes"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return f"""# Estimated and measured memory

`make bench-memory`: SmolLM2-135M-Instruct on the CPU, each setting in a fresh process, two optimizer steps, rows as \
long as max_length. *Estimated* is what `dry_run=true` says, from the model's config alone. *Measured* is the peak of \
resident memory (VmHWM) less what was resident before the model was loaded; mapped files count, because unquantized \
weights stay mapped from their file. Where glibc's heap has its gaps depends on every small block in between, so the \
same setting differs by up to a tenth from one process to the next.

{os.cpu_count()} cores of an {read_cpu_name()}, {memory:.0f} GB, {versions}.

| setting | estimated, GB | measured, GB | estimated / measured |
|---|---|---|---|
{chr(10).join(runs)}

One optimizer step of 8 pairs, some 220 tokens each, in micro-batches of different sizes; the gradient is the same.

| engine | estimated, GB | measured, GB | estimated / measured |
|---|---|---|---|
{chr(10).join(budgets)}

The model once it is loaded. *Measured* is what resident memory has grown by then; it has what the loader and the \
libraries keep in it too.

| quantization | estimated, MB | measured, MB |
|---|---|---|
{chr(10).join(weights)}
"""


if __name__ == "__main__":
    main()

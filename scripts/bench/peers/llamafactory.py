"""LLaMA-Factory as a peer: its environment, its configuration of the job, and its tokens."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from scripts.bench.inputs.shapes import check_same_tokens
from scripts.bench.measuring.process import run
from scripts.bench.peers.sides import Job, Measured, Variant, add_splits, read_trainer

PACKAGES = ("llamafactory==0.9.5", "torch==2.11.0", "torchaudio==2.11.0", "torchvision==0.26.0")
"""Torch packages are pinned: pip no longer picks the versions that LLaMA-Factory needs."""
PEER = "LLaMA-Factory"
PEER_VARIANTS = add_splits({PEER: Variant(), f"{PEER}, no checkpointing": Variant(gradient_checkpointing=False)})
"""Settings of LLaMA-Factory, the default first."""
_TEMPLATE = "smollm"

# Runs in its environment: writes the token ids that its loader makes from a configuration's dataset.
_PRINT_TOKENS = """
import json, sys
import yaml
from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from llamafactory.model import load_tokenizer
model_args, data_args, training_args, _, _ = get_train_args(yaml.safe_load(open(sys.argv[1])))
module = load_tokenizer(model_args)
template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
rows = get_dataset(template, model_args, data_args, training_args, stage="rm", **module)["train_dataset"]
made = []
for row in rows:
    sides = {}
    for side in ("chosen", "rejected"):
        prompt = sum(label == -100 for label in row[f"{side}_labels"])
        sides[f"{side}_ids"], sides["prompt_ids"] = row[f"{side}_input_ids"][prompt:], row[f"{side}_input_ids"][:prompt]
    made.append(sides)
json.dump(made, open(sys.argv[2], "w"))
"""


def find_peer(peers: Path) -> Path | None:
    """Return its command if it is installed under `peers`, else None."""
    command = peers / "llamafactory" / "bin" / "llamafactory-cli"
    return command if command.exists() else None


def install_peer(peers: Path) -> None:
    """Install it into a separate environment: 6 GB, mostly CUDA libraries that torch depends on."""
    folder = peers / "llamafactory"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    subprocess.run([str(folder / "bin" / "pip"), "install", "--quiet", *PACKAGES], check=True)


def build_config(job: Job, folder: Path, gradient_checkpointing: bool) -> dict[str, Any]:
    """Return its configuration of the job, and write its dataset_info.json."""
    rows = Path(job.rows).with_suffix(".sharegpt.json")
    tags = {"ranking": True, "formatting": "sharegpt", "file_name": rows.name}
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected", "system": "system"}
    (rows.parent / "dataset_info.json").write_text(json.dumps({rows.stem: {**tags, "columns": columns}}))
    return {
        "stage": "dpo",
        "do_train": True,
        "model_name_or_path": job.model,
        "finetuning_type": "lora",
        "lora_rank": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "lora_target": "all",
        "pref_beta": job.beta,
        "pref_loss": "sigmoid",
        "dataset_dir": str(rows.parent),
        "dataset": rows.stem,
        "template": _TEMPLATE,
        "cutoff_len": job.max_length,
        "output_dir": str(folder),
        "overwrite_cache": True,
        "disable_gradient_checkpointing": not gradient_checkpointing,
        "per_device_train_batch_size": job.batch,
        "gradient_accumulation_steps": job.accumulation,
        "learning_rate": job.learning_rate,
        "num_train_epochs": 1.0,
        "max_steps": job.max_steps,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "logging_steps": 1,
        "save_steps": 500,
        "bf16": True,
        "use_cpu": job.device == "cpu",
        "report_to": "none",
        "seed": job.seed,
    }


def measure_peer(
    side: str,
    job: Job,
    folder: Path,
    environment: Mapping[str, str],
    command: Path,
    variant: Variant,
) -> Measured:
    """Check that it makes the same tokens from the rows, run it, and read its results.

    Raises:
        ValueError: its tokens differ.
        CommandFailed: the command failed.
    """
    config = folder.with_suffix(".yaml")  # not JSON: LLaMA-Factory passes json.load the path, not a file
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(yaml.safe_dump(build_config(job, folder, variant.gradient_checkpointing)))
    own = {**environment, "DISABLE_VERSION_CHECK": "0"}
    own.pop("PYTHONPATH", None)
    tokens = Path(job.rows).with_suffix(".tokens.json")
    digest = hashlib.sha256(tokens.read_bytes()).hexdigest()[:12]  # the work folder may hold the tokens of other rows
    if not (theirs := tokens.with_suffix(f".llamafactory-{digest}.json")).exists():
        printing = [str(command.with_name("python")), "-c", _PRINT_TOKENS, str(config), str(theirs)]
        run(printing, own, folder.with_suffix(".tokens.log"))
    check_same_tokens(json.loads(tokens.read_text()), json.loads(theirs.read_text()), side)
    return read_trainer(side, job, run([str(command), "train", str(config)], own, folder.with_suffix(".log")), folder)

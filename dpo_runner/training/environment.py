"""The environment of a run: versions, commit, hardware, model and data fingerprints, peak memory."""

import hashlib
import os
import platform
import resource
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import xxhash

from dpo_runner.data.preferences import PreferenceData
from dpo_runner.io.upstream import find_commit
from dpo_runner.io.version import __version__
from dpo_runner.model.blueprint import Blueprint
from dpo_runner.model.policy import Policy

_PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "hydra-core", "wandb")


def collect_environment(seed: int, data: PreferenceData, blueprint: Blueprint, policy: Policy) -> dict[str, Any]:
    """Return the contents of environment.json.

    Args:
        seed: the run's seed.
        data: the tokenized rows.
        blueprint: the model's blueprint.
        policy: the loaded policy, whose config has the hub commit.
    """
    return {
        "dpo_runner": __version__,
        "commit": _read_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: metadata.version(name) for name in _PACKAGES},
        "hardware": {
            "cpu": read_cpu_name(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "seed": seed,
        "model": {
            "base": policy.base,
            "commit": find_commit(policy.model.config),
            "fingerprint": _fingerprint_model(policy.base),
            "weights": _digest_files(policy.base),
            "adapter": _digest_files(blueprint.adapter),
            "reference": _digest_files(blueprint.reference.folder or _base_of(blueprint.reference_model)),
            # None: as published
            "embedding_rows": {"sft_adapter": blueprint.vocabulary.brought, "result": blueprint.vocabulary.rows},
        },
        "data": {
            split: {"rows": len(rows), "fingerprint": data.fingerprint(split)}
            for split, rows in (("train", data.train), ("eval", data.eval))
            if rows is not None
        },
    }


def reset_peak_memory(device: torch.device) -> None:
    """Reset this process's peak memory: of the GPU if the run computes on one, else of resident memory (Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):  # not Linux, or a sandbox: the peak is then that of the whole process
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # sets VmHWM to the current resident size


def measure_peak_memory(device: torch.device) -> float:
    """Return peak memory since the last `reset_peak_memory`, in GB (1e9 bytes).

    If `device` is a GPU: memory allocated by torch in this process. Otherwise: resident memory of the process,
    libraries included; outside Linux since process start.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    for line in status.read_text(encoding="utf-8").splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):  # unlike ru_maxrss, not inherited from the parent process
            return int(line.split()[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def _read_commit() -> str | None:
    """Return the git commit of the checkout that this package runs from; None if it is installed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    result = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return result.stdout.strip() or None


def read_cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _base_of(blueprint: Blueprint | None) -> str | None:
    return None if blueprint is None else blueprint.base


def _digest_files(folder: str | Path | None) -> str | None:
    """Hash all weights, configs and code of a model or adapter folder; None without one, or for a hub id."""
    if folder is None or not Path(folder).is_dir():
        return None
    digest = xxhash.xxh3_128()
    for path in sorted(Path(folder).iterdir()):
        if path.suffix in (".safetensors", ".bin", ".gguf", ".json", ".py"):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while block := file.read(1 << 24):
                    digest.update(block)
    return digest.hexdigest()


def _fingerprint_model(base: str) -> str | None:
    """Hash config.json and the names and sizes of weight files of a local model folder; None for a hub id."""
    folder = Path(base)
    if not folder.is_dir():
        return None
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
    return digest.hexdigest()[:16]

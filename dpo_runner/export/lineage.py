"""Lineage of a run's weights, with digests that identify them."""

import hashlib
from pathlib import Path
from typing import Any

from dpo_runner.config.run_conf import RunConf
from dpo_runner.io.version import __version__


def trace_origins(conf: RunConf, run_dir: Path, tuned: Path, environment: dict[str, Any]) -> dict[str, Any]:
    """Return the lineage of a run's weights, from the base to the run, with commits and digests.

    Args:
        conf: the run's configuration, with the base at the commit used in training.
        run_dir: the run's directory.
        tuned: the folder in it with the model or the adapter.
        environment: the content of the run's environment.json.

    Returns:
        `base`, `sft_adapter` (or None), `dpo_run` and `export`.

    Raises:
        ConfigError: the base or the SFT adapter does not exist.
    """
    from dpo_runner.model.files.locations import resolve_adapter_path, resolve_model_path

    model, quant, sft = conf.model, conf.quant, None
    if model.adapter is not None:
        sft = {"name": model.adapter, "mode": model.adapter_mode, **_identify(resolve_adapter_path(model), None)}
    quantization = None
    if quant is not None:
        quantization = "int8" if quant.load_in_8bit else quant.bnb_4bit_quant_type
    run = {
        "name": conf.run_name,
        "dpo_runner": environment["dpo_runner"],
        "commit": environment["commit"],
        "config_sha256": _hash(run_dir / "config.yaml"),
        "quantization": quantization,
        "sha256": digest_weights(tuned),
    }
    base = {"name": model.model_name_or_path, **_identify(resolve_model_path(model), model.revision)}
    return {"base": base, "sft_adapter": sft, "dpo_run": run, "export": {"dpo_runner": __version__}}


def _identify(location: str, revision: str | None) -> dict[str, Any]:
    """Return hub commit and weight digests of a folder, or of a hub repository's files in the cache."""
    from huggingface_hub import try_to_load_from_cache

    folder = Path(location)
    if not folder.is_dir():
        cached = try_to_load_from_cache(location, "config.json", revision=revision)
        if not isinstance(cached, str):
            return {"commit": revision, "sha256": {}}
        folder = Path(cached).parent
    commit = folder.name if folder.parent.name == "snapshots" else None  # the layout of the hub's cache
    return {"commit": commit, "sha256": digest_weights(folder)}


def digest_weights(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file that affects a model's outputs, by name."""
    names = ("config.json", "adapter_config.json", "adapter_model.*", "model*.safetensors", "pytorch_model*.bin")
    return {path.name: _hash(path) for path in sorted(path for name in names for path in folder.glob(name))}


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

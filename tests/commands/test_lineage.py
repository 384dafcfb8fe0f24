"""Digests that identify models, and commits from the hub's cache."""

import hashlib
from pathlib import Path

import huggingface_hub

from dpo_runner.config.compose import load_conf
from dpo_runner.export.lineage import digest_weights, trace_origins

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ENVIRONMENT = {"dpo_runner": "0.1.0", "commit": None}


def write(folder: Path, *names: str) -> dict[str, str]:
    """Write files that contain their own names, and return their digests."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(name)
    return {name: hashlib.sha256(name.encode()).hexdigest() for name in names}


def test_what_decides_the_weights_is_digested_and_nothing_else(tmp_path: Path) -> None:
    expected = write(
        tmp_path / "x", "config.json", "adapter_config.json", "adapter_model.safetensors", "model-1-of-2.safetensors"
    )
    write(tmp_path / "x", "README.md", "tokenizer.json", "optimizer.pt")
    assert digest_weights(tmp_path / "x") == expected


def test_a_base_out_of_the_hubs_cache_has_its_commit(tmp_path: Path, monkeypatch, sft_adapter: str) -> None:
    snapshot = tmp_path / "models--some--model" / "snapshots" / COMMIT
    digests = write(snapshot, "config.json", "model.safetensors")
    cached = {("some/model", "main"): str(snapshot / "config.json")}
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda name, file, revision: cached.get((name, revision))
    )
    tuned, config = write(tmp_path / "r" / "adapter", "adapter_model.safetensors"), write(tmp_path / "r", "config.yaml")
    start = ["model.model_name_or_path=some/model", "model.revision=main", f"model.adapter={sft_adapter}"]
    conf = load_conf([*start, "model.adapter_mode=merge", "quant=int8"])
    origins = trace_origins(conf, tmp_path / "r", tmp_path / "r" / "adapter", ENVIRONMENT)
    assert origins["base"] == {"name": "some/model", "commit": COMMIT, "sha256": digests}
    assert (origins["sft_adapter"]["mode"], origins["sft_adapter"]["commit"]) == ("merge", None)
    assert origins["dpo_run"]["sha256"] == tuned and origins["dpo_run"]["quantization"] == "int8"
    assert origins["dpo_run"]["config_sha256"] == config["config.yaml"]

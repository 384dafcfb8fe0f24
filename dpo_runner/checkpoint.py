"""Whether a run directory may be written to or continued, and from which checkpoint."""

import json
import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import yaml

from dpo_runner.artifacts import HEARTBEAT_SECONDS, mask_secrets
from dpo_runner.config import RunConf, config_keys
from dpo_runner.errors import ConfigError

# What may differ between a run and its continuation without changing what is trained.
_HARMLESS = ("wandb", "resume", "dry_run", "run_dir", "run_name", "samples", "sweep")
TOKEN_COUNT_FILE = "num_tokens.json"
_PARTS = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", TOKEN_COUNT_FILE)


def find_last_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint in `folder`, or None.

    transformers' `get_last_checkpoint` takes the newest one, complete or not, and training goes on silently
    without the optimizer's state where that is what a kill cut off.
    """
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    for path in sorted(found, key=lambda path: int(path.name.partition("-")[2]), reverse=True):
        weights = list(path.glob("*.safetensors"))
        if weights and all((path / part).exists() for part in _PARTS) and _is_json(path / "trainer_state.json"):
            return path
    return None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return False
    return True


def read_step(checkpoint: Path) -> int:
    """Return the number of optimizer steps that a checkpoint has behind it."""
    return int(checkpoint.name.partition("-")[2])


def read_epoch(checkpoint: Path) -> float:
    """Return how many epochs a checkpoint has behind it, fractions included."""
    return float(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["epoch"])


def check_unused(run_dir: Path) -> None:
    """Refuse to write among files that no run has left there.

    Raises:
        ConfigError: `run_dir` is a file, or holds anything.
    """
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise ConfigError(
            f"`run_dir={run_dir}`: holds something that is no run of this program; use a new or empty folder"
        )


def check_continuable(run_dir: Path, status: dict[str, Any], conf: RunConf) -> None:
    """Refuse to continue a run that is not to be continued, is still going on, or had another configuration.

    Args:
        run_dir: where it is.
        status: what its status.json holds.
        conf: what is to be run now.

    Raises:
        ConfigError: with one line for each key that differs from run_dir/config.yaml.
    """
    if conf.resume == "never":
        raise ConfigError(
            f"`resume=never`: {run_dir} holds a run already; use resume=auto to continue it, or another run_dir"
        )
    if status["state"] == "running" and status["pid"] != os.getpid() and is_alive(status):
        raise ConfigError(
            f"`run_dir={run_dir}`: process {status['pid']} is running there; wait for it, or use another run_dir"
        )
    if status["state"] != "finished" and find_last_checkpoint(run_dir / "checkpoints") is None:
        return  # nothing was trained: the run begins anew
    before = _flatten(yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8")))
    now = _flatten(mask_secrets(config_keys(conf)))
    mistakes = [
        f"`{key}={now.get(key)}`: the run in {run_dir} has {before.get(key)}; use that value, or another run_dir"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key.partition(".")[0] not in _HARMLESS
    ]
    if mistakes:
        raise ConfigError(mistakes)


def is_alive(status: dict[str, Any]) -> bool:
    """Whether the process that wrote a status is alive: its heartbeat is fresh, or at least its pid is in use."""
    age = (datetime.now(UTC) - datetime.fromisoformat(status["heartbeat"])).total_seconds()
    return age <= 6 * HEARTBEAT_SECONDS and is_process_alive(status["pid"])


def is_process_alive(pid: int) -> bool:
    """Whether there is such a process; one that has ended, and that nobody has asked about (a zombie), is none."""
    try:
        return bool(psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD))
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix.removesuffix("."): value}
    return {key: leaf for name, item in value.items() for key, leaf in _flatten(item, f"{prefix}{name}.").items()}

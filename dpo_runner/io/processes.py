"""The GPUs that this process may use, and its environment variables. Imports no torch."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from dpo_runner.errors import ConfigError


def take_gpu() -> None:
    """Make one GPU visible to this process of several, unless its launcher has done so: the one numbered LOCAL_RANK.

    CUDA reads the variable once, so this comes before torch is imported.

    Raises:
        ConfigError: there are fewer GPUs than processes.
    """
    local = os.environ.get("LOCAL_RANK", "")
    if not local.isdecimal() or len(gpus := list_gpus()) < 2:
        return
    if int(local) >= len(gpus):
        raise ConfigError(f"LOCAL_RANK={local}: there are {len(gpus)} GPUs; start one process for each of them")
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus[int(local)]


def list_gpus() -> list[str]:
    """Return the usable GPUs as named in CUDA_VISIBLE_DEVICES."""
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in given.split(",") if name.strip() and name.strip() != "-1"]
    return list_installed_gpus()


def list_installed_gpus() -> list[str]:
    """Return the UUIDs of this machine's GPUs, or of their MIG parts, as nvidia-smi lists them."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    listed = subprocess.run([program, "--list-gpus"], capture_output=True, text=True, check=False)
    names = [line.rpartition("UUID: ")[2].rstrip(") ") for line in listed.stdout.splitlines() if "UUID: " in line]
    return [name for name in names if name.startswith("MIG-")] or names


@contextmanager
def setting_variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable in this block."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before

"""The GPUs that this process may use. Imports no torch."""

import os
import shutil
import subprocess


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

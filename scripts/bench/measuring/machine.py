"""Hardware, package versions and load of the benchmark machine."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")
_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes")


def describe_machine() -> dict[str, Any]:
    """Return processor, relevant CPU flags, cores, memory in GB (1e9 bytes), and versions."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in info.splitlines())}
    flags = fields.get("flags", "").split()
    return {
        "cpu": fields.get("model name", platform.processor() or platform.machine()),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in _PACKAGES},
    }


def describe_load() -> str:
    """Return the load average of the last minute, a measure of other work on the machine."""
    return f"{os.getloadavg()[0]:.2f}"

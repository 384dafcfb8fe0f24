"""dpo_runner: YAML-configured Direct Preference Optimization experiments."""

import os
import platform
import time
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_runner.io.version import __version__

__all__ = ["RunConf", "__version__", "apply_chat_template", "load_conf", "run", "run_rounds"]

if TYPE_CHECKING:
    from dpo_runner.config.compose import load_conf
    from dpo_runner.config.run_conf import RunConf
    from dpo_runner.data.templates.chat_template import apply_chat_template
    from dpo_runner.generate.rounds import run_rounds
    from dpo_runner.train import run


def _shares_a_core() -> bool:
    """Return whether other processes run now on cores that OpenMP's threads will take (Linux)."""
    if not Path("/proc/loadavg").exists():
        return False
    cores, running = len(os.sched_getaffinity(0)), []
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    for _ in range(5):  # a busy process runs each time; this one is counted too
        time.sleep(0.002)
        running.append(int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0]))
    return min(running) - 1 + (int(threads) if threads.isdecimal() else cores) > cores


# OpenMP reads it when torch is imported. By default a waiting thread spins 300,000 times before it sleeps: beside
# another busy process it holds the core that it waits for. On idle cores, sleeping sooner costs up to a fifth.
if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} and _shares_a_core():
    os.environ["GOMP_SPINCOUNT"] = "1000"

# torch reads it at the first allocation on a GPU. Each micro-batch has a different number of tokens, and in segments of
# a fixed size, blocks of ever different sizes leave gaps. Windows lacks the calls, and under WSL some drivers fail.
if (
    not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"}
    and platform.system() == "Linux"
    and "microsoft" not in platform.release().lower()
):
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"

_HOME = {
    "RunConf": "dpo_runner.config.run_conf",
    "load_conf": "dpo_runner.config.compose",
    "apply_chat_template": "dpo_runner.data.templates.chat_template",
    "run": "dpo_runner.train",
    "run_rounds": "dpo_runner.generate.rounds",
}


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that `import dpo_runner` does not import torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)

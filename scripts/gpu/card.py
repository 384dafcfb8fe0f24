"""The GPU: its name, memory, driver, and the bf16 peak of its data sheet."""

import re
import subprocess

from scripts.gpu.inputs import Task
from scripts.gpu.work import Tell

PEAKS = {
    "B200": 2250,
    "GH200": 989,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "A10G": 70,
    "A10": 125,
    "A40": 150,
    "RTX A6000": 155,
    "RTX 5090": 210,
    "RTX 4090": 165,
    "RTX 3090": 71,
}
"""Dense bf16 TFLOP/s with sums in fp32, by words of the name; the first that fits counts."""


def list_cards() -> str | None:
    """Return the driver's list of GPUs, one line; None without a driver."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return "; ".join(found.splitlines()) or None


def find_peak(name: str) -> float | None:
    """Return the data sheet's bf16 FLOP/s of a card; None if it is not known here."""
    return next((1e12 * peak for part, peak in PEAKS.items() if _has_words(name, part)), None)


def _has_words(name: str, part: str) -> bool:
    """Return whether `part` is in a card's name as whole words: `A100` is in A100-SXM4-80GB, not in RTX A1000."""
    return re.search(rf"(?<![A-Z0-9]){re.escape(part)}(?![A-Z0-9])", name) is not None


def describe_card(task: Task, tell: Tell) -> None:
    """Report the card that torch computes on.

    Raises:
        RuntimeError: torch does not see one.
    """
    import torch

    if task.device == "cpu":
        return
    if not torch.cuda.is_available():
        listed = list_cards()
        there = f"the driver lists {listed}" if listed else "nvidia-smi does not answer"
        raise RuntimeError(f"torch {torch.__version__} sees no GPU; {there}; --device cpu runs the check on the CPU")
    name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    memory = torch.cuda.get_device_properties(0).total_memory / 1e9
    with_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    tell(
        f"{name}, {memory:.1f} GB, compute capability {major}.{minor}, CUDA {torch.version.cuda}",
        card=name,
        listed=list_cards(),
        bf16=with_bf16,
        peak=find_peak(name),
    )

"""What a run computes in: its weights' dtype, or autocast to 16 bits."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dpo_runner.config.sections.training import TrainingConf


def has_bf16() -> bool:
    """Whether this machine multiplies bf16 matrices in hardware: CUDA since Ampere, x86 with AMX or avx512_bf16."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    cpu = torch.cpu
    return any(getattr(cpu, name, lambda: False)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def choose_autocast(training: TrainingConf) -> torch.dtype | None:
    """Return the dtype of a run's autocast, training and evaluation alike; None where it has none.

    Without `training.bf16` or `training.fp16` this machine's hardware decides.
    """
    if training.fp16:
        return torch.float16
    return torch.bfloat16 if (has_bf16() if training.bf16 is None else training.bf16) else None


@contextmanager
def autocast(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Compute as a run with that autocast does; None leaves each weight its dtype."""
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        yield

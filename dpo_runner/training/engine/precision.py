"""Compute precision of a run: the weights' dtype, or autocast to 16 bits."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dpo_runner.config.sections.training import TrainingConf
from dpo_runner.io.upstream import find_private
from dpo_runner.model.quantization import lacks_bf16


def has_bf16(use_cpu: bool = False) -> bool:
    """Return whether bf16 matmul is supported in hardware: CUDA since Ampere, x86 with AMX or avx512_bf16.

    Args:
        use_cpu: ask the CPU even if there is a GPU.
    """
    if torch.cuda.is_available() and not use_cpu:
        return not lacks_bf16()
    cpu = torch.cpu
    return any(find_private("torch", cpu, name)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def choose_autocast(training: TrainingConf) -> torch.dtype | None:
    """Return the autocast dtype of a run, for training and evaluation; None without autocast.

    If neither `training.bf16` nor `training.fp16` is set, the hardware decides.
    """
    if training.fp16 or (training.bf16 is not False and lacks_bf16(training.use_cpu)):
        return torch.float16
    return torch.bfloat16 if (has_bf16(training.use_cpu) if training.bf16 is None else training.bf16) else None


@contextmanager
def autocast(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Compute under autocast to `dtype`; None disables autocast."""
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        yield

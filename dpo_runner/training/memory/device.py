"""Free memory, out-of-memory errors, and an allocator setting. Importing this does not import torch."""

import ctypes
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dpo_runner.errors import ConfigError, RunError, reason_of

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
_KEEP_BYTES = 2**30


def keep_freed_memory() -> bool:
    """Make the allocator keep freed buffers instead of returning them to the kernel each time.

    A training step frees and reallocates the same buffers of a few hundred megabytes (log-probabilities over the
    vocabulary); by default glibc maps each of them anew and the kernel zeroes every page. Results do not change.

    Returns:
        Whether the allocator accepted the setting; False without glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_THRESHOLD, _KEEP_BYTES) and libc.mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES))


LOADING, PREPARING, TRAINING = "loading the model", "preparing the training", "training"
EVALUATION, ANSWERING, BENCHMARKS = "evaluation", "answering prompts", "benchmarks"

_MEMORY_WORDS = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "cannot allocate memory",
    "alloc_failed",
)
"""Parts of libraries' error messages; the last one is from cuBLAS and cuDNN."""
_DEVICE_WORDS = ("cuda", "cublas", "cudnn", "hip error")
_BROKEN_WORDS = ("cuda error", "cuda driver error", "cudnn error", "hip error", "triton")
_UNCLEAR_WORDS = ("could not create a ", "without exception set", "without setting an exception")
"""Of oneDNN and of Python, for a lack of memory and for other errors."""
_NEXT_TO_NOTHING = 2**27
"""Free bytes below which these words are taken for a lack of memory."""

_ASKED = re.compile(r"allocate ([\d.]+) (bytes|[KMGT]i?B)", re.IGNORECASE)
_UNITS = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


class OutOfMemory(RunError):
    """Error of a part of a run that ran out of memory.

    Args:
        part: such as `training`.
        sizes: the requested size, the free size and the device, in words.
        tokens: limit of a micro-batch; None if micro-batches are counted in rows.
        advice: settings that take less memory.
    """

    def __init__(self, part: str, sizes: str, tokens: int | None = None, advice: str = "") -> None:
        super().__init__(f"out of memory in {part}: {sizes}{advice and f'; {advice}'}")
        self.part, self.sizes, self.tokens = part, sizes, tokens

    def advised(self, advice: str) -> "OutOfMemory":
        """Return a copy with advice, without the traceback and cause, which keep tensors alive."""
        return OutOfMemory(self.part, self.sizes, self.tokens, advice)


@contextmanager
def watch_memory(part: str, tokens: int | None = None, advice: str = "") -> Iterator[None]:
    """Turn an out-of-memory error into one that names the part of the run; of nested parts, the inner one.

    Args:
        part: the part's name.
        tokens: limit of a micro-batch; None if micro-batches are counted in rows.
        advice: settings that take less memory, if known in advance.

    Raises:
        OutOfMemory: with the library's own error as its cause.
    """
    try:
        yield
    except OutOfMemory:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(part, _describe_sizes(error), tokens, advice) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error, or any of its causes, is out of memory, on a device or on the host."""
    return _find_cause(error) is not None


def is_of_device(error: BaseException) -> bool:
    """Return whether an error says nothing about the model: out of memory, or of CUDA, its libraries or Triton.

    After most errors of CUDA every later call in the process fails too.
    """
    kind, words = type(error), str(error).lower()
    own = kind.__name__ == "AcceleratorError" or kind.__module__.startswith("triton")
    return own or any(word in words for word in _BROKEN_WORDS) or is_out_of_memory(error)


def _find_cause(error: BaseException) -> BaseException | None:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (MemoryError, OutOfMemory)) or type(cause).__name__ == "OutOfMemoryError":
            return cause
        words, says = str(cause), isinstance(cause, (RuntimeError, OSError, SystemError))
        if says and any(word in words.lower() for word in _MEMORY_WORDS):
            return cause
        if says and any(word in words for word in _UNCLEAR_WORDS) and read_memory(True)[2] < _NEXT_TO_NOTHING:
            return cause
        cause = cause.__cause__ or cause.__context__
    return None


def _describe_sizes(error: BaseException) -> str:
    cause = _find_cause(error)
    of_device = any(word in str(cause).lower() for word in _DEVICE_WORDS)
    name, _, free = read_memory(of_host=type(cause).__name__ != "OutOfMemoryError" and not of_device)
    asked = _ASKED.search(str(cause))
    if asked is None:
        return f"{format_bytes(free)} were free on {name}"
    size = float(asked[1]) * _UNITS.get(asked[2][0].lower(), 1)
    return f"{format_bytes(size)} were asked for in one piece, with {format_bytes(free)} free on {name}"


def format_bytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


@dataclass(frozen=True)
class Device:
    """A device that a run trains on, at hand or only described.

    Attributes:
        name: the GPU's name, or `CPU`.
        total: its memory in bytes.
        free: what of it a run may take, in bytes.
        is_gpu: whether it is a GPU.
        has_varlen: whether packed pairs attend there in one call of torch's variable-length kernel.
    """

    name: str
    total: int
    free: int
    is_gpu: bool = False
    has_varlen: bool = False


def check_allocator() -> None:
    """Allocate on the GPU, whose driver may lack what `expandable_segments` needs, as in a share of a card (vGPU).

    Raises:
        ConfigError: it does.
    """
    import torch

    try:
        torch.empty(1, device="cuda")
    except RuntimeError as error:
        if "CUDA driver error" not in str(error):
            raise
        setting = f"PYTORCH_ALLOC_CONF={os.environ.get('PYTORCH_ALLOC_CONF', '')}"
        raise ConfigError(
            f"`{setting}`: the GPU's driver does not support it ({reason_of(error)}); "
            "set PYTORCH_ALLOC_CONF=expandable_segments:False in the environment"
        ) from error


def read_memory(of_host: bool) -> tuple[str, int, int]:
    """Return a device's name, its total memory and its free memory in bytes.

    Args:
        of_host: read the host's memory, limited by `ulimit -v`; otherwise the GPU's, if there is one.
    """
    import psutil
    import torch

    if not of_host and torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return torch.cuda.get_device_name(), total, free
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    if (limit := _read_limit()) is not None:
        total, free = min(total, limit), min(free, max(limit - psutil.Process().memory_info().vms, 0))
    return "CPU", total, free


def _read_limit() -> int | None:
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit

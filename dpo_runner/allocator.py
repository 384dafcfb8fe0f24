"""One setting of glibc's memory allocator that large CPU steps need."""

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
_KEEP_BYTES = 2**30


def keep_freed_memory() -> bool:
    """Let the process keep the buffers that it frees, instead of handing them back to the kernel every time.

    A training step frees and asks again for the same buffers of a few hundred megabytes (log-probabilities over
    the vocabulary); by default glibc maps each of them anew and the kernel zeroes every page. Changes no result.

    Returns:
        Whether the allocator took the setting; False where there is no glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_THRESHOLD, _KEEP_BYTES) and libc.mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES))

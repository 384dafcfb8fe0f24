"""Tracking of live tensors while a model runs on fake tensors, which have shapes but no memory."""

import platform
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

ACTIVATIONS, LOGITS, GRADIENTS = "activations", "logits", "gradients"

_HEAP_GAPS = {False: {ACTIVATIONS: 0.14, LOGITS: 0.7}, True: {ACTIVATIONS: 0.1}}
"""Gaps in glibc's heap as a share of the live tensors, without and with packed pairs.

A freed block's place is too small for an aligned block of the same size (before glibc 2.38). Fitted to measured peaks
(benchmarks/memory.md), because the gaps depend on every small block in between."""


class MemoryTracker(TorchDispatchMode):
    """Record the peak bytes of the tensors created inside, and their kinds at the peak.

    Args:
        kept: tensors that are not counted, such as the weights.
        widths: sizes over the vocabulary; a matrix with one of them is counted as logits.
        scratch: functions from arguments to bytes, for operators whose allocations show in no output tensor.

    Attributes:
        peak: bytes.
        alive: bytes at the peak, by kind.
    """

    def __init__(
        self, kept: Iterable[torch.Tensor], widths: set[int], scratch: dict[Any, Callable[..., int]] | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept = {storage_key(tensor.untyped_storage()) for tensor in kept}
        self._widths = widths
        self._scratch = scratch or {}
        self._storages: dict[int, tuple[weakref.ref[Any], int, str]] = {}
        self._now = {ACTIVATIONS: 0, LOGITS: 0, GRADIENTS: 0}
        self.peak = 0
        self.alive = dict(self._now)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return (
                0  # fake tensors have no values; 0, "not all tokens are attended to", makes transformers build a mask
            )
        out = func(*args, **(kwargs or {}))
        for leaf in tree_iter(out):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf)
        self._update_peak(self._scratch[func](*args) if func in self._scratch else 0)
        return out

    def reclassify(self, tensor: torch.Tensor, kind: str) -> None:
        """Count a tensor as `kind` from now on; start counting it if it is new."""
        self._note(tensor)
        key = storage_key(tensor.untyped_storage())
        if key in self._storages:
            reference, size, old = self._storages[key]
            self._storages[key] = (reference, size, kind)
            self._now[old] -= size
            self._now[kind] += size

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage_key(storage), storage.nbytes()
        if key in self._kept or key in self._storages or not size:
            return
        kind = LOGITS if tensor.ndim == 2 and self._widths.intersection(tensor.shape) else ACTIVATIONS
        self._storages[key] = (weakref.ref(storage, lambda _: self._forget(key)), size, kind)
        self._now[kind] += size

    def _forget(self, key: int) -> None:
        _, size, kind = self._storages.pop(key)
        self._now[kind] -= size

    def _update_peak(self, scratch: int) -> None:
        total = sum(self._now.values()) + scratch
        if total > self.peak:
            self.peak = total
            self.alive = self._now | {ACTIVATIONS: self._now[ACTIVATIONS] + scratch}


def storage_key(storage: torch.UntypedStorage) -> int:
    """Return what tells a storage from others; a fake one has no address."""
    key: int = storage._cdata
    return key


def count_heap_gaps(alive: dict[str, int], packed: bool) -> int:
    """Return the bytes that the CPU's allocator holds in addition to live tensors."""
    if platform.libc_ver()[0] != "glibc":
        return 0
    return round(sum(share * alive[kind] for kind, share in _HEAP_GAPS[packed].items()))

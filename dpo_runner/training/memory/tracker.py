"""Follow which tensors are alive while a model runs on fake tensors, which have shapes and dtypes but no memory."""

import platform
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

ACTIVATIONS, LOGITS, GRADIENTS = "activations", "logits", "gradients"

_HEAP_GAPS = {False: {ACTIVATIONS: 0.14, LOGITS: 0.7}, True: {ACTIVATIONS: 0.1}}
"""What glibc's heap holds beyond the tensors that are alive, as a share of them, without and with packed pairs: a
freed block's place is too small for an aligned block of the same size (before glibc 2.38). Fitted to measured peaks
(benchmarks/memory.md), for where they fall depends on every small block in between."""


class MemoryTracker(TorchDispatchMode):
    """Record the most bytes alive at once among the tensors made inside, and what they were then.

    Args:
        kept: tensors that are no part of the count, such as the weights.
        widths: sizes over the vocabulary; a matrix that has one is counted as logits.
        scratch: for operators that allocate what no tensor outside shows, a function of the arguments to bytes.

    Attributes:
        peak: bytes.
        alive: bytes at the peak, by what they are.
    """

    def __init__(
        self, kept: Iterable[torch.Tensor], widths: set[int], scratch: dict[Any, Callable[..., int]] | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept = {tensor.untyped_storage()._cdata for tensor in kept}
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
            return 0  # fake tensors have no values; "not all are attended to" makes transformers build its mask
        out = func(*args, **(kwargs or {}))
        for leaf in tree_iter(out):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf)
        self._update_peak(self._scratch[func](*args) if func in self._scratch else 0)
        return out

    def reclassify(self, tensor: torch.Tensor, kind: str) -> None:
        """Count a tensor as something else from here on, and a new one from here on at all."""
        self._note(tensor)
        key = tensor.untyped_storage()._cdata
        if key in self._storages:
            reference, size, old = self._storages[key]
            self._storages[key] = (reference, size, kind)
            self._now[old] -= size
            self._now[kind] += size

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
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


def count_heap_gaps(alive: dict[str, int], packed: bool) -> int:
    """Return the bytes that the allocator of the CPU holds beside tensors that are alive."""
    if platform.libc_ver()[0] != "glibc":
        return 0
    return round(sum(share * alive[kind] for kind, share in _HEAP_GAPS[packed].items()))

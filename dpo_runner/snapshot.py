"""All that a model consists of, as it was at one time, and the way back to it.

What a run does to its base model is the doing of many: PEFT replaces layers and freezes weights, TRL and the engine
replace `forward`, hooks are registered, gradient checkpointing and training mode are switched, Trainer changes the
config's special tokens. Nothing of that is undone one by one. Everything that can be reached from the model (modules,
weights, configs, and the dictionaries and lists between them) is recorded, and put back into the very same objects,
whatever has been done to them. The one thing that leaves nothing to put back is a weight whose memory was written to;
its bytes tell of it (XXH3, 0.1 s a gigabyte).

Refused: a model that holds a kind of object whose state is not known to be all in its attributes.
"""

import functools
import types
import weakref
from collections import OrderedDict, defaultdict
from enum import Enum
from typing import Any

import torch
import xxhash
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from dpo_runner.engine.identity import bytes_of

_CONSTANT = (
    *(type(None), bool, int, float, complex, str, bytes, type, Enum, torch.dtype, torch.device, torch.Size),
    *(types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial, weakref.ref),
)
"""Kinds that nobody changes in place."""

_DICTIONARIES, _SEQUENCES = (dict, OrderedDict, defaultdict), (list, set, tuple, frozenset)

_LIBRARIES = ("torch.nn.", "transformers.", "bitsandbytes.")
"""Whose objects have their state in their attributes."""


class Snapshot:
    """A model as it is when this is made.

    Args:
        model: recorded, and not changed.

    Raises:
        TypeError: it holds a kind of object that is not known here, in words that follow "it has".
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._objects: list[tuple[Any, type, dict[str, Any]]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._tensors: list[tuple[torch.Tensor, torch.Tensor, bool, int]] = []
        seen: dict[int, Any] = {}  # holds on to what it has seen, so that no id is used twice
        waiting: list[Any] = [model]
        while waiting:
            value = waiting.pop()
            if id(value) not in seen and not isinstance(value, _CONSTANT):
                seen[id(value)] = value
                waiting += self._record(value)

    def _record(self, value: Any) -> list[Any]:
        """Record one object, and return those that it refers to."""
        found: list[Any] = []
        if isinstance(value, torch.Tensor):
            self._tensors.append((value, value.data, value.requires_grad, _digest(value)))
        elif type(value) in _DICTIONARIES:
            self._containers.append((value, dict(value)))
            return [*value.keys(), *value.values()]
        elif type(value) in _SEQUENCES:
            if isinstance(value, (list, set)):
                self._containers.append((value, list(value)))
            return list(value)
        elif not isinstance(value, (nn.Module, PretrainedConfig)) and not type(value).__module__.startswith(_LIBRARIES):
            raise TypeError(f"a {type(value).__module__}.{type(value).__qualname__}, whose state is not known")
        if hasattr(value, "__dict__"):
            self._objects.append((value, type(value), dict(vars(value))))
            found += vars(value).values()
        return found

    def put_back(self) -> None:
        """Make all that was recorded what it was, but for the content of weights."""
        for value, kind, attributes in self._objects:
            if type(value) is not kind:
                value.__class__ = kind
            _refill(vars(value), attributes)
        for container, content in self._containers:
            _refill(container, content)
        for tensor, data, requires_grad, _ in self._tensors:
            tensor.grad = None
            tensor.data = data
            tensor.requires_grad_(requires_grad)

    def find_change(self) -> str | None:
        """Name a weight that has other bytes than it had, in words; None where all have their own."""
        for tensor, _, _, digest in self._tensors:
            if _digest(tensor) != digest:
                named = [*self._model.named_parameters(), *self._model.named_buffers()]
                name = next((name for name, each in named if each is tensor), "a constant of its quantization")
                return f"{name} has changed"
        return None


def _digest(tensor: torch.Tensor) -> int:
    return xxhash.xxh3_128_intdigest(bytes_of(tensor))


def _refill(container: Any, content: Any) -> None:
    container.clear()
    container.extend(content) if isinstance(container, list) else container.update(content)

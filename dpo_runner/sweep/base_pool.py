"""Reuse of the base model between the runs of one sweep worker."""

import functools
import gc
import random
import types
import weakref
from collections import OrderedDict, defaultdict
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from dpo_runner.io.upstream import find_commit
from dpo_runner.model.base import load_base_model
from dpo_runner.model.blueprint import Blueprint
from dpo_runner.model.policy import Say
from dpo_runner.training.engine.reference.identity import bytes_of
from dpo_runner.training.memory.fake_model import count_bytes

_CONSTANT = (
    *(type(None), bool, int, float, complex, str, bytes, type, Enum, torch.dtype, torch.device, torch.Size),
    *(types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial, weakref.ref),
)
"""Types that are not modified in place."""

_DICTIONARIES, _SEQUENCES = (dict, OrderedDict, defaultdict), (list, set, tuple, frozenset)

_LIBRARIES = ("torch.nn.", "transformers.", "bitsandbytes.")
"""Module prefixes of classes whose state is entirely in their attributes."""


class Snapshot:
    """A model's state at construction time, to restore later.

    Args:
        model: recorded, not modified.

    Raises:
        TypeError: the model holds an object of an unknown type; the message continues "it has".
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._objects: list[tuple[Any, type, dict[str, Any]]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._tensors: list[tuple[torch.Tensor, torch.Tensor, bool, int]] = []
        seen: dict[int, Any] = {}  # holds references, so that no id is reused
        waiting: list[Any] = [model]
        while waiting:
            value = waiting.pop()
            if id(value) not in seen and not isinstance(value, _CONSTANT):
                seen[id(value)] = value
                waiting += self._record(value)

    def _record(self, value: Any) -> list[Any]:
        """Record one object and return the objects that it refers to."""
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
        """Restore everything recorded except the content of weights."""
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

    def count_bytes(self, kind: str) -> int:
        """Return the bytes of the recorded tensors on devices of a kind.

        On a CPU only quantized weights count: others are mapped from their file, and their memory counts as free.
        """
        on_device = [data for _, data, _, _ in self._tensors if data.device.type == kind]
        held = [data for data in on_device if kind != "cpu" or not data.is_floating_point()]
        return count_bytes(held)

    def find_change(self) -> str | None:
        """Return a phrase that names a weight whose bytes have changed; None if none has."""
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


_ON_TOP = ("adapter", "adapter_revision", "adapter_mode", "reference", "chat_template", "pad_token")
"""Keys of `model` that affect only what is put on top of the base, given that nothing is merged into it."""


@dataclass(frozen=True)
class _Kept:
    identity: str
    model: PreTrainedModel
    path: str
    snapshot: Snapshot


class BasePool:
    """Keeps the base model of the last run for the next one.

    For a process that executes several runs in sequence. The next `load`, `put_back` or `clear` takes the base away
    from the run that uses it: that run's model is the bare base again.
    """

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def load(self, blueprint: Blueprint, say: Say) -> tuple[PreTrainedModel, str]:
        """Return the result of `load_base_model`, reusing the base of the run before if it is the same.

        Args:
            blueprint: the run's blueprint.
            say: shows one line to the user.

        Raises:
            ConfigError: the base cannot be loaded.
        """
        reason = why_not_kept(blueprint)
        identity = None if reason else _identify(blueprint)
        if self._kept is not None and self._kept.identity == identity:
            self.put_back()
            if (change := self._kept.snapshot.find_change()) is None:
                say("the base model is kept from the run before")
                return self._kept.model, self._kept.path
            say(f"engine.keep_base_model: the base model is loaded anew; {change}")
        self.clear()
        before = _random_state()
        base, path = load_base_model(blueprint)
        if reason is None and identity is None:
            reason = "it is not known which commit of the hub's repository it is"
        if reason is None and before != _random_state():
            reason = "loading it draws random numbers"
        if reason is None:
            assert identity is not None
            try:
                self._kept = _Kept(identity, base, path, Snapshot(base))
            except TypeError as error:
                reason = f"it has {error}"
        if reason is not None:
            say(f"engine.keep_base_model: the base model is not kept for the next run; {reason}")
        return base, path

    def count_bytes(self, use_cpu: bool) -> int:
        """Return the bytes that the base takes on the device that trains, without what is mapped from a file.

        Args:
            use_cpu: `training.use_cpu`.
        """
        if self._kept is None:
            return 0
        return self._kept.snapshot.count_bytes("cuda" if torch.cuda.is_available() and not use_cpu else "cpu")

    def put_back(self) -> None:
        """Restore the bare base, so that the memory of what a run put on it can be freed."""
        if self._kept is not None:
            self._kept.snapshot.put_back()

    def clear(self) -> None:
        """Free the base."""
        if self._kept is not None:
            self._kept = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def why_not_kept(blueprint: Blueprint) -> str | None:
    """Return why a run's base cannot be reused by another run; None if it can."""
    lora, vocabulary = blueprint.lora, blueprint.vocabulary
    if blueprint.trains_all:
        return "its own weights are trained"
    if blueprint.adapter_mode == "merge":
        return "an adapter is merged into it"
    if lora is not None and lora.modules_to_save:
        return "modules of it are trained (lora.modules_to_save)"
    if lora is not None and lora.init_lora_weights not in (True, False, "gaussian", "orthogonal"):
        return f"lora.init_lora_weights={lora.init_lora_weights} begins from its weights"
    if vocabulary.rows is not None or vocabulary.new_ids or vocabulary.replaces_base:
        return "its embeddings are resized or replaced"
    if blueprint.conf.device_map not in (None, "cpu"):
        return "model.device_map spreads it"
    return None


def _identify(blueprint: Blueprint) -> str | None:
    """Return everything that determines what is loaded, files by size and mtime; None if it is unknown."""
    folder = Path(blueprint.base)
    version: Any = find_commit(blueprint.config)
    if folder.is_dir():
        files = sorted(file for file in folder.resolve().rglob("*") if file.is_file())
        version = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    if version is None:
        return None
    settings = {key: value for key, value in asdict(blueprint.conf).items() if key not in _ON_TOP}
    return repr((blueprint.base, version, settings, None if blueprint.quant is None else asdict(blueprint.quant)))


def _random_state() -> str:
    cuda = [state.tolist() for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else []
    kept = np.random.get_state(legacy=False)
    assert isinstance(kept, dict)
    numpy = (kept["state"]["key"].tolist(), kept["state"]["pos"])
    return repr((torch.get_rng_state().tolist(), cuda, numpy, random.getstate()))

"""The model's layers, compiled by torch's inductor wherever packed rows are scored.

Between its matrix products a layer does many small things (norms, casts, LoRA's sums, the activation, residuals) that
each go over memory once; compiled, they go over it together. One compiled code serves all layers of a kind, for rows
of any length; attention (`attention.py`) stays as it is between the compiled parts. Training, evaluation and the
reference pass call layers with `pairs` and get the compiled code, so that policy and reference round alike. Whoever
calls without, as generation does, gets the layer as it was.

torch drops what it cannot hold silently, which is closed here:

- Its compiled code does not notice hooks within a layer that come or go. A layer is called uncompiled as long as there
  are any, such as those of the check that adapters move, in the first two steps.
- After so many variants of one code it goes on uncompiled. Here that ends the run, in one line.
- Code of an earlier run in the same process counts as variants too, so it is dropped first.
"""

import functools
import sysconfig
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo_runner.engine.attention import IMPLEMENTATION, attend
from dpo_runner.engine.packing import PairLengths
from dpo_runner.errors import ConfigError, RunError

_VARIANTS = 32
"""Of one code, before torch gives up: with gradient or without, adapter on or off, first layer or later, and such."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def check_compilable(model: PreTrainedModel, padding: str | None, use_cpu: bool) -> None:
    """Refuse `engine.compile_layers=true` where layers cannot be compiled.

    Args:
        model: the base model, which needs no weights.
        padding: why the run takes TRL's forward; None where it takes packed rows.
        use_cpu: whether the run trains on a CPU.

    Raises:
        ConfigError: they cannot; it says what is missing.
    """
    if padding is not None:
        reason = f"is for packed rows, and this run takes TRL's forward ({padding}); use engine.compile_layers=false"
    elif not use_cpu:
        reason = "is for runs on a CPU; use engine.compile_layers=false"
    elif not find_layers(model):
        reason = f"{type(model).__name__} is not made of transformers' layers; use engine.compile_layers=false"
    elif (lack := _find_lack()) is not None:
        reason = f"{lack}, or use engine.compile_layers=false"
    else:
        return
    raise ConfigError(f"`engine.compile_layers=True`: {reason}")


def _find_lack() -> str | None:
    """Say what this machine lacks to compile, and what to do about it; None where it has all."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, OSError):
        return "no C++ compiler is found; install g++, name one in the environment variable CXX"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return None if header.exists() else f"there is no {header}, Python's headers; install python3-dev"


def find_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """Return a model's repeated layers; none where it is not made of transformers' own kind."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def compile_layers(models: Sequence[nn.Module]) -> None:
    """Have the layers of models compiled when they are first called with packed rows.

    Args:
        models: whose scoring forward is that of `shared_prefix.py`; their layers get a `forward` of their own.

    Raises:
        RunError: in a later forward, if torch gives a layer up.
    """
    torch.compiler.reset()
    AttentionInterface.register(IMPLEMENTATION, torch.compiler.disable(_attend_hidden))
    compiled = _Compiled()
    for model in models:
        for layer in find_layers(model):
            layer.forward = types.MethodType(_build_forward(layer, compiled), layer)


class _Hidden:
    """Lengths of pairs where torch's compiler does not look at them: it would compile for each number of pairs."""

    def __init__(self, pairs: list[PairLengths]) -> None:
        self.pairs = pairs


def _attend_hidden(*args: Any, **kwargs: Any) -> Any:
    if isinstance(hidden := kwargs.get("pairs"), _Hidden):
        kwargs["pairs"] = hidden.pairs
    return attend(*args, **kwargs)


class _Compiled:
    """The compiled forward of each kind of layer."""

    def __init__(self) -> None:
        self._forwards: dict[type, Callable[..., Any]] = {}

    def __call__(self, layer: GradientCheckpointingLayer, *args: Any, pairs: list[PairLengths], **kwargs: Any) -> Any:
        from torch._dynamo import config
        from torch._dynamo.exc import FailOnRecompileLimitHit

        kind = type(layer)
        if kind not in self._forwards:
            plain = kind.forward.__wrapped__  # without gradient checkpointing around it
            self._forwards[kind] = torch.compile(plain, dynamic=True)
        try:
            with config.patch(
                recompile_limit=_VARIANTS, fail_on_recompile_limit_hit=True, automatic_dynamic_local_pgo=False
            ):
                return self._forwards[kind](layer, *args, pairs=_Hidden(pairs), **kwargs)
        except FailOnRecompileLimitHit:
            raise RunError(
                f"engine.compile_layers: torch has compiled {_VARIANTS} variants of {kind.__name__}, and "
                "would go on uncompiled; use engine.compile_layers=false"
            ) from None


def _build_forward(layer: GradientCheckpointingLayer, compiled: _Compiled) -> Callable[..., Any]:
    inner = [module for module in layer.modules() if module is not layer]

    def forward(self: GradientCheckpointingLayer, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("pairs") is None or any(getattr(module, name) for module in inner for name in _HOOKS):
            return type(self).forward(self, *args, **kwargs)
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(functools.partial(compiled, self, **kwargs), *args)
        return compiled(self, *args, **kwargs)

    return forward

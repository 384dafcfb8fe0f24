"""Whether a run keeps its 4-bit weights dequantized beside the packed ones: where there is plenty of memory for them.

`engine.keep_dequantized` says so, or leaves it to the memory estimate. Gradient checkpointing is decided about before,
as if nothing were kept, and a run that needs it for its memory keeps nothing. So the price of speed is memory that
nobody asked for.
"""

import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from trl import DPOConfig

from dpo_runner.checkpointing import bound_memory
from dpo_runner.config import EngineConf, RunConf
from dpo_runner.data.splits import PairShape
from dpo_runner.errors import ConfigError
from dpo_runner.estimate import estimate_memory, read_device, uses_cpu

_KEY = "engine.keep_dequantized"


def settle_dequantized(
    conf: RunConf,
    args: DPOConfig,
    model: PreTrainedModel,
    own: Any,
    short: bool,
    longest: int | None,
    largest: PairShape | None,
) -> tuple[EngineConf, str | None]:
    """Return the engine's settings with `keep_dequantized` settled, and for the plan which way and why.

    Args:
        conf: the run, `training.gradient_checkpointing` settled.
        args: of its trainer.
        model: the base model; it needs no weights.
        own: what the checkpoint's config says of its quantization.
        short: whether gradient checkpointing was switched on for want of memory.
        longest: tokens of the longest conversation; None where it is not known.
        largest: the pair with the most tokens; None where it is not known.

    Returns:
        The settings, and None in the place of words where the model has no 4-bit weights.

    Raises:
        ConfigError: `engine.keep_dequantized=true` where that cannot be.
    """
    asked = conf.engine.keep_dequantized
    size = count_matrices(conf, model, own)
    reason = None
    if not size:
        reason = "the model has no 4-bit weights of bitsandbytes; use quant=nf4, or leave it out"
    elif args.fsdp or args.deepspeed or args.torch_compile:
        reason = "not with training.fsdp, deepspeed or torch_compile; leave it out"
    if asked and reason is not None:
        raise ConfigError(f"`{_KEY}=true`: {reason}")
    if asked is False:
        reason = f"{_KEY}=false"
    elif asked is None:
        reason = reason or _explain_lack(conf, args, model, size, short, longest, largest)
    engine = dataclasses.replace(conf.engine, keep_dequantized=reason is None)
    if not size:
        return engine, None
    told = f"dequantized once and kept, {size / 1e9:.1f} GB" if reason is None else f"dequantized at each use; {reason}"
    return engine, told


def _explain_lack(
    conf: RunConf,
    args: DPOConfig,
    model: PreTrainedModel,
    size: int,
    short: bool,
    longest: int | None,
    largest: PairShape | None,
) -> str | None:
    """Say why there is no room for `size` bytes more, or return None where there is."""
    if not uses_cpu(args):
        return f"on a GPU {_KEY}=true keeps them"
    if short:
        return "memory is short"
    free = read_device(args)[2]
    if 2 * (bound_memory(conf, args, model, longest, largest) + size) < free:
        return None
    kept = dataclasses.replace(conf, engine=dataclasses.replace(conf.engine, keep_dequantized=True))
    try:
        total = estimate_memory(kept, longest, largest).total
    except ConfigError as error:
        return f"it is not known how much memory that leaves: {error}"
    if 2 * total <= free:
        return None
    return f"kept, they would make it {total / 1e9:.1f} GB, more than half of the {free / 1e9:.1f} GB free"


def count_matrices(conf: RunConf, model: PreTrainedModel, own: Any) -> int:
    """Return the bytes of the base's 4-bit weights in the dtype that they are multiplied in; 0 where there are none.

    Args:
        conf: the run.
        model: the base model, its layers replaced by bitsandbytes' where a run quantizes it.
        own: what the checkpoint's config says of its quantization, where it is quantized already.
    """
    if own is not None:
        brought = own if isinstance(own, dict) else own.to_dict()
        if not brought.get("load_in_4bit"):
            return 0
        dtype = str(brought.get("bnb_4bit_compute_dtype") or "float32")
    elif conf.quant is not None and conf.quant.load_in_4bit:
        dtype = conf.quant.bnb_4bit_compute_dtype
    else:
        return 0
    from bitsandbytes.nn import Linear4bit

    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    replaced = [module for module in linear if isinstance(module, Linear4bit)]
    layers = replaced or [module for module in linear if module is not model.get_output_embeddings()]
    weights = sum(int(layer.in_features) * int(layer.out_features) for layer in layers)
    itemsize: int = getattr(torch, dtype.removeprefix("torch.")).itemsize
    return itemsize * weights

"""Estimate of a training run's peak memory from the model's config alone.

It needs no weights, no tokenizer, and no device of the run's size. The real model class, PEFT's layers, bitsandbytes'
layers and TRL's fused head run forward and backward on fake tensors, which have shapes and dtypes only, while a tracker
records which tensors are alive.
"""

import copy
import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig
from trl import DPOConfig
from trl.trainer import utils as trl_utils

from dpo_runner.config.run_conf import RunConf
from dpo_runner.data.splits import DataShape, PairShape
from dpo_runner.errors import ConfigError
from dpo_runner.model.blueprint import Blueprint
from dpo_runner.training.engine.layers.lean import make_lean
from dpo_runner.training.engine.packed.forward import share_prefixes, trains_head, why_not_packable
from dpo_runner.training.engine.token_batches import choose_budget, why_not_grouped
from dpo_runner.training.memory.device import read_memory
from dpo_runner.training.memory.fake_model import build_fake_models, tensors_of
from dpo_runner.training.memory.fake_step import (
    build_packed_inputs,
    build_padded_inputs,
    count_dequantized_bytes,
    run_phase,
    without_tile_copies,
)
from dpo_runner.training.memory.tracker import ACTIVATIONS, GRADIENTS, LOGITS, MemoryTracker, count_heap_gaps

_FULL_DEPTH = 8
"""Deeper models are run with this many and half as many layers and extrapolated linearly."""

_COPIES = {  # 4-byte values that an optimizer keeps per weight
    "adamw_torch": 2,
    "adamw_torch_fused": 2,
    "paged_adamw": 2,
    "paged_adamw_32bit": 2,
    "ademamix": 3,
    "paged_ademamix_32bit": 3,
    "lion": 1,
    "lion_32bit": 1,
    "paged_lion": 1,
    "paged_lion_32bit": 1,
    "rmsprop": 1,
    "rmsprop_bnb": 1,
    "rmsprop_bnb_32bit": 1,
    "adagrad": 1,
    "sgd": 0,
}
_COPIES_8BIT = {  # 1-byte values, with a 4-byte absmax per 256 of them
    "adamw_8bit": 2,
    "adamw_bnb_8bit": 2,
    "paged_adamw_8bit": 2,
    "ademamix_8bit": 3,
    "paged_ademamix_8bit": 3,
    "lion_8bit": 1,
    "paged_lion_8bit": 1,
    "rmsprop_bnb_8bit": 1,
}


@dataclass
class MemoryEstimate:
    """The memory of a run at its peak.

    Attributes:
        rows: bytes by purpose; they add up to `total`.
        phases: peak bytes of each phase, everything counted.
        advice: the settings that would save most.
        length: tokens of the longest row assumed.
        device: the accelerator's name, or `CPU`.
        device_total: its memory in bytes.
        device_free: its free memory in bytes.
    """

    rows: dict[str, int]
    phases: dict[str, int]
    advice: str
    length: int
    device: str
    device_total: int
    device_free: int

    @property
    def total(self) -> int:
        """Peak in bytes, without the process itself and CUDA's context (about 0.5 GB each)."""
        return sum(self.rows.values())

    @property
    def phase(self) -> str:
        """The phase with the highest peak."""
        return max(self.phases, key=lambda name: self.phases[name])

    @property
    def title(self) -> str:
        """Heading of the estimate's table."""
        return f"estimated peak memory, with {self.length:,} tokens to the longest row"

    @property
    def totals(self) -> dict[str, int]:
        """The peak and the free memory, in bytes."""
        return {f"at the peak ({self.phase})": self.total, f"free on {self.device}": self.device_free}

    @property
    def shortage(self) -> str:
        """One line with the memory needed, the memory free, and the settings that take less."""
        return (
            f"about {self.total / 1e9:.1f} GB are needed, {self.device_free / 1e9:.1f} GB are free on "
            f"{self.device} ({self.device_total / 1e9:.1f} GB in all); {self.advice}"
        )

    @property
    def fits(self) -> bool:
        """True if the peak fits into the memory free now."""
        return self.total <= self.device_free


def estimate_memory(conf: RunConf, args: DPOConfig, blueprint: Blueprint, shape: DataShape) -> MemoryEstimate:
    """Estimate a run's peak memory, on one device, from the model's config.

    Args:
        conf: the run's configuration.
        args: its trainer's.
        blueprint: its model's.
        shape: row lengths of its data.

    Returns:
        The peak over the phases training (policy, reference, backward), optimizer step and evaluation.

    Raises:
        ConfigError: there is no model config, or the memory of a setting cannot be estimated.
    """
    shape, args = shape.cut(conf.training.max_length), copy.copy(args)
    args.precompute_ref_log_probs |= blueprint.reference.is_stored
    config = blueprint.config
    _check_estimable(conf, args)
    depth = getattr(config.get_text_config(), "num_hidden_layers", 0)
    kinds = getattr(config.get_text_config(), "layer_types", None) or []
    if depth > _FULL_DEPTH and len(set(kinds)) < 2:
        cuts = (blueprint.with_config(_cut(config, layers)) for layers in (_FULL_DEPTH // 2, _FULL_DEPTH))
        half, whole = (_simulate(cut, conf, args, shape) for cut in cuts)
        held, phases = _extrapolate(half, whole, (depth - _FULL_DEPTH) / (_FULL_DEPTH - _FULL_DEPTH // 2))
    else:
        held, phases = _simulate(blueprint, conf, args, shape)
    peak = max(phases.values(), key=lambda rows: sum(rows.values()))
    name, total, free = read_device(args)
    totals = {phase: sum(held.values()) + sum(rows.values()) for phase, rows in phases.items()}
    return MemoryEstimate(held | peak, totals, _advise(conf, held | peak), shape.longest, name, total, free)


Rows = dict[str, int]


def _advise(conf: RunConf, rows: Rows) -> str:
    """Return the settings that would save most, the largest share first."""
    training = conf.training
    ways: dict[str, list[str]] = {"weights": [], "optimizer": [], "reference": [], ACTIVATIONS: [], LOGITS: []}
    if conf.quant is None:
        ways["weights"] += ["quant=nf4"]
    if conf.lora is None and conf.model.adapter is None:
        ways["optimizer"] += ["lora=r16"]
        ways["reference"] += ["engine.reference_store=true"]
    if not training.gradient_checkpointing:
        ways[ACTIVATIONS] += ["training.gradient_checkpointing=true"]
    if (batch := training.per_device_train_batch_size) > 1:
        accumulation = training.gradient_accumulation_steps * 2
        smaller = f"training.per_device_train_batch_size={batch // 2}"
        ways[LOGITS] += [f"{smaller} training.gradient_accumulation_steps={accumulation}"]
    order = sorted(ways, key=lambda row: rows[row], reverse=True)
    keys = [key for row in order for key in ways[row] if rows[row]] or ["a smaller training.max_length"]
    return "try " + ", or ".join(keys)


def _check_estimable(conf: RunConf, args: DPOConfig) -> None:
    reason = None
    if args.optim not in {*_COPIES, *_COPIES_8BIT, "adafactor"}:
        reason = f"training.optim={args.optim.value}"
    elif args.activation_offloading or conf.training.deepspeed or args.fsdp:
        reason = "training.activation_offloading, deepspeed or fsdp"
    if reason:
        raise ConfigError(f"`{reason}`: its memory cannot be estimated")


def _cut(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    cut = copy.deepcopy(config)
    text = cut.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return cut


def _extrapolate(
    half: tuple[Rows, dict[str, Rows]], whole: tuple[Rows, dict[str, Rows]], more: float
) -> tuple[Rows, dict[str, Rows]]:
    def go_on(low: Rows, high: Rows) -> Rows:
        return {name: round(high[name] + more * (high[name] - low[name])) for name in high}

    return go_on(half[0], whole[0]), {phase: go_on(half[1][phase], rows) for phase, rows in whole[1].items()}


def _simulate(blueprint: Blueprint, conf: RunConf, args: DPOConfig, shape: DataShape) -> tuple[Rows, dict[str, Rows]]:
    """Run the phases on fake tensors, with the longest rows, or with the largest pairs if they are packed.

    Returns:
        Bytes held throughout, and the additional bytes of each phase at its peak.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    policy, reference, held = build_fake_models(blueprint, args, mode)
    models = [model for model in (policy, reference) if model is not None]
    packed = conf.engine.shared_prefix and _share_prefixes(models, shape.longest, args)
    use_cpu = uses_cpu(args)
    if conf.engine.lean_layers:
        make_lean(policy, use_cpu)
    with mode:
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        held["optimizer"] = _count_optimizer(args.optim, trained)
        kept = [tensor for model in models for tensor in tensors_of(model)]
        width = blueprint.config.get_text_config().vocab_size
        chunk = trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE
        widths = {width, width % chunk, min(width, chunk), chunk} - {0}
        phases = {}
        scratch = {torch.ops.bitsandbytes.gemm_4bit.default: count_dequantized_bytes}
        with nullcontext() if use_cpu else without_tile_copies():
            for phase in ("training", "evaluation"):
                tracker = MemoryTracker(kept, widths, scratch)
                batch = args.per_device_train_batch_size if phase == "training" else args.per_device_eval_batch_size
                if packed:
                    budget = count_tokens_at_once(conf, args, shape.largest) if phase == "training" else None
                    inputs = build_packed_inputs(shape.largest, batch, budget)
                else:
                    inputs = build_padded_inputs(2 * batch, shape.longest)
                with tracker:
                    run_phase(phase, policy, reference, trained, tracker, args, inputs)
                phases[phase] = {
                    "gradients": tracker.alive[GRADIENTS],
                    "activations": tracker.alive[ACTIVATIONS],
                    "logits": tracker.alive[LOGITS],
                    "heap gaps": count_heap_gaps(tracker.alive, packed) if use_cpu else 0,
                }
        gradients = sum(parameter.nbytes for parameter in trained)
        phases["optimizer step"] = {"gradients": gradients, "activations": 0, "logits": 0, "heap gaps": 0}
    return held, phases


def _share_prefixes(models: list[Any], length: int, args: DPOConfig) -> bool:
    """Install the engine's forward in policy and reference if a run would, and return whether it would."""
    if any(why_not_packable(model, length, args) for model in models):
        return False
    for model in models:
        share_prefixes(model, trains_head(models[0]))
    return True


def count_tokens_at_once(conf: RunConf, args: DPOConfig, pair: PairShape) -> int | None:
    """Return the tokens of a micro-batch; None if micro-batches are counted in rows."""
    batch = args.per_device_train_batch_size
    if (
        why_not_grouped(args.loss_type)
        or (budget := choose_budget(conf.engine, batch, sum(pair), uses_cpu(args))) is None
    ):
        return None
    whole: int = batch * args.gradient_accumulation_steps * sum(pair)
    return max(min(budget, whole), sum(pair))


def _count_optimizer(name: str, trained: list[torch.nn.Parameter]) -> int:
    sizes = [parameter.numel() for parameter in trained]
    if name in _COPIES:
        return 4 * _COPIES[name] * sum(sizes)
    if name in _COPIES_8BIT:  # state of weights with fewer than 4096 values stays 32-bit
        return _COPIES_8BIT[name] * sum(4 * n if n < 4096 else n + 4 * -(-n // 256) for n in sizes)
    # Adafactor keeps row and column sums and no first moment
    return 4 * sum(sum(p.shape[-2:]) * math.prod(p.shape[:-2]) if p.ndim > 1 else p.numel() for p in trained)


def uses_cpu(args: DPOConfig) -> bool:
    """Return whether training runs on the CPU."""
    return bool(args.use_cpu) or not torch.cuda.is_available()


def read_device(args: DPOConfig) -> tuple[str, int, int]:
    """Return the training device's name, its total memory and its free memory in bytes."""
    return read_memory(of_host=uses_cpu(args))

"""Estimate of a training run's peak memory from the model's config alone.

It needs no weights, no tokenizer, and no device of the run's size. The real model class, PEFT's layers, bitsandbytes'
layers and TRL's fused head run forward and backward on fake tensors, which have shapes and dtypes only, while a tracker
records which tensors are alive.
"""

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig
from trl import DPOConfig
from trl.trainer import utils as trl_utils

from dpo_runner.config.run_conf import RunConf, count_processes
from dpo_runner.data.splits import DataShape, PairShape
from dpo_runner.errors import ConfigError
from dpo_runner.io.upstream import check_names
from dpo_runner.model.blueprint import Blueprint
from dpo_runner.training.engine.layers.lean import make_lean
from dpo_runner.training.engine.packed.forward import share_prefixes, trains_head, why_not_packable
from dpo_runner.training.engine.packed.varlen_attention import has_kernel
from dpo_runner.training.engine.token_batches import choose_budget, why_not_grouped
from dpo_runner.training.memory.device import Device, check_allocator, read_memory
from dpo_runner.training.memory.fake_model import build_fake_models, fake_mode, tensors_of
from dpo_runner.training.memory.fake_step import (
    SCRATCH,
    build_packed_inputs,
    build_padded_inputs,
    choose_attention,
    run_phase,
    without_tile_copies,
)
from dpo_runner.training.memory.optimizer import KNOWN, count_optimizer
from dpo_runner.training.memory.sharded import count_gathered, divide
from dpo_runner.training.memory.tracker import ACTIVATIONS, GRADIENTS, LOGITS, MemoryTracker, count_heap_gaps

check_names("trl", trl_utils, "_CHUNKED_LOGPROB_CHUNK_SIZE")

_FULL_DEPTH = 8
"""Deeper models are run with this many and half as many layers and extrapolated linearly."""

_SPARE = 0.1
"""Share of the peak that a GPU must have beside it, for gaps between blocks and libraries' workspaces; not measured."""


@dataclass
class MemoryEstimate:
    """The memory of a run at its peak.

    Attributes:
        rows: bytes by purpose; they add up to `total`.
        phases: peak bytes of each phase, everything counted.
        advice: the settings that would save most.
        length: tokens of the longest row assumed.
        device: what the run trains on.
    """

    rows: dict[str, int]
    phases: dict[str, int]
    advice: str
    length: int
    device: Device

    @property
    def total(self) -> int:
        """Peak in bytes, without the process itself and CUDA's context (about 0.5 GB each)."""
        return sum(self.rows.values())

    @property
    def needed(self) -> int:
        """The free bytes that the run needs: the peak, and on a GPU a tenth more."""
        return round(self.total * (1 + _SPARE)) if self.device.is_gpu else self.total

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
        return {f"at the peak ({self.phase})": self.total, f"free on {self.device.name}": self.device.free}

    @property
    def shortage(self) -> str:
        """One line with the memory needed, the memory free, and the settings that take less."""
        return (
            f"about {self.needed / 1e9:.1f} GB are needed, {self.device.free / 1e9:.1f} GB are free on "
            f"{self.device.name} ({self.device.total / 1e9:.1f} GB in all); {self.advice}"
        )

    @property
    def fits(self) -> bool:
        """True if what is needed is free now."""
        return self.needed <= self.device.free


def estimate_memory(
    conf: RunConf, args: DPOConfig, blueprint: Blueprint, shape: DataShape, device: Device | None = None
) -> MemoryEstimate:
    """Estimate a run's peak memory, on one device, from the model's config.

    Args:
        conf: the run's configuration.
        args: its trainer's.
        blueprint: its model's.
        shape: row lengths of its data.
        device: what it trains on; by default the device at hand.

    Returns:
        The peak over the phases training (policy, reference, backward), optimizer step and evaluation.

    Raises:
        ConfigError: there is no model config, or the memory of a setting cannot be estimated.
    """
    device = device or read_device(args)
    shape, args = shape.cut(conf.training.max_length), copy.copy(args)
    args.precompute_ref_log_probs |= blueprint.reference.is_stored
    config = blueprint.config
    _check_estimable(conf, args)
    depth = getattr(config.get_text_config(), "num_hidden_layers", 0)
    kinds = getattr(config.get_text_config(), "layer_types", None) or []
    if depth > _FULL_DEPTH and len(set(kinds)) < 2:
        cuts = (blueprint.with_config(_cut(config, layers)) for layers in (_FULL_DEPTH // 2, _FULL_DEPTH))
        half, whole = (_simulate(cut, conf, args, shape, device) for cut in cuts)
        held, phases = _extrapolate(half, whole, (depth - _FULL_DEPTH) / (_FULL_DEPTH - _FULL_DEPTH // 2))
    else:
        held, phases = _simulate(blueprint, conf, args, shape, device)
    held, phases = divide(held, conf), {phase: divide(rows, conf) for phase, rows in phases.items()}
    peak = max(phases.values(), key=lambda rows: sum(rows.values()))
    totals = {phase: sum(held.values()) + sum(rows.values()) for phase, rows in phases.items()}
    return MemoryEstimate(held | peak, totals, _advise(conf, held | peak), shape.longest, device)


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
        accumulation = training.gradient_accumulation_steps // count_processes(conf) * 2
        smaller = f"training.per_device_train_batch_size={batch // 2}"
        ways[LOGITS] += [f"{smaller} training.gradient_accumulation_steps={accumulation}"]
    order = sorted(ways, key=lambda row: rows[row], reverse=True)
    keys = [key for row in order for key in ways[row] if rows[row]] or ["a smaller training.max_length"]
    return "try " + ", or ".join(keys)


def _check_estimable(conf: RunConf, args: DPOConfig) -> None:
    reason = None
    if args.optim not in KNOWN:
        reason = f"training.optim={args.optim.value}"
    elif args.activation_offloading:
        reason = "training.activation_offloading=True"
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


def _simulate(
    blueprint: Blueprint, conf: RunConf, args: DPOConfig, shape: DataShape, device: Device
) -> tuple[Rows, dict[str, Rows]]:
    """Run the phases on fake tensors, with the longest rows, or with the largest pairs if they are packed.

    Fake tensors lie on the CPU. What a GPU computes in another way is replaced, whatever the machine.

    Returns:
        Bytes held throughout, and the additional bytes of each phase at its peak.
    """
    mode = fake_mode()
    policy, reference, held = build_fake_models(blueprint, args, mode)
    models = [model for model in (policy, reference) if model is not None]
    packed = conf.engine.shared_prefix and _share_prefixes(models, shape.longest, args, device)
    if conf.engine.lean_layers:
        make_lean(policy, not device.is_gpu)
    with mode:
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        held |= {"optimizer": count_optimizer(args.optim, trained), **count_gathered(policy, conf)}
        kept = [tensor for model in models for tensor in tensors_of(model)]
        width = blueprint.config.get_text_config().vocab_size
        chunk = trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE
        widths = {width, width % chunk, min(width, chunk), chunk} - {0}
        phases = {}
        attention = choose_attention(device.has_varlen) if device.is_gpu else None
        with without_tile_copies() if device.is_gpu else nullcontext():
            for phase in ("training", "evaluation"):
                tracker = MemoryTracker(kept, widths, SCRATCH)
                batch = args.per_device_train_batch_size if phase == "training" else args.per_device_eval_batch_size
                if packed:
                    trains = phase == "training"
                    tokens = count_tokens_at_once(conf, args, shape.largest, device) if trains else None
                    inputs = build_packed_inputs(shape.largest, batch, tokens, attention)
                else:
                    inputs = build_padded_inputs(2 * batch, shape.longest)
                with tracker:
                    run_phase(phase, policy, reference, trained, tracker, args, inputs)
                phases[phase] = {
                    "gradients": tracker.alive[GRADIENTS],
                    "activations": tracker.alive[ACTIVATIONS],
                    "logits": tracker.alive[LOGITS],
                    "heap gaps": 0 if device.is_gpu else count_heap_gaps(tracker.alive, packed),
                }
        gradients = sum(parameter.nbytes for parameter in trained)
        phases["optimizer step"] = {"gradients": gradients, "activations": 0, "logits": 0, "heap gaps": 0}
    return held, phases


def _share_prefixes(models: list[Any], length: int, args: DPOConfig, device: Device) -> bool:
    """Install the engine's forward in policy and reference if a run would, and return whether it would."""
    if any(why_not_packable(model, length, args) for model in models):
        return False
    for model in models:
        share_prefixes(model, device.is_gpu or trains_head(models[0]))  # a GPU takes TRL's kernel for the head anyway
    return True


def count_tokens_at_once(conf: RunConf, args: DPOConfig, pair: PairShape, device: Device) -> int | None:
    """Return the tokens of a micro-batch; None if micro-batches are counted in rows."""
    batch = args.per_device_train_batch_size
    if (
        why_not_grouped(args.loss_type)
        or (budget := choose_budget(conf.engine, batch, sum(pair), not device.is_gpu)) is None
    ):
        return None
    whole: int = batch * args.gradient_accumulation_steps * sum(pair)
    return max(min(budget, whole), sum(pair))


def read_device(args: DPOConfig, held: int = 0) -> Device:
    """Return the device that training runs on.

    Args:
        args: TRL's settings.
        held: bytes that this process holds there and gives up for the run.

    Raises:
        ConfigError: nothing can be allocated on the GPU with torch's allocator set as it is.
    """
    if is_gpu := torch.cuda.is_available() and not args.use_cpu:
        check_allocator()
    name, total, free = read_memory(of_host=not is_gpu)
    return Device(name, total, free + held, is_gpu, is_gpu and has_kernel(args.device))

"""Settle the settings that a configuration leaves open, before any weight is loaded.

Gradient checkpointing computes every layer twice, a third more work, for the same gradients. It is on if
`training.gradient_checkpointing=true`, or if the memory estimate says that the run would not fit without it, unless
`engine.auto_gradient_checkpointing=false`. On a GPU smaller micro-batches, which cost less, are tried before. If memory
cannot be estimated, the settings stay unchanged.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from trl import DPOConfig

from dpo_runner.config.rules.training import NO_EVALUATION_ROWS, find_vain_evaluation
from dpo_runner.config.run_conf import RunConf, count_processes
from dpo_runner.data.splits import DataShape
from dpo_runner.errors import ConfigError
from dpo_runner.model.blueprint import Blueprint
from dpo_runner.model.quantization import lacks_bf16
from dpo_runner.training.answers.benchmarks.tasks import check_tasks
from dpo_runner.training.answers.rewards.reward import build_reward
from dpo_runner.training.build import build_dpo_config
from dpo_runner.training.engine.install import why_not_packed
from dpo_runner.training.engine.packed.forward import is_certain
from dpo_runner.training.engine.precision import has_bf16
from dpo_runner.training.memory.device import Device
from dpo_runner.training.memory.estimate import MemoryEstimate, count_tokens_at_once, estimate_memory, read_device

_BYTES_PER_WEIGHT = 20
"""Weight, gradient, Adam's two moments and the reference's copy, in fp32."""

_ENOUGH = 2048
"""Tokens of a micro-batch with which a GPU's matrix products are large; with fewer, checkpointing may cost less."""

_ACCUMULATION = "training.gradient_accumulation_steps"

Settings = Mapping[str, Any]
"""Values by dotted key."""


@dataclass(frozen=True)
class Settled:
    """A run's configuration, as requested and as executed. Picklable.

    Attributes:
        asked: the configuration as composed.
        conf: the configuration as executed.
        args: TRL's settings, built from `conf`.
        shape: lengths and counts of the run's rows.
        notes: what `conf` does otherwise than the reader expects, and why, by label in the plan.
    """

    asked: RunConf
    conf: RunConf
    args: DPOConfig
    shape: DataShape
    notes: dict[str, str] = field(default_factory=dict)

    def with_settings(self, settings: Settings) -> "Settled":
        """Return the run with changed settings, such as smaller batches."""
        if not settings:
            return self
        executed = dict(settings)
        if _ACCUMULATION in settings:
            executed[_ACCUMULATION] *= count_processes(self.asked)
        conf = with_settings(self.conf, executed)
        args = build_dpo_config(conf, Path(self.args.output_dir))
        return replace(self, asked=with_settings(self.asked, settings), conf=conf, args=args)

    def estimate(self, blueprint: Blueprint) -> MemoryEstimate:
        """Estimate the run's peak memory.

        Raises:
            ConfigError: peak memory cannot be estimated.
        """
        return estimate_memory(self.conf, self.args, blueprint, self.shape)


def settle(conf: RunConf, blueprint: Blueprint, shape: DataShape, checkpoints: Path, held: int = 0) -> Settled:
    """Settle the settings that a configuration leaves open.

    Args:
        conf: the configuration as composed.
        blueprint: the model's blueprint.
        shape: lengths and counts of the rows.
        checkpoints: the folder for checkpoints.
        held: bytes of the device that this process holds and gives up for the run.

    Raises:
        ConfigError: TRL or transformers rejects the settings, or they need evaluation rows, and there are none.
    """
    if conf.samples.reward:
        build_reward(conf.reward)  # a missing package, function or model ends the run here, before training
    check_tasks(conf)
    # Each process sees all batches of a step; see `ranks.group`.
    batches = conf.training.gradient_accumulation_steps * count_processes(conf)
    executed, notes = with_settings(conf, {_ACCUMULATION: batches}), {}
    if not shape.has_evaluation:
        executed = _leave_out_evaluation(executed)
        notes["evaluation"] = "none, there are no evaluation rows"
    args = build_dpo_config(executed, checkpoints)
    if args.device.type == "cpu" and not has_bf16(use_cpu=True):
        slow = {"model.dtype=float32": blueprint.dtype != torch.float32, "training.bf16=false": args.bf16}
        if cures := [cure for cure, applies in slow.items() if applies]:
            notes["speed"] = f"this CPU emulates 16-bit arithmetic, many times slower; use {' '.join(cures)}"
    if lacks_bf16(conf.training.use_cpu):
        notes["precision"] = f"fp16 instead of bf16, which {torch.cuda.get_device_name()} lacks"
    device = read_device(args, held)
    if not device.is_gpu:
        device = replace(device, free=device.free // count_processes(conf))
    settings, note = _save_memory(executed, args, blueprint, shape, device)
    if settings:
        executed = with_settings(executed, settings)
        args = build_dpo_config(executed, checkpoints)
    return Settled(conf, executed, args, shape, notes | note)


def _leave_out_evaluation(conf: RunConf) -> RunConf:
    """Return a run without evaluation rows without the evaluations that only a preset asks for.

    Raises:
        ConfigError: the user's own settings need evaluation rows.
    """
    if conf.sweep.search.sampler is not None and conf.sweep.search.objective.startswith("eval_"):
        raise ConfigError(f"`sweep.search.objective={conf.sweep.search.objective}`: {NO_EVALUATION_ROWS}")
    executed = with_settings(conf, {"training.eval_strategy": "no"}) if conf.evaluation_is_optional else conf
    if vain := find_vain_evaluation(executed.training):
        raise ConfigError(vain)
    return executed


def _save_memory(
    conf: RunConf, args: DPOConfig, blueprint: Blueprint, shape: DataShape, device: Device
) -> tuple[Settings, dict[str, str]]:
    """Return the settings that the run needs to fit, and a note for the plan; both are empty if it needs none."""
    if conf.training.gradient_checkpointing or not conf.engine.auto_gradient_checkpointing:
        return {}, {}
    if conf.training.activation_checkpointing is not None:  # transformers' new name, which goes before
        return {}, {}
    bound = bound_memory(conf, args, blueprint, shape, device)
    if not blueprint.meta.supports_gradient_checkpointing or 2 * bound < device.free:
        return {}, {}
    try:
        whole = estimate_memory(conf, args, blueprint, shape, device)
        if whole.fits:
            return {}, {}
        free = f"{device.free / 1e9:.1f} GB free on {device.name}"
        for tokens in _halve_budget(conf, args, blueprint, shape, device):
            settings = {"engine.max_tokens_per_micro_batch": tokens}
            if estimate_memory(with_settings(conf, settings), args, blueprint, shape, device).fits:
                note = f"at most {tokens:,} tokens ({whole.needed / 1e9:.1f} GB needed with more; {free})"
                return settings, {"micro-batches": note}
    except ConfigError:
        return {}, {}
    note = f"switched on ({whole.needed / 1e9:.1f} GB needed without it; {free})"
    return {"training.gradient_checkpointing": True}, {"checkpointing": note}


def _halve_budget(
    conf: RunConf, args: DPOConfig, blueprint: Blueprint, shape: DataShape, device: Device
) -> Iterator[int]:
    """Yield smaller token budgets of a micro-batch, down to the largest pair, or to what keeps a GPU busy."""
    if not device.is_gpu or why_not_packed(conf, blueprint, shape.longest) is not None:
        return
    pair = shape.cut(args.max_length).largest
    tokens, least = count_tokens_at_once(conf, args, pair, device), max(sum(pair), _ENOUGH)
    while tokens is not None and tokens > least:
        tokens = max(tokens // 2, least)
        yield tokens


def with_settings(conf: RunConf, settings: Settings) -> RunConf:
    """Return a configuration with settings changed by dotted key."""
    for key, value in settings.items():
        section, _, name = key.partition(".")
        changed = replace(getattr(conf, section), **{name: value})
        conf = replace(conf, **{section: changed})
    return conf


def bound_memory(conf: RunConf, args: DPOConfig, blueprint: Blueprint, shape: DataShape, device: Device) -> float:
    """Return a cheap upper bound of a run's memory in bytes, inf if unknown; the estimate takes seconds.

    Args:
        conf: the configuration.
        args: TRL's settings.
        blueprint: the model's blueprint.
        shape: lengths and counts of the rows.
        device: what the run trains on.
    """
    cut, model = shape.cut(args.max_length), blueprint.meta
    text = model.config.get_text_config()
    keys = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    sizes = [size for key in keys if isinstance(size := getattr(text, key, None), int)]
    if len(sizes) < len(keys):
        return math.inf
    layers, hidden, inner, heads, vocabulary = sizes
    # bytes per token and layer in 16 bits: inputs of matmuls and norms; attention weights to 1024 other tokens
    per_layer = (60 * hidden + 8 * inner + 2 * 1024 * heads) * (1 if args.bf16 or args.fp16 else 2)
    training, evaluation = args.per_device_train_batch_size, args.per_device_eval_batch_size
    if why_not_packed(conf, blueprint, shape.longest) is None and is_certain(model):
        pair = sum(cut.largest)
        tokens, scored = count_tokens_at_once(conf, args, cut.largest, device) or training * pair, evaluation * pair
    else:
        tokens, scored = 2 * max(training, evaluation) * cut.longest, 0
    of_tokens = max(tokens * (layers * per_layer + 8 * vocabulary), scored * (2 * per_layer + 8 * vocabulary))
    return float(_BYTES_PER_WEIGHT * model.num_parameters() + of_tokens)

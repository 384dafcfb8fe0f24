"""Settle the settings that a configuration leaves open, before any weight is loaded.

Gradient checkpointing computes every layer twice, a third more work, for the same gradients. It is on if
`training.gradient_checkpointing=true`, or if the memory estimate says that the run would not fit without it, unless
`engine.auto_gradient_checkpointing=false`. If memory cannot be estimated, the setting stays unchanged.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trl import DPOConfig

from dpo_runner.config.run_conf import RunConf
from dpo_runner.data.splits import DataShape
from dpo_runner.errors import ConfigError
from dpo_runner.model.blueprint import Blueprint
from dpo_runner.training.build import build_dpo_config
from dpo_runner.training.engine.install import why_not_packed
from dpo_runner.training.engine.packed.forward import is_certain
from dpo_runner.training.memory.estimate import MemoryEstimate, count_tokens_at_once, estimate_memory, read_device

_BYTES_PER_WEIGHT = 20
"""Weight, gradient, Adam's two moments and the reference's copy, in fp32."""

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
        notes: why `conf` differs from `asked`, by label in the plan.
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
        conf = with_settings(self.conf, settings)
        args = build_dpo_config(conf, Path(self.args.output_dir))
        return replace(self, asked=with_settings(self.asked, settings), conf=conf, args=args)

    def estimate(self, blueprint: Blueprint) -> MemoryEstimate:
        """Estimate the run's peak memory.

        Raises:
            ConfigError: peak memory cannot be estimated.
        """
        return estimate_memory(self.conf, self.args, blueprint, self.shape)


def settle(conf: RunConf, blueprint: Blueprint, shape: DataShape, checkpoints: Path) -> Settled:
    """Settle the settings that a configuration leaves open.

    Args:
        conf: the configuration as composed.
        blueprint: the model's blueprint.
        shape: lengths and counts of the rows.
        checkpoints: the folder for checkpoints.

    Raises:
        ConfigError: TRL or transformers rejects the settings.
    """
    args = build_dpo_config(conf, checkpoints)
    if (lack := _find_lack_of_memory(conf, args, blueprint, shape)) is None:
        return Settled(conf, conf, args, shape)
    executed = with_settings(conf, {"training.gradient_checkpointing": True})
    notes = {"checkpointing": f"of gradients, switched on: {lack}"}
    return Settled(conf, executed, build_dpo_config(executed, checkpoints), shape, notes)


def _find_lack_of_memory(conf: RunConf, args: DPOConfig, blueprint: Blueprint, shape: DataShape) -> str | None:
    """Return the memory shortage that requires gradient checkpointing, in words; None if there is none."""
    if conf.training.gradient_checkpointing or not conf.engine.auto_gradient_checkpointing:
        return None
    bound = bound_memory(conf, args, blueprint, shape)
    if not blueprint.meta.supports_gradient_checkpointing or 2 * bound < read_device(args)[2]:
        return None
    try:
        estimate = estimate_memory(conf, args, blueprint, shape)
    except ConfigError:
        return None
    if estimate.fits:
        return None
    return f"{estimate.total / 1e9:.1f} GB without it, {estimate.device_free / 1e9:.1f} GB free on {estimate.device}"


def with_settings(conf: RunConf, settings: Settings) -> RunConf:
    """Return a configuration with settings changed by dotted key."""
    for key, value in settings.items():
        section, _, name = key.partition(".")
        changed = replace(getattr(conf, section), **{name: value})
        conf = replace(conf, **{section: changed})
    return conf


def bound_memory(conf: RunConf, args: DPOConfig, blueprint: Blueprint, shape: DataShape) -> float:
    """Return a cheap upper bound of a run's memory in bytes, inf if unknown; the estimate takes seconds.

    Args:
        conf: the configuration.
        args: TRL's settings.
        blueprint: the model's blueprint.
        shape: lengths and counts of the rows.
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
        tokens, scored = count_tokens_at_once(conf, args, cut.largest) or training * pair, evaluation * pair
    else:
        tokens, scored = 2 * max(training, evaluation) * cut.longest, 0
    of_tokens = max(tokens * (layers * per_layer + 8 * vocabulary), scored * (2 * per_layer + 8 * vocabulary))
    return float(_BYTES_PER_WEIGHT * model.num_parameters() + of_tokens)

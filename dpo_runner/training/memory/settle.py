"""Gradient checkpointing where a run would not fit into memory without it, and nowhere else.

It computes every layer twice, a third more work, for the same gradients. `training.gradient_checkpointing=true` has it
always; otherwise the memory estimate decides, and `engine.auto_gradient_checkpointing=false` leaves it off. Where the
memory cannot be estimated it stays as it is set.
"""

import dataclasses
import math

from transformers import PreTrainedModel
from trl import DPOConfig

from dpo_runner.config.run_conf import RunConf
from dpo_runner.data.splits import PairShape
from dpo_runner.errors import ConfigError
from dpo_runner.training.engine.install import explain_padding
from dpo_runner.training.engine.packed.forward import is_certain
from dpo_runner.training.memory.estimate import estimate_memory, read_device, settle_tokens

_BYTES_PER_WEIGHT = 20
"""The weight, its gradient, Adam's two moments and the reference's copy, in fp32."""


def explain_checkpointing(
    conf: RunConf, args: DPOConfig, model: PreTrainedModel, longest: int, largest: PairShape
) -> str | None:
    """Say how much memory asks for gradient checkpointing that is not set, or return None where none does.

    Args:
        conf: the run.
        args: of its trainer.
        model: the base model; it needs no weights.
        longest: tokens of the longest conversation.
        largest: the pair with the most tokens.
    """
    if conf.training.gradient_checkpointing or not conf.engine.auto_gradient_checkpointing:
        return None
    bound = bound_memory(conf, args, model, longest, largest)
    if not model.supports_gradient_checkpointing or 2 * bound < read_device(args)[2]:
        return None
    try:
        estimate = estimate_memory(conf, longest, largest)
    except ConfigError:
        return None
    if estimate.fits:
        return None
    return f"{estimate.total / 1e9:.1f} GB without it, {estimate.device_free / 1e9:.1f} GB free on {estimate.device}"


def switch_on(conf: RunConf) -> RunConf:
    """Return the run with `training.gradient_checkpointing=true`."""
    return dataclasses.replace(conf, training=dataclasses.replace(conf.training, gradient_checkpointing=True))


def bound_memory(conf: RunConf, args: DPOConfig, model: PreTrainedModel, longest: int, largest: PairShape) -> float:
    """Return bytes that a run stays below, found without the seconds that the estimate takes; inf where none are known.

    Args:
        conf: the run.
        args: of its trainer.
        model: the base model; it needs no weights.
        longest: tokens of the longest conversation.
        largest: the pair with the most tokens.
    """
    length = longest if args.max_length is None else min(longest, args.max_length)
    text = model.config.get_text_config()
    keys = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    sizes = [size for key in keys if isinstance(size := getattr(text, key, None), int)]
    if len(sizes) < len(keys):
        return math.inf
    layers, hidden, inner, heads, vocabulary = sizes
    # of a token in a layer, in 16 bits: inputs of its products and norms; attention weights to 1024 others
    per_layer = (60 * hidden + 8 * inner + 2 * 1024 * heads) * (1 if args.bf16 or args.fp16 else 2)
    training, evaluation = args.per_device_train_batch_size, args.per_device_eval_batch_size
    if explain_padding(conf, model, longest) is None and is_certain(model):
        pair = largest.cut(length)
        tokens, scored = settle_tokens(conf, args, pair) or training * sum(pair), evaluation * sum(pair)
    else:
        tokens, scored = 2 * max(training, evaluation) * length, 0
    of_tokens = max(tokens * (layers * per_layer + 8 * vocabulary), scored * (2 * per_layer + 8 * vocabulary))
    return float(_BYTES_PER_WEIGHT * model.num_parameters() + of_tokens)

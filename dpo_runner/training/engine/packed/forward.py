"""The packed forward: each pair's common prefix scored once, no padding, and only labelled tokens.

TRL passes the model 2B padded rows and gets back log-probabilities of shape [2B, L-1], from which its losses and
metrics are computed. The forward installed here returns the same, from one packed row (`packing.py`), through segment
attention (`attention.py`), with the vocabulary scored at completion tokens only (`head.py`). A token's output depends
on its own row only, so all values are TRL's up to the rounding of sums; gradients of the prefix add up from both
answers, as they do in TRL's two copies.

With ρ = prompt length / completion length, (2ρ+2)/(ρ+2) times fewer tokens pass through the model
(arXiv 2410.20305).
"""

import functools
import types
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from trl import DPOConfig
from trl.trainer.utils import FusedCausalLMOutput

from dpo_runner.config.sections.training import TrainingConf
from dpo_runner.io.upstream import find_attention, find_private
from dpo_runner.model.base import base_of
from dpo_runner.model.quantization import rounds_inputs
from dpo_runner.model.reference import find_batch_dependence
from dpo_runner.training.engine.packed.attention import IMPLEMENTATION, register_attention
from dpo_runner.training.engine.packed.head import frozen_head
from dpo_runner.training.engine.packed.packing import Packing, pack_pairs

_PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

_LAYER_TYPES = {"full_attention", "sliding_attention"}
"""Layer types in which tokens interact only through `AttentionInterface`."""

_COMPARED = {"llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma3_text", "phi3", "olmo2", "gpt_neox"}
"""Model types that the tests compare; the self-check decides about all others."""

_DROPOUTS = ("attention_dropout", "attn_pdrop", "dropout", "activation_dropout", "hidden_dropout")
"""Config keys for dropout that models may apply without an `nn.Dropout` module."""


def trains_head(policy: PreTrainedModel | PeftModel) -> bool:
    """Return whether the policy's output head is trained."""
    return any(parameter.requires_grad for parameter in policy.get_output_embeddings().parameters())


def why_not_packable(
    model: PreTrainedModel | PeftModel,
    longest: int,
    settings: DPOConfig | TrainingConf,
    adapters: Iterable[PeftConfig] = (),
) -> str | None:
    """Return why a model's scoring forward cannot be replaced exactly; None if no reason is known.

    Args:
        model: the trainer's, or one without weights on the meta device.
        longest: tokens of the longest row.
        settings: the training's.
        adapters: configs of adapters that `model` does not have yet.
    """
    from bitsandbytes.nn import Linear8bitLt

    to_come = list(adapters)
    adapters = [*to_come, *(model.peft_config.values() if isinstance(model, PeftModel) else ())]
    if any(adapter.is_prompt_learning for adapter in adapters):
        return "prompt learning prepends virtual tokens to each row"
    # Their dropout need not be a module, and no forward reveals it before training: a new adapter adds 0 either way.
    others = [adapter for adapter in adapters if adapter.peft_type != PeftType.LORA and _drops_out(adapter)]
    if others:
        return f"the {others[0].peft_type.value} adapter has dropout, which training.disable_dropout need not reach"
    if settings.neftune_noise_alpha:
        return "training.neftune_noise_alpha scales its noise by the padded length of TRL's batches"
    model = base_of(model)
    config = model.config.get_text_config()
    mixes = rounds_inputs(settings.use_cpu) and any(isinstance(layer, Linear8bitLt) for layer in model.modules())
    if reason := find_batch_dependence(config, mixes, longest):
        return reason
    if config is not model.config:
        return "the model takes more than text"
    if (implementation := find_attention(model.config)) != IMPLEMENTATION:
        return f"model.attn_implementation is {implementation}, not {IMPLEMENTATION}"
    if not find_private("transformers", model, "_supports_attention_backend"):
        return f"{type(model).__name__} does not attend through transformers' AttentionInterface"
    kinds = getattr(config, "layer_types", None) or ()
    if other := set(kinds) - _LAYER_TYPES:
        return f"the model has layers of the kind {', '.join(sorted(other))}"
    window = getattr(config, "sliding_window", None)
    if window is not None and window < longest and (not kinds or "sliding_attention" in kinds):
        return f"the model's sliding window of {window} tokens is shorter than the longest row, {longest}"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "the model caps its attention scores"
    if hasattr(config, "output_router_logits") and getattr(config, "router_aux_loss_coef", None):  # TRL's own rule
        return "TRL adds the loss of the experts' router, which counts each row's tokens"
    if any("jitter" in key and value for key, value in config.to_dict().items()):
        return "the experts' router adds noise in training, once for both rows of a pair"
    drawn = not settings.disable_dropout and (any(map(_drops_out, to_come)) or _has_dropout(model))
    if drawn or getattr(config, "layerdrop", None):  # layerdrop is not an nn.Dropout
        return "dropout is on, and would be drawn once for both rows of a pair"
    return None


def _drops_out(adapter: PeftConfig) -> bool:
    return any("dropout" in key and value for key, value in adapter.to_dict().items())


def _has_dropout(model: PreTrainedModel) -> bool:
    return _names_dropout(model) or any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())


def _names_dropout(model: PreTrainedModel) -> bool:
    config = model.config.get_text_config()
    return any(getattr(config, key, 0) for key in _DROPOUTS)


def is_certain(model: PreTrainedModel) -> bool:
    """Return whether a model that passes `why_not_packable` is expected to pass the self-check too."""
    return model.config.model_type in _COMPARED and not _names_dropout(model)


def share_prefixes(model: PreTrainedModel | PeftModel, trains_head: bool) -> Callable[[], None]:
    """Replace TRL's scoring forward of `model`; its other forwards are unchanged.

    Args:
        model: its base has been through `trl.trainer.utils.add_fused_lm_head`.
        trains_head: whether the policy's head is trained; policy and reference then both use TRL's kernel for the
            head, so that they do not differ by rounding before training.

    Returns:
        A function that restores TRL's forward.
    """
    register_attention()
    base = base_of(model)
    trl_forward = base.forward

    @functools.wraps(type(base).forward)
    def forward(self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return trl_forward(*args, **kwargs)
        return _score(self, trl_forward, trains_head, *args, **kwargs)

    def take_back() -> None:
        base.forward = trl_forward

    base.forward = types.MethodType(forward, base)
    return take_back


def _score(
    model: PreTrainedModel,
    trl_forward: Callable[..., FusedCausalLMOutput],
    trains_head: bool,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
    packing: Packing | None = None,
    **kwargs: Any,
) -> FusedCausalLMOutput:
    """Return the output of TRL's forward for a padded batch; `packing` is `pack_pairs` of it, or None."""
    if packing is None:
        packing = pack_pairs(input_ids, attention_mask, labels)

    def keep_sources(module: nn.Module, args: Any, output: BaseModelOutput) -> BaseModelOutput:
        assert output.last_hidden_state is not None
        output.last_hidden_state = output.last_hidden_state[:, packing.source.to(output.last_hidden_state.device)]
        return output

    hook = model.base_model.register_forward_hook(keep_sources)
    try:
        with nullcontext() if trains_head else frozen_head():
            outputs = trl_forward(
                input_ids=packing.input_ids,
                position_ids=packing.position_ids,
                # transformers passes a four-dimensional mask through unchanged; this one is not used
                attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device),
                pairs=packing.pairs,
                shift_labels=packing.targets.unsqueeze(0),
                fused_lm_head=True,
                **kwargs,
            )
    finally:
        hook.remove()
    for name in _PER_TOKEN:
        if (values := getattr(outputs, name)) is not None:
            setattr(outputs, name, values.new_zeros(packing.mask.shape).masked_scatter(packing.mask, values))
    outputs.label_mask = packing.mask
    return outputs

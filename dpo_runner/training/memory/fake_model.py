"""The policy and its reference as a run builds them, on fake tensors, which have shapes but no memory."""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from peft import get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.initialization import no_init_weights
from transformers.quantizers.auto import AutoHfQuantizer
from trl import DPOConfig
from trl.trainer.utils import add_fused_lm_head

from dpo_runner.errors import ConfigError
from dpo_runner.io.upstream import find_private
from dpo_runner.model.blueprint import Blueprint
from dpo_runner.model.files.locations import loading_errors
from dpo_runner.model.quantization import keep_training_products
from dpo_runner.model.stacking import SFT
from dpo_runner.training.memory.tracker import storage_key

OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")
"""Outputs of the fused head that DPOTrainer requests for the policy."""

CHECKPOINT_KWARGS = {"use_reentrant": False, "preserve_rng_state": False}
"""Checkpointing on fake tensors: no random state to preserve, and reentrance does not affect sizes."""

_BLOCK, _NESTED_BLOCK = 64, 256  # weights per absmax, and absmax values per nested absmax


def build_fake_models(
    blueprint: Blueprint, args: DPOConfig, mode: FakeTensorMode
) -> tuple[nn.Module, nn.Module | None, dict[str, int]]:
    """Build the policy and, if it is a separate model, the reference; count their bytes.

    Args:
        blueprint: the run's.
        args: TRL's settings for the run.
        mode: the fake tensors' mode; not active yet, because bitsandbytes' layers cannot be built in it.

    Returns:
        Policy, reference or None, and bytes by purpose.

    Raises:
        ConfigError: the checkpoint is quantized by a method other than bitsandbytes', or a layer is not covered.
    """
    quantization = _find_quantization(blueprint)
    policy, base = _build_on_meta(blueprint, quantization, lambda model: _put_adapters(model, blueprint))
    model: Any = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    add_fused_lm_head(model, outputs=OUTPUTS)
    with mode:
        frozen = _make_fake(policy, base)
        state = _fill_quantized(policy, quantization, blueprint.dtype) if quantization is not None else []
    held = {
        "weights": count_bytes([*frozen, *(layer.weight for layer in _quantized_layers(policy))]),
        "quantization state": count_bytes(state),
    }
    held["adapters"] = count_bytes(tensors_of(policy)) - held["weights"]
    reference, held["reference"] = _build_reference(blueprint, args.precompute_ref_log_probs, mode)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(CHECKPOINT_KWARGS)
        if policy is not model:
            model.enable_input_require_grads()
    return policy, reference, held


def _build_reference(blueprint: Blueprint, precomputed: bool, mode: FakeTensorMode) -> tuple[nn.Module | None, int]:
    """Return the reference, or None if it is not a separate model during training, and its bytes."""
    copied = blueprint.reference.is_initial and blueprint.trains_all and not precomputed
    other = blueprint if copied else blueprint.reference_model
    if other is None:
        return None, 0
    if other.name == blueprint.name:  # cut to as many layers as the policy has in this simulation
        other = other.with_config(blueprint.config)
    quantization = _find_quantization(other)
    reference, base = _build_on_meta(other, quantization, lambda model: model)
    add_fused_lm_head(reference.eval().requires_grad_(False))
    with mode:
        _make_fake(reference, base)
        state = _fill_quantized(reference, quantization, other.dtype) if quantization is not None else []
    return reference, count_bytes([*tensors_of(reference), *state])


def _build_on_meta(
    blueprint: Blueprint, quantization: BitsAndBytesConfig | None, finish: Callable[[nn.Module], nn.Module]
) -> tuple[Any, set[int]]:
    """Return the model after `finish`, and the `id()`s of the tensors that it had before."""
    config = copy.deepcopy(blueprint.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"), no_init_weights(), loading_errors(blueprint.name, "model.model_name_or_path"):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=blueprint.dtype,
            attn_implementation=blueprint.conf.attn_implementation,
            trust_remote_code=blueprint.conf.trust_remote_code,
        )
        model.tie_weights()
        if quantization is not None:
            quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
            find_private("transformers", quantizer, "_process_model_before_weight_loading")(model, device_map=None)
            model.is_loaded_in_4bit, model.is_loaded_in_8bit = quantization.load_in_4bit, quantization.load_in_8bit
            model.hf_quantizer, model.config.quantization_config = quantizer, quantization
        base = {id(tensor) for tensor in tensors_of(model)}
        return finish(model), base


def _make_fake(model: nn.Module, base: set[int]) -> list[torch.Tensor]:
    """Replace tensors on the meta device by fake ones, and return those that replace `base`.

    If the model were built on fake tensors from the start, PEFT could not move and cast them.
    """
    made: dict[int, Any] = {}
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    if id(parameter) not in made:
                        fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                        made[id(parameter)] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
                    module._parameters[name] = made[id(parameter)]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    made[id(buffer)] = made.get(id(buffer), torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu"))
                    module._buffers[name] = made[id(buffer)]
    quantized = {id(layer.weight) for layer in _quantized_layers(model)}
    return [fake for key, fake in made.items() if key in base and id(fake) not in quantized]


def _quantized_layers(model: nn.Module) -> Iterator[Any]:
    return (layer for layer in model.modules() if isinstance(layer, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)))


def _fill_quantized(model: nn.Module, quantization: BitsAndBytesConfig, dtype: torch.dtype) -> list[torch.Tensor]:
    """Give quantized layers packed weights, and return their quantization state."""
    state: list[torch.Tensor] = []
    for layer in _quantized_layers(model):
        state += _fill_8bit(layer) if quantization.load_in_8bit else _fill_4bit(layer, quantization, dtype)
    keep_training_products(model)
    return state


def fake_mode() -> FakeTensorMode:
    """Return the mode in which tensors are made without memory; real ones may be mixed in."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def tensors_of(model: nn.Module) -> Iterator[torch.Tensor]:
    """Yield parameters and buffers."""
    yield from model.parameters()
    yield from model.buffers()


def count_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of the tensors' storages; a shared storage counts once."""
    return sum({storage_key(s): s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors)}.values())


def _find_quantization(blueprint: Blueprint) -> BitsAndBytesConfig | None:
    """Return the quantization of the base's layers, by the run or by the checkpoint."""
    own = blueprint.own_quantization
    if own is None:
        return blueprint.quantization
    own = own if isinstance(own, dict) else own.to_dict()
    if str(own.get("quant_method", "")).split(".")[-1].lower() not in ("bitsandbytes", "bitsandbytes_4bit"):
        key = f"model.model_name_or_path={blueprint.name}"
        raise ConfigError(f"`{key}`: the memory of such a quantization cannot be estimated")
    return BitsAndBytesConfig.from_dict(own)


def _fill_4bit(layer: Any, quantization: BitsAndBytesConfig, dtype: torch.dtype) -> list[torch.Tensor]:
    size = layer.in_features * layer.out_features
    blocks = -(-size // _BLOCK)
    code = torch.empty(16)
    nested, offset, absmax = None, None, torch.empty(blocks)
    if quantization.bnb_4bit_use_double_quant:
        absmax, offset = torch.empty(blocks, dtype=torch.uint8), torch.empty(())
        constants = torch.empty(-(-blocks // _NESTED_BLOCK))
        nested = QuantState(absmax=constants, code=torch.empty(256), blocksize=_NESTED_BLOCK, dtype=torch.float32)
    storage = quantization.bnb_4bit_quant_storage
    packed = torch.empty(-(-size // 2 // storage.itemsize), 1, dtype=storage)
    layer.weight = nn.Parameter(packed, requires_grad=False)  # Params4bit would drop the fake tensor type
    layer.weight.quant_state = QuantState(
        absmax=absmax,
        shape=torch.Size((layer.out_features, layer.in_features)),
        code=code,
        blocksize=_BLOCK,
        quant_type=quantization.bnb_4bit_quant_type,
        dtype=dtype,
        offset=offset,
        state2=nested,
    )
    layer.weight.compress_statistics = quantization.bnb_4bit_use_double_quant
    layer.weight.quant_type = quantization.bnb_4bit_quant_type
    return [absmax, code, *([offset, nested.absmax, nested.code] if nested is not None else [])]


def _fill_8bit(layer: Any) -> list[torch.Tensor]:
    layer.state.CB = torch.empty(layer.out_features, layer.in_features, dtype=torch.int8)
    layer.state.SCB = torch.empty(layer.out_features)
    layer.weight = nn.Parameter(layer.state.CB, requires_grad=False)  # Int8Params would drop the fake tensor type
    layer.weight.CB = layer.weight.SCB = None  # already in `state`
    layer.weight.has_fp16_weights = False
    return [layer.state.SCB]


def _put_adapters(model: nn.Module, blueprint: Blueprint) -> nn.Module:
    """Add the adapters of the trainer's model, the trained one in fp32."""
    configs = blueprint.adapter_configs()
    if not configs:
        return model.requires_grad_(True)
    policy = get_peft_model(model, configs.pop("default"))
    for name, config in configs.items():
        policy.add_adapter(name, config)
    policy.base_model.set_adapter([SFT, "default"] if SFT in configs else "default")
    for name, parameter in policy.named_parameters():
        if f".{SFT}." in name or ".ref." in name:
            parameter.requires_grad_(False)
        elif parameter.requires_grad:
            parameter.data = parameter.data.float()
    assert isinstance(policy, nn.Module)
    return policy

"""The policy and its reference as a run would build them, for use under `FakeTensorMode`: shapes without memory."""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig
from transformers.initialization import no_init_weights
from transformers.quantizers.auto import AutoHfQuantizer
from trl import DPOConfig
from trl.trainer.utils import add_fused_lm_head

from dpo_runner.config.run_conf import RunConf
from dpo_runner.config.sections.model import ModelConf
from dpo_runner.errors import ConfigError
from dpo_runner.model.adapters import build_peft_config, changes_base
from dpo_runner.model.files.locations import explain_missing, is_adapter, resolve_adapter_path
from dpo_runner.model.quantization import build_quantization_config, close_4bit_trap
from dpo_runner.model.reference import holds_reference, is_initial, trains_all
from dpo_runner.model.stacking import SFT
from dpo_runner.model.vocabulary import load_model_config

OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")
"""What DPOTrainer has the head compute for the policy."""

CHECKPOINT_KWARGS = {"use_reentrant": False, "preserve_rng_state": False}
"""How checkpointing is done here: fake tensors have no random state to keep, and reentrance changes no size."""

_BLOCK, _NESTED_BLOCK = 64, 256  # weights to one absmax, and absmax to one absmax of theirs


def build_fake_models(
    config: PretrainedConfig, conf: RunConf, args: DPOConfig, mode: FakeTensorMode
) -> tuple[nn.Module, nn.Module | None, dict[str, int]]:
    """Build the policy, the reference where it is a model of its own, and count what they hold.

    Args:
        config: the model's.
        conf: the run.
        args: TRL's settings for it.
        mode: the fake tensors'; not active yet, since bitsandbytes' layers cannot be made in it.

    Returns:
        Policy, reference or None, and bytes by what they are for.

    Raises:
        ConfigError: the checkpoint is quantized by another method than bitsandbytes', or a layer is not covered.
    """
    full = trains_all(conf)
    dtype = _find_dtype(config, conf, full)
    quantization = _find_quantization(config, conf)
    policy, base = _build_on_meta(config, conf.model, dtype, quantization, lambda model: _put_adapters(model, conf))
    model: Any = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    add_fused_lm_head(model, outputs=OUTPUTS)
    with mode:
        frozen = _make_fake(policy, base)
        state = _fill_quantized(policy, quantization, dtype) if quantization is not None else []
    held = {
        "weights": count_bytes([*frozen, *(layer.weight for layer in _quantized_layers(policy))]),
        "quantization state": count_bytes(state),
    }
    held["adapters"] = count_bytes(tensors_of(policy)) - held["weights"]
    reference, held["reference"] = _build_reference(config, conf, full, args.precompute_ref_log_probs, mode)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(CHECKPOINT_KWARGS)
        if policy is not model:
            model.enable_input_require_grads()
    return policy, reference, held


def _build_reference(
    config: PretrainedConfig, conf: RunConf, full: bool, precomputed: bool, mode: FakeTensorMode
) -> tuple[nn.Module | None, int]:
    """Return the reference where it is a model of its own, as `dpo_runner.model.policy` has it, and the bytes it holds."""
    name = conf.model.reference
    quantization = None
    if is_initial(conf):
        if not full or precomputed:
            return None, 0  # inside the policy, or gone before training
    elif (name == "base" or is_adapter(name)) and holds_reference(conf):
        return None, 0
    else:
        if name != "base" and not is_adapter(name):
            config = load_model_config(replace(conf.model, model_name_or_path=name, revision=None, gguf_file=None))
        quantization = _find_quantization(config, conf)
    dtype = _find_dtype(config, conf, full)
    reference, base = _build_on_meta(config, conf.model, dtype, quantization, lambda model: model)
    add_fused_lm_head(reference.eval().requires_grad_(False))
    with mode:
        _make_fake(reference, base)
        state = _fill_quantized(reference, quantization, dtype) if quantization is not None else []
    return reference, count_bytes([*tensors_of(reference), *state])


def _find_dtype(config: PretrainedConfig, conf: RunConf, full: bool) -> torch.dtype:
    if conf.model.dtype != "auto":
        dtype = getattr(torch, conf.model.dtype)
    else:
        dtype = torch.float32 if full else config.get_text_config().dtype or config.dtype or torch.float32
    assert isinstance(dtype, torch.dtype)
    return dtype


def _build_on_meta(
    config: PretrainedConfig,
    conf: ModelConf,
    dtype: torch.dtype,
    quantization: BitsAndBytesConfig | None,
    finish: Callable[[nn.Module], nn.Module],
) -> tuple[Any, set[int]]:
    """Return the model, finished by `finish`, and the ids of the tensors that it had before."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    name = conf.model_name_or_path
    with torch.device("meta"), no_init_weights(), explain_missing(name, "model.model_name_or_path"):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            attn_implementation=conf.attn_implementation,
            trust_remote_code=conf.trust_remote_code,
        )
        model.tie_weights()
        if quantization is not None:
            quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
            quantizer._process_model_before_weight_loading(model, device_map=None)
            model.is_loaded_in_4bit, model.is_loaded_in_8bit = quantization.load_in_4bit, quantization.load_in_8bit
            model.hf_quantizer, model.config.quantization_config = quantizer, quantization
        base = {id(tensor) for tensor in tensors_of(model)}
        return finish(model), base


def _make_fake(model: nn.Module, base: set[int]) -> list[torch.Tensor]:
    """Put fake tensors in the place of those on the meta device, and return the ones that stand for `base`.

    Built as fake ones right away, they could not be moved and cast as PEFT does.
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
    """Give quantized layers packed weights, and return the state that goes with them."""
    state: list[torch.Tensor] = []
    for layer in _quantized_layers(model):
        state += _fill_8bit(layer) if quantization.load_in_8bit else _fill_4bit(layer, quantization, dtype)
    close_4bit_trap(model)
    return state


def tensors_of(model: nn.Module) -> Iterator[torch.Tensor]:
    """Yield parameters and buffers."""
    yield from model.parameters()
    yield from model.buffers()


def count_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Sum up storages, each once however many tensors share it."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def _find_quantization(config: PretrainedConfig, conf: RunConf) -> BitsAndBytesConfig | None:
    own = getattr(config, "quantization_config", None)
    if own is None:
        return build_quantization_config(conf.quant)
    own = own if isinstance(own, dict) else own.to_dict()
    if str(own.get("quant_method", "")).split(".")[-1].lower() not in ("bitsandbytes", "bitsandbytes_4bit"):
        key = f"model.model_name_or_path={conf.model.model_name_or_path}"
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
    layer.weight = nn.Parameter(packed, requires_grad=False)  # Params4bit would lose that it is fake
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
    layer.weight = nn.Parameter(layer.state.CB, requires_grad=False)  # Int8Params would lose that it is fake
    layer.weight.CB = layer.weight.SCB = None  # in `state` already
    layer.weight.has_fp16_weights = False
    return [layer.state.SCB]


def _put_adapters(model: nn.Module, conf: RunConf) -> nn.Module:
    """Put on what `dpo_runner.model.policy` and TRL put on: the trained adapter, and the reference where it is one too."""
    config = build_peft_config(conf.lora)
    mode = conf.model.adapter_mode if conf.model.adapter is not None else None
    if config is None and mode != "continue":
        return model.requires_grad_(True)
    sft = _read_adapter(resolve_adapter_path(conf.model)) if mode in ("continue", "stack") else None
    taken_from_base = changes_base(config)
    if mode == "continue":
        policy, reference = get_peft_model(model, sft), sft
    else:
        if isinstance(config, LoraConfig):
            config.init_lora_weights = True  # other ways to begin end in the same shapes
        policy, reference = get_peft_model(model, config), config if mode == "stack" or taken_from_base else None
        if mode == "stack":
            policy.add_adapter(SFT, sft)
    if is_adapter(conf.model.reference) and holds_reference(conf):
        reference = _read_adapter(conf.model.reference)
    elif not is_initial(conf) and not taken_from_base:
        reference = None
    if reference is not None:
        policy.add_adapter("ref", reference)
    policy.base_model.set_adapter([SFT, "default"] if mode == "stack" else "default")
    for name, parameter in policy.named_parameters():
        if f".{SFT}." in name or ".ref." in name:
            parameter.requires_grad_(False)
        elif parameter.requires_grad:
            parameter.data = parameter.data.float()
    assert isinstance(policy, nn.Module)
    return policy


def _read_adapter(folder: str) -> PeftConfig:
    config = PeftConfig.from_pretrained(folder)
    config.inference_mode = False
    return config

"""Quantization by the `quant` group or by the checkpoint, the share quantized, and 16 bits without bf16 hardware."""

import re
from collections.abc import Iterator
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from dpo_runner.config.sections.model import QuantConf
from dpo_runner.config.sections.run import RunFields
from dpo_runner.errors import ConfigError

LEAST_QUANTIZED = 0.9
"""Least quantized share of the eligible weights; below it, the run is refused."""

_SAID_BY_CHECKPOINT = (
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "bnb_4bit_compute_dtype",
    "bnb_4bit_quant_storage",
)


def lacks_bf16(use_cpu: bool = False) -> bool:
    """Return whether a run's GPU has no bf16 arithmetic (T4, V100); it computes in fp16 then. CPUs emulate bf16.

    Args:
        use_cpu: whether the run uses the CPU despite a GPU.
    """
    if use_cpu or not torch.cuda.is_available():
        return False
    return not torch.cuda.is_bf16_supported(including_emulation=False)


def choose_dtype(dtype: torch.dtype, use_cpu: bool = False) -> torch.dtype:
    """Return `dtype`, or float16 for bfloat16 if the run's GPU lacks bf16."""
    return torch.float16 if dtype == torch.bfloat16 and lacks_bf16(use_cpu) else dtype


def build_quantization_config(conf: QuantConf | None, use_cpu: bool = False) -> BitsAndBytesConfig | None:
    """Return transformers' `BitsAndBytesConfig` for the `quant` group."""
    if conf is None:
        return None
    if conf.load_in_8bit:
        return BitsAndBytesConfig(
            load_in_8bit=True,
            llm_int8_threshold=conf.llm_int8_threshold,
            llm_int8_skip_modules=conf.llm_int8_skip_modules,
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=conf.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=conf.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=choose_dtype(getattr(torch, conf.bnb_4bit_compute_dtype), use_cpu),
        bnb_4bit_quant_storage=getattr(torch, conf.bnb_4bit_quant_storage),
        llm_int8_skip_modules=conf.llm_int8_skip_modules,
    )


def choose_quantization(
    conf: QuantConf | None, own: Any, name: str, use_cpu: bool = False
) -> BitsAndBytesConfig | None:
    """Return the quantization config to load a checkpoint with, which may already be quantized.

    Args:
        conf: the `quant` group.
        own: the checkpoint's own `quantization_config`, or None.
        name: the model's, for messages.
        use_cpu: whether the run uses the CPU despite a GPU.

    Returns:
        None if loading quantizes nothing: the checkpoint's own config applies.

    Raises:
        ConfigError: `conf` contradicts the checkpoint.
    """
    if own is None:
        return build_quantization_config(conf, use_cpu)
    if (asked := build_quantization_config(conf, use_cpu=True)) is None:  # in the dtype that is asked for
        return None
    brought = own if isinstance(own, dict) else own.to_dict()
    wanted = asked.to_dict()
    keys: tuple[str, ...] = _SAID_BY_CHECKPOINT
    if brought.get("quant_method") != wanted["quant_method"]:
        keys = ("quant_method",)
    for key in keys:
        if wanted.get(key) != brought.get(key, False if isinstance(wanted.get(key), bool) else wanted.get(key)):
            asked_for = getattr(wanted.get(key), "value", wanted.get(key))
            raise ConfigError(
                f"`quant`: {name} is quantized already, with {key}={brought.get(key)}, not {asked_for}; use "
                "quant=none, which loads the checkpoint as it is"
            )
    return None


def check_quantized_training(own: Any, asked: Any, has_adapter: bool, start: Any) -> None:
    """Check that training on a quantized base is possible.

    Args:
        own: the checkpoint's own `quantization_config`, or None.
        asked: the quantization config for loading, or None.
        has_adapter: whether an adapter is trained.
        start: the initialization of a new adapter that subtracts its share from the base weights, or None.

    Raises:
        ConfigError: it is not.
    """
    if own is not None and not has_adapter:
        raise ConfigError("`lora=null`: the checkpoint is quantized, and quantized weights need an adapter to train")
    if (own is not None or asked is not None) and start is not None:
        raise ConfigError(
            f"`lora.init_lora_weights={start}`: subtracts its share from the base weights, which is not exact on a "
            "quantized base; use quant=none, or lora.init_lora_weights=true"
        )


def linear4bit_modules(model: torch.nn.Module) -> Iterator[Any]:
    """Yield bitsandbytes' 4-bit layers."""
    from bitsandbytes.nn import Linear4bit

    return (module for module in model.modules() if isinstance(module, Linear4bit))


def keep_training_products(model: torch.nn.Module) -> None:
    """Let bitsandbytes' layers compute in evaluation what they compute in training. Only on CPUs the two differ.

    4 bits: with avx512_bf16, an evaluation forward repacks the weights into a form whose product has no gradient, and
    every later training step is silently wrong.

    8 bits: training multiplies by the dequantized weights. Evaluation would also round the inputs to int8, as GPUs
    always do (LLM.int8), so the policy that is measured would not be the one that is trained.
    """
    from bitsandbytes.nn import Linear8bitLt

    for module in linear4bit_modules(model):
        module.support_avx512bf16_for_cpu = False
    for module in model.modules():
        if isinstance(module, Linear8bitLt):
            module.register_forward_pre_hook(_compute_as_in_training)


def _compute_as_in_training(layer: torch.nn.Module, args: Any) -> None:
    layer.training = True  # chooses the product, and nothing else


def check_quantized(meta: PreTrainedModel, quantization_config: BitsAndBytesConfig | None, name: str) -> None:
    """Refuse a model if bitsandbytes would quantize too small a share of its weights.

    Some families keep their weights in custom modules (fused experts, layers derived from `nn.Linear`), which
    bitsandbytes silently skips.

    Args:
        meta: the model on the meta device, unquantized; its layers are replaced here.
        quantization_config: the config for loading; None if loading quantizes nothing.
        name: the model's, for messages.

    Raises:
        ConfigError: less than `LEAST_QUANTIZED` of the eligible weights would be; names the weights left out.
    """
    if quantization_config is None:
        return
    quantizer = AutoHfQuantizer.from_config(quantization_config, pre_quantized=False)
    quantizer.preprocess_model(model=meta, device_map=None)
    share, left = count_quantized(meta, quantization_config.llm_int8_skip_modules or [])
    if share < LEAST_QUANTIZED:
        raise ConfigError(
            f"`quant`: only {100 * share:.0f} % of the weights of {name} would be quantized, at least "
            f"{100 * LEAST_QUANTIZED:.0f} % must be; not those of {', '.join(left)}; use quant=none, or "
            "name the modules to skip in quant.llm_int8_skip_modules"
        )


def count_quantized(model: PreTrainedModel, skipped: list[str]) -> tuple[float, list[str]]:
    """Count the matrices that bitsandbytes quantizes.

    Embeddings, the head (which bitsandbytes skips) and modules that the configuration skips are not eligible.

    Args:
        model: with its layers replaced; the weights themselves may still be on the meta device.
        skipped: names, or parts of names, of modules that the configuration leaves unquantized.

    Returns:
        The quantized share of the eligible weights, in [0, 1], and the names of the unquantized ones, with `*` for
        layer indices.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    quantized = total = 0
    left: dict[str, None] = {}
    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding) or module is head or any(part in path.split(".") for part in skipped):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim < 2:
                continue
            total += parameter.numel()
            if isinstance(module, (Linear4bit, Linear8bitLt)):
                quantized += parameter.numel()
            else:
                left[re.sub(r"\.\d+\.", ".*.", f"{path}.{name}")] = None
    return (quantized / total if total else 1.0), list(left)


def rounds_inputs(use_cpu: bool) -> bool:
    """Return whether int8 layers round their inputs too: on GPUs, not on CPUs (see `keep_training_products`)."""
    return not use_cpu and torch.accelerator.is_available()


def mixes_rows(quantization: Any, use_cpu: bool) -> bool:
    """Return whether a row's products depend on the other rows of its batch, as those of LLM.int8 do on a GPU.

    Args:
        quantization: a `BitsAndBytesConfig`, or a checkpoint's own config as a dict; None without.
        use_cpu: whether the run uses the CPU despite a GPU.
    """
    fields = quantization if isinstance(quantization, dict) or quantization is None else quantization.to_dict()
    return bool(fields and fields.get("load_in_8bit")) and rounds_inputs(use_cpu)


def describe_quantization(conf: RunFields, own: Any = None) -> str:
    """Return a short description of the base's quantization, for the plan; `own` is the checkpoint's config."""
    quant, use_cpu = conf.quant, conf.training.use_cpu
    if own is not None:
        brought = own if isinstance(own, dict) else own.to_dict()
        kind = brought.get("bnb_4bit_quant_type") if brought.get("load_in_4bit") else brought.get("quant_method")
        kind = "int8" if brought.get("load_in_8bit") else kind
        return f"the checkpoint's own ({kind})"
    if quant is None:
        return "none"
    if quant.load_in_8bit:
        return "int8 (LLM.int8())" if rounds_inputs(use_cpu) else "int8 weights, inputs are not rounded on a CPU"
    dtype = str(choose_dtype(getattr(torch, quant.bnb_4bit_compute_dtype), use_cpu)).removeprefix("torch.")
    return f"{name_quantization(quant)}, computes in {dtype}"


def name_quantization(quant: QuantConf) -> str:
    """Return the quantization that a run asks for, in words that hold on any machine, as a card needs them."""
    if quant.load_in_8bit:
        return "int8"
    return f"{quant.bnb_4bit_quant_type}{', double quantization' if quant.bnb_4bit_use_double_quant else ''}"

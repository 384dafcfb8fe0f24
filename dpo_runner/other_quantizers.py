"""Quantizers of transformers other than bitsandbytes, as `quant.config` describes them."""

import dataclasses
import inspect
from enum import Enum
from typing import Any

import torch
import transformers
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING, AutoHfQuantizer
from transformers.quantizers.base import HfQuantizer

from dpo_runner.config_checks import suggest
from dpo_runner.errors import ConfigError, reason_of


def build_other_quantization(config: dict[str, Any]) -> Any:
    """Return the object of transformers' config class for `config["quant_method"]`, made of the other entries.

    torchao's class takes a config object of torchao's own as its `quant_type`. Here that is the name of its class,
    and its fields stand beside it: `{quant_method: torchao, quant_type: Int4WeightOnlyConfig, group_size: 64}`.

    Raises:
        ConfigError: no such method or field, a value that it does not take, or a package that is missing.
    """
    method = config.get("quant_method")
    if method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise ConfigError(
            f"`quant.config.quant_method={method}`: no such method; {suggest(method, AUTO_QUANTIZATION_CONFIG_MAPPING)}"
        )
    cls = AUTO_QUANTIZATION_CONFIG_MAPPING[method]
    fields = {key: value for key, value in config.items() if key != "quant_method"}
    # Most of these classes swallow what they do not know.
    known = {
        name
        for base in cls.__mro__
        if "__init__" in vars(base)
        for name, parameter in inspect.signature(vars(base)["__init__"]).parameters.items()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    } - {"self"}
    try:
        if method == "torchao":
            inner = {name: fields.pop(name) for name in [*fields] if name not in known}
            fields["quant_type"] = _build_torchao_type(fields.get("quant_type"), inner)
        _check_names(fields, known, cls)
        return cls(**fields)
    except (ImportError, TypeError, ValueError) as error:
        raise ConfigError(f"`quant.config`: {reason_of(error)}") from None


def _check_names(fields: dict[str, Any], known: set[str], cls: type) -> None:
    for name in fields:
        if name not in known:
            raise ConfigError(f"`quant.config.{name}`: {cls.__name__} has no such field; {suggest(name, known)}")


def _build_torchao_type(name: Any, values: dict[str, Any]) -> Any:
    import torchao.quantization
    from torchao.core.config import AOBaseConfig

    classes = {
        key: each
        for key, each in vars(torchao.quantization).items()
        if isinstance(each, type) and issubclass(each, AOBaseConfig) and dataclasses.is_dataclass(each)
    }
    if name not in classes:
        raise ConfigError(f"`quant.config.quant_type={name}`: torchao has no such config; {suggest(name, classes)}")
    known = {field.name: field.default for field in dataclasses.fields(classes[name])}
    _check_names(values, set(known), classes[name])
    return classes[name](**{key: _as_type_of(known[key], key, value) for key, value in values.items()})


def _as_type_of(default: Any, name: str, value: Any) -> Any:
    """Return a value of YAML as what torchao has in that place: a dtype, a member of an enumeration, or itself."""
    if isinstance(default, torch.dtype):
        dtype = getattr(torch, str(value), None)
        if not isinstance(dtype, torch.dtype):
            raise ConfigError(f"`quant.config.{name}={value}`: must be a dtype of torch, such as {default}")
        return dtype
    if isinstance(default, Enum):
        members = {member.name.lower(): member for member in type(default)}
        if str(value).lower() not in members:
            raise ConfigError(f"`quant.config.{name}={value}`: no such choice; {suggest(value, members)}")
        return members[str(value).lower()]
    if default is not None and not isinstance(default, (bool, int, float, str)):
        raise ConfigError(f"`quant.config.{name}`: is an object of torchao ({default}), which YAML cannot give")
    return value


def check_other_quantization(config: Any) -> None:
    """Refuse a method that cannot quantize a model while it is loaded, or that no adapter can be trained upon.

    Args:
        config: an object of transformers' config class, for a checkpoint that is not quantized yet.

    Raises:
        ConfigError: it cannot be used here.
    """
    method = getattr(config.quant_method, "value", config.quant_method)
    key, quantizer = f"`quant.config.quant_method={method}`", AUTO_QUANTIZER_MAPPING[method]
    if quantizer.requires_calibration:
        raise ConfigError(
            f"{key}: quantizes beforehand, by data of its own; name a checkpoint that is quantized so, with quant=none"
        )
    replaces = quantizer.param_needs_quantization is not HfQuantizer.param_needs_quantization
    if replaces and quantizer.get_quantize_ops is HfQuantizer.get_quantize_ops:
        raise ConfigError(
            f"{key}: transformers {transformers.__version__} cannot quantize with it while loading; use torchao or "
            "quanto, or quant=nf4 or int8"
        )
    try:
        trainable = AutoHfQuantizer.from_config(config, pre_quantized=False).is_trainable
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{key}: {reason_of(error)}") from None
    if not trainable:
        raise ConfigError(f"{key}: transformers trains no adapter on weights that are quantized by {config.to_dict()}")

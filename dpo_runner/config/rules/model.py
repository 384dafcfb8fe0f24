"""The rules within and between the groups `model`, `quant` and `lora`. Imports no torch."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from dpo_runner.config.sections.model import LoraConf
from dpo_runner.config.sections.run import RunFields
from dpo_runner.errors import suggest

_ZERO_INITIALIZATIONS = (True, "gaussian", "orthogonal", "eva")
_NEED_MORE = {
    "loftq": "replaces the base by quantized weights, on which no published model and no reference stands",
    "corda": "needs covariances from a pass over data of its own",
    "lora_ga": "needs gradients from a pass over data of its own",
}
OTHER_LORA_FIELDS = {"rank": "is called lora.r"}
"""Fields that users of other tools may write under `lora`."""

OWNED_LORA_FIELDS = {
    "bias": "PEFT's bias=none always applies: trained biases of the base would be the reference's too",
    "task_type": "PEFT's task_type=CAUSAL_LM always applies",
    "inference_mode": "an adapter in inference mode is not trained",
}
"""Fields of PEFT's configs that neither `lora` nor `lora.config` sets, each with the reason."""

_DEVICE = re.compile(
    r"None|auto|balanced|balanced_low_0|sequential|cpu|disk|(?:(?:cuda|xpu|npu|hpu|mlu):)?\d+|cuda|xpu|mps"
)
"""accelerate's strategies, and the names of devices, of which None stands for the default."""


def check_model_groups(conf: RunFields) -> Iterator[str]:
    """Yield one line per broken rule of the groups `model`, `quant` and `lora`."""
    model, quant, lora = conf.model, conf.quant, conf.lora
    trains_adapter = lora is not None or (model.adapter is not None and model.adapter_mode == "continue")
    if quant is not None:
        chosen = [name for name in ("load_in_4bit", "load_in_8bit") if getattr(quant, name)]
        if len(chosen) != 1:
            yield (
                f"`quant`: {' and '.join(chosen) or 'neither load_in_4bit nor load_in_8bit'} set; use exactly one of "
                "them: quant=nf4, fp4 or int8, or quant=none"
            )
    if quant is not None and not trains_adapter:
        yield "`lora=null`: quantized weights cannot be trained without an adapter; use lora=r16, or quant=none"
    if model.adapter and model.adapter_mode == "continue" and lora is not None:
        yield (
            f"`lora`: model.adapter_mode=continue trains the adapter {model.adapter} as it is, so there is no new one "
            "for `lora` to describe; use lora=none, or model.adapter_mode=stack or merge to put a new adapter on top"
        )
    if not model.adapter and model.adapter_mode != "continue":
        yield f"`model.adapter_mode={model.adapter_mode}`: needs model.adapter, the adapter to {model.adapter_mode}"
    if model.adapter and model.adapter_mode == "stack":
        if lora is None:
            yield "`lora=null`: model.adapter_mode=stack trains a new adapter on top; use lora=r16"
        elif lora.use_dora or lora.peft_type != "LORA" or lora.init_lora_weights not in _ZERO_INITIALIZATIONS:
            yield (
                "`model.adapter_mode=stack`: the new adapter must be plain LoRA that begins at 0, to be joined with "
                "the SFT adapter in the result; use model.adapter_mode=merge for DoRA, PiSSA and other methods"
            )
        elif key := _find_unjoinable(lora):
            yield (
                f"`lora.{key}`: the result of model.adapter_mode=stack is two adapters joined into one, which PEFT "
                "cannot do with such; use model.adapter_mode=merge"
            )
    yield from _check_device_map(model.device_map, conf.training.use_cpu)
    if lora is not None and lora.lora_dropout > 0 and conf.training.disable_dropout:
        yield (
            f"`lora.lora_dropout={lora.lora_dropout}`: has no effect with training.disable_dropout=true; "
            "set training.disable_dropout=false, or lora.lora_dropout=0"
        )
    if lora is not None:
        yield from _check_lora(lora)
    if lora is not None and not lora.target_modules:
        yield f"`lora.target_modules={lora.target_modules}`: must name at least one module, such as all-linear"
    if not trains_adapter and conf.checks.step0 and model.dtype in ("bfloat16", "float16"):
        yield (
            f"`model.dtype={model.dtype}`: all weights are trained (lora=none), where in 16 bits most updates round "
            "to nothing; use model.dtype=auto, which loads float32 (training.bf16 decides what is computed in), or "
            "checks.step0=false to train them so"
        )
    if trains_adapter and conf.training.sync_ref_model:
        yield "`training.sync_ref_model=True`: needs full fine-tuning; the reference of an adapter has no copy to move"


def _check_device_map(device_map: Any, use_cpu: bool) -> Iterator[str]:
    """Yield a line if a device does not exist, or if the model would not be where training puts its batches."""
    devices = {str(device) for device in (device_map.values() if isinstance(device_map, dict) else [device_map])}
    number = re.fullmatch(r"(?:\w+:)?0*([1-9]\d*)", min(devices, default=""))
    if wrong := [each for each in sorted(devices) if not _DEVICE.fullmatch(each)]:
        yield f"`model.device_map={device_map}`: {wrong[0]} is no device; use auto, or leave it out"
    elif use_cpu and devices not in ({"None"}, {"cpu"}):
        yield f"`model.device_map={device_map}`: contradicts training.use_cpu=true; leave one of them out"
    elif devices == {"cpu"} and not use_cpu:
        yield f"`model.device_map={device_map}`: places the model alone; use training.use_cpu=true to train on the CPU"
    elif len(devices) == 1 and number:
        yield (
            f"`model.device_map={device_map}`: training takes the first GPU that it sees; set CUDA_VISIBLE_DEVICES="
            f"{number[1]} in the environment, and leave model.device_map out"
        )


def _find_unjoinable(lora: LoraConf) -> str | None:
    return next((key for key in ("modules_to_save", "target_parameters") if getattr(lora, key)), None)


def _check_lora(lora: LoraConf) -> Iterator[str]:
    for name, pattern in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        yield from (f"`lora.{name}.{key}={value}`: must be at least 1" for key, value in pattern.items() if value < 1)
    start = lora.init_lora_weights
    if start is False:
        yield "`lora.init_lora_weights=False`: begins with a random B, away from the reference; use true"
    elif start in _NEED_MORE:
        yield f"`lora.init_lora_weights={start}`: {_NEED_MORE[start]}; use true, eva, olora or pissa"
    elif start not in (*_ZERO_INITIALIZATIONS, "pissa", "olora") and not re.fullmatch(r"pissa_niter_\d+", str(start)):
        names = ("gaussian", "orthogonal", "eva", "pissa", "pissa_niter_16", "olora")
        yield f"`lora.init_lora_weights={start}`: no such initialization{suggest(start, names)}"
    elif lora.use_dora and start not in _ZERO_INITIALIZATIONS:
        yield f"`lora.use_dora=True`: cannot be converted to plain LoRA with init_lora_weights={start}; use true"
    elif start not in _ZERO_INITIALIZATIONS and (key := _find_unjoinable(lora)):
        yield (
            f"`lora.{key}`: the result of init_lora_weights={start} is two adapters joined into one, which PEFT cannot "
            "do with such; use init_lora_weights=true"
        )
    for name in filter(OWNED_LORA_FIELDS.get, lora.config):
        yield f"`lora.config.{name}={lora.config[name]}`: is not set here; {OWNED_LORA_FIELDS[name]}"
    if lora.peft_type != "LORA":
        kept = ("peft_type", "config", "target_modules")
        for field in dataclasses.fields(lora):
            default = field.default if field.default is not dataclasses.MISSING else {}
            if field.name not in kept and getattr(lora, field.name) != default:
                yield (
                    f"`lora.{field.name}={getattr(lora, field.name)}`: is LoRA's; {lora.peft_type} takes its fields "
                    f"from lora.config ({{{field.name}: …}})"
                )

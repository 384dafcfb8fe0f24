"""From a configuration to the policy, and to what its reference is.

Unless `model.reference` says otherwise, the reference is the model that training starts from: the base where a new
adapter goes on it (its B is 0), the SFT model where an SFT adapter is continued, stacked upon or merged, a frozen
copy in full fine-tuning.
"""

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from dpo_runner.adapters import build_peft_config, changes_base, check_adapter, check_targets
from dpo_runner.config import RunConf
from dpo_runner.errors import ConfigError
from dpo_runner.locations import (
    explain_missing,
    is_adapter,
    refuse_hub_adapter,
    resolve_adapter_path,
    resolve_model_path,
)
from dpo_runner.merge import load_merged_path
from dpo_runner.model_config import ModelConf, QuantConf
from dpo_runner.quantization import check_quantized, close_4bit_trap, settle_quantization
from dpo_runner.stacking import copy_adapter, stack_adapter
from dpo_runner.tokenizer import settle_vocabulary
from dpo_runner.vocabulary import (
    build_meta_model,
    count_rows,
    free_pad_row,
    load_model_config,
    read_brought_rows,
    resize_embeddings,
    train_new_rows,
)


@dataclass
class Policy:
    """The model to train and what it is compared with.

    Attributes:
        model: the base model, or a `PeftModel` whose adapter `default` is trained.
        peft_config: the new adapter for `DPOTrainer` to put on `model`, or None.
        ref_model: the reference where it is a model of its own; with adapters it is usually inside `model`.
        base: what the adapter will have to be loaded on.
        reference_adapter: folder of an adapter on the same base that is the reference, `""` for none at all (the
            bare base), None where TRL's choice is right: the initial model.
        result: the adapters that make up the result, each with its weight.
        rows: how many rows the embeddings of `base` are resized to beneath the result, None where they are not.
        saves_embeddings: whether the result must hold the embeddings that an SFT adapter has put into the base.
    """

    model: "PreTrainedModel | PeftModel"
    peft_config: PeftConfig | None
    ref_model: PreTrainedModel | None
    base: str
    reference_adapter: str | None = None
    result: dict[str, float] = field(default_factory=lambda: {"default": 1.0})
    rows: int | None = None
    saves_embeddings: bool = False


def check_model(conf: RunConf) -> PretrainedConfig:
    """Check model, quantization and adapters against the model's config, before any weight is loaded.

    Returns:
        The model's config.

    Raises:
        ConfigError: something does not fit.
    """
    name = conf.model.model_name_or_path
    refuse_hub_adapter(conf.model)
    config = load_model_config(conf.model)
    own = getattr(config, "quantization_config", None)
    quantization_config = settle_quantization(conf.quant, own, name)
    if own is not None and conf.lora is None and conf.model.adapter is None:
        raise ConfigError("`lora=null`: the checkpoint is quantized, and quantized weights need an adapter to train")
    peft_config = build_peft_config(conf.lora)
    if (quantization_config is not None or own is not None) and changes_base(peft_config):
        raise ConfigError(
            f"`lora.init_lora_weights={conf.lora and conf.lora.init_lora_weights}`: takes its share out of the base "
            "weights, which a quantized base cannot give exactly; use quant=none, or lora.init_lora_weights=true"
        )
    meta = build_meta_model(config, conf.model)
    if conf.model.adapter is not None:
        check_adapter(Path(resolve_adapter_path(conf.model)), meta, name, conf.model.use_safetensors)
    if conf.lora is not None:
        check_targets(conf.lora, meta, name)
    new_ids = settle_vocabulary(conf.model).new_ids
    if new_ids and conf.model.adapter is not None and conf.model.adapter_mode != "merge":
        raise ConfigError(
            f"`model.added_tokens`: {len(new_ids)} of them are new to the tokenizer of {conf.model.adapter}, whose "
            "embeddings are its own; use model.adapter_mode=merge"
        )
    train_new_rows(peft_config, meta, new_ids)
    check_quantized(meta, quantization_config, name)
    return config


def load_policy(conf: RunConf) -> Policy:
    """Load base, quantization and SFT adapter into the policy that training starts from.

    Raises:
        ConfigError: a model or adapter cannot be loaded.
    """
    mode = conf.model.adapter_mode if conf.model.adapter is not None else None
    base, path = load_base_model(settle_dtype(conf), conf.quant)
    policy = Policy(base, build_peft_config(conf.lora), None, path)
    vocabulary = settle_vocabulary(conf.model)
    train_new_rows(policy.peft_config, base, vocabulary.new_ids)
    policy.rows = vocabulary.rows if mode != "merge" or vocabulary.new_ids else None  # a merged base has them already
    policy.saves_embeddings = vocabulary.replaces_base and mode in ("continue", "stack")
    if mode in ("continue", "stack"):
        folder = resolve_adapter_path(conf.model)
        with explain_missing(str(conf.model.adapter), "model.adapter"):
            if mode == "continue":
                # Without is_trainable the adapter is frozen and the loss would never move.
                policy.model = PeftModel.from_pretrained(base, folder, is_trainable=True)
            else:
                assert policy.peft_config is not None
                policy.model = stack_adapter(base, folder, policy.peft_config)
                policy.peft_config = None
                policy.result = {"sft": 1.0, "default": 1.0}
                policy.saves_embeddings |= policy.model.absorbed
    elif changes_base(policy.peft_config):
        # TRL gets both adapters: without any, the base is not the one that training starts from.
        policy.model = get_peft_model(base, policy.peft_config)
        policy.model.peft_config["default"].init_lora_weights = True  # its copy must not take from the base again
        policy.peft_config = None
        policy.result = {"default": 1.0, "ref": -1.0}  # what it has become on top of the base as published
    policy.reference_adapter, policy.ref_model = load_reference(conf)
    if policy.ref_model is not None and "ref" in policy.result:
        copy_adapter(policy.model, "default", "ref")  # TRL does so only where that is its reference
    if is_initial(conf) and trains_all(conf) and not conf.training.precompute_ref_log_probs:
        policy.ref_model = copy.deepcopy(policy.model).eval().requires_grad_(False)
    return policy


def trains_all(conf: RunConf) -> bool:
    """Whether a run trains the model's own weights, and no adapter."""
    return conf.lora is None and (conf.model.adapter is None or conf.model.adapter_mode != "continue")


def settle_dtype(conf: RunConf) -> ModelConf:
    """Return the `model` group with the dtype that a run loads its weights in."""
    if trains_all(conf) and conf.model.dtype == "auto":
        return replace(conf.model, dtype="float32")  # in 16 bits most small updates of the weights are lost
    return conf.model


def is_initial(conf: RunConf) -> bool:
    """Whether the reference is the model that training starts from."""
    return conf.model.reference == "initial" or (conf.model.reference == "base" and conf.model.adapter is None)


def holds_reference(conf: RunConf) -> bool:
    """Whether a reference that is the bare base, or an adapter on it, is within the policy's own model.

    It is not where the policy has no adapter, or has it on another base: one that an SFT adapter was merged into, or
    that an initialization has taken its share out of.
    """
    merged = conf.model.adapter is not None and conf.model.adapter_mode == "merge"
    return not (trains_all(conf) or merged or changes_base(build_peft_config(conf.lora)))


def load_reference(conf: RunConf) -> tuple[str | None, PreTrainedModel | None]:
    """Load what `model.reference` names.

    Returns:
        The folder of an adapter that is the reference on the policy's base, `""` for that base with no adapter on;
        or the reference as a model of its own, in evaluation mode. Neither where it is the initial model.

    Raises:
        ConfigError: it cannot be loaded, or is an adapter for another base.
    """
    name, other = conf.model.reference, settle_dtype(conf)
    if is_initial(conf):
        return None, None
    if name == "base" and holds_reference(conf):
        return "", None
    other = replace(other, adapter=None, adapter_mode="continue", adapter_revision=None, added_tokens=[])
    if is_adapter(name):
        other = replace(other, adapter=name, adapter_mode="merge")
        folder = resolve_adapter_path(other)
        meta = build_meta_model(load_model_config(conf.model), conf.model)
        check_adapter(Path(folder), meta, conf.model.model_name_or_path, True)
        if holds_reference(conf):
            if read_brought_rows(Path(folder), meta)[1]:
                raise ConfigError(
                    f"`model.reference={name}`: brings embeddings of its own, which would be the policy's too; merge "
                    "it into its base, and name that model"
                )
            return folder, None
    elif name != "base":
        other = replace(other, model_name_or_path=name, revision=None, gguf_file=None)
    rows = settle_vocabulary(conf.model).rows or 0
    return None, load_base_model(other, conf.quant, rows)[0].eval().requires_grad_(False)


def load_base_model(conf: ModelConf, quant: QuantConf | None, min_rows: int = 0) -> tuple[PreTrainedModel, str]:
    """Load the model beneath the trained adapter, the SFT adapter merged into it where `adapter_mode` says so.

    Args:
        conf: the `model` group; its tokens decide about the size of the embeddings.
        quant: the `quant` group.
        min_rows: how many rows the embeddings must have at least.

    Returns:
        The model, and the folder or hub id of its unquantized weights.

    Raises:
        ConfigError: it cannot be loaded.
    """
    base = resolve_model_path(conf)
    own, vocabulary = getattr(load_model_config(conf), "quantization_config", None), settle_vocabulary(conf)
    if conf.adapter is not None and conf.adapter_mode == "merge":
        if own is not None:
            raise ConfigError(
                f"`model.adapter_mode=merge`: {conf.model_name_or_path} is quantized, and merging into it would round "
                "the merged weights; name the unquantized model, or use model.adapter_mode=stack"
            )
        adapter = resolve_adapter_path(conf)
        base = str(load_merged_path(conf, base, adapter, lambda: _load_beneath(conf, base, vocabulary.brought)))
    model = load_weights(conf, base, settle_quantization(quant, own, conf.model_name_or_path))
    resize_embeddings(model, max(vocabulary.rows or count_rows(model), min_rows))
    return model, base


def _load_beneath(conf: ModelConf, base: str, rows: int | None) -> PreTrainedModel:
    model = load_weights(conf, base, None)
    resize_embeddings(model, rows or count_rows(model))
    return model


def load_weights(conf: ModelConf, base: str, quantization_config: Any) -> PreTrainedModel:
    """Load a model's weights from a folder or the hub.

    Raises:
        ConfigError: it cannot be loaded, or only as a pickle.
    """
    device_map = conf.device_map
    if device_map is None and quantization_config is not None and torch.cuda.is_available():
        device_map = {"": torch.cuda.current_device()}  # bitsandbytes quantizes where the weights are to stay
    folder = Path(base)
    if (
        conf.use_safetensors
        and folder.is_dir()
        and not list(folder.glob("*.safetensors"))
        and list(folder.glob("*.bin"))
    ):
        raise ConfigError(
            f"`model.model_name_or_path={base}`: holds its weights only as a pickle, which may run code; "
            "model.use_safetensors=false allows it"
        )
    with explain_missing(base, "model.model_name_or_path"):
        model = AutoModelForCausalLM.from_pretrained(
            base,
            revision=_revision(conf, base),
            dtype=conf.dtype if conf.dtype == "auto" else getattr(torch, conf.dtype),
            attn_implementation=conf.attn_implementation,
            trust_remote_code=conf.trust_remote_code,
            use_safetensors=True if conf.use_safetensors else None,
            device_map=device_map,
            # None, passed on, would override what the checkpoint says of itself
            **({} if quantization_config is None else {"quantization_config": quantization_config}),
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        # transformers has put the adapter's layers into the model itself, where no reference can be told from it.
        raise ConfigError(
            f"`model.model_name_or_path={base}`: is an adapter; put it in model.adapter and its base model here"
        )
    close_4bit_trap(model)
    free_pad_row(model)
    return model


def _revision(conf: ModelConf, base: str) -> str | None:
    return conf.revision if base == conf.model_name_or_path else None


def describe_reference(conf: RunConf) -> str:
    """Say in one line what the policy is compared with, for the plan."""
    model = conf.model
    if model.reference == "base" and model.adapter:
        return f"the bare {model.model_name_or_path}, without {model.adapter}"
    if model.reference not in ("initial", "base"):
        on_base = f", on {model.model_name_or_path}" if is_adapter(model.reference) else ""
        return f"{model.reference}{on_base} (model.reference)"
    if model.adapter and model.adapter_mode == "merge":
        return f"the SFT model: {model.adapter} merged into the unquantized {model.model_name_or_path}"
    if model.adapter:
        frozen = "with a frozen copy of" if model.adapter_mode == "continue" else "with the frozen"
        return f"the SFT model: {model.model_name_or_path} {frozen} {model.adapter}"
    if conf.lora is None:
        how = "as it is before training" if conf.training.precompute_ref_log_probs else "a frozen copy of"
        return f"{model.model_name_or_path} {how}" if "before" in how else f"{how} {model.model_name_or_path}"
    if changes_base(build_peft_config(conf.lora)):
        return f"{model.model_name_or_path}: a frozen copy of the {conf.lora.init_lora_weights} adapter as it begins"
    return f"{model.model_name_or_path} without the adapter"

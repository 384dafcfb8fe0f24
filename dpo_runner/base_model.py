"""The model beneath all trained adapters: weights, quantization, a merged SFT adapter, the size of the vocabulary."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from dpo_runner.errors import ConfigError
from dpo_runner.locations import (
    explain_missing,
    resolve_adapter_path,
    resolve_model_path,
)
from dpo_runner.merge import load_merged_path
from dpo_runner.model_config import ModelConf, QuantConf
from dpo_runner.quantization import close_4bit_trap, settle_quantization
from dpo_runner.tokenizer import settle_vocabulary
from dpo_runner.vocabulary import (
    count_rows,
    free_pad_row,
    load_model_config,
    resize_embeddings,
)


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

"""Base weights: loaded, quantized, resized, an SFT adapter merged into them."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dpo_runner.config.sections.model import ModelConf, QuantConf
from dpo_runner.errors import ConfigError
from dpo_runner.io.files import cache_dir, write_folder_once
from dpo_runner.model.files.locations import explain_missing, resolve_adapter_path, resolve_model_path
from dpo_runner.model.quantization import close_4bit_trap, settle_quantization
from dpo_runner.model.tokenizer import settle_vocabulary
from dpo_runner.model.vocabulary import count_rows, free_pad_row, load_model_config, resize_embeddings


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


def load_merged_path(conf: ModelConf, base: str, adapter: str, load_base: Callable[[], PreTrainedModel]) -> Path:
    """Return the folder of the base with the adapter merged into it, made on first use.

    Args:
        conf: the `model` group.
        base: the base's folder or hub id.
        adapter: the adapter's folder.
        load_base: loads the unquantized base, its embeddings of the adapter's size.
    """
    digest = hashlib.sha256(repr((base, conf.revision, conf.dtype)).encode())
    sources = [*Path(adapter).glob("adapter_*"), *(Path(base).glob("*") if Path(base).is_dir() else ())]
    for path in sorted(path for path in sources if path.is_file()):
        stat = path.stat()
        digest.update(repr((path.name, stat.st_size, stat.st_mtime_ns)).encode())
        if path.name.startswith("adapter_"):
            digest.update(path.read_bytes())
    folder = cache_dir() / f"merged-{digest.hexdigest()[:16]}"
    if not folder.exists():
        with torch.random.fork_rng():  # PEFT draws weights before it loads them, on the first use only
            beneath = load_base()
            with explain_missing(str(conf.adapter), "model.adapter"):
                model = PeftModel.from_pretrained(beneath, adapter)
            model = model.merge_and_unload()
        revision = conf.revision if base == conf.model_name_or_path else None
        tokenizer = AutoTokenizer.from_pretrained(base, revision=revision, trust_remote_code=conf.trust_remote_code)

        def fill(staging: Path) -> None:
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)

        write_folder_once(folder, fill)
    return folder

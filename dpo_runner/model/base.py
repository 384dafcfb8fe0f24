"""Load base weights: quantize, resize embeddings, merge an SFT adapter."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dpo_runner.config.sections.model import ModelConf
from dpo_runner.errors import ConfigError
from dpo_runner.io.files import cache_dir, write_folder_once
from dpo_runner.model.blueprint import Blueprint
from dpo_runner.model.files.locations import loading_errors
from dpo_runner.model.quantization import close_4bit_trap
from dpo_runner.model.vocabulary import count_rows, free_pad_row, resize_embeddings


def load_base_model(blueprint: Blueprint, min_rows: int = 0) -> tuple[PreTrainedModel, str]:
    """Load the base of the trained adapter; with `adapter_mode=merge`, the SFT adapter merged into it.

    Args:
        blueprint: the model's blueprint; its tokens determine the number of embedding rows.
        min_rows: minimum number of embedding rows.

    Returns:
        The model, and the folder or hub id of its unquantized weights.

    Raises:
        ConfigError: the model cannot be loaded.
    """
    base = blueprint.base
    if blueprint.adapter_mode == "merge":
        if blueprint.own_quantization is not None:
            raise ConfigError(
                f"`model.adapter_mode=merge`: {blueprint.name} is quantized, and merging into it would round "
                "the merged weights; name the unquantized model, or use model.adapter_mode=stack"
            )
        base = str(_merge_adapter(blueprint))
    model = load_weights(blueprint.conf, base, blueprint.quantization)
    resize_embeddings(model, max(blueprint.vocabulary.rows or count_rows(model), min_rows))
    return model, base


def load_weights(conf: ModelConf, base: str, quantization_config: Any) -> PreTrainedModel:
    """Load a model's weights from a folder or the hub.

    Raises:
        ConfigError: the model cannot be loaded, or only from a pickle.
    """
    device_map = conf.device_map
    if device_map is None and quantization_config is not None and torch.cuda.is_available():
        device_map = {"": torch.cuda.current_device()}  # bitsandbytes quantizes on the final device
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
    with loading_errors(base, "model.model_name_or_path"):
        model = AutoModelForCausalLM.from_pretrained(
            base,
            revision=_revision(conf, base),
            dtype=conf.dtype if conf.dtype == "auto" else getattr(torch, conf.dtype),
            attn_implementation=conf.attn_implementation,
            trust_remote_code=conf.trust_remote_code,
            use_safetensors=True if conf.use_safetensors else None,
            device_map=device_map,
            # passing None would override the checkpoint's own quantization_config
            **({} if quantization_config is None else {"quantization_config": quantization_config}),
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        # transformers has injected the adapter layers into the model, so the base cannot serve as reference.
        raise ConfigError(
            f"`model.model_name_or_path={base}`: is an adapter; put it in model.adapter and its base model here"
        )
    close_4bit_trap(model)
    free_pad_row(model)
    return model


def _revision(conf: ModelConf, base: str) -> str | None:
    return conf.revision if base == conf.model_name_or_path else None


def _merge_adapter(blueprint: Blueprint) -> Path:
    """Merge the SFT adapter into the unquantized base, once, and return the cached folder.

    Merging into a quantized base would round the merged weights, which changes policy and reference.
    """
    conf, base, adapter = blueprint.conf, blueprint.base, blueprint.adapter
    assert adapter is not None
    digest = hashlib.sha256(repr((base, conf.revision, conf.dtype)).encode())
    sources = [*adapter.glob("adapter_*"), *(Path(base).glob("*") if Path(base).is_dir() else ())]
    for path in sorted(path for path in sources if path.is_file()):
        stat = path.stat()
        digest.update(repr((path.name, stat.st_size, stat.st_mtime_ns)).encode())
        if path.name.startswith("adapter_"):
            digest.update(path.read_bytes())
    folder = cache_dir() / f"merged-{digest.hexdigest()[:16]}"
    if not folder.exists():
        with (
            torch.random.fork_rng()
        ):  # PEFT initializes weights at random before loading; without the fork, only an uncached merge would do so
            beneath = load_weights(conf, base, None)
            resize_embeddings(beneath, blueprint.vocabulary.brought or count_rows(beneath))
            with loading_errors(str(conf.adapter), "model.adapter"):
                model = PeftModel.from_pretrained(beneath, adapter)
            model = model.merge_and_unload()
        tokenizer = AutoTokenizer.from_pretrained(
            base, revision=_revision(conf, base), trust_remote_code=conf.trust_remote_code
        )

        def fill(staging: Path) -> None:
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)

        write_folder_once(folder, fill)
    return folder

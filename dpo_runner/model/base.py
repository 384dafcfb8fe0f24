"""Load base weights: quantize, resize embeddings, merge an SFT adapter, place on the device."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dpo_runner.config.sections.model import ModelConf
from dpo_runner.errors import ConfigError
from dpo_runner.io.files import cache_dir
from dpo_runner.io.upstream import find_private
from dpo_runner.model.blueprint import Blueprint
from dpo_runner.model.files.gguf import write_model
from dpo_runner.model.files.locations import loading_errors
from dpo_runner.model.quantization import keep_training_products
from dpo_runner.model.vocabulary import count_rows, free_pad_row, resize_embeddings

_MERGING = 2
"""Version of `merge_adapter`; a change lets merged models in the cache be made anew."""


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
    conf = blueprint.conf
    if blueprint.dtype == torch.float16:  # instead of bfloat16 on some GPUs
        conf = replace(conf, dtype="float16")
    model = load_weights(conf, base, blueprint.quantization)
    resize_embeddings(model, max(blueprint.vocabulary.rows or count_rows(model), min_rows))
    if (head := model.get_output_embeddings()) is not None:
        head.register_forward_pre_hook(_fold_rows)
    return model, base


def _fold_rows(head: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Make the head's input contiguous.

    For a slice, such as each prompt's last position, torch's linear makes a batched product, which on a CPU copies a
    frozen weight for each row. `contiguous` alone is not enough: a batch of one counts as contiguous.
    """
    if not args or args[0].dim() < 3:
        return None
    hidden, *others = args
    return (hidden.flatten(0, -2).contiguous().view(hidden.shape), *others)


def load_weights(conf: ModelConf, base: str, quantization_config: Any) -> PreTrainedModel:
    """Load a model's weights from a folder or the hub.

    Raises:
        ConfigError: the model cannot be loaded, or only from a pickle.
    """
    device_map = conf.device_map
    if device_map is None and quantization_config is not None:
        device_map = str(find_device(conf))  # bitsandbytes quantizes on the final device
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
        model, found = AutoModelForCausalLM.from_pretrained(
            base,
            revision=_revision(conf, base),
            dtype=conf.dtype if conf.dtype == "auto" else getattr(torch, conf.dtype),
            attn_implementation=conf.attn_implementation,
            trust_remote_code=conf.trust_remote_code,
            use_safetensors=True if conf.use_safetensors else None,
            device_map=device_map,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below
            # passing None would override the checkpoint's own quantization_config
            **({} if quantization_config is None else {"quantization_config": quantization_config}),
        )
    if find_private("transformers", model, "_hf_peft_config_loaded"):
        # transformers has injected the adapter layers into the model, so the base cannot serve as reference.
        raise ConfigError(
            f"`model.model_name_or_path={base}`: is an adapter; put it in model.adapter and its base model here"
        )
    _check_whole(model, found, f"model.model_name_or_path={base}")
    keep_training_products(model)
    free_pad_row(model)
    return model


def find_device(conf: ModelConf) -> torch.device:
    """Return the device that a model computes on: a GPU, unless there is none or `model.device_map=cpu`.

    `Blueprint.of_run` sets that for `training.use_cpu=true`.
    """
    if conf.device_map == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def place(model: PreTrainedModel, conf: ModelConf) -> PreTrainedModel:
    """Move a model to the device that it computes on, and return it.

    One that transformers spread over several devices, or loaded onto one, stays there.
    """
    device = find_device(conf)
    if getattr(model, "hf_device_map", None) is None and model.device.type == "cpu" != device.type:
        model.to(device)
    return model


def _check_whole(model: PreTrainedModel, found: dict[str, Any], key: str) -> None:
    """Refuse a model whose files lack weights, or have them in another shape: transformers draws them at random."""
    for name, has, needs in sorted(found["mismatched_keys"]):
        raise ConfigError(
            f"`{key}`: its files have {name} in the shape {list(has)}, its config.json asks for {list(needs)}; use the "
            "config.json of these weights"
        )
    weights = dict(model.named_parameters())
    if lacks := sorted(weights.keys() & found["missing_keys"]):
        others = sorted(found["unexpected_keys"])
        cure = f"; they have {others[0]}, for which the model has no place" if others else ""
        cure += "; save the whole model again, as a causal language model and without a prefix to the names"
        head = model.get_output_embeddings()
        if head is not None and lacks == [name for name in lacks if weights[name] is head.weight]:
            cure += ', or set `"tie_word_embeddings": true` in its config.json if its head is its embeddings'
        raise ConfigError(
            f"`{key}`: its files lack {len(lacks)} of {len(weights)} weights, such as {lacks[0]}, and transformers "
            f"would draw them at random{cure}"
        )


def _revision(conf: ModelConf, base: str) -> str | None:
    return conf.revision if base == conf.model_name_or_path else None


def base_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return a model without PEFT's wrapper."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def merge_adapter(model: PeftModel, safe_merge: bool = False) -> PreTrainedModel:
    """Merge the adapter into its base; tied embeddings and head are untied first if the adapter changes one of them.

    PEFT would merge into the weight that both use.

    Args:
        model: the base with the adapter.
        safe_merge: whether PEFT looks for NaN first.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    adapted = isinstance(embeddings, BaseTunerLayer) or isinstance(head, BaseTunerLayer)
    if adapted and head is not None and head.weight is embeddings.weight:
        own = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
        own.weight = torch.nn.Parameter(own.weight.detach().clone(), requires_grad=False)
    merged: PreTrainedModel = model.merge_and_unload(safe_merge=safe_merge)
    return merged


def _merge_adapter(blueprint: Blueprint) -> Path:
    """Merge the SFT adapter into the unquantized base, once, and return the cached folder.

    Merging into a quantized base would round the merged weights, which changes policy and reference.
    """
    conf, base, adapter = blueprint.conf, blueprint.base, blueprint.adapter
    assert adapter is not None
    digest = hashlib.sha256(repr((base, conf.revision, conf.dtype, _MERGING)).encode())
    sources = [*adapter.glob("adapter_*"), *(Path(base).glob("*") if Path(base).is_dir() else ())]
    for path in sorted(path for path in sources if path.is_file()):
        stat = path.stat()
        digest.update(repr((path.name, stat.st_size, stat.st_mtime_ns)).encode())
        if path.name.startswith("adapter_"):
            digest.update(path.read_bytes())
    folder = cache_dir() / f"merged-{digest.hexdigest()[:16]}"
    if not folder.exists():
        # PEFT initializes weights at random, on the CPU; without the fork, only an uncached merge would do so
        with torch.random.fork_rng(devices=[]):
            beneath = load_weights(conf, base, None)
            resize_embeddings(beneath, blueprint.vocabulary.brought or count_rows(beneath))
            with loading_errors(str(conf.adapter), "model.adapter"):
                model = PeftModel.from_pretrained(beneath, adapter, torch_device="cpu")
            model = merge_adapter(model)
        tokenizer = AutoTokenizer.from_pretrained(
            base, revision=_revision(conf, base), trust_remote_code=conf.trust_remote_code
        )
        write_model(folder, model, tokenizer)
    return folder

"""From a configuration to the policy, and to what its reference is.

The reference must be the model that training starts from: the base where a new adapter goes on it (its B
is 0), the SFT model where an SFT adapter is continued or merged, a frozen copy in full fine-tuning.
"""

import copy
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from dpo_runner.artifacts import cache_dir, write_folder_once
from dpo_runner.config import LoraConf, ModelConf, QuantConf, RunConf
from dpo_runner.locations import explain_missing, resolve_adapter_path, resolve_model_path


@dataclass
class Policy:
    """The model to train and what it is compared with.

    Attributes:
        model: the base model, or a `PeftModel` whose adapter `default` is trained.
        peft_config: the new adapter for `DPOTrainer` to put on `model`, or None.
        ref_model: a frozen copy, in full fine-tuning only; with adapters the reference is inside `model`.
        base: what the adapter will have to be loaded on.
    """

    model: "PreTrainedModel | PeftModel"
    peft_config: LoraConfig | None
    ref_model: PreTrainedModel | None
    base: str


def build_quantization_config(conf: QuantConf | None) -> BitsAndBytesConfig | None:
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
        bnb_4bit_compute_dtype=getattr(torch, conf.bnb_4bit_compute_dtype),
        llm_int8_skip_modules=conf.llm_int8_skip_modules,
    )


def build_lora_config(conf: LoraConf | None) -> LoraConfig | None:
    """Return peft's `LoraConfig` for the `lora` group."""
    if conf is None:
        return None
    return LoraConfig(
        r=conf.r,
        lora_alpha=conf.lora_alpha,
        lora_dropout=conf.lora_dropout,
        target_modules=conf.target_modules,
        use_rslora=conf.use_rslora,
        modules_to_save=conf.modules_to_save,
        bias="none",
        task_type="CAUSAL_LM",
    )


def load_policy(conf: RunConf) -> Policy:
    """Load base, quantization and SFT adapter into the policy that training starts from.

    Raises:
        ConfigError: a model or adapter cannot be loaded.
    """
    continues = conf.model.adapter is not None and conf.model.adapter_mode == "continue"
    model_conf = conf.model
    if conf.lora is None and not continues and model_conf.dtype == "auto":
        model_conf = replace(model_conf, dtype="float32")  # in 16 bits most small updates of the weights are lost
    loaded, base = load_base_model(model_conf, conf.quant)
    model: PreTrainedModel | PeftModel = loaded
    if continues:
        with explain_missing(str(conf.model.adapter), "model.adapter"):
            # Without is_trainable the adapter is frozen and the loss would never move.
            model = PeftModel.from_pretrained(model, resolve_adapter_path(conf.model), is_trainable=True)
    ref_model = None
    if conf.lora is None and not continues:
        ref_model = copy.deepcopy(model).eval().requires_grad_(False)
    return Policy(model, build_lora_config(conf.lora), ref_model, base)


def load_base_model(conf: ModelConf, quant: QuantConf | None) -> tuple[PreTrainedModel, str]:
    """Load the model beneath the trained adapter, the SFT adapter merged into it where `adapter_mode` says so.

    Returns:
        The model, and the folder or hub id of its unquantized weights.

    Raises:
        ConfigError: it cannot be loaded.
    """
    base = resolve_model_path(conf)
    if conf.adapter is not None and conf.adapter_mode == "merge":
        base = str(_merge(conf, base, resolve_adapter_path(conf)))
    return _load_weights(conf, base, build_quantization_config(quant)), base


def _load_weights(conf: ModelConf, base: str, quantization_config: BitsAndBytesConfig | None) -> PreTrainedModel:
    with explain_missing(base, "model.model_name_or_path"):
        model = AutoModelForCausalLM.from_pretrained(
            base,
            revision=conf.revision if base == conf.model_name_or_path else None,
            dtype=conf.dtype if conf.dtype == "auto" else getattr(torch, conf.dtype),
            attn_implementation=conf.attn_implementation,
            trust_remote_code=conf.trust_remote_code,
            quantization_config=quantization_config,
            # bitsandbytes quantizes on the device where the weights are to stay
            device_map={"": torch.cuda.current_device()} if quantization_config and torch.cuda.is_available() else None,
        )
    for module in linear4bit_modules(model):
        # On CPUs with avx512_bf16, an evaluation forward repacks the weights into a form whose product has no
        # gradient, and every later training step is silently wrong. Off, the gradients are those of the
        # dequantized weights, before and after an evaluation.
        module.support_avx512bf16_for_cpu = False
    return model


def linear4bit_modules(model: torch.nn.Module) -> Iterator[Any]:
    """Yield bitsandbytes' 4-bit layers."""
    from bitsandbytes.nn import Linear4bit

    return (module for module in model.modules() if isinstance(module, Linear4bit))


def _merge(conf: ModelConf, base: str, adapter: str) -> Path:
    """Merge an adapter into the unquantized base, once, and return the folder of the result.

    Merging into a quantized base would round the merged weights, and move policy and reference with them.
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
        model = PeftModel.from_pretrained(_load_weights(conf, base, None), adapter).merge_and_unload()
        tokenizer = AutoTokenizer.from_pretrained(
            base, revision=conf.revision if base == conf.model_name_or_path else None
        )

        def fill(staging: Path) -> None:
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)

        write_folder_once(folder, fill)
    return folder


def describe_reference(conf: RunConf) -> str:
    """Say in one line what the policy is compared with, for the plan."""
    model = conf.model
    if model.adapter and model.adapter_mode == "continue":
        return f"the SFT model: {model.model_name_or_path} with a frozen copy of {model.adapter}"
    if model.adapter:
        return f"the SFT model: {model.adapter} merged into the unquantized {model.model_name_or_path}"
    if conf.lora is None:
        return f"a frozen copy of {model.model_name_or_path}"
    return f"{model.model_name_or_path} without the adapter"

"""What the policy is compared with: which model that is, where it is held, and how to load it alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from dpo_runner.config.run_conf import RunConf
from dpo_runner.config.sections.model import ModelConf
from dpo_runner.errors import ConfigError
from dpo_runner.io.processes import count_processes
from dpo_runner.model.adapters import build_peft_config, changes_base, check_adapter
from dpo_runner.model.base import load_base_model
from dpo_runner.model.files.locations import is_adapter, resolve_adapter_path
from dpo_runner.model.tokenizer import settle_vocabulary
from dpo_runner.model.vocabulary import build_meta_model, load_model_config, read_brought_rows


def trains_all(conf: RunConf) -> bool:
    """Whether a run trains the model's own weights, and no adapter."""
    return conf.lora is None and (conf.model.adapter is None or conf.model.adapter_mode != "continue")


def settle_dtype(conf: RunConf) -> ModelConf:
    """Return the `model` group with the dtype that a run loads its weights in."""
    if trains_all(conf) and conf.model.dtype == "auto":
        return replace(conf.model, dtype="float32")  # in 16 bits most small updates of the weights are lost
    return conf.model


def stores_reference(conf: RunConf) -> bool:
    """Whether the engine's store has the reference's log-probabilities, so that training runs no reference."""
    return conf.engine.reference_store and not conf.training.sync_ref_model and count_processes() == 1


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
        before = conf.training.precompute_ref_log_probs or stores_reference(conf)
        how = "as it is before training" if before else "a frozen copy of"
        return f"{model.model_name_or_path} {how}" if "before" in how else f"{how} {model.model_name_or_path}"
    if changes_base(build_peft_config(conf.lora)):
        return f"{model.model_name_or_path}: a frozen copy of the {conf.lora.init_lora_weights} adapter as it begins"
    return f"{model.model_name_or_path} without the adapter"


def silence_dropout(model: torch.nn.Module) -> None:
    """Run the reference without dropout, while the policy has what `lora_dropout` and the model's config say.

    TRL takes the reference from the model in training mode, under `no_grad`, where dropout would make it noise.
    No other forward of the whole model is without gradient in training mode.
    """
    in_reference = False

    def before(module: torch.nn.Module, args: Any) -> None:
        nonlocal in_reference
        in_reference = module.training and not torch.is_grad_enabled()
        if in_reference:
            module.eval()

    def after(module: torch.nn.Module, args: Any, output: Any) -> None:
        if in_reference:
            module.train()

    model.register_forward_pre_hook(before)
    model.register_forward_hook(after, always_call=True)

"""Checks of adapters before weights are loaded: they fit the base, can have a copy beside them, can be joined."""

import copy
import dataclasses
import warnings
from difflib import get_close_matches
from pathlib import Path

import peft
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dpo_runner.config.adapter_config import read_adapter_fields
from dpo_runner.config.sections.model import LoraConf, ModelConf
from dpo_runner.errors import ConfigError, reason_of, suggest
from dpo_runner.model.adapters import changes_base
from dpo_runner.model.files.locations import loading_errors
from dpo_runner.model.files.pickles import refuse_pickled_adapter
from dpo_runner.model.reference import Reference
from dpo_runner.model.stacking import SFT, absorb_embeddings, find_unjoinable
from dpo_runner.model.vocabulary import count_rows, read_brought_rows, resize_embeddings


def check_adapters(
    conf: ModelConf, adapter: Path | None, reference: Reference, new: PeftConfig | None, meta: PreTrainedModel
) -> None:
    """Check the adapters of a run: SFT adapter, reference and the new one.

    Args:
        conf: the `model` group.
        adapter: the SFT adapter's folder, if any.
        reference: the reference, which may be an adapter.
        new: the new adapter's config, if any.
        meta: the base on the meta device, unquantized; not modified.

    Raises:
        ConfigError: an adapter does not fit the base, or cannot be used in this way.
    """
    start = getattr(new, "init_lora_weights", None)
    if new is not None:
        _check_tying(new, meta, "lora.config.ensure_weight_tying=True", "leave it out, and list the output head too")
    if adapter is not None:
        key = f"model.adapter={adapter}"
        model = check_adapter(adapter, meta, key, conf)
        if conf.adapter_mode == "merge":
            _check_mergeable(model, key, "use model.adapter_mode=continue")
        else:
            _check_copyable(model, key, "use model.adapter_mode=merge")
        if conf.adapter_mode == "stack":
            own = {"modules_to_save", "trainable_token_indices"}  # embeddings are moved into the base
            if found := find_unjoinable(model.peft_config[SFT], own):
                raise ConfigError(
                    f"`{key}`: its adapter_config.json has {found}, with which it cannot be joined with a new adapter; "
                    f"use model.adapter_mode=continue{'' if found.startswith('lora_bias') else ' or merge'}"
                )
            absorb_embeddings(model)
            _check_new(new, frozenset(), "model.adapter_mode=stack", "use model.adapter_mode=merge")
    if changes_base(new):
        joined = frozenset({"trainable_token_indices"})
        _check_new(new, joined, f"lora.init_lora_weights={start}", "use lora.init_lora_weights=true")
    if reference.folder is not None:
        folder, key = Path(reference.folder), f"model.reference={conf.reference}"
        model = check_adapter(folder, meta, key, dataclasses.replace(conf, use_safetensors=True))
        instead = "merge it into its base, and name that model"
        if not reference.is_within:
            _check_mergeable(model, key, "name another reference")
        else:
            _check_copyable(model, key, instead)
            if read_brought_rows(folder, meta)[1]:
                raise ConfigError(f"`{key}`: brings embeddings of its own, which would be the policy's too; {instead}")


def _check_mergeable(model: PeftModel, key: str, instead: str) -> None:
    for path, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer) and layer.lora_bias.get(SFT) and layer.get_base_layer().bias is None:
            raise ConfigError(f"`{key}`: its lora_bias=True cannot be merged into {path}, which has no bias; {instead}")


def _check_copyable(model: PeftModel, key: str, instead: str) -> None:
    """Refuse an adapter that changes the base's own weights, or of which PEFT makes no whole copy."""
    config = model.peft_config[SFT]
    if getattr(config, "bias", "none") != "none":
        raise ConfigError(
            f"`{key}`: trains biases of the base (bias={config.bias}), so no other adapter can be beside it; {instead}"
        )
    start = getattr(config, "init_lora_weights", True)
    if changes_base(config) or start in ("loftq", "corda", "lora_ga"):
        raise ConfigError(
            f"`{key}`: changes the base whenever PEFT loads it (init_lora_weights={start}), and its frozen copy would "
            f"change it again; {instead}"
        )
    _check_tying(config, model, key, instead)


def _check_tying(config: PeftConfig, model: PeftModel | PreTrainedModel, key: str, instead: str) -> None:
    """Refuse copies of embeddings and head that are tied: PEFT ties those of a model's first adapter only."""
    ties = getattr(config, "ensure_weight_tying", False) and config.modules_to_save
    if ties and model.config.tie_word_embeddings:
        raise ConfigError(
            f"`{key}`: ensure_weight_tying=True ties its copies of {', '.join(config.modules_to_save)}, and PEFT does "
            f"so for one adapter of a model, but a run needs a second one; {instead}"
        )


def _check_new(new: PeftConfig | None, joined: frozenset[str], why: str, instead: str) -> None:
    if new is not None and (found := find_unjoinable(new, joined)):
        own = found.partition("=")[0] in {field.name for field in dataclasses.fields(LoraConf)}
        raise ConfigError(
            f"`lora.{'' if own else 'config.'}{found}`: the result of {why} is two adapters joined into one, which is "
            f"not exact with it; {instead}"
        )


def check_adapter(folder: Path, meta: PreTrainedModel, key: str, conf: ModelConf) -> PeftModel:
    """Check by the names and shapes in its file that an adapter fits the model and is not all zero.

    PEFT loads an adapter for another base without its weights, with a warning at most, and likewise layers that its
    file lacks.

    Args:
        folder: the adapter's.
        meta: the base model on the meta device, unquantized; not modified.
        key: the setting that names the adapter, for messages.
        conf: the `model` group: the base's name for messages, and whether a pickled file is refused.

    Returns:
        The model with the adapter as `sft`, on the meta device.

    Raises:
        ConfigError: its config cannot be used; a weight is missing, or has another name or shape; all of its lora_B are
            0; or it is pickled.
    """
    config = read_adapter_config(folder)
    if config.is_prompt_learning:
        raise ConfigError(f"`{key}`: is a {config.peft_type.value} adapter, which learns virtual tokens, not weights")
    if config.task_type in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"):
        raise ConfigError(
            f"`{key}`: is a classifier's, such as a reward model's (task_type={config.task_type}), and its head would "
            "be left out; name an adapter that was trained to answer"
        )
    file = folder / "adapter_model.safetensors"
    if conf.use_safetensors or file.exists() or not (folder / "adapter_model.bin").exists():
        refuse_pickled_adapter(folder, key)
        _check_names(file, meta, key, conf.model_name_or_path)
    return _put_on_meta(folder, config, meta, key)


def _check_names(file: Path, meta: PreTrainedModel, key: str, name: str) -> None:
    modules = dict(meta.named_modules())
    moved, (setting, _, folder) = None, key.partition("=")
    with loading_errors(folder, setting), safe_open(file, "pt") as tensors:
        for weight in sorted(tensors.keys()):
            if "_orig_mod." in weight:
                raise ConfigError(
                    f"`{key}`: was saved from a model compiled by torch.compile: its weights have names with "
                    f"`_orig_mod.`, which PEFT does not find; remove `_orig_mod.` from the names in {file.name}, or "
                    "save the uncompiled model"
                )
            path, found, part = weight.removeprefix("base_model.model.").partition(".lora_")
            if not found or part.split(".")[0] not in ("A", "B"):
                continue
            module = modules.get(path)
            if module is None:
                near = get_close_matches(path, modules, n=1)
                hint = f"; the nearest there is {near[0]}" if near else ""
                raise ConfigError(f"`{key}`: is for another base: {name} has no module {path}{hint}")
            _check_shape(key, name, path, module, part[0], list(tensors.get_slice(weight).get_shape()))
            if part[0] == "B":
                moved = moved or bool(tensors.get_tensor(weight).any())
    if moved is False:
        raise ConfigError(
            f"`{key}`: all of its lora_B weights are 0, so it changes nothing; it was saved before training, or its "
            "training never updated it"
        )


def _check_shape(key: str, name: str, path: str, module: torch.nn.Module, part: str, shape: list[int]) -> None:
    weight = getattr(module, "weight", None)
    if not isinstance(module, (torch.nn.Linear, Conv1D)) or weight is None:
        return
    inputs, outputs = (weight.shape[0], weight.shape[1]) if isinstance(module, Conv1D) else weight.shape[::-1]
    has, wants = (shape[-1], inputs) if part == "A" else (shape[0], outputs)
    if has != wants:
        side = "inputs" if part == "A" else "outputs"
        raise ConfigError(
            f"`{key}`: is for another base: its lora_{part} of {path} has {has} {side}, that layer of {name} has "
            f"{wants}"
        )


def _put_on_meta(folder: Path, config: PeftConfig, meta: PreTrainedModel, key: str) -> PeftModel:
    """Let PEFT load an adapter onto a copy of the model without weights, and check what it leaves out."""
    loaded = copy.deepcopy(config)
    if isinstance(loaded, LoraConfig):
        loaded.init_lora_weights = True  # other initializations compute with the base's weights
    try:
        base = copy.deepcopy(meta)
        resize_embeddings(base, read_brought_rows(folder, meta)[0] or count_rows(meta))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # copying to the meta device does nothing
            model = get_peft_model(base, loaded, SFT, low_cpu_mem_usage=True)
            result = model.load_adapter(str(folder), SFT, torch_device="cpu")
    except KeyError as error:  # of modules_to_save
        raise ConfigError(f"`{key}`: its file lacks {error}, which its adapter_config.json names") from None
    except (ValueError, RuntimeError, TypeError) as error:
        sizes = next((line.strip() for line in str(error).splitlines() if "size mismatch" in line), None)
        raise ConfigError(f"`{key}`: cannot be put on this base; {sizes or reason_of(error)}") from None
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]
    for weights, what in (
        (result.missing_keys, "its file lacks {} weights of the layers that its adapter_config.json names"),
        (
            [weight for weight in result.unexpected_keys if prefix in weight],
            "its file has {} weights of layers that its adapter_config.json does not name",
        ),
    ):
        if weights:
            first = weights[0].removeprefix("base_model.model.").replace(f".{SFT}", "")
            raise ConfigError(
                f"`{key}`: {what.format(len(weights))}, such as {first}; PEFT would leave them out silently; save the "
                "adapter again, whole"
            )
    model.peft_config[SFT] = config
    return model


def check_result(folder: Path) -> None:
    """Check that the adapter of a finished run can be read.

    Raises:
        ConfigError: a file of it is missing or damaged.
    """
    refuse_pickled_adapter(folder)
    remedy = "put it back from a copy, or run again with another run_dir"
    file = folder / "adapter_config.json"
    try:
        read_adapter_config(folder)
        file = folder / "adapter_model.safetensors"
        with safe_open(file, "pt"):
            pass
    except ConfigError as error:
        raise ConfigError(f"{error}; {remedy}") from None
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{file}: cannot be read; {reason_of(error)}; {remedy}") from None


def read_adapter_config(folder: Path) -> PeftConfig:
    """Return the config of an adapter's folder, with `inference_mode` off.

    Raises:
        ConfigError: it names no method of PEFT, or sets a switch that this PEFT does not know.
    """
    file = folder / "adapter_config.json"
    fields = read_adapter_fields(file)
    methods = {method.value: config for method, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    method = fields.get("peft_type")
    if method not in methods:
        hint = suggest(method, methods) if method else '; add the method that it was trained with, such as "LORA"'
        raise ConfigError(f"{file}: `peft_type={method}`: no such method in PEFT{hint}")
    known = {field.name for field in dataclasses.fields(methods[method])}
    # PEFT drops unknown fields with a warning. Numbers and names may be defaults of what is off.
    for name in sorted(fields.keys() - known):
        if fields[name] is True or (isinstance(fields[name], (list, dict)) and fields[name]):
            raise ConfigError(
                f"{file}: `{name}={fields[name]}`: PEFT {peft.__version__} has no such field and would leave it out, "
                f"so the model would be another; install the PEFT that saved it "
                f"({fields.get('peft_version', 'a newer one')})"
            )
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{file}: cannot be read as an adapter's config; {reason_of(error)}") from None
    config.inference_mode = False
    return config

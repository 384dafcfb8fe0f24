"""The blueprint of a run's model: all facts known before any weight is loaded, each derived once."""

import copy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from dpo_runner.config.sections.model import LoraConf, ModelConf, QuantConf
from dpo_runner.config.sections.run import RunFields
from dpo_runner.errors import ConfigError, renaming
from dpo_runner.model.adapters import build_peft_config, changes_base, check_targets, find_other_bases
from dpo_runner.model.files.fit import check_adapters, read_adapter_config
from dpo_runner.model.files.locations import is_adapter, refuse_hub_adapter, resolve_adapter_path, resolve_model_path
from dpo_runner.model.quantization import (
    check_quantized,
    check_quantized_training,
    choose_dtype,
    choose_quantization,
    mixes_rows,
)
from dpo_runner.model.reference import Kind, Reference, describe_reference, find_batch_dependence
from dpo_runner.model.stacking import SFT
from dpo_runner.model.tokenizer import (
    check_room,
    describe_template,
    finish_tokenizer,
    has_tokenizer,
    load_adapter_tokenizer,
    load_base_tokenizer,
)
from dpo_runner.model.vocabulary import (
    Vocabulary,
    build_meta_model,
    count_rows,
    load_model_config,
    read_brought_rows,
    train_new_rows,
)


@dataclass(frozen=True)
class Blueprint:
    """The model of a configuration, derived from configs, tokenizers and file headers on first use, and cached.

    Attributes:
        conf: the `model` group; weights are loaded in its dtype, and on the CPU with `training.use_cpu`.
        stores_reference: whether the engine stores the reference's log-probabilities.
        precomputes_reference: whether TRL computes them before training.
        longest: the limit of a row's tokens; None without limit.
    """

    conf: ModelConf
    quant: QuantConf | None = None
    lora: LoraConf | None = None
    stores_reference: bool = False
    precomputes_reference: bool = False
    longest: int | None = None

    @classmethod
    def of_run(cls, conf: RunFields) -> "Blueprint":
        """Return the unchecked blueprint of a run."""
        stores = conf.engine.reference_store and not conf.training.sync_ref_model
        model = replace(conf.model, device_map="cpu") if conf.training.use_cpu else conf.model
        groups, training = (model, conf.quant, conf.lora), conf.training
        blueprint = cls(*groups, stores, training.precompute_ref_log_probs, training.max_length)
        if blueprint.trains_all and model.dtype == "auto":  # in 16 bits most small weight updates are lost
            return replace(blueprint, conf=replace(model, dtype="float32"))
        return blueprint

    # ---- Location

    @property
    def name(self) -> str:
        """The model's name in the configuration."""
        return self.conf.model_name_or_path

    @cached_property
    def base(self) -> str:
        """Folder or hub id of the base weights."""
        return resolve_model_path(self.conf)

    @cached_property
    def adapter(self) -> Path | None:
        """Folder of the SFT adapter."""
        return None if self.conf.adapter is None else Path(resolve_adapter_path(self.conf))

    @property
    def adapter_mode(self) -> str | None:
        """Use of the SFT adapter: `continue`, `stack` or `merge`; None without adapter."""
        return None if self.conf.adapter is None else self.conf.adapter_mode

    # ---- Shape and dtype

    @cached_property
    def config(self) -> PretrainedConfig:
        """The base's config."""
        return load_model_config(self.conf, self.base)

    @property
    def own_quantization(self) -> Any:
        """The `quantization_config` of a checkpoint that is already quantized, else None."""
        return getattr(self.config, "quantization_config", None)

    @cached_property
    def quantization(self) -> BitsAndBytesConfig | None:
        """The config that quantizes weights on loading; None if the checkpoint's own config does."""
        return choose_quantization(self.quant, self.own_quantization, self.name, self.conf.device_map == "cpu")

    @cached_property
    def meta(self) -> PreTrainedModel:
        """The base on the meta device, without weights; after `check`, with bitsandbytes layers."""
        return build_meta_model(self.config, self.conf)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which weights are loaded."""
        dtype = None if self.conf.dtype == "auto" else getattr(torch, self.conf.dtype)
        dtype = dtype or self.config.get_text_config().dtype or self.config.dtype or torch.float32
        return choose_dtype(dtype, self.conf.device_map == "cpu")

    def with_config(self, config: PretrainedConfig) -> "Blueprint":
        """Return a copy with another config of the base, such as one with fewer layers."""
        other = copy.copy(self)
        vars(other).pop("meta", None)
        vars(other)["config"] = config
        return other

    # ---- Tokens

    @cached_property
    def _base_template(self) -> Any:
        return load_base_tokenizer(self.conf, self.base).chat_template

    @cached_property
    def _tokenizer(self) -> tuple[PreTrainedTokenizerBase, list[int]]:
        room = self.config.get_text_config().vocab_size
        if (tokenizer := load_adapter_tokenizer(self.conf, self.adapter)) is None:
            tokenizer = load_base_tokenizer(self.conf, self.base)
        else:
            if len(tokenizer) > room and self.adapter is not None:
                room = read_brought_rows(self.adapter, self.meta)[0] or room
            check_room(tokenizer, self.conf, room)
            if tokenizer.chat_template is None:
                tokenizer.chat_template = self._base_template
        return tokenizer, finish_tokenizer(tokenizer, self.conf, room)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer: the SFT adapter's if it has one, with the chat template of its training.

        Raises:
            ConfigError: the model does not exist, the adapter's tokenizer has tokens without embeddings, or
                `model.pad_token` is not a token.
        """
        return self._tokenizer[0]

    @cached_property
    def template_origin(self) -> str:
        """The origin of the chat template, in words."""
        of_base = self._base_template if has_tokenizer(self.adapter) else None
        return describe_template(self.conf, self.tokenizer.chat_template, has_tokenizer(self.adapter), of_base)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The required embedding rows, from the adapter's file and the tokenizer.

        Raises:
            ConfigError: as for `tokenizer`; or the adapter's file has embeddings for only some of its tokens.
        """
        vocabulary = Vocabulary()
        if self.adapter is not None:
            vocabulary.brought, vocabulary.replaces_base = read_brought_rows(self.adapter, self.meta)
        vocabulary.rows = vocabulary.brought
        if self.conf.added_tokens:
            tokenizer, vocabulary.new_ids = self._tokenizer
            if len(tokenizer) > (vocabulary.rows or count_rows(self.meta)):
                vocabulary.rows = len(tokenizer)
        return vocabulary

    # ---- Trained weights and reference

    @property
    def trains_all(self) -> bool:
        """Whether the model's own weights are trained instead of an adapter."""
        return self.lora is None and self.adapter_mode != "continue"

    @cached_property
    def _peft(self) -> PeftConfig | None:
        return build_peft_config(self.lora)

    def build_peft(self) -> PeftConfig | None:
        """Return a copy of the new adapter's config, which PEFT and TRL may modify; None without new adapter."""
        return copy.deepcopy(self._peft)

    @property
    def changes_base(self) -> bool:
        """Whether the new adapter starts with part of the base's weights; see `adapters.changes_base`."""
        return changes_base(self._peft)

    @cached_property
    def reference(self) -> Reference:
        """The reference of the DPO loss."""
        conf, name = self.conf, self.conf.reference
        # A policy that has no adapter, or whose own weights differ from the base's, cannot switch to the reference.
        holds = not (self.trains_all or self.adapter_mode == "merge" or self.changes_base)
        kind, folder, loaded = Kind.INITIAL, None, None
        other = replace(conf, adapter=None, adapter_mode="continue", adapter_revision=None, added_tokens=[])
        if name == "base" and conf.adapter is not None:
            kind, loaded = Kind.BASE, other
        elif name not in ("initial", "base") and is_adapter(name):
            kind, loaded = Kind.ADAPTER, replace(other, adapter=name, adapter_mode="merge")
            folder = resolve_adapter_path(loaded)
        elif name not in ("initial", "base"):
            kind, holds = Kind.MODEL, False
            loaded = replace(other, model_name_or_path=name, revision=None, gguf_file=None)
        loaded = None if holds else loaded
        model = self if loaded is None else Blueprint(loaded, self.quant, longest=self.longest)
        stored = self.stores_reference and model.batch_dependence is None  # the store scores rows alone
        before = stored or self.precomputes_reference
        return Reference(kind, self.describe_reference(before), stored, before, folder, loaded)

    @property
    def batch_dependence(self) -> str | None:
        """Why a row's log-probabilities depend on the other rows of its batch; None if they do not."""
        mixes = mixes_rows(self.quantization or self.own_quantization, self.conf.device_map == "cpu")
        return find_batch_dependence(self.config.get_text_config(), mixes, self.longest)

    def describe_reference(self, before: bool | None = None) -> str:
        """Describe the reference; reads no model config if an adapter is trained."""
        before = self.trains_all and self.reference.is_scored_before if before is None else before
        return describe_reference(self.conf, self.lora, self.changes_base, before)

    @cached_property
    def reference_model(self) -> "Blueprint | None":
        """The blueprint of the reference if it is loaded as a separate model, else None."""
        loaded = self.reference.loaded
        return None if loaded is None else Blueprint(loaded, self.quant, longest=self.longest)

    def adapter_configs(self) -> dict[str, PeftConfig]:
        """Return the configs of the model's adapters by name: `default` is trained, `sft` and `ref` frozen.

        TRL copies `default` to `ref` if its model already has `default`.
        """
        new, reference = self.build_peft(), self.reference
        if isinstance(new, LoraConfig):
            new.init_lora_weights = True  # other initializations give the same shapes
        sft = read_adapter_config(self.adapter) if self.adapter and self.conf.adapter_mode != "merge" else None
        trained = sft if self.adapter_mode == "continue" else new
        if trained is None:
            return {}
        configs = {"default": trained, **({SFT: sft} if sft is not None and self.adapter_mode == "stack" else {})}
        if reference.kind is Kind.ADAPTER and reference.is_within:
            configs["ref"] = read_adapter_config(Path(str(reference.folder)))
        elif self.changes_base or (reference.kind is Kind.INITIAL and sft is not None):
            configs["ref"] = trained
        return configs

    def find_other_bases(self) -> list[str]:
        """Return a warning for each adapter that was trained on a different base."""
        return find_other_bases(self.conf, self.base, self.adapter)

    def check(self) -> None:
        """Check that model, quantization, adapters and reference are compatible.

        Raises:
            ConfigError: two of them are incompatible.
        """
        refuse_hub_adapter(self.conf)
        has_adapter = self.lora is not None or self.conf.adapter is not None
        start = self.lora.init_lora_weights if self.lora is not None and self.changes_base else None
        check_quantized_training(self.own_quantization, self.quantization, has_adapter, start)
        check_adapters(self.conf, self.adapter, self.reference, self._peft, self.meta)
        if self.lora is not None:
            check_targets(self.lora, self.meta, self.name)
        if (new_ids := self.vocabulary.new_ids) and self.adapter_mode not in (None, "merge"):
            raise ConfigError(
                f"`model.added_tokens`: {len(new_ids)} of them are new to the tokenizer of {self.conf.adapter}, whose "
                "embeddings are its own; use model.adapter_mode=merge"
            )
        train_new_rows(self.build_peft(), self.meta, new_ids)
        check_quantized(self.meta, self.quantization, self.name)


def draw_blueprint(conf: RunFields) -> Blueprint:
    """Return a run's checked blueprint, without loading weights.

    Raises:
        ConfigError: model, adapters, quantization or tokenizer are incompatible.
    """
    blueprint = Blueprint.of_run(conf)
    if conf.training.fsdp:  # loaded on the CPU, and moved to the GPUs in parts
        blueprint = replace(blueprint, conf=replace(blueprint.conf, device_map="cpu"))
    with renaming("model.reference", "model.model_name_or_path", conf.model.reference):
        blueprint.check()
    return blueprint

"""From a configuration to the policy, and to what its reference is.

Unless `model.reference` says otherwise, the reference is the model that training starts from: the base where a new
adapter goes on it (its B is 0), the SFT model where an SFT adapter is continued, stacked upon or merged, a frozen
copy in full fine-tuning.
"""

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from peft import PeftConfig, PeftModel, get_peft_model
from transformers import PretrainedConfig, PreTrainedModel

from dpo_runner.config.run_conf import RunConf
from dpo_runner.errors import ConfigError
from dpo_runner.model.adapters import build_peft_config, changes_base, check_adapter, check_targets
from dpo_runner.model.base import load_base_model
from dpo_runner.model.files.locations import explain_missing, refuse_hub_adapter, resolve_adapter_path
from dpo_runner.model.quantization import check_quantized, settle_quantization
from dpo_runner.model.reference import is_initial, load_reference, settle_dtype, stores_reference, trains_all
from dpo_runner.model.stacking import copy_adapter, stack_adapter
from dpo_runner.model.tokenizer import settle_vocabulary
from dpo_runner.model.vocabulary import build_meta_model, load_model_config, train_new_rows
from dpo_runner.sweep.base_pool import BasePool

logger = logging.getLogger(__name__)


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


def check_model(conf: RunConf) -> tuple[PretrainedConfig, PreTrainedModel]:
    """Check model, quantization and adapters against the model's config, before any weight is loaded.

    Returns:
        The model's config, and the model without weights, on the meta device.

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
    return config, meta


def load_policy(conf: RunConf, bases: BasePool | None = None, tell: Callable[[str], None] = logger.info) -> Policy:
    """Load base, quantization and SFT adapter into the policy that training starts from.

    Args:
        conf: the run.
        bases: keeps the base model between runs; None where there is but one.
        tell: shows one line to a person.

    Raises:
        ConfigError: a model or adapter cannot be loaded.
    """
    mode = conf.model.adapter_mode if conf.model.adapter is not None else None
    if bases is None:
        base, path = load_base_model(settle_dtype(conf), conf.quant)
    else:
        base, path = bases.load(conf, tell)
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
    kept_nowhere = not conf.training.precompute_ref_log_probs and not stores_reference(conf)
    if is_initial(conf) and trains_all(conf) and kept_nowhere:
        policy.ref_model = copy.deepcopy(policy.model).eval().requires_grad_(False)
    return policy

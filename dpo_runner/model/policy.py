"""Load the policy from a blueprint, and its reference if that is a separate model.

Unless `model.reference` is set, the reference is the model that training starts from: the base for a new adapter (its
B is 0), the SFT model if an SFT adapter is continued, stacked or merged, a frozen copy in full fine-tuning.
"""

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from peft import PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from dpo_runner.errors import renaming
from dpo_runner.model.base import load_base_model, place
from dpo_runner.model.blueprint import Blueprint
from dpo_runner.model.files.locations import loading_errors
from dpo_runner.model.stacking import copy_adapter, stack_adapter
from dpo_runner.model.vocabulary import train_new_rows

logger = logging.getLogger(__name__)

Say = Callable[[str], None]
"""Shows one line to the user."""

LoadBase = Callable[[Blueprint, Say], tuple[PreTrainedModel, str]]
"""Loads a base model; returns it and the folder or hub id of its unquantized weights."""


@dataclass
class Policy:
    """The model to train, and its reference if that is a separate model.

    Attributes:
        model: the base model, or a `PeftModel` whose adapter `default` is trained.
        peft_config: the new adapter that `DPOTrainer` adds to `model`, or None.
        ref_model: the reference if it is a separate model; with adapters it is usually part of `model`.
        base: folder or hub id of the model on which the resulting adapter must be loaded.
        result: the adapters that make up the result, with weights.
        rows: number of embedding rows to which the result's base is resized; None if it is not resized.
        saves_embeddings: whether the result must include the embeddings that an SFT adapter put into the base.
    """

    model: "PreTrainedModel | PeftModel"
    peft_config: PeftConfig | None
    ref_model: PreTrainedModel | None
    base: str
    result: dict[str, float] = field(default_factory=lambda: {"default": 1.0})
    rows: int | None = None
    saves_embeddings: bool = False


def load_fresh(blueprint: Blueprint, say: Say) -> tuple[PreTrainedModel, str]:
    """Load a base model that is not shared between runs."""
    return load_base_model(blueprint)


def load_reference(blueprint: Blueprint) -> PreTrainedModel | None:
    """Load the reference, frozen, in evaluation mode and on its device, if it is a separate model.

    Returns:
        The model; None if the reference is the initial model or part of the policy's model.

    Raises:
        ConfigError: the model cannot be loaded.
    """
    if blueprint.reference_model is None:
        return None
    rows = blueprint.vocabulary.rows or 0
    with renaming("model.reference", "model.model_name_or_path", blueprint.conf.reference):
        model, _ = load_base_model(blueprint.reference_model, rows)
    return place(model, blueprint.conf).eval().requires_grad_(False)


def load_policy(blueprint: Blueprint, load_base: LoadBase = load_fresh, say: Say = logger.info) -> Policy:
    """Load the quantized base and the SFT adapter as the initial policy, on its device.

    Args:
        blueprint: the model's blueprint.
        load_base: loads the base model; sweep workers keep it between runs.
        say: shows one line to the user.

    Raises:
        ConfigError: a model or adapter cannot be loaded.
    """
    mode, reference, vocabulary = blueprint.adapter_mode, blueprint.reference, blueprint.vocabulary
    base, path = load_base(blueprint, say)
    place(base, blueprint.conf)  # before PEFT computes with its weights, as in PiSSA's SVDs
    policy = Policy(base, blueprint.build_peft(), None, path)
    train_new_rows(policy.peft_config, base, vocabulary.new_ids)
    policy.rows = vocabulary.rows if mode != "merge" or vocabulary.new_ids else None  # a merged base already has them
    policy.saves_embeddings = vocabulary.replaces_base and mode in ("continue", "stack")
    if mode in ("continue", "stack"):
        folder = str(blueprint.adapter)
        with loading_errors(str(blueprint.conf.adapter), "model.adapter"):
            if mode == "continue":
                # Without is_trainable=True the adapter is frozen and the loss would stay constant. Without torch_device
                # PEFT reads it on a GPU, with use_cpu too.
                policy.model = PeftModel.from_pretrained(base, folder, is_trainable=True, torch_device="cpu")
            else:
                assert policy.peft_config is not None
                policy.model = stack_adapter(base, folder, policy.peft_config)
                policy.peft_config = None
                policy.result = {"sft": 1.0, "default": 1.0}
                policy.saves_embeddings |= policy.model.absorbed
    elif blueprint.changes_base:
        # TRL gets both adapters: with adapters off, the base is not the model that training starts from.
        policy.model = get_peft_model(base, policy.peft_config)
        policy.model.peft_config[
            "default"
        ].init_lora_weights = True  # its copy must not take weights from the base again
        policy.peft_config = None
        policy.result = {"default": 1.0, "ref": -1.0}  # the change relative to the published base
    policy.ref_model = load_reference(blueprint)
    if policy.ref_model is not None and "ref" in policy.result:
        copy_adapter(policy.model, "default", "ref")  # TRL does so only if that adapter is its reference
    if reference.is_initial and blueprint.trains_all and not reference.is_scored_before:
        policy.ref_model = copy.deepcopy(policy.model).eval().requires_grad_(False)
    return policy

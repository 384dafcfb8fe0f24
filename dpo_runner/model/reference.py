"""The reference model: its kind, its description, and a forward without dropout."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from dpo_runner.config.sections.model import LoraConf, ModelConf
from dpo_runner.model.files.locations import is_adapter


class Kind(Enum):
    """The kind of reference model."""

    INITIAL = "the model that training starts from"
    BASE = "the bare base, without the SFT adapter"
    ADAPTER = "another adapter on the same base"
    MODEL = "another model"


@dataclass(frozen=True)
class Reference:
    """The reference of the DPO loss.

    Attributes:
        kind: the kind of reference.
        described: description for the plan.
        is_stored: whether the engine's store has its log-probabilities, so that training runs no reference.
        is_scored_before: whether its log-probabilities are computed before training, by the store or by TRL.
        folder: the adapter's folder, if the reference is another adapter.
        loaded: the `model` group to load it with, if it is a separate model.
    """

    kind: Kind
    described: str
    is_stored: bool
    is_scored_before: bool
    folder: str | None = None
    loaded: ModelConf | None = None

    @property
    def is_initial(self) -> bool:
        return self.kind is Kind.INITIAL

    @property
    def is_within(self) -> bool:
        """Whether it is part of the policy's model: the base with another adapter, or with none."""
        return self.kind is not Kind.INITIAL and self.loaded is None


def describe_reference(model: ModelConf, lora: LoraConf | None, changes_base: bool, before: bool) -> str:
    """Describe the reference in one line.

    Args:
        model: the `model` group.
        lora: the `lora` group.
        changes_base: whether the new adapter starts with part of the base's weights.
        before: whether the reference's log-probabilities are computed before training.
    """
    name = model.model_name_or_path
    if model.reference == "base" and model.adapter:
        return f"the bare {name}, without {model.adapter}"
    if model.reference not in ("initial", "base"):
        on_base = f", on {name}" if is_adapter(model.reference) else ""
        return f"{model.reference}{on_base} (model.reference)"
    if model.adapter and model.adapter_mode == "merge":
        return f"the SFT model: {model.adapter} merged into the unquantized {name}"
    if model.adapter:
        frozen = "with a frozen copy of" if model.adapter_mode == "continue" else "with the frozen"
        return f"the SFT model: {name} {frozen} {model.adapter}"
    if lora is None:
        return f"{name} as it is before training" if before else f"a frozen copy of {name}"
    if changes_base:
        return f"{name}: a frozen copy of the {lora.init_lora_weights} adapter as it begins"
    return f"{name} without the adapter"


def count_learned_positions(meta: PreTrainedModel) -> int | None:
    """Return the number of positions that a model has embeddings for, as GPT-2 and OPT do; None for other models."""
    tokens, room = meta.get_input_embeddings(), getattr(meta.config, "max_position_embeddings", None)
    others = (layer for layer in meta.modules() if isinstance(layer, torch.nn.Embedding) and layer is not tokens)
    if room and any(0 <= layer.num_embeddings - room <= 2 for layer in others):  # OPT has 2 more
        return int(room)
    return None


def find_growing_rope(config: PretrainedConfig, longest: int | None) -> str | None:
    """Return the type of a model's RoPE if the longest row of a batch sets the frequencies of all its rows.

    So it is with dynamic NTK and LongRoPE once a row exceeds the original context (transformers'
    `dynamic_rope_update`). A row's log-probabilities then depend on the other rows.

    Args:
        config: the text model's.
        longest: tokens of the longest row; None if unknown.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    for each in [rope, *rope.values()]:  # some models have one per layer type
        kind = str(each.get("rope_type")) if isinstance(each, dict) else ""
        if "dynamic" in kind or kind == "longrope":
            context = config.max_position_embeddings
            if kind == "longrope":
                context = each["original_max_position_embeddings"]
            if longest is None or longest > context:
                return kind
    return None


def find_batch_dependence(config: PretrainedConfig, mixes_rows: bool, longest: int | None) -> str | None:
    """Return why a row's log-probabilities depend on the other rows of its batch; None if they do not.

    Args:
        config: the text model's.
        mixes_rows: whether layers are bitsandbytes' LLM.int8, on a GPU.
        longest: tokens of the longest row; None if unknown.
    """
    if kind := find_growing_rope(config, longest):
        return f"the model's {kind} RoPE depends on the longest row of a batch"
    if mixes_rows:
        return "LLM.int8 computes a column in 16 bits if it is an outlier in any row of the batch"
    return None


def silence_dropout(model: torch.nn.Module) -> None:
    """Disable dropout in the reference's forward only.

    The policy keeps `lora_dropout` and the dropout of the model's config.
    TRL runs the reference through the same model in training mode under `no_grad`, where dropout would add noise.
    No other forward of the whole model runs in training mode without gradients.
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

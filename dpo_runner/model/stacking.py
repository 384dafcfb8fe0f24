"""Several adapters in one model: a new one on the SFT adapter, the reference's, a combined one."""

import dataclasses
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModelForCausalLM, load_peft_weights, set_peft_model_state_dict
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dpo_runner.errors import ConfigError

SFT = "sft"
"""Name of the frozen SFT adapter if another is trained on top of it."""


class StackedPeftModel(PeftModelForCausalLM):  # type: ignore[misc]
    """A model whose frozen adapter `sft` is always on, beneath the active one.

    TRL's reference is `ref`, a copy of the untrained `default`, which adds 0; TRL switches between the two:
    policy = base + sft + default, reference = base + sft. With adapters disabled the model is the bare base.
    """

    stacked: tuple[str, ...] = ("default", "ref")
    """The adapters on top of `sft`; a configured reference may be on the bare base."""
    absorbed: bool = False
    """Whether embeddings trained with `sft` have replaced the base's."""

    @property
    def active_adapters(self) -> list[str]:
        """The trained adapter alone: Trainer loads checkpoints into the first of these."""
        return [self.active_adapter]

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode)
        if adapter_name in self.stacked:
            self.base_model.set_adapter([SFT, adapter_name], inference_mode)
            self._freeze_sft()

    def add_adapter(self, *args: Any, **kwargs: Any) -> None:
        super().add_adapter(*args, **kwargs)
        self._freeze_sft()  # PEFT before 0.21 makes every active adapter trainable

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        with super().disable_adapter():
            yield
        self._freeze_sft()  # PEFT makes every adapter that it re-enables trainable

    def _freeze_sft(self) -> None:
        self.set_requires_grad(SFT, False)


def stack_adapter(base: PreTrainedModel, folder: str, config: PeftConfig) -> StackedPeftModel:
    """Add a new adapter `default` on top of the frozen SFT adapter in `folder`."""
    if (
        config.target_modules == "all-linear"
    ):  # with an SFT adapter in place, PEFT would mistake the adapter's copies of the head for layers
        head = base.get_output_embeddings()
        config.target_modules = {
            name
            for name, layer in base.named_modules()
            if isinstance(layer, (torch.nn.Linear, Conv1D)) and layer is not head
        }
    sft = PeftConfig.from_pretrained(folder)
    sft.task_type = None  # from_pretrained builds the class of the task type
    model = StackedPeftModel.from_pretrained(base, folder, adapter_name=SFT, config=sft, torch_device="cpu")
    model.__class__ = StackedPeftModel
    model.absorbed = absorb_embeddings(model)
    model.add_adapter("default", config)
    model.set_adapter("default")
    assert isinstance(model, StackedPeftModel)
    return model


def absorb_embeddings(model: PeftModelForCausalLM) -> bool:
    """Move the embeddings of `sft` into the base, and return whether it has any.

    PEFT can neither stack nor join adapters that have embeddings.

    Raises:
        ConfigError: `sft` has modules other than the embeddings and the head, or unties tied ones.
    """
    base, has_some = model.get_base_model(), False
    embeddings = (base.get_input_embeddings(), base.get_output_embeddings())
    for path, module in [*base.named_modules()]:
        if not isinstance(module, AuxiliaryTrainingWrapper):
            continue
        parts = isinstance(module, ModulesToSaveWrapper) and base.config.tie_word_embeddings
        if parts or not any(module is each for each in embeddings):
            raise ConfigError(
                f"`model.adapter_mode=stack`: the SFT adapter has its own copy of {path}, which cannot be joined with "
                "another adapter; use model.adapter_mode=continue or merge"
            )
        parent, _, name = path.rpartition(".")
        own = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=[SFT])
        setattr(base.get_submodule(parent), name, own.requires_grad_(False))
        has_some = True
    model.peft_config[SFT].modules_to_save = model.peft_config[SFT].trainable_token_indices = None
    return has_some


def load_lora_alone(model: PeftModelForCausalLM, folder: str, name: str) -> None:
    """Load an adapter's LoRA weights next to other adapters, without its embeddings."""
    config = PeftConfig.from_pretrained(folder, inference_mode=True)
    config.modules_to_save = config.trainable_token_indices = None
    model.add_adapter(name, config)
    weights = {key: value for key, value in load_peft_weights(folder, device="cpu").items() if ".lora_" in key}
    set_peft_model_state_dict(model, weights, name)


def complete_reference(model: PeftModelForCausalLM, loaded: dict[str, torch.Tensor]) -> None:
    """Copy to TRL's reference `ref` the weights that TRL leaves out.

    Their names end with the adapter's name. These are trained rows of the embeddings, LoRA on embeddings, and most
    methods other than LoRA; without the copy the reference has new ones, that is, the bare base.

    Args:
        model: the trainer's.
        loaded: the weights of `default` before training, by name.
    """
    if "ref" in model.peft_config:
        weights = dict(model.named_parameters())
        for name, value in loaded.items():
            if name.endswith(".default"):
                weights[f"{name.removesuffix('default')}ref"].data.copy_(value)


def copy_adapter(model: PeftModelForCausalLM, name: str, copy: str) -> None:
    """Add a frozen copy of an adapter under the name `copy`."""
    model.add_adapter(copy, model.peft_config[name])
    weights = dict(model.named_parameters())
    for path, weight in weights.items():
        if f".{name}" in path:
            weights[path.replace(f".{name}", f".{copy}")].data.copy_(weight)
    model.set_adapter(name)


def put_reference(model: PeftModelForCausalLM, folder: str | None) -> None:
    """Make another adapter the reference that TRL finds in the model.

    Args:
        model: the trainer's.
        folder: the adapter's; None makes the bare base the reference.
    """
    if "ref" in model.peft_config:
        model.delete_adapter("ref")
    if isinstance(model, StackedPeftModel):
        model.stacked = ("default",)
    if folder:
        model.load_adapter(folder, "ref", is_trainable=False, torch_device="cpu")
    model.set_adapter("default")


def read_initial_weights(model: PeftModelForCausalLM) -> dict[str, torch.Tensor]:
    """Return by name the initial values of a new adapter's copies of base weights.

    On a quantized base TRL has rounded the copies.
    """
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    began = {
        name: name.replace("trainable_tokens_delta.", "trainable_tokens_original.").replace(
            "modules_to_save.default", "original_module"
        )
        for name in weights
    }
    return {name: weights[source] for name, source in began.items() if source != name and source in weights}


_JOINED = {
    *(field.name for field in dataclasses.fields(PeftConfig)),
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"),  # `combined_adapter` is exact with these
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("lora_dropout", "init_lora_weights", "eva_config", "fan_in_fan_out", "runtime_config"),  # no part of the result
}
"""Fields of a LoraConfig that may differ from their defaults in an adapter that is joined with another."""


def find_unjoinable(config: PeftConfig, more: Collection[str]) -> str | None:
    """Return a setting, such as `use_dora=True`, with which an adapter cannot be joined exactly with another.

    Args:
        config: the adapter's.
        more: further fields that may be set.
    """
    if not isinstance(config, LoraConfig):
        return f"peft_type={config.peft_type.value}"
    plain = LoraConfig()
    names = (field.name for field in dataclasses.fields(config) if field.name not in {*_JOINED, *more})
    found = next((name for name in names if (getattr(config, name) or None) != (getattr(plain, name) or None)), None)
    return None if found is None else f"{found}={getattr(config, found)}"


def _name_alone(model: PeftModelForCausalLM, name: str) -> LoraConfig:
    """Return an adapter's config with each of its modules by its path, and without the factor of rank-stabilized LoRA.

    PEFT joins adapters by their names of modules under the other settings of the first one. It has multiplied the
    joined weights by each adapter's own factor already.
    """
    paths = {
        path
        for path, layer in model.get_base_model().named_modules()
        if name in {**getattr(layer, "lora_A", {}), **getattr(layer, "lora_embedding_A", {})}
    }
    only = {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    return dataclasses.replace(model.peft_config[name], target_modules=paths, use_rslora=False, **only)


@contextmanager
def combined_adapter(model: PeftModelForCausalLM, parts: dict[str, float]) -> Iterator[str]:
    """Combine several adapters into one: ranks and weighted updates add up (`cat` in PEFT).

    Yields:
        The name of the combined adapter, which is deleted afterwards.
    """
    if list(parts.items()) == [("default", 1.0)]:
        yield "default"
        return
    name, configs = "result", dict(model.peft_config)
    model.peft_config.update({part: _name_alone(model, part) for part in parts})
    model.base_model.add_weighted_adapter(list(parts), list(parts.values()), name, combination_type="cat")
    model.peft_config.update(configs)
    weights = dict(model.named_parameters())
    for path, weight in weights.items():  # trained rows do not add up, and PEFT gives the new adapter the base's
        if path.endswith(f".trainable_tokens_delta.{name}"):
            weight.data.copy_(weights[path.removesuffix(name) + "default"])
    try:
        yield name
    finally:
        model.delete_adapter(name)
        model.set_adapter("default")

"""Trainer mixin: weights that are divided between processes; see `ranks.sharding`."""

from typing import Any

import torch
from trl import DPOTrainer

from dpo_runner.io.upstream import check_names
from dpo_runner.training.ranks.sharding import (
    divide_optimizer,
    gather_optimizer,
    gather_weights,
    make_whole,
)

check_names(
    "transformers",
    DPOTrainer,
    _save="output_dir state_dict",
    _move_model_to_device="model device",
)


class ShardedWeights(DPOTrainer):  # type: ignore[misc]
    """Trains, saves and loads a model whose weights are divided between processes, and any other model as it is."""

    _is_divided = False
    _whole_weights: dict[str, torch.Tensor] | None = None
    _whole_optimizer: dict[str, Any] | None = None

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        if not self._is_divided:  # the whole model need not fit there
            super()._move_model_to_device(model, device)

    def make_whole(self) -> Any:
        """Return the trained model with whole weights. All processes must call this, after training."""
        if self._is_divided:
            make_whole(self.model)
        return self.model

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)
        if self._is_divided:
            optimizer.register_load_state_dict_pre_hook(divide_optimizer)
            optimizer.register_state_dict_post_hook(lambda optimizer, state: self._whole_optimizer or state)
        return optimizer

    def gather_state(self) -> None:
        """Gather what a checkpoint holds, for the first process to write. All processes must call this."""
        if not self._is_divided:
            return
        adapters = set(getattr(self.model, "peft_config", ()))
        frozen = {name for name, weight in self.model.named_parameters() if not weight.requires_grad}
        self._whole_weights = gather_weights(
            self.model, lambda name: not adapters or name not in frozen or bool(adapters & set(name.split(".")))
        )
        self._whole_optimizer = gather_optimizer(self.optimizer)

    def drop_state(self) -> None:
        """Drop what `gather_state` has gathered."""
        self._whole_weights = self._whole_optimizer = None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict if self._whole_weights is None else self._whole_weights)

"""A model whose weights are divided between the processes: FSDP2 and HSDP, by torch's `fully_shard`.

Each process keeps a part of every weight. A layer's whole weights are gathered just before they are used and dropped
afterwards, so all processes must make the same forwards in the same order. A step's micro-batches are made equally
many; elsewhere `level` fills in. The model is sharded here and not by accelerate, which would cast the outputs, and so
log-probabilities, to 16 bits.

Files hold whole weights and whole optimizer states, as those of one process: another number of processes, sharded or
not, can continue them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from dpo_runner.config.sections.training import TrainingConf
from dpo_runner.errors import ConfigError
from dpo_runner.io.upstream import check_names, find_private
from dpo_runner.model.base import base_of
from dpo_runner.training.ranks.group import count, gather

_POLICY = MixedPrecisionPolicy(param_dtype=None, reduce_dtype=torch.float32, output_dtype=None)
"""Autocast alone chooses the dtype of products; gradients are summed in fp32, outputs keep their dtype."""

check_names("torch", FSDPModule, _get_fsdp_state="")


def is_sharded(model: Any) -> bool:
    """Return whether a model's weights are divided between processes."""
    return isinstance(base_of(model), FSDPModule)


def shard(model: Any, training: TrainingConf, device: torch.device) -> None:
    """Divide a model's weights between the processes, layer by layer, and move each part to the device.

    Args:
        model: the whole model, the same in all processes.
        training: has `fsdp_config` and, for HSDP, `parallelism_config`.
        device: this process's.

    Raises:
        ConfigError: the model has no layers of the named classes.
    """
    gather(None)  # opens torch's process group
    base = base_of(model)
    replicas = (training.parallelism_config or {}).get("dp_replicate_size") or 1
    shape = (replicas, count() // replicas)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    mesh = mesh if shape[0] > 1 else mesh["shard"]
    reshard = (training.fsdp_config or {}).get("reshard_after_forward", True)
    for module in (*find_layers(base, training), base):
        fully_shard(module, mesh=mesh, mp_policy=_POLICY, reshard_after_forward=reshard)
    for module in base.modules():
        if isinstance(module, FSDPModule):  # gradients of all processes' pairs are summed; gloo has no average
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
    if isinstance(model, PeftModel):
        # PEFT calls the base's `forward`, past the hooks that gather its weights.
        model.base_model.forward = lambda *args, **kwargs: base(*args, **kwargs)
    model.register_load_state_dict_pre_hook(_divide_loaded)


def find_layers(base: nn.Module, training: TrainingConf) -> list[nn.Module]:
    """Return the layers whose weights are gathered together: of the named classes, or those that upstream names.

    Raises:
        ConfigError: there are none.
    """
    classes = (training.fsdp_config or {}).get("transformer_layer_cls_to_wrap")
    classes = classes or find_private("transformers", base, "_no_split_modules") or []
    classes = {classes} if isinstance(classes, str) else set(classes)
    layers = [module for module in base.modules() if type(module).__name__ in classes]
    if not layers:
        kinds = sorted({type(module).__name__ for module in base.modules() if len(list(module.children())) > 2})
        raise ConfigError(
            f"`training.fsdp_config`: the model has no {' or '.join(sorted(classes)) or 'layers that it names'}; set "
            f"transformer_layer_cls_to_wrap to the class of its layers, one of {', '.join(kinds)}"
        )
    return layers


def _divide_loaded(module: nn.Module, state: dict[str, Any], prefix: str, *others: Any) -> None:
    """Replace whole weights that are being loaded by this process's parts."""
    own: dict[str, Any] = dict(module.named_parameters(remove_duplicate=False))
    for name, value in state.items():
        weight = own.get(name.removeprefix(prefix))
        if isinstance(weight, DTensor) and not isinstance(value, DTensor):
            state[name] = _divide(value, weight)


def _divide(whole: torch.Tensor, like: DTensor) -> DTensor:
    whole = whole.to(like.device, like.dtype)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def is_divided(tensor: torch.Tensor) -> bool:
    """Return whether this process has a part of a tensor alone."""
    return isinstance(tensor, DTensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a tensor; a whole one is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Any) -> Any:
    """Return a tensor that is whole, on its device. All processes must call this for a divided one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_weights(model: Any, is_wanted: Callable[[str], bool]) -> dict[str, torch.Tensor]:
    """Return whole weights of a sharded model by name, on the CPU. All processes must call this."""
    state = model.state_dict()
    return {name: whole(value.detach()).cpu() for name, value in state.items() if is_wanted(name)}


def gather_optimizer(optimizer: Optimizer) -> dict[str, Any]:
    """Return the optimizer's state with whole tensors, on the CPU. All processes must call this."""
    state = optimizer.state_dict()
    states = {
        index: {name: whole(value).cpu() if isinstance(value, DTensor) else value for name, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": states}


def divide_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return a loaded optimizer state with this process's parts of whole tensors. A hook of torch's optimizers."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    states = {
        index: {
            name: _divide(value, weights[index])
            if isinstance(weights[index], DTensor) and value.shape == weights[index].shape
            else value
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    return {**state, "state": states}


def make_whole(model: Any) -> None:
    """Give each process the whole model, on the CPU, without FSDP. All processes must call this.

    The first process can then save and compare the result alone.
    """
    base = base_of(model)
    sharded = [module for module in base.modules() if isinstance(module, FSDPModule)]
    for part in sharded:
        part.reshard()
    found: dict[int, nn.Parameter] = {}
    for module in base.modules():
        for name, weight in module.named_parameters(recurse=False):
            if isinstance(weight, DTensor):
                if id(weight) not in found:  # of tied weights there is one
                    found[id(weight)] = nn.Parameter(whole(weight.detach()).cpu(), weight.requires_grad)
                setattr(module, name, found[id(weight)])
    for part in sharded:
        _forget_sharding(part)
    base.to("cpu")


def _forget_sharding(module: Any) -> None:
    state = module._get_fsdp_state()
    for handle in (state._pre_forward_hook_handle, state._post_forward_hook_handle):
        handle.remove()
    for group in state._fsdp_param_groups:
        for param in group.fsdp_params:
            param._post_load_hook_handle.remove()
        for handles in (
            group._module_to_pre_save_state_dict_hook_handle,
            group._module_to_pre_load_state_dict_hook_handle,
        ):
            for handle in handles.values():
                handle.remove()
    module.__class__ = type(module).__mro__[2]  # FSDPLlama(FSDPModule, Llama)


_leveled: set[int] = set()


@contextmanager
def level(model: Any) -> Iterator[None]:
    """Let processes make different numbers of forwards, without gradients, in this block.

    Before each forward a process tells the others that it works. One that has left the block makes forwards of one
    token until all have left it.
    """
    if not is_sharded(model) or id(model) in _leveled:
        yield
        return
    base = base_of(model)

    def announce(module: nn.Module, args: Any) -> None:
        _does_any_work(True)

    handle = base.register_forward_pre_hook(announce, prepend=True)
    _leveled.add(id(model))
    try:
        yield
    finally:
        handle.remove()
        _leveled.discard(id(model))
    ids = torch.zeros(1, 1, dtype=torch.int64, device=next(base.parameters()).device)
    with torch.no_grad():
        while _does_any_work(False):
            base(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)


def _does_any_work(here: bool) -> bool:
    works = torch.tensor(int(here))
    dist.all_reduce(works, dist.ReduceOp.MAX)
    return bool(works)

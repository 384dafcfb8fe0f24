"""Rules of several processes, and of weights that are divided between them."""

from collections.abc import Iterator
from typing import Any

from dpo_runner.config.sections.run import RunFields

_FSDP_KEYS: dict[str, tuple[Any, ...]] = {
    "reshard_after_forward": (True, False),
    "transformer_layer_cls_to_wrap": (),
    "version": (2, "2"),
    "state_dict_type": ("FULL_STATE_DICT",),
    "cpu_ram_efficient_loading": (False,),
}
"""Supported keys of `training.fsdp_config`, with their values; empty for any."""

_GROUP_KEYS = ("dp_replicate_size", "dp_shard_size")

_ELEMENTWISE = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop", "adagrad")
"""Optimizers whose update of a value depends on that value's own gradients alone."""


def check_launch(conf: RunFields) -> Iterator[str]:
    processes, training = conf.launch.processes, conf.training
    if isinstance(processes, str) and processes != "auto":
        yield f"`launch.processes={processes}`: must be a number, or auto: one process for each visible GPU"
    if processes in (None, 1):
        return
    if (training.accelerator_config or {}).get("use_seedable_sampler") is False:
        yield (
            "`training.accelerator_config`: with launch.processes all processes need the same rows; leave out "
            "use_seedable_sampler"
        )
    if conf.model.device_map is not None:
        yield f"`model.device_map={conf.model.device_map}`: each of launch.processes has one GPU; leave it out"


def check_sharding(conf: RunFields) -> Iterator[str]:
    """Yield what contradicts weights that are divided between processes."""
    training, groups = conf.training, conf.training.parallelism_config
    if training.deepspeed:
        yield "`training.deepspeed`: its checkpoints hold pickles and programs; use distributed=fsdp2"
    if not training.fsdp:
        if groups:
            yield f"`training.parallelism_config={groups}`: needs training.fsdp=true; distributed=hsdp sets both"
        return
    settings = training.fsdp_config or {}
    if not isinstance(settings, dict):
        yield f"`training.fsdp_config={settings}`: must be a map, such as {{reshard_after_forward: false}}"
        return
    for key in settings.keys() - _FSDP_KEYS.keys():
        yield f"`training.fsdp_config.{key}`: is not supported; there are {', '.join(_FSDP_KEYS)}"
    for key, allowed in _FSDP_KEYS.items():
        if allowed and settings.get(key, allowed[0]) not in allowed:
            yield f"`training.fsdp_config.{key}={settings[key]}`: must be {' or '.join(map(str, allowed))}"
    yield from _check_groups(groups or {}, conf.launch.processes)
    if conf.quant is not None and conf.quant.load_in_8bit:
        yield "`quant`: training.fsdp=True cannot divide int8 weights; use quant=nf4"
    if conf.model.reference != "initial":
        yield f"`model.reference={conf.model.reference}`: training.fsdp=True keeps no second model; use distributed=ddp"
    if not conf.engine.reference_store and conf.lora is None and conf.model.adapter is None:
        yield (
            "`engine.reference_store=False`: with training.fsdp=True and lora=none the reference is scored before "
            "training; use engine.reference_store=true"
        )
    if training.optim not in _ELEMENTWISE:
        yield (
            f"`training.optim={training.optim}`: with training.fsdp=True each process updates its own part of a "
            f"weight, which only some optimizers allow: {', '.join(_ELEMENTWISE)}"
        )
    for key in ("fp16", "sync_ref_model", "use_liger_kernel", "torch_compile", "activation_offloading"):
        if getattr(training, key):
            yield f"`training.{key}=True`: does not go with training.fsdp=True; leave one of the two out"


def _check_groups(groups: dict[str, Any], processes: int | str | None) -> Iterator[str]:
    sizes = {key: groups.get(key) for key in _GROUP_KEYS}
    for key in groups.keys() - sizes.keys():
        yield f"`training.parallelism_config.{key}`: is not supported; there are {', '.join(_GROUP_KEYS)}"
    wrong = {key: size for key, size in sizes.items() if size is not None and (not isinstance(size, int) or size < 1)}
    for key, size in wrong.items():
        yield f"`training.parallelism_config.{key}={size}`: must be a whole number, at least 1"
    if wrong or not isinstance(processes, int):
        return
    replicas, shards = (size or 1 for size in sizes.values())
    if processes % (replicas * shards) or (sizes["dp_shard_size"] and processes != replicas * shards):
        yield (
            f"`training.parallelism_config={groups}`: dp_replicate_size x dp_shard_size must be the number of "
            f"processes, {processes}"
        )

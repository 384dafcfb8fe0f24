"""The memory of one process if weights are divided between processes; see `ranks.sharding`."""

from typing import Any

from dpo_runner.config.run_conf import RunConf, count_processes
from dpo_runner.model.base import base_of
from dpo_runner.training.memory.fake_model import count_bytes, tensors_of
from dpo_runner.training.ranks.sharding import find_layers

Rows = dict[str, int]

_DIVIDED = ("weights", "adapters", "optimizer", "gradients")


def count_parts(conf: RunConf) -> int:
    """Return the number of processes that a weight is divided between; 1 if weights are whole."""
    replicas = (conf.training.parallelism_config or {}).get("dp_replicate_size") or 1
    return count_processes(conf) // replicas if conf.training.fsdp else 1


def count_gathered(policy: Any, conf: RunConf) -> Rows:
    """Return the bytes of the whole weights that are there at once: two layers, and what is in none.

    Args:
        policy: on fake tensors.
        conf: the run's configuration.
    """
    if not conf.training.fsdp:
        return {}
    base = base_of(policy)
    layers = [count_bytes(tensors_of(layer)) for layer in find_layers(base, conf.training)]
    return {"gathered weights": 2 * max(layers) + count_bytes(tensors_of(base)) - sum(layers)}


def divide(rows: Rows, conf: RunConf) -> Rows:
    """Return rows of the estimate, those that are divided between processes as one process has them."""
    parts = count_parts(conf)
    return {name: -(-size // parts) if name in _DIVIDED else size for name, size in rows.items()}

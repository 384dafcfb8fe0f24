"""The processes that train one run together, and what they exchange.

Each process runs TRL's trainer as a single process does: the same batches in the same order, the same optimizer steps,
the same weights. Only work is divided: the pairs of a step, the batches of an evaluation, the prompts to answer, and
the rows that the reference scores. accelerate and transformers see one process, so nothing of theirs wraps the model,
splits batches or gathers metrics; gradients are summed over the processes before each optimizer step.

Outside a group every function here acts as in a group of one.
"""

import os
import pickle
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dpo_runner.config.run_conf import RunConf
from dpo_runner.errors import ConfigError
from dpo_runner.io.processes import list_gpus

LAUNCHER = "DPO_RUNNER_LAUNCHER"
"""Environment variable: the process id of the run that started this process with `launch.processes`."""

_HIDDEN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Environment variables that tell accelerate of other processes."""

_FOREVER = timedelta(days=30)
"""Other processes wait that long for the first one's data preparation; failures end the wait earlier."""

_AT_ONCE = 2**25  # gradient values that are summed at a time

Value = TypeVar("Value")

_torch: Any = dist  # its stubs lack these
TCPStore, PrefixStore = _torch.TCPStore, _torch.PrefixStore


@dataclass
class _Group:
    """This process's place among `count` processes, and the store that they share.

    Attributes:
        store: torch's key-value store, served by the launcher or by the first process.
        prefix: of the names in the store; torchrun keeps its store when it starts the processes again.
        connect: opens torch's process group, with names in the store that begin as given; None if it is not ours.
        turn: number of values shared so far.
    """

    rank: int
    count: int
    store: Any
    prefix: str
    connect: Callable[[str], None] | None
    turn: int = 0


_group: _Group | None = None


def join_group(conf: RunConf) -> RunConf:
    """Join the processes that a launcher started for this run, if there are any, and settle their number.

    Launchers (torchrun, srun scripts, Ray, `launch.processes`) set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
    MASTER_PORT. torch's process group is opened by the first `gather`: once there is one, transformers writes no model
    files in processes other than the first, so their caches would stay incomplete.

    Returns:
        The configuration, with `launch.processes` set to the number of processes.

    Raises:
        ConfigError: there are fewer GPUs, or the launcher's variables are incomplete.
    """
    global _group
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if _group is None and count > 1:
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise ConfigError(
                    f"WORLD_SIZE={count}: the environment lacks {name}; a launcher sets all four, or none"
                )
        _group = _meet(conf, int(os.environ["RANK"]), count)
        _group.store.set_timeout(_FOREVER)
        for name in _HIDDEN:
            os.environ.pop(name, None)
    if _group is None:
        return _with_processes(conf, _choose_count(conf))
    return _with_processes(conf, _group.count) if conf.launch.processes in (None, "auto") else conf


def _with_processes(conf: RunConf, processes: int) -> RunConf:
    if processes == (conf.launch.processes or 1):
        return conf
    return replace(conf, launch=replace(conf.launch, processes=processes))


def _meet(conf: RunConf, rank: int, count: int) -> _Group:
    prefix = f"dpo_runner/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    if dist.is_initialized():  # by Ray Train
        return _Group(rank, count, _open_store(rank), prefix, None)
    met = next(_torch.rendezvous("env://"))[0]
    on_gpus = torch.cuda.is_available() and not conf.training.use_cpu

    def connect(prefix: str) -> None:
        backend, timeout = "cpu:gloo,cuda:nccl" if on_gpus else "gloo", timedelta(seconds=conf.training.ddp_timeout)
        store = PrefixStore(prefix, met)
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=timeout)

    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return _Group(rank, count, store, prefix, connect)


def _choose_count(conf: RunConf) -> int:
    processes = conf.launch.processes or 1
    if processes == 1:
        return 1
    gpus = [] if conf.training.use_cpu else list_gpus()
    if processes == "auto":
        return max(len(gpus), 1)
    assert isinstance(processes, int)
    if processes > len(gpus) > 0:
        raise ConfigError(f"`launch.processes={processes}`: there are {len(gpus)} GPUs; use at most that many, or auto")
    return processes


def check_environment(conf: RunConf) -> None:
    """Check that a launcher, if there is one, started what this run can use.

    Raises:
        ConfigError: it started something else.
    """
    count = 1 if _group is None else _group.count
    if conf.training.fsdp and max(count, conf.launch.processes or 1) == 1:
        raise ConfigError(
            "`training.fsdp=True`: divides the model between processes, and there is one; use launch.processes=N"
        )
    if count == 1:
        return
    if torch.cuda.device_count() > 1 and not conf.training.use_cpu:
        raise ConfigError(
            f"WORLD_SIZE={count}: this process sees {torch.cuda.device_count()} GPUs; set CUDA_VISIBLE_DEVICES to one "
            "of them before torch is imported, as `python -m dpo_runner` does from LOCAL_RANK"
        )
    if conf.launch.processes != count:
        raise ConfigError(
            f"`launch.processes={conf.launch.processes}`: a launcher has started {count} processes; leave it out"
        )
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        if os.environ.get(name, "false").lower() == "true":
            raise ConfigError(
                f"{name}={os.environ[name]}: several processes share the work of a step, and each holds the whole "
                "model; start them with launch.processes=N, torchrun, or accelerate launch --multi_gpu"
            )


def _open_store(rank: int) -> Any:
    """Return a store of our own, served by the first process of an existing group."""
    host = socket.gethostname()
    served = TCPStore(host, 0, is_master=True, wait_for_workers=False) if rank == 0 else None
    address: list[Any] = [(host, served.port) if served is not None else None]
    dist.broadcast_object_list(address)
    return served or TCPStore(*address[0], is_master=False)


def rank() -> int:
    """Return this process's number; 0 for the first."""
    return 0 if _group is None else _group.rank


def count() -> int:
    """Return the number of processes."""
    return 1 if _group is None else _group.count


def is_first() -> bool:
    """Return whether this process writes the run directory and talks to the terminal and W&B."""
    return rank() == 0


def is_launched() -> bool:
    """Return whether a run with `launch.processes` has started this process, and shown its plan."""
    return LAUNCHER in os.environ


def open_store() -> Any:
    """Return another connection to the processes' store, for another thread."""
    assert _group is not None
    store = PrefixStore(_group.prefix, _group.store.clone())
    store.set_timeout(timedelta(seconds=10))
    return store


def share(value: Value) -> Value:
    """Return the first process's value; the others wait for it without a limit."""
    if _group is None:
        return value
    key, _group.turn = f"{_group.prefix}/{_group.turn}", _group.turn + 1
    if _group.rank == 0:
        _group.store.set(key, pickle.dumps(value))
        return value
    received: Value = pickle.loads(_group.store.get(key))
    return received


def do_first(act: Callable[[], Value]) -> Value:
    """Let the first process act, and return what it returns; the others wait."""
    return share(act() if is_first() else None)  # type: ignore[return-value]


@contextmanager
def first_before_others() -> Iterator[None]:
    """Let the first process run this block before the others, which then find its caches."""
    if not is_first():
        share(None)
    yield
    if is_first():
        share(None)


def leave_together() -> None:
    """Close torch's process group at the end of a run; the first process, which may serve the store, waits for all."""
    if _group is None:
        return
    _group.store.set(f"{_group.prefix}/left/{_group.rank}/{_group.turn}", b"")
    if _group.rank == 0:
        _group.store.wait([f"{_group.prefix}/left/{number}/{_group.turn}" for number in range(_group.count)])
    if _group.connect is not None and dist.is_initialized():
        dist.destroy_process_group()


def gather(value: Value) -> list[Value]:
    """Return each process's value, in their order."""
    if _group is None:
        return [value]
    if not dist.is_initialized():
        assert _group.connect is not None
        _group.connect(f"group/{_group.turn}")
    values: list[Any] = [None] * _group.count
    dist.all_gather_object(values, value)
    return values


def copy_from_first(weights: Iterable[torch.Tensor]) -> None:
    """Give all processes the first one's weights: factorizations on GPUs may differ in signs and last bits."""
    for weight in weights if _group is not None else ():
        dist.broadcast(weight.data, 0)


def sum_gradients(weights: Sequence[torch.nn.Parameter]) -> None:
    """Sum the gradients of trained weights over all processes, in place; a missing one counts as 0.

    A weight without a gradient in all processes, such as an idle expert's, keeps none. Comes after a `gather`.
    """
    if _group is None or not weights:
        return
    device = weights[0].device
    held = torch.tensor([weight.grad is not None for weight in weights], dtype=torch.float32, device=device)
    dist.all_reduce(held)
    reached = [weight for weight, processes in zip(weights, held.tolist(), strict=True) if processes]
    for weight in reached:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    some: list[torch.Tensor] = []
    for weight in reached:
        assert weight.grad is not None
        some.append(weight.grad)
        if weight is reached[-1] or sum(grad.numel() for grad in some) >= _AT_ONCE:
            _sum(some)
            some = []


def _sum(tensors: list[torch.Tensor]) -> None:
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))

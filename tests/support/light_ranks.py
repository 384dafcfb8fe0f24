"""Jobs of several processes that train nothing, so that they start fast: faults of one of them."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dpo_runner.config.run_conf import RunConf
from dpo_runner.errors import RunError
from dpo_runner.training.ranks import watch
from dpo_runner.training.ranks.division import deal
from dpo_runner.training.ranks.group import gather, rank, share, sum_gradients
from dpo_runner.training.ranks.watch import note_progress, over_processes


def _fail() -> None:
    if rank() == 1:
        raise ValueError("a fault of one process")


def _hang() -> None:
    watch._GRACE_SECONDS = 1  # nothing ends by itself
    if rank() == 1:
        time.sleep(300)


def _exit() -> None:
    if rank() == 1:
        raise SystemExit(3)


def _fail_everywhere() -> None:
    raise ValueError("a fault of all processes")


FAULTS: dict[str, Callable[[], None]] = {
    "an error": _fail,
    "errors": _fail_everywhere,
    "a hang": _hang,
    "an exit": _exit,
}


@over_processes
def work(conf: RunConf, fault: str | None) -> None:
    """Exchange what processes exchange; in the second of two rounds, with a fault of one of them."""
    assert conf.launch.processes == 2
    for turn in range(2):
        assert gather(rank()) == [0, 1] and share(rank()) == 0
        weights = [torch.nn.Parameter(torch.zeros(3)) for _ in range(3)]
        weights[rank()].grad = torch.full((3,), 1.0 + rank())
        sum_gradients(weights)
        grads = [None if weight.grad is None else weight.grad.tolist() for weight in weights]
        assert grads == [[1.0] * 3, [2.0] * 3, None]
        assert deal([5, 4, 3, 3]) == [0, 1, 1, 0]
        note_progress()
        if turn == 1 and fault is not None:
            FAULTS[fault]()
            gather(turn)


def work_again(conf: RunConf, folder: Path) -> None:
    """Work, catch the failure of all processes, and be refused in the same ones; write a file of each to `folder`."""
    with pytest.raises(ValueError):
        work(conf, "errors")
    with pytest.raises(RunError, match=r"^an earlier run has failed in these processes, .*; start them again$"):
        work(conf, None)
    (folder / f"refused-{rank()}").touch()

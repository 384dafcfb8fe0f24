"""Each process's share of the work, and of the random numbers."""

from collections.abc import Sequence

import torch

from dpo_runner.training.ranks.group import count, rank


def seed_process(seed: int, step: int) -> None:
    """Give processes other than the first dropout of their own, the same after a resume as without an interruption.

    The first process draws what a single process draws. The others are seeded anew at each step.

    Args:
        seed: the run's.
        step: optimizer steps done.
    """
    if rank():
        torch.manual_seed(hash((seed, rank(), step)) % 2**32)


def deal(sizes: Sequence[int]) -> list[int]:
    """Deal work out to the processes: the largest first, each to the process that has least.

    Args:
        sizes: the size of each piece of work.

    Returns:
        Each piece's process.
    """
    loads, owners = [0] * count(), [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        owner = min(range(count()), key=loads.__getitem__)
        loads[owner] += sizes[index]
        owners[index] = owner
    return owners

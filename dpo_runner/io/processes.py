"""The number of processes in distributed training."""

import os


def count_processes() -> int:
    """Return the world size set by the launcher, 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))

"""Liveness of a run's process, from its lock, heartbeat and process id. Does not import torch."""

import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from dpo_runner.io.files import lock

HEARTBEAT_SECONDS = 10

LOCK_FILE = ".lock"
"""A file in the run directory, locked by the run's process; the system unlocks it when that ends."""

_SILENT_AFTER = 6 * HEARTBEAT_SECONDS


def find_death(run_dir: Path, status: dict[str, Any]) -> str | None:
    """Return the evidence that a run, `running` in its status.json, has died; None if it may be alive.

    A live process holds its run's lock, and the system releases a dead process's lock at once, whatever the clocks and
    process ids; but locks show only processes on the same host. Across hosts the heartbeat decides.

    Args:
        run_dir: the run's directory.
        status: the contents of its status.json, which is untrusted.
    """
    pid, host, heartbeat = status.get("pid"), status.get("host"), status.get("heartbeat")
    killed = f"its process, {pid}, was killed, or went down with the machine"
    if host == platform.node() and pid != os.getpid():  # the holder of the lock would lose it by this check
        held = _is_held(run_dir / LOCK_FILE)
        if held is not None:
            return None if held else killed
    try:
        silent = (datetime.now(UTC) - datetime.fromisoformat(str(heartbeat))).total_seconds()
    except (ValueError, TypeError):  # TypeError: a time without a zone
        return None
    if abs(silent) > _SILENT_AFTER:  # a heartbeat in the future: the clock was set back
        return f"no sign of life since {heartbeat}"
    return killed if host is None and isinstance(pid, int) and not is_process_alive(pid) else None


def is_process_alive(pid: int) -> bool:
    """Return whether a process exists; a zombie, which has ended but was not waited for, does not count."""
    try:
        return bool(psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD))
    except (psutil.NoSuchProcess, ValueError):  # ValueError: a negative number
        return False
    except psutil.AccessDenied:
        return True


def _is_held(path: Path) -> bool | None:
    """Return whether another process holds a lock file; None if unknown."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # without O_NONBLOCK, opening a pipe would block
        try:
            taken = lock(handle, shared=True)
        finally:
            os.close(handle)
    except OSError:
        return None
    return None if taken is None else not taken

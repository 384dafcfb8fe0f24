"""Tells whether the process of a run is alive: lock, heartbeat, process. Imports no torch."""

import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from dpo_runner.io.locks import lock

HEARTBEAT_SECONDS = 10

LOCK_FILE = ".lock"
"""In a run directory, held by the process that writes there; the system lets go of it however that ends."""

_SILENT_AFTER = 6 * HEARTBEAT_SECONDS


def find_death(run_dir: Path, status: dict[str, Any]) -> str | None:
    """Say how it is known that a run, `running` in its status.json, has died; None where it may well be alive.

    A living process holds the lock of its run, and the system takes that from a dead one at once, whatever clocks and
    process ids say; but it tells of processes on its own host alone. Elsewhere the heartbeat counts.

    Args:
        run_dir: where it is.
        status: what its status.json holds, which anybody may have written.
    """
    pid, host, heartbeat = status.get("pid"), status.get("host"), status.get("heartbeat")
    killed = f"its process, {pid}, was killed, or went down with the machine"
    if host == platform.node() and pid != os.getpid():  # whoever holds a lock loses it by asking
        held = _is_held(run_dir / LOCK_FILE)
        if held is not None:
            return None if held else killed
    try:
        silent = (datetime.now(UTC) - datetime.fromisoformat(str(heartbeat))).total_seconds()
    except (ValueError, TypeError):  # TypeError: a time without a zone
        return None
    if abs(silent) > _SILENT_AFTER:  # one that is to come is of a clock that has been set since
        return f"no sign of life since {heartbeat}"
    return killed if host is None and isinstance(pid, int) and not is_process_alive(pid) else None


def is_process_alive(pid: int) -> bool:
    """Whether there is such a process; one that has ended, and that nobody has asked about (a zombie), is none."""
    try:
        return bool(psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD))
    except (psutil.NoSuchProcess, ValueError):  # ValueError: a negative number
        return False
    except psutil.AccessDenied:
        return True


def _is_held(path: Path) -> bool | None:
    """Return whether another process holds a lock file; None if that cannot be known."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # without O_NONBLOCK, opening a pipe would block
        try:
            taken = lock(handle, shared=True)
        finally:
            os.close(handle)
    except OSError:
        return None
    return None if taken is None else not taken

"""File locks, which the system releases when the process ends, for any reason."""

import errno
import fcntl

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)
"""Errors from network file systems without locks."""


def lock(handle: int, *, shared: bool = False, wait: bool = False, inherited: bool = False) -> bool | None:
    """Lock an open file.

    Args:
        handle: the file descriptor; open for writing, unless the lock is shared.
        shared: take a shared lock.
        wait: wait until the lock is free.
        inherited: let child processes that inherit the descriptor hold the lock too (flock). Otherwise the lock
            belongs to this process alone (lockf), and closing any descriptor of the file releases it.

    Returns:
        True if the lock is taken, False if another process holds it, None if the file system has no locks.
    """
    take = fcntl.flock if inherited else fcntl.lockf
    flags = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    try:
        take(handle, flags)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True

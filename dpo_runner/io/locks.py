"""File locks, which the system releases when a process ends, however it ends."""

import errno
import fcntl

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)
"""What network file systems without locks answer."""


def lock(handle: int, *, shared: bool = False, wait: bool = False, inherited: bool = False) -> bool | None:
    """Lock an open file.

    Args:
        handle: its descriptor; open for writing, unless the lock is shared.
        shared: share the lock with other shared locks.
        wait: wait until the lock is free.
        inherited: let child processes that inherit the descriptor hold the lock too (flock). Otherwise it is this
            process's own (lockf), and closing any descriptor of the file releases it.

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

"""Atomic writes of files and folders, JSON Lines files, file locks, and the cache folder."""

import errno
import fcntl
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from dpo_runner.errors import ConfigError, RunError, reason_of
from dpo_runner.io.masking import mask_secrets

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)
"""Errors from network file systems without locks."""


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: under a temporary name first, then renamed."""
    _write_whole(path, [text])


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write an iterable of lines to a file atomically, one at a time."""
    _write_whole(path, (line + "\n" for line in lines))


def _write_whole(path: Path, texts: Iterable[str]) -> None:
    staging = _name_beside(path)
    try:
        with staging.open("x", encoding="utf-8") as file:
            file.writelines(texts)
            file.flush()
            os.fsync(file.fileno())
        staging.replace(path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


def _name_beside(path: Path) -> Path:
    """Return a new name in the folder of `path`; unlike tempfile's, what is made there has the modes of the umask."""
    return path.with_name(f".{path.name}-{secrets.token_hex(4)}")


def write_json(path: Path, value: Any) -> None:
    """Write one JSON value atomically, with secrets masked."""
    write_text(path, json.dumps(mask_secrets(value), indent=2, ensure_ascii=False) + "\n")


def write_folder(path: Path, fill: Callable[[Path], None], replace: bool = True) -> None:
    """Let `fill` write a temporary folder next to `path`, then rename it to `path`.

    Args:
        path: the folder.
        fill: writes the files into the folder it receives.
        replace: replace an existing folder; if False, an existing folder is an OSError.
    """
    staging = _name_beside(path)
    staging.mkdir()
    mode = stat.S_IMODE(staging.stat().st_mode)
    try:
        fill(staging)
        for file in staging.rglob("*"):  # safetensors sets owner-only permissions
            file.chmod(mode if file.is_dir() else mode & 0o666)
        if replace:
            replace_folder(path, staging, staging.with_name(f"{staging.name}-old"))
        else:
            staging.rename(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def replace_folder(path: Path, staging: Path, old: Path) -> None:
    """Rename `staging` to `path`. An existing folder moves to `old` first and is deleted last."""
    if path.exists():
        path.rename(old)
        staging.rename(path)
        shutil.rmtree(old)
    else:
        staging.rename(path)


def write_folder_once(path: Path, fill: Callable[[Path], None]) -> None:
    """Write a cache folder; if several processes write it at once, the first to finish wins.

    Raises:
        RunError: the folder cannot be written, for instance because the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_folder(path, fill, replace=False)
    except OSError as error:
        if not path.is_dir():  # otherwise another process won
            raise RunError(
                f"{path}: the cache cannot be written; {reason_of(error)}; DPO_RUNNER_CACHE names another folder"
            ) from error


def cache_dir() -> Path:
    """Return the cache folder: `DPO_RUNNER_CACHE`, else `~/.cache/dpo_runner`.

    Raises:
        ConfigError: the path begins with `~`, and there is no such home directory.
    """
    name = os.environ.get("DPO_RUNNER_CACHE") or "~/.cache/dpo_runner"
    try:
        return Path(name).expanduser()
    except RuntimeError:  # in a container a user may have neither HOME nor an account
        raise ConfigError(f"{name}: this home directory is not known; set DPO_RUNNER_CACHE=DIR, or HOME") from None


def find_fresh_folder(parent: Path) -> Path:
    """Return an unused path in `parent`, named by the current time. Creates nothing."""
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    names = (f"{stamp}{suffix}" for suffix in ["", *(f"_{n}" for n in range(1, 1000))])
    return next(parent / name for name in names if not (parent / name).exists())


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


class JsonLines:
    """An append-only file of records, one JSON object per line.

    Args:
        path: the file. A last line cut off by a kill is dropped.
        repair: whether to drop such a line in the file too; not while another process may write to it.

    Raises:
        RunError: any other line is not JSON.
    """

    def __init__(self, path: Path, repair: bool = True) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        if not path.exists():
            return
        content = path.read_bytes()
        whole, _, cut = content.rpartition(b"\n")
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self.records.append(json.loads(line))
            except ValueError:
                raise RunError(f"{path}:{number}: is no JSON; delete the file to have its work done again") from None
        if cut and repair:
            self.keep(len(self.records))

    def keep(self, count: int) -> None:
        """Drop all but the first `count` records."""
        self.records = self.records[:count]
        write_text(self.path, "".join(map(_to_line, self.records)))

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        """Append records; they are flushed to disk on return."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(map(_to_line, records)))
            file.flush()
            os.fsync(file.fileno())
        self.records += records


def _to_line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"  # ASCII: a line separator or lone surrogate in an answer must not break a line

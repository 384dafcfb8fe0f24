"""Log-probabilities under the reference model, computed once and cached on disk for all its runs.

There is one SQLite file per reference (`identity.py` defines its digest), with one row per pair: a digest of its two
rows of token ids, cut as the trainer cuts them, and log p of each completion token. Sums are computed on reading, so
entries stay valid under any beta, learning rate, loss, seed, LoRA, `ld_alpha`, and order or choice of pairs.

All files together stay within a limit. A process that adds rows holds a lock on the whole store, so that several
processes, with one file or with many, do not each count the same free room.
"""

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from dpo_runner.errors import RunError, reason_of
from dpo_runner.io.files import cache_dir, lock

_SCHEMA = """
CREATE TABLE IF NOT EXISTS pairs (key BLOB PRIMARY KEY, chosen BLOB NOT NULL, rejected BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS about (description TEXT NOT NULL);
"""
_AT_ONCE = 500  # keys in one query
_PATIENCE_SECONDS = 60


class PairLogps(NamedTuple):
    """log p of each completion token, fp32: [chosen tokens] and [rejected tokens]."""

    chosen: npt.NDArray[np.float32]
    rejected: npt.NDArray[np.float32]


class ReferenceStore:
    """One reference's open file; several processes may have it open and write to it at once.

    Args:
        digest: the reference's.
        description: shown in listings of the cache.
        limit: bytes that all references together may take. The least recently used others are deleted to make room;
            if that is not enough, pairs are not kept.

    Attributes:
        left_out: number of pairs not kept because the store was full.

    Raises:
        RunError: the file is damaged, or cannot be written or locked.
    """

    def __init__(self, digest: str, description: Mapping[str, Any], limit: int) -> None:
        self.path = store_dir() / f"{digest}.sqlite"
        self._limit, self.left_out = limit, 0
        with self._store_errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._in_use = _lock_path(self.path).open("a")
            if lock(self._in_use.fileno(), shared=True, wait=True, inherited=True) is None:  # SQLite would wait for one
                raise OSError("its disk has no file locks")
            self._database = sqlite3.connect(self.path, timeout=_PATIENCE_SECONDS)
            with self._database:
                self._database.executescript(_SCHEMA)
                self._database.execute(
                    "INSERT INTO about SELECT ? WHERE NOT EXISTS (SELECT * FROM about)", [json.dumps(description)]
                )
            self.path.touch()  # mark it as used, even if nothing is written

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.close()
        self._in_use.close()
        with _writing():
            size = self.path.stat().st_size if self.path.exists() else 0
            if size > self._limit:  # filled under another limit
                _delete(self.path)
            else:
                make_room(self._limit - size, keep=self.path)

    def find(self, keys: Sequence[bytes]) -> dict[bytes, PairLogps]:
        """Return the stored pairs among `keys`.

        Raises:
            RunError: the file is damaged.
        """
        found = {}
        with self._store_errors():
            for start in range(0, len(keys), _AT_ONCE):
                some = keys[start : start + _AT_ONCE]
                places = ", ".join("?" * len(some))
                rows = self._database.execute(f"SELECT key, chosen, rejected FROM pairs WHERE key IN ({places})", some)
                for key, *logps in rows:
                    found[key] = PairLogps(*(np.frombuffer(values, np.float32) for values in logps))
        return found

    def add(self, pairs: Mapping[bytes, PairLogps]) -> None:
        """Store `pairs`, or none of them if there is no room; rows that another process has added first stay."""
        rows = [(key, logps.chosen.tobytes(), logps.rejected.tobytes()) for key, logps in pairs.items()]
        with self._store_errors(), _writing(), self._database:
            self._database.executemany("INSERT OR IGNORE INTO pairs VALUES (?, ?, ?)", rows)
            if not self._fits():
                self._database.rollback()
                self.left_out += len(rows)

    def _fits(self) -> bool:
        """Make room for the file at its uncommitted size, and return whether there is enough."""
        pages, page = (self._database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size"))
        room: int = self._limit - pages * page
        if room < 0:
            return False
        make_room(room, keep=self.path)
        return sum(stat.st_size for path, stat in _stat_files() if path != self.path) <= room

    @contextlib.contextmanager
    def _store_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise RunError(
                f"{self.path}: {error}; `python -m dpo_runner.cache clear reference` deletes it, "
                "engine.reference_store=false runs without the store"
            ) from error
        except OSError as error:  # such as another user's file
            raise RunError(
                f"{self.path}: the cache cannot be written; {reason_of(error)}; DPO_RUNNER_CACHE names another folder, "
                "engine.reference_store=false runs without the store"
            ) from error


def store_dir() -> Path:
    return cache_dir() / "reference"


@dataclass(frozen=True)
class StoredReference:
    """One file of the store: its path, size in bytes, last use (POSIX time), number of pairs, description."""

    path: Path
    size: int
    used: float
    pairs: int | None
    description: dict[str, Any]


def list_references() -> list[StoredReference]:
    """Return the files of the store, the most recently used first; `pairs` of a damaged file is None."""
    listed = []
    for path, stat in _stat_files():
        pairs, description = None, {}
        with contextlib.suppress(sqlite3.Error), closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            pairs = database.execute("SELECT count(*) FROM pairs").fetchone()[0]
            description = json.loads(database.execute("SELECT description FROM about").fetchone()[0])
        listed.append(StoredReference(path, stat.st_size, stat.st_mtime, pairs, description))
    return sorted(listed, key=lambda reference: reference.used, reverse=True)


def make_room(limit: int, keep: Path | None = None) -> list[Path]:
    """Delete the least recently used references until the rest fits.

    Args:
        limit: bytes.
        keep: neither counted nor deleted. Files that a process has open are counted, but not deleted.

    Returns:
        The deleted files.
    """
    files = sorted(((path, stat) for path, stat in _stat_files() if path != keep), key=lambda file: file[1].st_mtime)
    total, deleted = sum(stat.st_size for _, stat in files), []
    for path, stat in files:
        if total <= limit:
            break
        if _delete(path):
            total -= stat.st_size
            deleted.append(path)
    return deleted


def _stat_files() -> Iterator[tuple[Path, os.stat_result]]:
    for path in store_dir().glob("*.sqlite"):
        with contextlib.suppress(FileNotFoundError):  # deleted by another process
            yield path, path.stat()


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    """Hold the lock under which one process at a time counts free room."""
    with (store_dir() / "writing.lock").open("a") as file:
        lock(file.fileno(), wait=True, inherited=True)
        yield


def _delete(path: Path) -> bool:
    try:
        with _lock_path(path).open("a") as file:
            if lock(file.fileno(), inherited=True) is False:
                return False
            path.unlink(missing_ok=True)
    except OSError:  # another user's
        return False
    return True


def _lock_path(path: Path) -> Path:
    return path.with_suffix(".lock")

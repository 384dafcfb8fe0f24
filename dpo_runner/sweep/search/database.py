"""Studies in a PostgreSQL database, which several commands share; each has a sweep's directory of its own."""

import json
import re
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import quote

import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage

from dpo_runner.config.rules.sweep import DRIVER
from dpo_runner.errors import ConfigError, RunError, reason_of
from dpo_runner.io.files import write_json

_RECORD = "study.json"
_KEY = "`sweep.search.storage`"
_CONNECT_SECONDS = 15
_LOCKED_SECONDS = 60


@dataclass(frozen=True)
class Membership:
    """The content of study.json: the name of the study, and that of this directory within it."""

    study: str
    member: str


def find_membership(sweep_dir: Path) -> Membership | None:
    """Return study.json of a sweep's directory, or None if its search has no study in a database."""
    try:
        return Membership(**json.loads((sweep_dir / _RECORD).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def join(sweep_dir: Path, run_name: str) -> Membership:
    """Return the membership of a directory, and record a new one."""
    found = find_membership(sweep_dir)
    if found is None:
        found = Membership(f"{run_name}/{sweep_dir.resolve().name}", secrets.token_hex(4))
        write_json(sweep_dir / _RECORD, asdict(found))
    return found


def check_place(sweep_dir: Path, storage: str | None, file: str) -> None:
    """Check that a search that is continued has its study where it began.

    Args:
        sweep_dir: the sweep's directory.
        storage: the URL of this command, if any.
        file: name of the file that has the study if no URL is set.

    Raises:
        ConfigError: the study is elsewhere.
    """
    if storage is not None and (sweep_dir / file).exists():
        raise ConfigError(f"{_KEY}: the search in {sweep_dir} has its study in {file} there; leave it out")
    if storage is None and (found := find_membership(sweep_dir)) is not None:
        raise ConfigError(f"{_KEY}: the search in {sweep_dir} has its study, {found.study}, in a database; name it")


def describe_place(sweep_dir: Path) -> str:
    return f"{socket.gethostname()}:{sweep_dir.resolve()}"


@contextmanager
def reporting(url: str | None) -> Iterator[None]:
    """Turn errors of the database of a search into one line; without a URL, change nothing.

    Raises:
        RunError: the database cannot be used, or no longer.
    """
    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError) as error:
        if url is None:
            raise
        cause = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error
        told = reason_of(getattr(cause, "orig", None) or cause)
        raise RunError(f"{_KEY}: {told}; once that is mended, the same command goes on") from error


def open_database(url: str, heartbeat: int, grace: int) -> RDBStorage:
    """Connect to a database, and create Optuna's tables if there are none.

    Raises:
        RunError: it cannot be used.
    """
    given = re.sub("^[a-z+]+(?=:)", f"postgresql+{DRIVER}", url)  # SQLAlchemy's own default depends on its version
    options = {"connect_args": {"connect_timeout": _CONNECT_SECONDS}}
    try:
        engine = sqlalchemy.create_engine(given, poolclass=sqlalchemy.pool.NullPool, **options)
        with reporting(url), locking(engine, "dpo_runner"):  # commands that start together create the tables once
            return RDBStorage(
                re.sub("[{}]", lambda match: quote(match[0]), given),
                engine_kwargs={**options, "pool_pre_ping": True},
                heartbeat_interval=heartbeat,
                grace_period=grace,
            )
    except (ImportError, ValueError, RuntimeError, sqlalchemy.exc.ArgumentError) as error:
        raise RunError(f"{_KEY}: {reason_of(error)}") from error


@contextmanager
def locking(engine: sqlalchemy.Engine, name: str) -> Iterator[None]:
    """Hold a lock of the database; the server takes it back from a process that dies or hangs."""
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text(f"SET LOCAL idle_in_transaction_session_timeout = '{_LOCKED_SECONDS}s'"))
        connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 0))"), {"name": name})
        yield

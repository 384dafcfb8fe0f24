"""A PostgreSQL server of its own, from the system's packages, on a socket in a temporary folder."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def find_binaries() -> Path | None:
    """Return the folder with initdb and pg_ctl, which Debian keeps off the path."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    pg_ctl = found[-1] if found else shutil.which("pg_ctl")
    return Path(pg_ctl).parent if pg_ctl else None


@contextmanager
def serve(binaries: Path) -> Iterator[str]:
    """Run a server and yield the URL of a database, with a password in it."""
    folder = Path(tempfile.mkdtemp(prefix="pg"))  # the path of a socket must be short
    secret = folder / "secret"
    secret.write_text("hunter2-hunter2")
    user: dict[str, Any] = {}
    if os.getuid() == 0:  # which the server refuses; the package has made a user
        user = {"user": "postgres", "group": "postgres", "extra_groups": []}
        for path in (folder, secret):
            shutil.chown(path, "postgres")

    def call(name: str, *arguments: str) -> None:
        subprocess.run([binaries / name, "-D", folder / "data", *arguments], check=True, capture_output=True, **user)

    login = ("-U", "searcher", f"--pwfile={secret}", "-A", "scram-sha-256")
    call("initdb", *login, "--no-sync", "--no-instructions", "--locale=C", "--encoding=UTF8")
    options = f"-k {folder} -c listen_addresses= -c fsync=off -c shared_buffers=16MB -c autovacuum=off"
    subprocess.run(
        [binaries / "pg_ctl", "-D", folder / "data", "-l", folder / "log", "-w", "-o", options, "start"],
        check=True,
        stdout=subprocess.DEVNULL,  # the server keeps its streams
        stderr=subprocess.DEVNULL,
        **user,
    )
    try:
        yield f"postgresql://searcher:hunter2-hunter2@/postgres?host={folder}"
    finally:
        call("pg_ctl", "-m", "immediate", "stop")
        shutil.rmtree(folder)

"""A folder of a cache, written once by whichever process is the first to finish it."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from dpo_runner.errors import RunError, reason_of


def write_folder_once(path: Path, fill: Callable[[Path], None]) -> None:
    """Write a folder of a cache: several processes may do so at once, and the first to finish wins.

    Raises:
        RunError: it cannot be written, as where the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
        try:
            fill(staging)
            staging.chmod(0o755)
            try:
                staging.rename(path)
            except OSError:
                if not path.is_dir():  # not lost to another process: a real failure
                    raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise RunError(
            f"{path}: the cache cannot be written; {reason_of(error)}; DPO_RUNNER_CACHE names another folder"
        ) from error

"""W&B's local files: their folder, their upload state, and the commands that show and upload them."""

import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_HEADER_BYTES = 7
"""Size of a .wandb header. `wandb sync` cannot read a file without more, left by a run killed at once."""


_DATA_DIR = "WANDB_DATA_DIR"


def find_folder(configured: str | None, default: Path) -> Path:
    """Return the folder of W&B's files, in `wandb.dir` if that is set, else in `default`."""
    return (default if configured is None else Path(configured).expanduser()) / "wandb"


@contextmanager
def keep_data_in(folder: Path) -> Iterator[None]:
    """Make W&B keep files to upload (tables of answers, …) with its other files, not in the home folder.

    In the home folder one file per run would remain, and `wandb sync` on another machine would not find it.
    """
    if _DATA_DIR in os.environ:
        yield
        return
    os.environ[_DATA_DIR] = str(folder.absolute())
    try:
        yield
    finally:
        del os.environ[_DATA_DIR]


def find_parts(folder: Path, run_id: str) -> set[Path]:
    """Return the folders in which W&B recorded a run, one for each start."""
    return set(folder.glob(f"*run-*-{run_id}"))


def mark_sent(part: Path) -> None:
    """Mark a part of a run as uploaded, for `wandb sync`."""
    for file in part.glob("*.wandb"):
        _mark(file).touch()


def list_commands(folder: Path, run_id: str | None = None) -> dict[str, str]:
    """Return the commands that show runs in the terminal, and upload them if the server lacks some, by their use.

    Args:
        folder: the folder of W&B's files.
        run_id: the run to upload; None for all in the folder.
    """
    files = sorted(folder.glob("*run-*/run-*.wandb"), key=lambda file: file.parent.name.removeprefix("offline-"))
    if not files:
        return {}
    runs: dict[str, list[Path]] = {}
    for file in files:
        if file.stat().st_size > _HEADER_BYTES:
            runs.setdefault(file.stem.removeprefix("run-"), []).append(file)
    chosen = runs.values() if run_id is None else [runs.get(run_id, [])]
    lacking = [file for parts in chosen for file in _find_lacking(parts)]
    commands = {"curves": ["wandb", "leet", str(folder)]}
    if lacking:
        synced, online = any(map(_is_sent, lacking)), any(map(_is_online, lacking))
        flags = ["--include-synced"] * synced + ["--include-online"] * online
        taken = [file for file in files if (synced or not _is_sent(file)) and (online or not _is_online(file))]
        whole = run_id is None and len(taken) == len(lacking)
        paths = [folder] if whole else [file.parent for file in lacking]
        commands["upload"] = ["wandb", "sync", *flags, *map(str, paths)]
    return {use: shlex.join(command) for use, command in commands.items()}


def _find_lacking(parts: Sequence[Path]) -> Sequence[Path]:
    """Return the parts of a run to upload, oldest first: from the first that the server lacks.

    Later parts that the server has are uploaded again, so that the newest figures stay the newest.
    """
    first = next((index for index, part in enumerate(parts) if not _is_sent(part)), len(parts))
    return parts[first:]


def _is_online(file: Path) -> bool:
    return not file.parent.name.startswith("offline-")


def _is_sent(file: Path) -> bool:
    return _mark(file).exists()


def _mark(file: Path) -> Path:
    """Return the file that marks a .wandb file as uploaded, for `wandb sync`."""
    return file.with_suffix(".wandb.synced")

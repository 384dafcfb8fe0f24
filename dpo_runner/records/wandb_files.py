"""What W&B keeps on the disk: where it is, what of it the server has, and the commands that show and upload it."""

import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_HEADER_BYTES = 7
"""Of a .wandb file. One that holds no more, of a run that was killed at once, `wandb sync` cannot read."""


_DATA_DIR = "WANDB_DATA_DIR"


def find_folder(configured: str | None, default: Path) -> Path:
    """Return the folder of W&B's files, which is in `wandb.dir`, or where that is not set in `default`."""
    return (default if configured is None else Path(configured).expanduser()) / "wandb"


@contextmanager
def keep_data_in(folder: Path) -> Iterator[None]:
    """Have W&B keep what it is going to upload (tables of answers, say) with its other files, not in the home folder.

    There it would stay, one file for each run, and `wandb sync` on another machine would not find it.
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
    """Return the folders into which W&B has recorded a run, one for each time that it was started."""
    return set(folder.glob(f"*run-*-{run_id}"))


def mark_sent(part: Path) -> None:
    """Let `wandb sync` know that the server has all that a part of a run holds."""
    for file in part.glob("*.wandb"):
        _mark(file).touch()


def list_commands(folder: Path, run_id: str | None = None) -> list[str]:
    """Return the commands that show runs: in the terminal, and on the web where the server lacks some of them.

    Args:
        folder: of W&B's files.
        run_id: of the run that is to be uploaded; all in the folder unless told otherwise.
    """
    files = sorted(folder.glob("*run-*/run-*.wandb"), key=lambda file: file.parent.name.removeprefix("offline-"))
    if not files:
        return []
    runs: dict[str, list[Path]] = {}
    for file in files:
        if file.stat().st_size > _HEADER_BYTES:
            runs.setdefault(file.stem.removeprefix("run-"), []).append(file)
    chosen = runs.values() if run_id is None else [runs.get(run_id, [])]
    lacking = [file for parts in chosen for file in _find_lacking(parts)]
    commands = [["wandb", "leet", str(folder)]]
    if lacking:
        synced, online = any(map(_is_sent, lacking)), any(map(_is_online, lacking))
        flags = ["--include-synced"] * synced + ["--include-online"] * online
        taken = [file for file in files if (synced or not _is_sent(file)) and (online or not _is_online(file))]
        whole = run_id is None and len(taken) == len(lacking)
        commands.append(["wandb", "sync", *flags, *map(str, [folder] if whole else [file.parent for file in lacking])])
    return [shlex.join(command) for command in commands]


def _find_lacking(parts: Sequence[Path]) -> Sequence[Path]:
    """Return what of a run, oldest first, is to be sent: all that came after the first that the server lacks.

    What it has of that is sent again, so that the newest figures stay the newest.
    """
    first = next((index for index, part in enumerate(parts) if not _is_sent(part)), len(parts))
    return parts[first:]


def _is_online(file: Path) -> bool:
    return not file.parent.name.startswith("offline-")


def _is_sent(file: Path) -> bool:
    return _mark(file).exists()


def _mark(file: Path) -> Path:
    """Return the file by which `wandb sync` knows that a .wandb file has been uploaded."""
    return file.with_suffix(".wandb.synced")

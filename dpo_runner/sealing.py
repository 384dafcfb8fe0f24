"""Checkpoints that are whole or do not count.

A checkpoint is written under another name and flushed to the disk; its manifest, with each file's size and digest,
comes last; then it gets its name. So a process may be killed, and the machine lose its power, at any instant: what has
the name `checkpoint-N` and a manifest that holds is what was saved. Whatever became of one later (files cut off,
deleted, swapped, bits flipped), its manifest does not hold any more, and it is put aside, not deleted.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError

from dpo_runner.artifacts import write_json
from dpo_runner.errors import RunError, is_disk_full, reason_of

MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_STAGING, _DAMAGED = ".saving-", "damaged-"
_CHUNK = 2**24
_NEXT_TO_NOTHING = 2**16  # bytes free on a disk that is full


def write_sealed(path: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write a checkpoint, seal it, and give it its name.

    Args:
        path: what it is to be called, `…/checkpoint-N`; one of this name that is there already is replaced.
        fill: writes its files into the folder that it is given.

    Raises:
        RunError: a file cannot be written, as where the disk is full. Other checkpoints are what they were.
    """
    staging = path.with_name(f"{_STAGING}{path.name}")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        fill(staging)
        seal(staging)
        if path.exists():
            path.rename(old := path.with_name(f"{_STAGING}old-{path.name}"))
            staging.rename(path)
            shutil.rmtree(old)
        else:
            staging.rename(path)
        _flush(path.parent)
    except (OSError, SafetensorError, RuntimeError) as error:  # RuntimeError: so torch.save says that a disk is full
        reason = reason_of(error)
        if not is_disk_full(error) and path.parent.exists() and shutil.disk_usage(path.parent).free < _NEXT_TO_NOTHING:
            reason = os.strerror(errno.ENOSPC)  # torch.save's own words are "unexpected pos 64 vs 0"
        shutil.rmtree(staging, ignore_errors=True)
        raise RunError(f"{path}: the checkpoint cannot be written; {reason}") from error


def seal(folder: Path) -> None:
    """Flush a folder's files to the disk and write its manifest.

    Raises:
        OSError: something cannot be read or written.
    """
    manifest = {}
    for file in sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / MANIFEST):
        _flush(file)
        manifest[str(file.relative_to(folder))] = {"size": file.stat().st_size, "xxh3_128": _digest(file)}
    write_json(folder / MANIFEST, manifest)
    _flush(folder)


def explain_damage(checkpoint: Path, whole: bool) -> str | None:
    """Say what a checkpoint lacks of what was sealed, or return None where it lacks nothing.

    Args:
        checkpoint: its folder.
        whole: read all files and compare digests; otherwise sizes alone.
    """
    try:
        manifest: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        sealed = {str(name): (int(about["size"]), str(about["xxh3_128"])) for name, about in manifest.items()}
    except OSError:
        return f"it has no {MANIFEST}: it was not written to its end"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} is damaged"
    if not sealed:
        return f"its {MANIFEST} is empty"
    for name, (size, digest) in sealed.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if (now := file.stat().st_size) != size:
            return f"{name} has {now:,} bytes of {size:,}"
        if whole and _digest(file) != digest:
            return f"{name} is not what was written"
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """Return what is called a checkpoint in `folder`, the newest, by its step, first."""
    named = [(match, path) for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for match, path in sorted(named, key=lambda each: -int(each[0][1]))]


def find_last_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint whose files have the sizes that were sealed, or None; nothing is changed."""
    return next((path for path in list_checkpoints(folder) if explain_damage(path, whole=False) is None), None)


def open_last_checkpoint(folder: Path, tell: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint that is what was sealed, to the bit, or None.

    Newer ones that are not are put aside under another name. A save that was cut off is finished where only its name
    was missing, and removed otherwise.
    transformers' `get_last_checkpoint` takes the newest one, complete or not, and training goes on silently without
    the optimizer's state where that is what is missing.

    Args:
        folder: of a run that nobody else has in hand.
        tell: shows one line to a person.
    """
    for rest in sorted(folder.glob(f"{_STAGING}*")):  # sorted: a new one comes before the old one that it replaces
        named = rest.with_name(rest.name.removeprefix(_STAGING))
        if _NAME.fullmatch(named.name) and not named.exists() and explain_damage(rest, whole=True) is None:
            rest.rename(named)
        else:
            shutil.rmtree(rest)
    for path in list_checkpoints(folder):
        damage = explain_damage(path, whole=True)
        if damage is None:
            return path
        aside = _put_aside(path)
        tell(f"{path} is not continued from: {damage}; it is kept as {aside.name}")
    return None


def _put_aside(path: Path) -> Path:
    names = (f"{_DAMAGED}{path.name}{suffix}" for suffix in ["", *(f"_{n}" for n in range(1, 1000))])
    aside = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    return path.rename(aside)


def _digest(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems flush files, and no folders
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(handle)

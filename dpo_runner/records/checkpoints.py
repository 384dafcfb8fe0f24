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
from functools import cache
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError

from dpo_runner.errors import RunError, is_disk_full, reason_of
from dpo_runner.io.files import replace_folder, write_json

MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_STAGING, _DAMAGED = ".saving-", "damaged-"
_ASIDE = re.compile(rf"{_DAMAGED}checkpoint-(\d+)(_\d+)?")
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
        replace_folder(path, staging, old=path.with_name(f"{_STAGING}old-{path.name}"))
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


def find_damage(checkpoint: Path, whole: bool) -> str | None:
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
    """Return the newest checkpoint whose files have the sizes that were sealed, or None; nothing is changed.

    One that was sealed when a kill came before it had its name counts too: `open_last_checkpoint` gives it that.
    """
    unnamed = [rest for rest in folder.glob(f"{_STAGING}checkpoint-*") if _lacks_name(rest)]
    found = sorted([*list_checkpoints(folder), *unnamed], key=read_step, reverse=True)
    return next((path for path in found if find_damage(path, whole=False) is None), None)


def read_step(checkpoint: Path) -> int:
    """Return the number of optimizer steps that a checkpoint has behind it."""
    return int(checkpoint.name.rpartition("-")[2])


def open_last_checkpoint(
    folder: Path, say: Callable[[str], None], needs_best: bool = False, examine_all: bool = False
) -> Path | None:
    """Return the newest checkpoint that is what was sealed, to the bit, or None.

    Newer ones that are not are put aside under another name. A save that was cut off is finished where only its name
    was missing, and removed otherwise.
    transformers' `get_last_checkpoint` takes the newest one, complete or not, and training goes on silently without
    the optimizer's state where that is what is missing.

    Args:
        folder: of a run that nobody else has in hand.
        say: shows one line to a person.
        needs_best: the run ends with its best weights. Where these are lost, a checkpoint that was made after them is
            put aside too: from one before them they are made again.
        examine_all: read older ones too, which are going to be counted and deleted.
    """
    for rest in sorted(folder.glob(f"{_STAGING}*")):  # sorted: a new one comes before the old one that it replaces
        named = rest.with_name(rest.name.removeprefix(_STAGING))
        if _lacks_name(rest) and find_damage(rest, whole=True) is None:
            rest.rename(named)
        else:
            shutil.rmtree(rest)
    describe_error = cache(lambda path: find_damage(path, whole=True))
    found = list_checkpoints(folder)
    last = None
    for path in found:
        if last is not None and not examine_all:
            break
        damage = describe_error(path)
        if damage is None and last is None and needs_best:
            damage = _find_lost_best(path, describe_error)
        if damage is not None:
            _put_aside(path, damage, say)
        elif last is None:
            last = path
    if found and last is None:
        say(f"{folder} holds no other checkpoint: the run begins anew")
    return last


def put_damaged_aside(folder: Path, say: Callable[[str], None]) -> None:
    """Put checkpoints aside whose files are missing or cut off, so that none is counted, or deleted without a word."""
    for path in list_checkpoints(folder):
        if damage := find_damage(path, whole=False):
            _put_aside(path, damage, say)


def _lacks_name(rest: Path) -> bool:
    """Whether a folder with a checkpoint's temporary name is the only one of that checkpoint."""
    named = rest.with_name(rest.name.removeprefix(_STAGING))
    return _NAME.fullmatch(named.name) is not None and not named.exists()


def _find_lost_best(checkpoint: Path, describe_error: Callable[[Path], str | None]) -> str | None:
    """Say why a run that continues from `checkpoint` could not end with its best weights; None where it could."""
    step = _read_best(checkpoint)
    best = checkpoint.with_name(f"checkpoint-{step}")
    if not step or best == checkpoint or (damage := describe_error(best)) is None:
        return None
    if not best.exists():
        if _gave_way(step, checkpoint):
            return None
        damage = "it is not there any more"
    return f"the run is to end with the best one so far, {best.name}, and {damage}"


def _gave_way(best: int, checkpoint: Path) -> bool:
    """Whether what was the best at `checkpoint` was deleted for a better one, which will be made again from there.

    That one was newer and is damaged itself, or it would be continued from.
    """
    aside = {path: int(match[1]) for path in checkpoint.parent.iterdir() if (match := _ASIDE.fullmatch(path.name))}
    newer = [path for path, step in aside.items() if step > read_step(checkpoint)]
    return bool(newer) and best not in aside.values() and all(_read_best(path) != best for path in newer)


def _read_best(checkpoint: Path) -> int | None:
    """Return the step of the best checkpoint so far, as one tells that may be damaged."""
    try:
        step = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["best_global_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


def _put_aside(path: Path, damage: str, say: Callable[[str], None]) -> None:
    names = (f"{_DAMAGED}{path.name}{suffix}" for suffix in ["", *(f"_{n}" for n in range(1, 1000))])
    aside = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    path.rename(aside)
    say(f"{path} is not continued from: {damage}; it is kept as {aside.name}")


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

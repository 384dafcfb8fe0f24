"""Crash-safe checkpoints, verified by a manifest.

A checkpoint is written under a temporary name and flushed to disk; its manifest, with each file's size and digest, is
written last; then it is renamed to `checkpoint-N`. So the process may be killed, or the machine lose power, at any
instant: a `checkpoint-N` that matches its manifest is exactly what was saved. A checkpoint damaged later (files
truncated, deleted, swapped, bits flipped) no longer matches its manifest; it is set aside, not deleted.
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
_NEXT_TO_NOTHING = 2**16  # bytes; a disk with less free space is full


def write_sealed(path: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write a checkpoint, seal it, and rename it to `path`.

    Args:
        path: the final path, `…/checkpoint-N`; an existing checkpoint there is replaced.
        fill: writes the files into the folder it receives.

    Raises:
        RunError: a file cannot be written, for instance because the disk is full. Other checkpoints stay unchanged.
    """
    staging = path.with_name(f"{_STAGING}{path.name}")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        fill(staging)
        seal(staging)
        replace_folder(path, staging, old=path.with_name(f"{_STAGING}old-{path.name}"))
        _flush(path.parent)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        reason = reason_of(error)
        if not is_disk_full(error) and path.parent.exists() and shutil.disk_usage(path.parent).free < _NEXT_TO_NOTHING:
            reason = os.strerror(errno.ENOSPC)  # torch.save's message is "unexpected pos 64 vs 0"
        shutil.rmtree(staging, ignore_errors=True)
        raise RunError(f"{path}: the checkpoint cannot be written; {reason}") from error


def seal(folder: Path) -> None:
    """Flush a folder's files to disk and write its manifest.

    Raises:
        OSError: a file cannot be read or written.
    """
    manifest = {}
    for file in sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / MANIFEST):
        _flush(file)
        manifest[str(file.relative_to(folder))] = {"size": file.stat().st_size, "xxh3_128": _digest(file)}
    write_json(folder / MANIFEST, manifest)
    _flush(folder)


def find_damage(checkpoint: Path, whole: bool) -> str | None:
    """Return how a checkpoint differs from its manifest, or None if it does not.

    Args:
        checkpoint: the checkpoint's folder.
        whole: read all files and compare digests; otherwise compare sizes only.
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
    """Return the folders named `checkpoint-N` in `folder`, highest step first."""
    named = [(match, path) for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for match, path in sorted(named, key=lambda each: -int(each[0][1]))]


def find_last_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint whose files have the sizes in its manifest, or None. Changes nothing.

    A sealed checkpoint that was not renamed because of a kill counts too: `open_last_checkpoint` renames it.
    """
    unnamed = [rest for rest in folder.glob(f"{_STAGING}checkpoint-*") if _lacks_name(rest)]
    found = sorted([*list_checkpoints(folder), *unnamed], key=read_step, reverse=True)
    return next((path for path in found if find_damage(path, whole=False) is None), None)


def read_step(checkpoint: Path) -> int:
    """Return the number of optimizer steps done at a checkpoint, from its name."""
    return int(checkpoint.name.rpartition("-")[2])


def open_last_checkpoint(
    folder: Path, say: Callable[[str], None], needs_best: bool = False, examine_all: bool = False
) -> Path | None:
    """Return the newest checkpoint that matches its manifest bit for bit, or None.

    Newer, damaged checkpoints are set aside under another name. An interrupted save is renamed if it was complete, and
    removed otherwise.
    transformers' `get_last_checkpoint` returns the newest checkpoint, complete or not; if the optimizer's state is
    missing, training continues silently without it.

    Args:
        folder: the checkpoints folder of a run that no other process uses.
        say: shows one line to the user.
        needs_best: the run ends with its best weights. If they are lost, checkpoints saved after them are set aside
            too, because a run continued from an earlier checkpoint computes them again.
        examine_all: verify older checkpoints too, because they will be counted and deleted.
    """
    for rest in sorted(folder.glob(f"{_STAGING}*")):  # sorted: a new checkpoint precedes the old one it replaces
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
    """Set aside checkpoints with missing or truncated files, so that none is counted, or deleted silently."""
    for path in list_checkpoints(folder):
        if damage := find_damage(path, whole=False):
            _put_aside(path, damage, say)


def _lacks_name(rest: Path) -> bool:
    """Return whether a folder has a checkpoint's temporary name and no folder has its final name."""
    named = rest.with_name(rest.name.removeprefix(_STAGING))
    return _NAME.fullmatch(named.name) is not None and not named.exists()


def _find_lost_best(checkpoint: Path, describe_error: Callable[[Path], str | None]) -> str | None:
    """Return why a run continued from `checkpoint` could not end with its best weights; None if it could."""
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
    """Return whether the best checkpoint as of `checkpoint` was deleted in favor of a better one.

    A run continued from `checkpoint` computes that better one again. It was newer, and is damaged itself; otherwise
    the run would continue from it.
    """
    aside = {path: int(match[1]) for path in checkpoint.parent.iterdir() if (match := _ASIDE.fullmatch(path.name))}
    newer = [path for path, step in aside.items() if step > read_step(checkpoint)]
    return bool(newer) and best not in aside.values() and all(_read_best(path) != best for path in newer)


def _read_best(checkpoint: Path) -> int | None:
    """Return the step of the best checkpoint so far, from the state of a checkpoint that may be damaged."""
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
    except OSError as error:  # some network file systems cannot flush folders
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(handle)

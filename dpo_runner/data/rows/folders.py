"""The files of a path, folder or glob, and what their names tell."""

import json
import os
import re
from contextlib import suppress
from glob import glob
from pathlib import Path

from dpo_runner.data.rows.packing import PACKINGS, TEXTS
from dpo_runner.errors import DataError, suggest

SUFFIXES = (*(text + packing for text in TEXTS for packing in ("", *PACKINGS)), ".parquet", ".arrow")
FORMATS = f"{', '.join(TEXTS)} (each also with {', '.join(PACKINGS)}), .parquet or .arrow"
_METADATA = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")  # written by `datasets`
_TRAINING = {"train", "training"}
_EVALUATION = {"test", "testing", "eval", "evaluation", "valid", "validation", "val", "dev"}
_SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}")

File = tuple[str, Path]
"""Display name, and path."""


def list_files(text: str, setting: str) -> list[File]:
    """Return the files, at least one, of a path, folder or glob.

    Raises:
        DataError: there are none.
        OSError: a folder cannot be read.
    """
    root = expand(text)
    if (root / "dataset_dict.json").is_file():
        raise DataError(f"`{setting}`: the folder holds several splits; name the subfolder of one of them")
    if root.is_dir():
        saved = is_saved(root)
        names = read_metadata(root / "state.json", "_data_files", setting) if saved else walk(root)[0]
        files = [(str(Path(text, name)), root / name) for name in names]
        rule = f"the folder holds no file of a known format; use {FORMATS}"
    elif root.exists():
        return [(text, root)]
    elif any(character in text for character in "*?["):
        names = sorted(glob(str(root), recursive=True))  # noqa: PTH207 (Path.glob includes hidden files)
        files = [(name, Path(name)) for name in names if Path(name).is_file()]
        rule = "no file matches"
    elif root.is_symlink():
        files, rule = [], "is a broken symlink"
    else:
        near = suggest(root.name, [path.name for path in root.parent.iterdir()] if root.parent.is_dir() else [])
        files, rule = [], "no such file" + (near if near.startswith("; did") else "")
    if not files:
        raise DataError(f"`{setting}`: {rule}")
    return files


def walk(root: Path) -> tuple[list[str], list[str]]:
    """Return the files of a known format, relative to `root`, and those of them that `datasets` left as scratch."""

    def fail(error: OSError) -> None:
        raise error  # by default os.walk skips unreadable folders

    found = []
    for folder, subfolders, names in os.walk(root, onerror=fail):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        paths = [Path(folder, name) for name in names if not name.startswith(".") and name not in _METADATA]
        found += [path.relative_to(root) for path in paths if suffix_of(path.name) in SUFFIXES]
    scratch = {path for path in found if path.match("cache-*.arrow") or any(map(_is_unfinished, path.parts))}
    return sorted(str(path) for path in found if path not in scratch), sorted(map(str, scratch))


def _is_unfinished(name: str) -> bool:
    return name.endswith(".incomplete")  # the folder that `datasets` writes into


def find_splits(names: list[str], root: Path) -> dict[str, str]:
    """Return the split of each file, or nothing unless all have one in their name: `<split>-00000-of-00002.parquet`.

    In the cache of `datasets`, whose dataset_info.json lists the splits, it is `<dataset>-<split>.arrow`.
    """
    known: list[str] = []
    with suppress(OSError, ValueError, LookupError, TypeError):
        known = sorted(json.loads((root / "dataset_info.json").read_text(encoding="utf-8"))["splits"], key=len)
    splits = {}
    for name in names:
        stem = stem_of(name)
        shard = _SHARD.fullmatch(stem)
        split = shard.group(1) if shard else ""
        for listed in known:
            if f"-{split or stem}".endswith(f"-{listed}"):
                split = listed
                break
        if not split:
            return {}
        splits[name] = split
    return splits


def is_saved(folder: Path) -> bool:
    """Return whether `datasets` wrote the folder with `save_to_disk`."""
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def read_metadata(path: Path, key: str, setting: str) -> list[str]:
    try:
        items = json.loads(path.read_text(encoding="utf-8"))[key]
        return [item if isinstance(item, str) else item["filename"] for item in items]
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"`{setting}`: {path} is not as `datasets` writes it; {type(error).__name__}: {error}"
        ) from None


def is_held_out(name: str) -> bool:
    """Return whether the file name (or split), or else the nearest folder name with a split word, means evaluation."""
    for part in reversed(Path(name).parts):
        words = set(re.split("[^a-z]+", part.lower()))
        if words & (_TRAINING | _EVALUATION):
            return not words & _TRAINING
    return False


def expand(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:  # `~name` of an unknown user
        return Path(text)


def stem_of(name: str) -> str:
    """Return a file's name without folders and suffixes."""
    name = Path(name).name
    return name[: len(name) - len(suffix_of(name))]


def suffix_of(name: str) -> str:
    parts = Path(name.lower()).suffixes[-2:]
    return "".join(parts if "".join(parts) in SUFFIXES or set(parts[-1:]) & set(PACKINGS) else parts[-1:])

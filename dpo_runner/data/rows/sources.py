"""Sources of rows: bundled pairs, local files, folders, globs, or the hub.

Imports datasets only for the hub.
"""

import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

from dpo_runner.config.sections.data import DataConf, SourceFields, resolve_sources
from dpo_runner.data.rows.decoding import Batch, decode_rows
from dpo_runner.data.rows.readers import Unreadable, read_file, read_hub
from dpo_runner.errors import DataError, reason_of, suggest

__all__ = ["BUNDLED_PREFIX", "Batch", "RowSource", "decode_rows", "open_sources"]

BUNDLED_PREFIX = "bundled:"
_TEXT = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
_SUFFIXES = (*(text + packing for text in _TEXT for packing in ("", ".gz", ".zst")), ".parquet", ".arrow")
_FORMATS = f"{', '.join(_TEXT)} (each also with .gz or .zst), .parquet or .arrow"
_METADATA = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")  # written by `datasets`
_TRAINING = {"train", "training"}
_EVALUATION = {"test", "testing", "eval", "evaluation", "valid", "validation", "val", "dev"}

_File = tuple[str, Path]  # display name, and path


@dataclass(frozen=True)
class RowSource:
    """Files or a hub dataset; each call of `batches` reads from the beginning.

    Attributes:
        files: display names.
        setting: the setting that names them, such as `data.path=pairs.jsonl`.
        paths: paths of the files; empty for a hub dataset.
        dataset: the hub dataset, or None.
    """

    files: tuple[str, ...]
    setting: str
    paths: tuple[Path, ...] = ()
    dataset: Any = None

    def locate(self, file: int, number: int) -> str:
        """Return the location of the row with this `number` of a `Batch`, as text."""
        place = self.place(file, number)
        return f"{place['file']}:{place['line']}" if "line" in place else f"{place['file']}, row {place['row']}"

    def place(self, file: int, number: int) -> dict[str, Any]:
        """Return the location as a dict: `file`, and `line` or, for files without lines, `row`."""
        name = self.files[file]
        has_lines = number > 0 and self.dataset is None and _suffix(name) not in (".parquet", ".arrow")
        return {"file": name, "line": number} if has_lines else {"file": name, "row": abs(number)}

    def digest(self) -> str:
        """Return a hex digest of the contents and formats of the files; names and paths do not matter.

        Raises:
            DataError: a file cannot be read.
        """
        if self.dataset is not None:
            return str(self.dataset._fingerprint)
        total = hashlib.sha256()
        for name, path in zip(self.files, self.paths, strict=True):
            try:
                with path.open("rb") as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise _mistake(self.setting, name, f"cannot be read; {reason_of(error)}") from None
            total.update(f"{_suffix(name)} {content}\n".encode())  # the same bytes are other rows as .csv than as .tsv
        return total.hexdigest()

    def batches(self, size: int) -> Iterator[Batch]:
        """Yield all rows in order, in batches of at most `size` rows (`size` at least 1).

        Raises:
            DataError: a file is broken, or there are no rows.
        """
        has_rows = False
        for index, name in enumerate(self.files):
            try:
                for batch in self._read(index, size):
                    has_rows = True
                    yield batch
            except (OSError, EOFError, zlib.error, Unreadable) as error:
                raise _mistake(self.setting, name, f"cannot be read; {reason_of(error)}") from None
        if not has_rows:
            raise DataError(f"`{self.setting}`: holds no rows")

    def _read(self, file: int, size: int) -> Iterator[Batch]:
        if self.dataset is not None:
            return read_hub(file, self.dataset, size)
        return read_file(file, self.paths[file], _suffix(self.files[file]), size)


def check_local_sources(conf: DataConf) -> None:
    """Check local sources without importing the libraries that read them.

    Raises:
        DataError: as `open_sources` does.
    """
    for name, source in resolve_sources(conf).items():
        if not source.path or not is_hub_id(source.path):
            open_sources(source, source_key(name, conf))


def source_key(name: str, conf: DataConf) -> str:
    """Return the configuration key of a source, such as `data.sources.math`."""
    return f"data.sources.{name}" if conf.sources else "data"


def open_sources(conf: SourceFields, key: str) -> tuple[RowSource, RowSource | None]:
    """Return the training rows, and the evaluation rows if the source has any (else None).

    Args:
        conf: the source.
        key: its configuration key, such as `data` or `data.sources.math`.

    Raises:
        DataError: a file is missing, unreadable or of an unknown format, a folder holds no data file, a hub dataset
            cannot be loaded, or a setting does not apply to this kind of source.
    """
    if not conf.path:
        raise DataError(f"`{key}.path`: must be set (`{key}.path=VALUE`)")
    setting, eval_setting = f"{key}.path={conf.path}", f"{key}.eval_path={conf.eval_path}"
    try:
        named = _build(_list_files(conf.eval_path, eval_setting), eval_setting) if conf.eval_path else None
        if is_hub_id(conf.path):
            train = _open_hub(conf, setting, conf.split)
            return train, named or (_open_hub(conf, setting, conf.eval_split) if conf.eval_split else None)
        files, eval_files = _list_local(conf, key, setting)
        if named and not _expand(conf.path).is_file():  # exclude evaluation files that the folder or glob also matches
            held_out = {path.resolve() for path in named.paths}
            files = [file for file in files if file[1].resolve() not in held_out]
        if not files:
            raise DataError(f"`{setting}`: holds evaluation files only; rename one of them to train.jsonl or similar")
        return _build(files, setting), named or (_build(eval_files, setting) if eval_files else None)
    except OSError as error:
        raise DataError(f"`{setting}`: cannot be read; {reason_of(error)}") from None


def _list_local(conf: SourceFields, key: str, setting: str) -> tuple[list[_File], list[_File]]:
    """Return the training files, and the evaluation files that the source itself contains."""
    assert conf.path is not None
    root = _expand(conf.path)
    has_splits = (root / "dataset_dict.json").is_file()
    for name in ("subset", "revision") if has_splits else ("subset", "revision", "split", "eval_split"):
        value = getattr(conf, name)
        if value is not None and (name, value) != ("split", "train"):
            kinds = "hub datasets" + (" and folders saved with splits" if "split" in name else "")
            cure = f"set {key}.eval_path instead" if name == "eval_split" else "leave it out"
            raise DataError(f"`{key}.{name}={value}`: is for {kinds}, not for {key}.path={conf.path}; {cure}")
    if conf.path.startswith(BUNDLED_PREFIX):
        folders = {path.parent.name: path.parent for path in Path(__file__).parents[1].glob("*/train.jsonl")}
        name = conf.path.removeprefix(BUNDLED_PREFIX)
        if name not in folders:
            raise DataError(f"`{setting}`: no such bundled data{suggest(name, folders)}")
        train, evaluation = ([(f"{conf.path}/{file}", folders[name] / file)] for file in ("train.jsonl", "eval.jsonl"))
        return train, evaluation
    if has_splits:
        splits = _read_metadata(root / "dataset_dict.json", "splits", setting)
        for name in ("split", "eval_split"):
            value = getattr(conf, name)
            if value is not None and value not in splits:
                raise DataError(f"`{key}.{name}={value}`: no such split in {conf.path}{suggest(value, splits)}")
        train = _list_files(f"{conf.path.rstrip('/')}/{conf.split}", setting)
        return train, _list_files(f"{conf.path.rstrip('/')}/{conf.eval_split}", setting) if conf.eval_split else []
    files = _list_files(conf.path, setting)
    if not root.is_dir() or _is_saved(root):
        return files, []
    evaluation = [file for file in files if _is_evaluation(file[1].relative_to(root))]
    return [file for file in files if file not in evaluation], evaluation


def _list_files(text: str, setting: str) -> list[_File]:
    """Return the files, at least one, of a path, folder or glob."""
    root = _expand(text)
    if (root / "dataset_dict.json").is_file():
        raise DataError(f"`{setting}`: the folder holds several splits; name the subfolder of one of them")
    if root.is_dir():
        saved = _is_saved(root)
        names = _read_metadata(root / "state.json", "_data_files", setting) if saved else _walk(root)
        files = [(str(Path(text, name)), root / name) for name in names]
        rule = f"the folder holds no file of a known format; use {_FORMATS}"
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


def _walk(root: Path) -> list[str]:
    def fail(error: OSError) -> None:
        raise error  # by default os.walk skips unreadable folders

    found = []
    for folder, subfolders, names in os.walk(root, onerror=fail):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        paths = [Path(folder, name) for name in names if not name.startswith(".") and name not in _METADATA]
        found += [str(path.relative_to(root)) for path in paths if _suffix(path.name) in _SUFFIXES]
    return sorted(found)


def _is_saved(folder: Path) -> bool:
    """Return whether `datasets` wrote the folder with `save_to_disk`."""
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def _read_metadata(path: Path, key: str, setting: str) -> list[str]:
    try:
        items = json.loads(path.read_text(encoding="utf-8"))[key]
        return [item if isinstance(item, str) else item["filename"] for item in items]
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"`{setting}`: {path} is not as `datasets` writes it; {type(error).__name__}: {error}"
        ) from None


def _is_evaluation(relative: Path) -> bool:
    """Return whether the file name, or else the nearest folder name with a split word, means evaluation."""
    for part in reversed(relative.parts):
        words = set(re.split("[^a-z]+", part.lower()))
        if words & (_TRAINING | _EVALUATION):
            return not words & _TRAINING
    return False


def is_hub_id(text: str) -> bool:
    """Return whether a path must be a hub dataset: it looks like one, and no local file or folder matches."""
    path = Path(text)
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", text) or path.exists() or _suffix(text) in _SUFFIXES:
        return False
    return path.parent == Path() or not path.parent.is_dir()


def _expand(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:  # `~name` of an unknown user
        return Path(text)


def _suffix(name: str) -> str:
    parts = Path(name.lower()).suffixes[-2:]
    return "".join(parts if "".join(parts) in _SUFFIXES or parts[-1:] in ([".gz"], [".zst"]) else parts[-1:])


def _build(files: list[_File], setting: str) -> RowSource:
    for name, path in files:
        if not path.is_file():
            is_broken = path.is_symlink() and not path.exists()
            raise _mistake(setting, name, "is a broken symlink" if is_broken else "no such regular file")
        if (suffix := _suffix(name)) not in _SUFFIXES:
            raise _mistake(setting, name, f"no such format `{suffix}`; use {_FORMATS}")
        with path.open("rb") as file:
            if not file.read(1):
                raise _mistake(setting, name, "the file is empty")
    return RowSource(tuple(name for name, _ in files), setting, tuple(path for _, path in files))


def _open_hub(conf: SourceFields, setting: str, split: str) -> RowSource:
    import datasets

    try:
        dataset = datasets.load_dataset(conf.path, conf.subset, split=split, revision=conf.revision)
    except Exception as error:  # the hub client passes on any exception of its transports and file readers
        reason = f"neither a local file nor a reachable hub dataset; {reason_of(error)}"
        raise DataError(f"`{setting}` (split {split}): {reason}") from None
    return RowSource((f"{conf.path} (split {split})",), setting, dataset=dataset)


def _mistake(setting: str, name: str, text: str) -> DataError:
    return DataError(f"`{setting}`: {text}" if setting.endswith(f"={name}") else f"`{setting}`: {name}: {text}")

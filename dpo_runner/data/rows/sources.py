"""Sources of rows: bundled pairs, local files, folders, globs, or the hub.

Imports datasets only for the hub.
"""

import hashlib
import lzma
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpo_runner.config.sections.data import DataConf, SourceFields, resolve_sources
from dpo_runner.data.rows.decoding import Batch, decode_rows
from dpo_runner.data.rows.folders import FORMATS, SUFFIXES, File, expand, list_files, suffix_of
from dpo_runner.data.rows.local import BUNDLED_PREFIX, list_local
from dpo_runner.data.rows.packing import Unreadable, advise
from dpo_runner.data.rows.readers import read_file, read_hub
from dpo_runner.errors import DataError, reason_of
from dpo_runner.io.upstream import find_fingerprint

__all__ = ["BUNDLED_PREFIX", "Batch", "RowSource", "decode_rows", "open_sources"]


@dataclass(frozen=True)
class RowSource:
    """Files or a hub dataset; each call of `batches` reads from the beginning.

    Attributes:
        files: display names.
        setting: the setting that names them, such as `data.path=pairs.jsonl`.
        paths: paths of the files; empty for a hub dataset.
        dataset: the hub dataset, or None.
        skipped: display names of the folder's files that hold no rows of it.
    """

    files: tuple[str, ...]
    setting: str
    paths: tuple[Path, ...] = ()
    dataset: Any = None
    skipped: tuple[str, ...] = ()

    def locate(self, file: int, number: int) -> str:
        """Return the location of the row with this `number` of a `Batch`, as text."""
        place = self.place(file, number)
        return f"{place['file']}:{place['line']}" if "line" in place else f"{place['file']}, row {place['row']}"

    def place(self, file: int, number: int) -> dict[str, Any]:
        """Return the location as a dict: `file`, and `line` or, for files without lines, `row`."""
        name = self.files[file]
        has_lines = number > 0 and self.dataset is None and suffix_of(name) not in (".parquet", ".arrow")
        return {"file": name, "line": number} if has_lines else {"file": name, "row": abs(number)}

    def digest(self) -> str:
        """Return a hex digest of the contents and formats of the files; names and paths do not matter.

        Raises:
            DataError: a file cannot be read.
        """
        if self.dataset is not None:
            return find_fingerprint(self.dataset)
        total = hashlib.sha256()
        for name, path in zip(self.files, self.paths, strict=True):
            try:
                with path.open("rb") as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise _mistake(self.setting, name, f"cannot be read; {reason_of(error)}") from None
            total.update(
                f"{suffix_of(name)} {content}\n".encode()
            )  # the same bytes are other rows as .csv than as .tsv
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
            except (OSError, EOFError, zlib.error, lzma.LZMAError, Unreadable) as error:
                raise _mistake(self.setting, name, f"cannot be read; {reason_of(error)}") from None
        if not has_rows:
            raise DataError(f"`{self.setting}`: holds no rows")

    def _read(self, file: int, size: int) -> Iterator[Batch]:
        if self.dataset is not None:
            return read_hub(file, self.dataset, size)
        return read_file(file, self.paths[file], suffix_of(self.files[file]), size)


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
        named = _build(list_files(conf.eval_path, eval_setting), eval_setting) if conf.eval_path else None
        if is_hub_id(conf.path):
            train = _open_hub(conf, setting, conf.split)
            return train, named or (_open_hub(conf, setting, conf.eval_split) if conf.eval_split else None)
        found = list_local(conf, key, setting)
        files = found.train
        if named and not expand(conf.path).is_file():  # exclude evaluation files that the folder or glob also matches
            held_out = {path.resolve() for path in named.paths}
            files = [file for file in files if file[1].resolve() not in held_out]
        if not files:
            raise DataError(f"`{setting}`: holds evaluation files only; rename one of them to train.jsonl or similar")
        evaluation = named or (_build(found.evaluation, setting) if found.evaluation else None)
        return replace(_build(files, setting), skipped=tuple(found.skipped)), evaluation
    except OSError as error:
        raise DataError(f"`{setting}`: cannot be read; {reason_of(error)}") from None


def is_hub_id(text: str) -> bool:
    """Return whether a path must be a hub dataset: it looks like one, and no local file or folder matches."""
    path = Path(text)
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", text) or path.exists() or suffix_of(text) in SUFFIXES:
        return False
    return path.parent == Path() or not path.parent.is_dir()


def _build(files: list[File], setting: str) -> RowSource:
    for name, path in files:
        if not path.is_file():
            is_broken = path.is_symlink() and not path.exists()
            raise _mistake(setting, name, "is a broken symlink" if is_broken else "no such regular file")
        if (suffix := suffix_of(name)) not in SUFFIXES:
            what = f"no such format `{suffix}`" if suffix else "its name has no suffix"
            raise _mistake(setting, name, f"{what}; {advise(path) or f'use {FORMATS}'}")
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

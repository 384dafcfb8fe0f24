"""Helpers for tests that write and read files of rows in every format, with sample rows."""

import bz2
import csv
import gzip
import io
import json
import lzma
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_runner.config.sections.data import SourceFields
from dpo_runner.data.rows.decoding import decode_rows
from dpo_runner.data.rows.sources import RowSource, open_sources
from dpo_runner.errors import DataError
from tests.support.common import ROWS


def read(source: RowSource, size: int = 7) -> list[tuple[int, Any]]:
    return [row for batch in source.batches(size) for row in decode_rows(pickle.loads(pickle.dumps(batch)))]


def read_path(path: str | Path, size: int = 7) -> list[tuple[int, Any]]:
    return read(open_sources(SourceFields(path=str(path)), "data")[0], size)


def rows_of(source: RowSource | None) -> list[Any]:
    assert source is not None
    return [row for _, row in read(source)]


def error_of(path: str | Path = "x", key: str = "data", **fields: Any) -> str:
    """Return the one-line error message of opening and reading a source that must fail."""
    with pytest.raises(DataError) as caught:
        for source in open_sources(SourceFields(path=str(path), **fields), key):
            if source:
                read(source)
    assert len(caught.value.mistakes) == 1 and "\n" not in str(caught.value), caught.value
    return str(caught.value)


def write(path: str, content: str | bytes) -> str:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogateescape")
    file.write_bytes(pack(path, data))
    return path


def pack(path: str, data: bytes) -> bytes:
    suffix = Path(path).suffix
    if suffix == ".zst":
        return cast(bytes, pa.compress(data, codec="zstd", asbytes=True))
    return {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(suffix, bytes)(data)


def to_lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def to_table(rows: list[dict[str, Any]], delimiter: str = ",") -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_arrow(path: str, table: pa.Table, new: Callable[..., Any] = pa.ipc.new_stream, **options: Any) -> str:
    with new(path, table.schema) as writer:
        writer.write_table(table, **options)
    return path


TRICKY = [
    {"prompt": "héllo 😀 \u2028 \x85", "chosen": 'a {"b": [1]} \\ "q"', "rejected": "one\ntwo\r\n\nthree, and\tfour"},
    {"prompt": "  spaced  ", "chosen": "]}", "rejected": ""},
    *ROWS,
]
LINES, LIST, TABLE = to_lines(TRICKY), json.dumps(TRICKY, indent=1, ensure_ascii=False), pa.Table.from_pylist(TRICKY)


WRITERS: dict[str, Callable[[str], object]] = {
    "pairs.parquet": lambda path: pq.write_table(TABLE, path),
    "groups.parquet": lambda path: pq.write_table(TABLE, path, row_group_size=3, write_page_checksum=True),
    "packed.parquet": lambda path: pq.write_table(TABLE, path, compression="zstd"),
    "stream.arrow": lambda path: write_arrow(path, TABLE),
    "stream_batches.arrow": lambda path: write_arrow(path, TABLE, max_chunksize=3),
    "file.arrow": lambda path: write_arrow(path, TABLE, pa.ipc.new_file),
    "file_batches.arrow": lambda path: write_arrow(path, TABLE, pa.ipc.new_file, max_chunksize=5),
    "large.arrow": lambda path: write_arrow(
        path, TABLE.cast(pa.schema([(name, pa.large_string()) for name in TABLE.column_names]))
    ),
    "dictionary.arrow": lambda path: write_arrow(
        path, pa.table([c.dictionary_encode() for c in TABLE], TABLE.schema.names)
    ),
    "view.arrow": lambda path: write_arrow(
        path, TABLE.cast(pa.schema([(name, pa.string_view()) for name in TABLE.column_names]))
    ),
}

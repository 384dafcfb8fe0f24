"""Readers of raw rows from files, in batches; memory stays flat for files of any size."""

import codecs
import csv
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dpo_runner.data.rows.decoding import Batch, quote
from dpo_runner.data.rows.json_text import JsonText
from dpo_runner.data.rows.packing import CHUNK, LONGEST_ROW, Unreadable, open_text
from dpo_runner.errors import RowError, reason_of

_BATCH_BYTES = 32 << 20  # a batch of long rows ends early, so that memory stays flat
_MOST_BLANK = 1 << 20  # consecutive blank lines; a small compressed file can hold practically endless ones


def read_file(file: int, path: Path, suffix: str, size: int) -> Iterator[Batch]:
    if suffix == ".parquet":
        return _pack_arrow(file, _read_parquet(path, size), size)
    if suffix == ".arrow":
        return _pack_arrow(file, _read_arrow(path), size)
    return _pack(file, _read_text(path, suffix), size)


def read_hub(file: int, dataset: Any, size: int) -> Iterator[Batch]:
    tables = dataset.with_format("arrow").iter(batch_size=size)
    return _pack_arrow(file, (batch for table in tables for batch in table.to_batches()), size)


def _pack(file: int, rows: Iterable[tuple[int, Any]], size: int) -> Iterator[Batch]:
    batch, weight = Batch(file, [], []), 0
    for number, row in rows:
        batch.numbers.append(number)
        batch.rows.append(row)
        if not isinstance(row, RowError):
            weight += sum(map(len, row.values())) if isinstance(row, dict) else len(row)
        if len(batch.rows) == size or weight >= _BATCH_BYTES:
            yield batch
            batch, weight = Batch(file, [], []), 0
    if batch.rows:
        yield batch


def _pack_arrow(file: int, batches: Iterable[Any], size: int) -> Iterator[Batch]:
    import pyarrow as pa

    first = 1
    try:
        for batch in batches:
            for column in batch.columns:
                _check_column(column)
            for name, count in Counter(batch.schema.names).items():
                if count > 1:
                    raise Unreadable(f"column {quote(name)} appears twice")
            step = max(1, min(size, batch.num_rows * _BATCH_BYTES // max(batch.nbytes, 1)))
            for start in range(0, batch.num_rows, step):
                part = batch.slice(start, step).replace_schema_metadata()
                sink = pa.BufferOutputStream()  # copy: a pickled slice would carry the whole batch with it
                with pa.ipc.new_stream(sink, part.schema) as writer:
                    writer.write_batch(part)
                part = pa.ipc.open_stream(sink.getvalue()).read_next_batch()
                yield Batch(file, list(range(first, first + part.num_rows)), part)
                first += part.num_rows
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise Unreadable(reason_of(error)) from None


def _check_column(column: Any) -> None:
    try:
        column.validate(full=True)  # Arrow trusts the offsets in a file; a wrong one crashes the process
    except ValueError as error:
        if "UTF8" not in str(error):  # invalid UTF-8 costs one row only; see `_decode_arrow`
            raise


def _read_parquet(path: Path, size: int) -> Iterator[Any]:
    from pyarrow import parquet

    # read page by page; by default pyarrow holds whole row groups and ignores page checksums
    settings = {"pre_buffer": False, "buffer_size": CHUNK, "page_checksum_verification": True}
    with parquet.ParquetFile(path, **settings) as file:
        yield from file.iter_batches(size, use_threads=False)


def _read_arrow(path: Path) -> Iterator[Any]:
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        is_file_format = file.read(6) == b"ARROW1"
        file.seek(0)
        if is_file_format:
            reader = pa.ipc.open_file(file)
            yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
        else:
            yield from pa.ipc.open_stream(file)


def _read_text(path: Path, suffix: str) -> Iterator[tuple[int, Any]]:
    """Yield (line, row) from a text file, packed or not."""
    kind, dot, packing = suffix.removeprefix(".").partition(".")
    with open_text(path, dot + packing) as file:
        if kind in ("csv", "tsv"):
            yield from _read_table(file, "," if kind == "csv" else "\t")
        elif kind == "json":
            yield from JsonText(file).rows()
        else:
            yield from _read_lines(file)


def _read_lines(file: io.BufferedReader) -> Iterator[tuple[int, bytes]]:
    number = blank = 0
    while line := file.readline(LONGEST_ROW + 1):
        number += 1
        if len(line) > LONGEST_ROW:
            raise Unreadable(f"line {number}: longer than {LONGEST_ROW:,} bytes; each row needs a line of its own")
        line = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).rstrip()
        blank = 0 if line else blank + 1
        if blank > _MOST_BLANK:
            raise Unreadable(f"line {number}: the last {blank:,} lines are blank")
        if line:
            yield number, line


def _limit_lines(text: io.TextIOWrapper) -> Iterator[str]:
    number = blank = 0
    while line := text.readline(LONGEST_ROW + 1):
        number += 1
        if len(line) > LONGEST_ROW:
            raise Unreadable(f"line {number}: longer than {LONGEST_ROW:,} characters")
        blank = 0 if line.strip() else blank + 1
        if blank > _MOST_BLANK:
            raise Unreadable(f"line {number}: the last {blank:,} lines are blank")
        yield line


def _read_table(file: io.BufferedReader, delimiter: str) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(LONGEST_ROW)  # the csv module's default of 128 KiB is less than a long conversation
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    # without strict, the reader guesses where a quoted cell ends
    reader = csv.reader(_limit_lines(text), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "expected after" not in str(error):  # much or all of the rest of the file was read as one cell
                raise Unreadable(f"line {line}: a quote is never closed ({error})") from None
            yield line, RowError("broken quoting", f"{error}; double each quote inside quotes")
            continue
        if not cells:  # a blank line
            continue
        if header and len(cells) == len(header):
            yield line, dict(zip(header, cells, strict=True))
            continue
        if header:
            yield line, RowError("wrong number of cells", f"{len(cells)} instead of {len(header)}")
            continue
        names = [name.strip() for name in cells]
        header = names if len(set(names)) == len(names) else cells
        for column, name in enumerate(header, start=1):
            if re.fullmatch(r'\s+"[^"]*"', cells[column - 1]):
                raise Unreadable(f"line {line}: column {column} has a blank before its quote; remove such blanks")
            if not name.strip():
                raise Unreadable(f"line {line}: column {column} has no name (with pandas, write with index=False)")
            if name in header[: column - 1]:
                raise Unreadable(f"line {line}: column {quote(name)} appears twice")

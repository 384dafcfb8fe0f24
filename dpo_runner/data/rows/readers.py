"""Readers of raw rows from files, in batches; memory stays flat for files of any size."""

import codecs
import csv
import gzip
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from dpo_runner.data.rows.decoding import Batch, quote
from dpo_runner.errors import RowError, reason_of

_CHUNK = 1 << 20  # bytes per read
_BATCH_BYTES = 32 << 20  # a batch of long rows ends early, so that memory stays flat
_LONGEST_ROW = 64 << 20  # anything longer is not a row, but a file in a format other than its suffix says
_MOST_BLANK = 1 << 20  # consecutive blank lines; a small compressed file can hold practically endless ones
_SPACE = re.compile(r"[ \t\n\r]*")
_OTHER_KINDS = (  # first bytes of files that are not text
    (codecs.BOM_UTF32_LE, "it is UTF-32; save it as UTF-8"),  # before UTF-16: it starts with the same bytes
    (codecs.BOM_UTF32_BE, "it is UTF-32; save it as UTF-8"),
    (codecs.BOM_UTF16_LE, "it is UTF-16; save it as UTF-8"),
    (codecs.BOM_UTF16_BE, "it is UTF-16; save it as UTF-8"),
    (b"\x1f\x8b", "it is compressed with gzip; add .gz to its name"),
    (b"\x28\xb5\x2f\xfd", "it is compressed with zstd; add .zst to its name"),
    (b"PAR1", "it is Parquet; rename it to end in .parquet"),
    (b"ARROW1", "it is Arrow; rename it to end in .arrow"),
    (b"PK\x03\x04", "it is a zip archive; unpack it"),
)


class Unreadable(Exception):
    """The rest of a file cannot be read."""


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
    settings = {"pre_buffer": False, "buffer_size": _CHUNK, "page_checksum_verification": True}
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
    """Yield (line, row) from a text file, compressed or not."""
    kind, _, packing = suffix.removeprefix(".").partition(".")
    with _open(path, packing) as file:
        start = file.peek(8)[:8]
        for mark, told in _OTHER_KINDS:
            if start.startswith(mark):
                raise Unreadable(told)
        if kind in ("csv", "tsv"):
            yield from _read_table(file, "," if kind == "csv" else "\t")
        elif kind == "json":
            yield from _JsonText(file).rows()
        else:
            yield from _read_lines(file)


def _open(path: Path, packing: str) -> io.BufferedReader:
    if packing == "gz":
        return cast(io.BufferedReader, gzip.open(path))
    if packing == "zst":
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"), _CHUNK)
    return io.BufferedReader(path.open("rb", buffering=0), _CHUNK)


def _read_lines(file: io.BufferedReader) -> Iterator[tuple[int, bytes]]:
    number = blank = 0
    while line := file.readline(_LONGEST_ROW + 1):
        number += 1
        if len(line) > _LONGEST_ROW:
            raise Unreadable(f"line {number}: longer than {_LONGEST_ROW:,} bytes; each row needs a line of its own")
        line = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).rstrip()
        blank = 0 if line else blank + 1
        if blank > _MOST_BLANK:
            raise Unreadable(f"line {number}: the last {blank:,} lines are blank")
        if line:
            yield number, line


def _limit_lines(text: io.TextIOWrapper) -> Iterator[str]:
    number = blank = 0
    while line := text.readline(_LONGEST_ROW + 1):
        number += 1
        if len(line) > _LONGEST_ROW:
            raise Unreadable(f"line {number}: longer than {_LONGEST_ROW:,} characters")
        blank = 0 if line.strip() else blank + 1
        if blank > _MOST_BLANK:
            raise Unreadable(f"line {number}: the last {blank:,} lines are blank")
        yield line


def _read_table(file: io.BufferedReader, delimiter: str) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(_LONGEST_ROW)  # the csv module's default of 128 KiB is less than a long conversation
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
        header = cells
        for column, name in enumerate(header, start=1):
            if not name.strip():
                raise Unreadable(f"line {line}: column {column} has no name (with pandas, write with index=False)")
            if name in header[: column - 1]:
                raise Unreadable(f"line {line}: column {quote(name)} appears twice")


class _JsonText:
    """A JSON list or concatenated JSON objects, read value by value; only the current one is in memory."""

    def __init__(self, file: io.BufferedReader) -> None:
        self.file, self.decode = file, codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
        self.text, self.position, self.ended = "", 0, False
        self.line, self.line_start = 1, 0
        # leave ints as text: too many digits then fail in `decode_rows`, which costs one row instead of the file
        self.scan = json.JSONDecoder(parse_int=str).raw_decode

    def rows(self) -> Iterator[tuple[int, str]]:
        """Yield (number, JSON text) of each value: its line, or minus its position if all share one line."""
        for place, (line, text) in enumerate(self._values(), start=1):
            if place == 1:
                first_line, share_one = line, False
            elif place == 2:
                share_one = line == first_line
            yield (-place if share_one else line), text

    def _values(self) -> Iterator[tuple[int, str]]:
        first = self._peek()
        if first == "{":
            while self._peek() == "{":
                yield self._take()
        elif first == "[":
            self._move(self.position + 1)
            goes_on = self._peek() != "]"
            while goes_on:
                yield self._take()
                if self._peek() not in (",", "]"):
                    raise self._broken("Expecting ',' or ']'" if self._peek() else "the list never closes")
                goes_on = self._peek() == ","
                self._move(self.position + goes_on)
            self._move(self.position + 1)
        if self._peek():
            raise self._broken("Extra data" if first == "[" else "Expecting an object, or one list of them")

    def _peek(self) -> str:
        """Return the next non-blank character, or "" at the end."""
        blank = 0
        while True:
            match = _SPACE.match(self.text, self.position)
            assert match is not None
            blank += match.end() - self.position
            self._move(match.end())
            if self.position < len(self.text) or self.ended:
                return self.text[self.position : self.position + 1]
            if blank > _LONGEST_ROW:
                raise self._broken(f"the last {blank:,} characters are blank")
            self._read_on()

    def _take(self) -> tuple[int, str]:
        if not self._peek():
            raise self._broken("the list never closes")
        while True:
            # The last characters of the chunk may be part of a longer number, name or escape.
            certain = len(self.text) if self.ended else len(self.text) - 16
            try:
                _, end = self.scan(self.text, self.position)
                if end <= certain or self.text[end - 1] in '}]"':
                    break
            except json.JSONDecodeError as error:
                if self.ended or (error.pos < certain and not error.msg.startswith("Unterminated string")):
                    self._move(error.pos)
                    raise self._broken(error.msg) from None
            except RecursionError:
                raise self._broken("nested too deeply") from None
            if len(self.text) - self.position > _LONGEST_ROW:
                raise self._broken(f"longer than {_LONGEST_ROW:,} characters; the rows must be one list or stand alone")
            self._read_on()
        line, text = self.line, self.text[self.position : end]
        self._move(end)
        return line, text

    def _read_on(self) -> None:
        """Drop the consumed text and read at least as much as remains, so rescanning costs at most 2x."""
        rest = self.text[self.position :]
        data = self.file.read(max(_CHUNK, len(rest)))
        self.ended = not data
        self.line_start -= self.position
        self.text, self.position = rest + self.decode(data, self.ended), 0

    def _move(self, position: int) -> None:
        self.line += (newlines := self.text.count("\n", self.position, position))
        if newlines:
            self.line_start = self.text.rindex("\n", self.position, position) + 1
        self.position = position

    def _broken(self, message: str) -> Unreadable:
        return Unreadable(f"line {self.line}, column {self.position - self.line_start + 1}: {message}")

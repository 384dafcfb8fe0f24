"""Text files, packed or not: opened as bytes, or told apart from files of another kind."""

import bz2
import codecs
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

CHUNK = 1 << 20  # bytes per read
LONGEST_ROW = 64 << 20  # anything longer is not a row, but a file in a format other than its suffix says
TEXTS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
PACKINGS = (".gz", ".bz2", ".xz", ".zst")
_OTHER_KINDS = (  # first bytes of files that are not text
    (codecs.BOM_UTF32_LE, "it is UTF-32; save it as UTF-8"),  # before UTF-16: it starts with the same bytes
    (codecs.BOM_UTF32_BE, "it is UTF-32; save it as UTF-8"),
    (codecs.BOM_UTF16_LE, "it is UTF-16; save it as UTF-8"),
    (codecs.BOM_UTF16_BE, "it is UTF-16; save it as UTF-8"),
    (b"\x1f\x8b", "it is compressed with gzip; add .gz to its name"),
    *((b"BZh%d1AY&" % level, "it is compressed with bzip2; add .bz2 to its name") for level in range(1, 10)),
    (b"\xfd7zXZ\x00", "it is compressed with xz; add .xz to its name"),
    (b"\x04\x22\x4d\x18", "it is compressed with LZ4, which may hold no checksum; pack it as .zst"),
    (b"\x28\xb5\x2f\xfd", "it is compressed with zstd; add .zst to its name"),
    (b"PAR1", "it is Parquet; rename it to end in .parquet"),
    (b"ARROW1", "it is Arrow; rename it to end in .arrow"),
    (b"PK\x03\x04", "it is a zip archive; unpack it"),
)


class Unreadable(Exception):
    """The rest of a file cannot be read."""


def open_text(path: Path, packing: str) -> io.BufferedReader:
    """Open a text file, packed as its suffix says (`.gz`, …, or an empty text), at its first byte.

    Raises:
        Unreadable: it is not text.
        OSError, EOFError, zlib.error, lzma.LZMAError: it cannot be opened or unpacked, here or when read on.
    """
    file = _open(path, packing)
    try:
        if told := _tell_kind(file.peek(8)):
            raise Unreadable(told)
    except BaseException:
        file.close()
        raise
    return file


def _open(path: Path, packing: str) -> io.BufferedReader:
    if packing == ".gz":
        return cast(io.BufferedReader, gzip.open(path))
    if packing == ".bz2":
        return io.BufferedReader(_Unpacked(path, bz2.BZ2Decompressor), CHUNK)
    if packing == ".xz":
        return io.BufferedReader(_Unpacked(path, lzma.LZMADecompressor), CHUNK)
    if packing == ".zst":
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"), CHUNK)
    return io.BufferedReader(path.open("rb", buffering=0), CHUNK)


class _Unpacked(io.RawIOBase):
    """The text of a packed file, which may be several joined ones.

    The standard library's own files take damage after the first of them for the end.
    """

    def __init__(self, path: Path, new: Callable[[], Any]) -> None:
        self.file, self.new, self.decoder = path.open("rb", buffering=0), new, new()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            rest = b""
            if self.decoder.eof:
                rest = self.decoder.unused_data.lstrip(b"\0")  # xz files may be padded with zeros
                while not rest and (read := self.file.read(CHUNK)):
                    rest = read.lstrip(b"\0")
                if not rest:
                    return 0
                self.decoder = self.new()
            elif self.decoder.needs_input and not (rest := self.file.read(CHUNK)):
                raise EOFError("it ends in the middle")
            if data := self.decoder.decompress(rest, len(buffer)):
                buffer[: len(data)] = data
                return len(data)

    def close(self) -> None:
        self.file.close()
        super().close()


def _tell_kind(start: bytes) -> str | None:
    return next((told for mark, told in _OTHER_KINDS if start.startswith(mark)), None)


def advise(path: Path) -> str | None:
    """Return which suffix the content of a file asks for, in words, or None if it does not tell."""
    with path.open("rb") as file:
        start = file.read(1 << 16)
    if told := _tell_kind(start):
        suffix = path.suffix.lower()  # workbooks are zip archives too
        return None if suffix in PACKINGS or (start.startswith(b"PK") and suffix not in ("", ".zip")) else told
    text = start.removeprefix(codecs.BOM_UTF8).lstrip()
    line, *more = text.splitlines() or [b""]
    if text.startswith(b"["):
        return "it looks like a JSON list; rename it to end in .json"
    if text.startswith(b"{"):
        try:
            json.loads(line)
        except (ValueError, RecursionError):
            return "it looks like JSON; rename it to end in .json, or in .jsonl if each line is a row"
        return "it looks like JSON Lines; rename it to end in .jsonl"
    for mark, kind in ((b"\t", "tsv"), (b",", "csv")):
        if more and 0 < line.count(mark) == more[0].count(mark) and b"\0" not in start:
            return f"it looks like a table; rename it to end in .{kind}"
    return None

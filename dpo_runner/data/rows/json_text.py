"""Rows of a JSON text, value by value."""

import codecs
import io
import json
import re
from collections.abc import Iterator
from typing import Any

from dpo_runner.config.sections.data import COLUMNS
from dpo_runner.data.rows.decoding import quote
from dpo_runner.data.rows.packing import CHUNK, LONGEST_ROW, Unreadable

_SPACE = re.compile(r"[ \t\n\r]*")
# leave ints as text: too many digits then fail in `decode_rows`, which costs one row instead of the file
_DECODER = json.JSONDecoder(parse_int=str)


def _find_rows(text: str) -> str | None:
    """Return the name under which an object holds the rows of its file, or None if it is a row itself.

    Raises:
        Unreadable: it holds several lists of objects, or the columns.
    """
    try:
        columns = _DECODER.decode(text)
    except (ValueError, RecursionError):  # left to `decode_rows`
        return None
    if _is_columnar(list(columns.values())):
        raise Unreadable("one object of columns; write a list of rows (with pandas, orient='records')")
    if columns.keys() & {*COLUMNS, "messages"}:
        return None
    names = [
        name
        for name, value in columns.items()
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value)
    ]
    if len(names) > 1:
        shown = ", ".join(map(quote, names[:5]))
        raise Unreadable(f"one object with several lists of objects ({shown}); write each list to a file of its own")
    return names[0] if names else None


def _is_columnar(values: list[Any]) -> bool:
    """Return whether these are columns: each a list of cells, or as pandas writes them, an object of numbered cells."""
    if all(isinstance(value, dict) and value and all(key.isdecimal() for key in value) for value in values):
        return True
    is_columns = all(isinstance(value, list) and not any(isinstance(item, dict) for item in value) for value in values)
    return len(values) > 1 and is_columns and len({len(value) for value in values}) == 1 and len(values[0]) > 1


class JsonText:
    """A JSON list or concatenated JSON objects, read value by value; only the current one is in memory.

    The list may stand in an object, which is then held in memory as a whole: `{"version": 1, "data": [...]}`.
    """

    def __init__(self, file: io.BufferedReader) -> None:
        self.file, self.decode = file, codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
        self.text, self.position, self.ended = "", 0, False
        self.line, self.line_start = 1, 0
        self.scan = _DECODER.raw_decode

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
            start = self.line, self.position - self.line_start
            line, text = self._take()
            if not self._peek() and (name := _find_rows(text)):
                yield from self._unwrap(text, name, *start)
                return
            yield line, text
            while self._peek() == "{":
                yield self._take()
        elif first == "[":
            yield from self._list()
        if self._peek():
            hint = "; a list or object in quotes was encoded twice" if first == '"' else ""
            raise self._broken("Extra data" if first == "[" else f"Expecting an object, or one list of them{hint}")

    def _list(self) -> Iterator[tuple[int, str]]:
        self._move(self.position + 1)
        goes_on = self._peek() != "]"
        while goes_on:
            yield self._take()
            if self._peek() not in (",", "]"):
                raise self._broken("Expecting ',' or ']'" if self._peek() else "the list never closes")
            goes_on = self._peek() == ","
            self._move(self.position + goes_on)
        self._move(self.position + 1)

    def _unwrap(self, text: str, name: str, line: int, column: int) -> Iterator[tuple[int, str]]:
        """Yield the values of the list with this name in an object that is the whole file."""
        self.text, self.position, self.line, self.line_start = text, 1, line, -column
        has_come = False
        while self._peek() != "}":
            key, end = self.scan(text, self.position)
            self._move(end)
            self._peek()  # ":"
            self._move(self.position + 1)
            self._peek()
            if key == name and has_come:
                raise self._broken(f"{quote(name)} appears twice")
            if key == name:
                has_come = True
                yield from self._list()
            else:
                self._move(self.scan(text, self.position)[1])
            if self._peek() == ",":
                self._move(self.position + 1)

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
            if blank > LONGEST_ROW:
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
            if len(self.text) - self.position > LONGEST_ROW:
                raise self._broken(f"longer than {LONGEST_ROW:,} characters; the rows must be one list or stand alone")
            self._read_on()
        line, text = self.line, self.text[self.position : end]
        self._move(end)
        return line, text

    def _read_on(self) -> None:
        """Drop the consumed text and read at least as much as remains, so rescanning costs at most 2x."""
        rest = self.text[self.position :]
        data = self.file.read(max(CHUNK, len(rest)))
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

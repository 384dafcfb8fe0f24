"""Columns of images, videos and sounds: a row that has any would be trained without them, so it is refused."""

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from dpo_runner.errors import RowError

_COLUMN = re.compile(
    r"(?:(?:prompt|input|question|chosen|rejected)_)?(image|img|picture|photo|pixel_value|video|audio)s?"
    r"(?:_(?:path|url|file|name|byte|data|base64)s?)?"
)
_BLANKS = ("", "[]", "{}", "null", "none", "nan")


@functools.lru_cache(maxsize=4096)  # called for each column of each row
def find_kind(column: Any) -> str | None:
    """Return `image`, `video` or `audio` if a column or key of this name holds such things, else None."""
    found = _COLUMN.fullmatch(re.sub(r"[\W_]+", "_", column.strip()).lower()) if isinstance(column, str) else None
    if found is None:
        return None
    return found[1] if found[1] in ("video", "audio") else "image"


def holds_media(value: Any) -> bool:
    """Return whether a value of such a column is more than blank; a number by itself counts or names something."""
    if value is None or isinstance(value, (bool, int, float)):
        return False
    if isinstance(value, dict):
        return any(map(holds_media, value.values()))
    if isinstance(value, list):
        return any(isinstance(item, (int, float)) or holds_media(item) for item in value)
    return value.strip().lower() not in _BLANKS if isinstance(value, str) else value != b""


def check_media(row: Mapping[Any, Any], texts: Iterable[str]) -> None:
    """Check that a row has no images, videos or sounds, and no place for one in a text of its prompt.

    Args:
        row: with such a column. A text's `<image>` is only looked for beside a blank one.
        texts: of the prompt.

    Raises:
        RowError: names the column, and the setting that trains on the text alone.
    """
    columns = {column: kind for column in row if (kind := find_kind(column))}
    names = ", ".join(name if re.fullmatch(r"\w(?:[\w .-]*\w)?", name) else repr(name) for name in columns)
    cure = f'only text can be trained on, and "data.drop_columns=[{names}]" trains on the text alone'
    for column in columns:
        if holds_media(row[column]):
            raise RowError("not a text", f"`{column}` holds {row[column]!r:.60}; {cure}")
    place = re.compile(rf"<\|?(?:{'|'.join(set(columns.values()))})(?:_\d+|_pad)?\|?>")
    for text in texts:
        if found := place.search(text):
            raise RowError("not a text", f"`prompt` holds {found.group()}, and `{next(iter(columns))}` nothing; {cure}")

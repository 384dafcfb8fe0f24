"""Batches of raw rows, and their decoding in a worker process.

Imports pyarrow only for Arrow rows.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dpo_runner.errors import RowError, reason_of

_KINDS = {list: "a list", str: "a text", bool: "a boolean", type(None): "null"}


@dataclass(frozen=True)
class Batch:
    """Raw rows of one file: undecoded JSON, dicts from CSV, or an Arrow batch.

    Attributes:
        file: index into `RowSource.files`.
        numbers: number of each row, from 1: in a text format the line where it starts, else the row number; a
            negative number is the row number in a JSON list that stands on one line.
        rows: a list of bytes, str, dict or RowError, or a `pyarrow.RecordBatch`.
    """

    file: int
    numbers: list[int]
    rows: Any


def decode_rows(batch: Batch) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    """Yield the number of each row, and its columns or the reason why it cannot be read."""
    rows = map(_decode, batch.rows) if isinstance(batch.rows, list) else _decode_arrow(batch.rows)
    return zip(batch.numbers, rows, strict=True)


def _decode(row: bytes | str | dict[str, Any] | RowError) -> dict[str, Any] | RowError:
    if isinstance(row, (dict, RowError)):
        return row
    try:
        value = _JSON.decode(row if isinstance(row, str) else row.decode())
    except RowError as error:
        return error
    except UnicodeDecodeError as error:
        return RowError("invalid UTF-8", f"byte {error.start + 1} of the line")
    except json.JSONDecodeError as error:
        return RowError("broken JSON", f"{error.msg.removesuffix(' at')} at column {error.pos + 1}")
    except RecursionError:
        return RowError("broken JSON", "nested too deeply")
    except ValueError:  # the only other cause: Python's limit on the digits of an int
        return RowError("broken JSON", f"a number of more than {sys.get_int_max_str_digits()} digits")
    if isinstance(value, str) and value.lstrip()[:1] in ("{", '"'):  # a row that was encoded twice
        return _decode(value)
    return value if isinstance(value, dict) else RowError("not an object", _KINDS.get(type(value), "a number"))


def _to_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    columns = dict(pairs)
    if len(columns) < len(pairs):  # the json module would silently keep the last one
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise RowError("duplicate key", f"{quote(name)} appears twice")
    return columns


_JSON = json.JSONDecoder(object_pairs_hook=_to_object)


def _decode_arrow(batch: Any) -> Iterator[dict[str, Any] | RowError]:
    packed = {field.name: field.type for field in batch.schema if "arrow.json" in str(field.type)}
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError) as error:
        if batch.num_rows > 1:
            for index in range(batch.num_rows):
                yield from _decode_arrow(batch.slice(index, 1))
        elif isinstance(error, UnicodeDecodeError):
            yield RowError("invalid UTF-8", f"byte {error.start + 1} of a text")
        else:
            yield RowError("value out of range", reason_of(error))
        return
    for row in rows:
        try:
            yield {**row, **{name: _unpack(row[name], kind) for name, kind in packed.items()}} if packed else row
        except (ValueError, RecursionError) as error:
            yield RowError("broken JSON", reason_of(error))


def _unpack(value: Any, kind: Any) -> Any:
    """Decode values without a common Arrow type, such as tool arguments: `datasets` stores them as JSON."""
    import pyarrow as pa

    if value is None:
        return None
    if isinstance(kind, pa.JsonType):
        return json.loads(value)
    if pa.types.is_struct(kind):
        return {field.name: _unpack(value[field.name], field.type) for field in kind}
    if hasattr(kind, "value_type") and isinstance(value, list):
        return [_unpack(item, kind.value_type) for item in value]
    return value


def quote(name: str) -> str:
    return f"`{repr(name)[1:-1]:.60}`"  # on one line, without lone surrogates, which cannot be printed

"""Conversion of rows in any known layout to checked pairs: formatter, column names, layout detection."""

import importlib
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, cast

from dpo_runner.data.layouts.columns import Row, name_columns
from dpo_runner.data.layouts.known import LAYOUTS, Layout
from dpo_runner.data.layouts.media import check_media, find_kind
from dpo_runner.data.layouts.messages import Pair, check_pair, parse_json
from dpo_runner.data.layouts.scored import group_responses
from dpo_runner.data.layouts.spelling import find_spelling, respell
from dpo_runner.errors import DataError, RowError, suggest


def read_pairs(row: Row, layout: Layout, pairing: str) -> list[Pair]:
    """Return the pairs of a row, checked.

    Returns:
        One pair; several if the row has more than two answers; none if all scores are equal.

    Raises:
        RowError: the row cannot be used.
    """
    try:
        row = layout.respell(row) if layout.spelling else row
        pairs = layout.read(row, pairing)
        if any(map(find_kind, row)):
            check_media(row, (message["content"] for pair in pairs for message in pair.prompt))
        tools = parse_json(row.get("tools"), list, "tools")
        kwargs = parse_json(row.get("chat_template_kwargs"), dict, "chat_template_kwargs")
    except RecursionError:
        raise RowError("not JSON", "nested too deeply") from None
    for pair in pairs:
        pair.tools, pair.chat_template_kwargs = tools, kwargs
        check_pair(pair)
    return pairs


class _Watched(Row):
    """A row that notes which of its columns are read."""

    def __init__(self, row: Row, read: set[str]) -> None:
        super().__init__(row)
        self.read = read

    def __getitem__(self, column: str) -> Any:
        self.read.add(column)
        return super().__getitem__(column)

    def get(self, column: str, default: Any = None) -> Any:
        self.read.add(column)
        return super().get(column, default)

    def __or__(self, other: Any) -> "_Watched":  # type: ignore[override]  # of two overloads, one is used
        return _Watched(super().__or__(other), self.read)


def find_unread(rows: list[Row], layout: Layout) -> list[str]:
    """Return the columns of respelled rows that hold something and that the layout does not read."""
    read: set[str] = set()
    watched: list[Row] = [_Watched(row, read) for row in rows]
    if layout.grouped:
        watched = [cast(Row, row) for _, row in group_responses(enumerate(watched))]
    for row in watched:
        with suppress(RowError):
            read_pairs(row, replace(layout, spelling={}), "all_pairs")
    used = dict.fromkeys(column for row in rows for column, value in row.items() if value not in (None, "", [], {}))
    return [column for column in used if column not in read]


def rename_columns(row: Row, columns: dict[str, str]) -> Row:
    """Rename the mapped columns of a row; each replaces an existing column of the new name.

    Raises:
        RowError: the row lacks a mapped column.
    """
    for theirs in columns:
        if theirs not in row:
            raise RowError("missing column", f"`{theirs}` of data.columns{suggest(theirs, row)}")
    taken = set(columns.values())
    kept = {key: value for key, value in row.items() if key not in columns and key not in taken}
    return kept | {ours: row[theirs] for theirs, ours in columns.items()}


def load_formatter(name: str, key: str = "data.formatter") -> Callable[..., Any]:
    """Import the function that a key names as `package.module:function`.

    Raises:
        DataError: it cannot be imported or called, or is in the standard library, which is not meant for this.
    """
    module_name, _, function_name = name.partition(":")
    if module_name.partition(".")[0] in sys.stdlib_module_names:
        raise DataError(f"`{key}={name}`: is in Python's standard library; name your own function")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # importing the user's module may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"`{key}={name}`: {reason}; name it as package.module:function") from None
    if not callable(function):
        raise DataError(f"`{key}={name}`: is not a function")
    return cast(Callable[..., Any], function)


def format_row(row: Row, formatter: Callable[[Row], Any]) -> list[Row]:
    """Apply the user's function to a row and return the resulting rows, possibly none.

    Raises:
        RowError: the function fails or returns something else.
    """
    try:
        result = formatter(row)
    except Exception as error:  # the user's code may raise anything; it affects this row only
        raise RowError("data.formatter failed", " ".join(f"{type(error).__name__}: {error}".split())) from None
    rows = [] if result is None else result if isinstance(result, list) else [result]
    if not all(isinstance(item, dict) for item in rows):
        raise RowError(
            "data.formatter failed", f"returned {result!r:.60}; expected a row (dict), a list of rows or None"
        )
    return rows


def find_layout(rows: list[Row], name: str, key: str = "data", source: str = "data") -> Layout:
    """Return the layout of a source, detected from its first rows.

    Args:
        rows: readable rows, at least one, with columns already renamed. If none has a known layout, names in another
            spelling (`Prompt`, ` chosen`) are taken for ours.
        name: `data.format`; `auto` detects the layout.
        key: configuration key of the source, for messages.
        source: setting of the source, such as `data.path=pairs.jsonl`, for messages.

    Raises:
        DataError: no layout matches, or several match equally.
    """
    columns = name_columns(dict.fromkeys(column for row in rows for column, value in row.items() if value is not None))
    if spelling := _find_spelling(rows):
        return replace(find_layout([respell(row, spelling) for row in rows], name, key, source), spelling=spelling)
    if name != "auto":
        layout = next((layout for layout in LAYOUTS if layout.name == name), None)
        if layout is None:
            raise DataError(f"`{key}.format={name}`: no such layout{suggest(name, [known.name for known in LAYOUTS])}")
        if not any(layout.matches(row) for row in rows):
            raise DataError(f"`{key}.format={name}`: needs {layout.needs}; the rows of {source} have: {columns}")
        return layout
    counts = {layout.name: sum(layout.matches(row) for row in rows) for layout in LAYOUTS}
    most = max(counts.values())
    candidates = [layout for layout in LAYOUTS if counts[layout.name] == most]
    if most == 0:
        raise DataError(
            f"`{source}`: unknown layout; columns: {columns}; needed are prompt, chosen and rejected (or "
            f"another layout of docs/data.md); name yours with {key}.columns or {key}.formatter"
        )
    if len(candidates) > 1:
        names = ", ".join(f"{layout.name} ({layout.needs})" for layout in candidates)
        raise DataError(
            f"`{key}.format=auto`: the rows of {source} could be {names}; "
            f"set {key}.format={candidates[0].name} or another of them"
        )
    return candidates[0]


def _find_spelling(rows: list[Row]) -> dict[str, str]:
    """Return the respelled columns with which rows of no known layout have one; empty if none are needed."""
    if any(layout.matches(row) for row in rows for layout in LAYOUTS):
        return {}
    spelling = find_spelling(dict.fromkeys(column for row in rows for column in row))
    found = spelling and any(layout.matches(respell(row, spelling)) for row in rows for layout in LAYOUTS)
    return spelling if found else {}

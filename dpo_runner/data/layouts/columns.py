"""Access to a row's columns, shared by the layouts."""

import math
from collections.abc import Iterable
from typing import Any

from dpo_runner.data.layouts.messages import Message
from dpo_runner.errors import RowError

Row = dict[str, Any]

PROMPTS = ("prompt", "instruction", "question", "input")
SCORE_PAIRS = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen_avg_rating", "rejected_avg_rating"),
)


def has(row: Row, *columns: str) -> bool:
    """Return whether a row has a value in each of these columns."""
    return all(row.get(column) is not None for column in columns)


def first(row: Row, columns: Iterable[str]) -> str | None:
    """Return the first of these columns in which a row has a value, or None."""
    return next((column for column in columns if row.get(column) is not None), None)


def require(row: Row, *columns: str) -> None:
    """Raise a RowError that names the first of these columns without a value in the row."""
    for column in columns:
        if row.get(column) is None:
            found = name_columns(key for key, value in row.items() if value is not None)
            raise RowError("missing column", f"`{column}`; the row has: {found}")


def name_columns(names: Iterable[Any]) -> str:
    """Format column names for a one-line message; in a CSV file without header they may be whole texts."""
    shown = [text if (text := str(name)[:40]).isprintable() else ascii(text) for name in names]
    return ", ".join(shown[:25]) + (", …" if len(shown) > 25 else "") if shown else "nothing"


def find_scores(row: Row) -> float | None:
    """Return chosen's score minus rejected's, or None if the row lacks them."""
    for chosen, rejected in SCORE_PAIRS:
        if has(row, chosen, rejected):
            return to_number(row[chosen], chosen) - to_number(row[rejected], rejected)
    return None


def to_number(value: Any, column: str) -> float:
    """Return a score as a finite number, or raise a RowError."""
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError
        number = float(value)  # also of a str: CSV has no other type
    except ValueError:
        raise RowError("score is not a number", f"`{column}`: {value!r:.40}") from None
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RowError("score is not finite", f"`{column}`: {number}")
    return number


def with_system(row: Row, prompt: list[Message]) -> list[Message]:
    """Prepend a row's `system` text to its prompt, unless it is blank or the prompt has a system turn."""
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise RowError("not a text", f"`system` holds {system!r:.60}; expected a text")
    if system and system.strip() and prompt[0]["role"] != "system":
        return [{"role": "system", "content": system}, *prompt]
    return prompt

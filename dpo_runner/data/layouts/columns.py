"""Access to a row's columns, shared by the layouts."""

import math
from collections.abc import Iterable
from typing import Any

from dpo_runner.data.layouts.messages import Message, to_messages
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
    texts = [str(name)[:40] for name in names]  # in quotes where blanks at the edges would not be seen
    shown = [(text if text == text.strip() else repr(text)) if text.isprintable() else ascii(text) for text in texts]
    return ", ".join(shown[:25]) + (", …" if len(shown) > 25 else "") if shown else "nothing"


def find_scores(row: Row) -> float | None:
    """Return chosen's score minus rejected's, None if the row lacks them, or NaN if they are no finite numbers."""
    try:
        return read_scores(row)
    except RowError:
        return math.nan  # only `data.min_score_gap` needs them


def read_scores(row: Row) -> float | None:
    """Return chosen's score minus rejected's, or None if the row lacks them.

    Raises:
        RowError: a score is not a finite number.
    """
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
    """Prepend a row's `system` or `system_prompt` to its prompt, if not blank and the prompt has no system turn."""
    column = "system_prompt" if row.get("system") is None else "system"
    system = row.get(column)
    if system is not None and not isinstance(system, str):
        raise RowError("not a text", f"`{column}` holds {system!r:.60}; expected a text")
    if system and system.strip() and prompt[0]["role"] != "system":
        return [{"role": "system", "content": system}, *prompt]
    return prompt


def read_history(row: Row) -> list[Message]:
    """Return the turns of a row's `history`: pairs of question and answer, or messages."""
    turns: list[Message] = []
    history = row.get("history") or []
    if isinstance(history, list) and history and all(isinstance(turn, dict) for turn in history):
        return to_messages(history, "user", "history")
    for turn in history if isinstance(history, list) else [history]:
        if not isinstance(turn, list) or len(turn) != 2:
            raise RowError("not a text", f"`history` holds {turn!r:.60}; expected pairs of question and answer")
        turns += [*to_messages(turn[0], "user", "history"), *to_messages(turn[1], "assistant", "history")]
    return turns


def with_history(row: Row, prompt: list[Message]) -> list[Message]:
    """Prepend a row's `history`, if it is a list, to a prompt of one turn; one of more turns holds its own."""
    return [*read_history(row), *prompt] if len(prompt) == 1 and isinstance(row.get("history"), list) else prompt


def read_answers(row: Row, pairing: str) -> list[tuple[list[Message], list[Message]]]:
    """Return chosen and rejected as messages: one of each, or each with each if they are lists of texts.

    Raises:
        RowError: one is missing or no answer, or several have no order and `pairing` is not `all_pairs`.
    """
    require(row, "chosen", "rejected")
    chosen, rejected = row["chosen"], row["rejected"]
    return [
        (to_messages(one, "assistant", "chosen"), to_messages(other, "assistant", "rejected"))
        for one in _list_texts(chosen, "chosen", pairing)
        for other in _list_texts(rejected, "rejected", pairing)
    ]


def _list_texts(value: Any, column: str, pairing: str) -> list[Any]:
    if not isinstance(value, list) or not value or not isinstance(value[0], str):
        return [value]
    if len(value) > 1 and pairing != "all_pairs":
        cure = "data.pairing=all_pairs pairs each chosen answer with each rejected one"
        raise RowError("several answers", f"`{column}` holds {len(value)} texts without scores; {cure}")
    return value

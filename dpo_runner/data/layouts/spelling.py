"""Column names in another spelling: capitals, blanks, dots and dashes, and a few synonyms without a second meaning."""

import functools
import re
from collections.abc import Iterable, Mapping
from itertools import chain, product
from typing import Any

from dpo_runner.config.sections.data import COLUMNS
from dpo_runner.data.layouts.columns import SCORE_PAIRS, Row

_ANSWERS = ("response", "answer", "completion", "output", "text", "message", "messages", "conversation")
_NAMES = {
    **{name.replace("_", ""): name for name in (*COLUMNS, *chain(*SCORE_PAIRS))},
    "userprompt": "prompt",
    "prompttext": "prompt",
    **{f"{side}{name}": side for side, name in product(("chosen", "rejected"), _ANSWERS)},
    **{f"{name}{side}": side for side, name in product(("chosen", "rejected"), _ANSWERS)},
}
"""Names without capitals and anything but letters and digits, theirs to ours."""


@functools.lru_cache(maxsize=4096)  # called for each column of each row
def guess_name(column: Any) -> str | None:
    """Return our name of a column, whatever its spelling; None if it has none."""
    return _NAMES.get(re.sub(r"[\W_]+", "", column).lower()) if isinstance(column, str) else None


def find_spelling(columns: Iterable[Any]) -> dict[str, str]:
    """Return the columns that have one of our names in another spelling, theirs to ours.

    A name that exists as it is, or in two other spellings, is left alone.
    """
    columns = list(columns)
    found: dict[str, list[str]] = {}
    for column in columns:
        ours = guess_name(column)
        if ours is not None and ours not in columns:
            found.setdefault(ours, []).append(column)
    return {theirs[0]: ours for ours, theirs in found.items() if len(theirs) == 1}


def respell(row: Row, spelling: Mapping[str, str]) -> Row:
    """Return a row with its columns under our names."""
    return {spelling.get(column, column): value for column, value in row.items()} if spelling else row

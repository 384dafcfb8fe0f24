"""The recipe from rows to token ids: layout, columns, the user's function, template, tokenizer."""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from dpo_runner.config.sections.data import SourceFields
from dpo_runner.data.layouts.cells import decode_cells
from dpo_runner.data.layouts.columns import Row, read_scores
from dpo_runner.data.layouts.conversations import map_roles
from dpo_runner.data.layouts.formats import (
    find_layout,
    find_unread,
    format_row,
    load_formatter,
    read_pairs,
    rename_columns,
)
from dpo_runner.data.layouts.known import Layout
from dpo_runner.data.layouts.messages import Pair
from dpo_runner.data.layouts.scored import select_pairs
from dpo_runner.data.rows.decoding import Batch, decode_rows
from dpo_runner.data.rows.sources import RowSource
from dpo_runner.data.templates.chat_template import ChatTemplate
from dpo_runner.errors import DataError, LeftOut, RowError, suggest

_MOST_WATCHED = 50
"""Rows that are enough to see which columns are read."""


@dataclass
class RowReader:
    """The settings that change a source's rows before their layout is applied.

    Attributes:
        conf: settings for reading rows.
        formatter: the user's function, or None.
    """

    conf: SourceFields
    formatter: Callable[[Row], Any] | None = field(init=False)

    def __post_init__(self) -> None:
        self.formatter = load_formatter(self.conf.formatter) if self.conf.formatter else None

    def rows(self, row: Row | RowError) -> list[Row]:
        """Apply the user's formatter, then drop, rename and decode columns and map roles; return one row or several.

        Raises:
            LeftOut: the formatter leaves the row out.
            RowError: the row cannot be used.
        """
        return self.change(self.format(row))

    def change(self, rows: list[Row]) -> list[Row]:
        if self.conf.drop_columns:
            rows = [{key: row[key] for key in row if key not in self.conf.drop_columns} for row in rows]
        if self.conf.columns:
            rows = [rename_columns(row, self.conf.columns) for row in rows]
        rows = [decode_cells(row, self.conf.roles) for row in rows]
        return [map_roles(row, self.conf.roles) for row in rows] if self.conf.roles else rows

    def format(self, row: Row | RowError) -> list[Row]:
        if isinstance(row, RowError):
            raise row
        rows = format_row(row, self.formatter) if self.formatter else [row]
        if not rows:
            raise LeftOut("data.formatter returned nothing")
        return rows


@dataclass
class Recipe(RowReader):
    """The settings and template that convert a source's rows to token ids.

    Attributes:
        template: tokenizer and chat template.
        template_options: the settings used to build `template`.
        key: configuration key of the source, for messages.
        layout: detected from the first rows; None before.
        unread: columns of the first rows that the layout does not read; empty before.
    """

    template: ChatTemplate
    template_options: list[Any]
    key: str
    layout: Layout | None = None
    unread: list[str] = field(default_factory=list)

    def digest(self, source: RowSource) -> str:
        """Return the cache key for the result of this recipe on `source`."""
        conf, code = self.conf, Path(__file__).parents[1]
        parts = [
            source.digest(),
            [conf.format, sorted(conf.columns.items()), conf.pairing, conf.min_score_gap, sorted(conf.drop_columns)],
            [conf.max_length_difference, conf.max_similarity],
            sorted(conf.roles.items()),
            _digest_module(self.formatter) if self.formatter else None,
            self.template_options,
            _digest_tokenizer(self.template.tokenizer),
            [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(code.rglob("*.py"))],
            [metadata.version(name) for name in ("tokenizers", "transformers", "jinja2", "pyarrow")],
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def without_mapping(self) -> "Recipe":
        """Return a recipe for rows already processed by `rows`."""
        return replace(self, conf=replace(self.conf, columns={}, drop_columns=[], formatter=None, roles={}))

    def find_layout(self, batch: Batch, source: RowSource) -> str:
        """Detect the layout from a source's first rows, and return its description.

        Raises:
            DataError: no layout matches, several do, none of the rows can be used, or none has a column to drop.
        """
        rows, first, names = [], None, set[str]()
        for number, row in decode_rows(batch):
            try:
                made = self.format(row)
                names |= {str(name) for item in made for name in item}
                rows += self.change(made)
            except LeftOut:
                continue
            except RowError as error:
                first = first or f"{source.locate(batch.file, number)}: {error}"
        for name in self.conf.drop_columns:
            if names and name not in names:
                raise DataError(
                    f"`{self.key}.drop_columns=[{name}]`: none of the first rows has this column{suggest(name, names)}"
                )
        if not rows:
            raise DataError(
                f"`{self.key}`: none of the first rows can be used; {first or 'data.formatter leaves out all'}"
            )
        self.layout = find_layout(rows, self.conf.format, self.key, source.setting)
        fitting = [row for row in map(self.layout.respell, rows) if self.layout.matches(row)]
        self.unread = find_unread(fitting[:_MOST_WATCHED], self.layout)
        return self.layout.describe(fitting[0])

    def pairs(self, row: Row | RowError) -> list[Pair]:
        """Return a row's pairs, at least one.

        Raises:
            LeftOut: its scores allow no pair.
            RowError: the row cannot be used.
        """
        assert self.layout is not None
        pairs = []
        for item in self.rows(row):
            pairs += read_pairs(item, self.layout, self.conf.pairing)
            if self.conf.min_score_gap > 0 and any(pair.is_unscored() for pair in pairs):
                read_scores(self.layout.respell(item))  # names what is wrong with them
        return select_pairs(pairs, self.conf)


def _digest_tokenizer(tokenizer: Any) -> str:
    if tokenizer.is_fast:
        backend = tokenizer.backend_tokenizer
        backend.no_padding()  # state left by an earlier call; does not affect tokenization
        backend.no_truncation()
        vocabulary = backend.to_str()
    else:
        vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    special = [tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token, type(tokenizer).__name__]
    return hashlib.sha256(json.dumps([vocabulary, special]).encode()).hexdigest()


def _digest_module(function: Callable[[Row], Any]) -> str:
    """Digest the source file of the user's function; modules that it imports are not covered."""
    file = getattr(sys.modules.get(function.__module__), "__file__", None)
    if file is None:
        raise DataError(
            f"`data.formatter`: {function.__module__} has no source file, so changes to it cannot be detected"
        )
    return hashlib.sha256(Path(file).read_bytes() + function.__qualname__.encode()).hexdigest()

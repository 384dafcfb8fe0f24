"""The prompts of the `data` section: of files of prompts alone, and of preference pairs in any layout."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_runner.config.sections.data import DataConf, SourceConf, resolve_sources
from dpo_runner.config.sections.run import RunFields
from dpo_runner.data.layouts.columns import PROMPTS, Row, first, name_columns, with_history, with_system
from dpo_runner.data.layouts.formats import find_layout, read_pairs
from dpo_runner.data.layouts.known import LAYOUTS, Layout
from dpo_runner.data.layouts.messages import Message, check_prompt, parse_json, to_messages
from dpo_runner.data.layouts.transcripts import read_prompt
from dpo_runner.data.prepare.recipe import RowReader
from dpo_runner.data.rows.decoding import decode_rows
from dpo_runner.data.rows.sources import RowSource, open_sources, source_key
from dpo_runner.data.splits import hold_out
from dpo_runner.data.templates.chat_template import ChatTemplate
from dpo_runner.errors import ConfigError, DataError, LeftOut, RowError
from dpo_runner.io.files import write_lines

if TYPE_CHECKING:
    from datasets import Dataset

_ROWS_AT_ONCE = 1000
_OF_PAIRS = ("preference", "hh", "sharegpt", "swift", "alpaca", "orca")
"""Layouts whose prompt is that of their pairs; the rows of the others have it in a column."""
_CONVERSATIONS = ("messages", "conversations")
"""Columns of whole conversations, whose last answer is not part of the prompt."""
_COLUMNS = (*PROMPTS, "context", *_CONVERSATIONS)


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        where: its location, such as `prompts.jsonl:12`.
        messages: ends with a user or tool turn.
        variables: `tools` and variables of the chat template, where the row has any.
    """

    where: str
    messages: list[Message]
    variables: dict[str, Any] = field(default_factory=dict)

    @property
    def columns(self) -> dict[str, Any]:
        """`variables` as the columns of a row."""
        tools = self.variables.get("tools")
        further = {name: value for name, value in self.variables.items() if name != "tools"}
        return {**({"tools": tools} if tools else {}), **({"chat_template_kwargs": further} if further else {})}

    @property
    def key(self) -> str:
        """A digest of the content, 16 hexadecimal digits."""
        text = json.dumps([self.messages, self.variables], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass
class SamplePrompt:
    """A prompt to answer before and after training: its messages, and its token ids as in training."""

    messages: list[Message]
    ids: list[int]


@dataclass
class Prompts:
    """The distinct prompts of the data.

    Attributes:
        prompts: in the order of the data.
        rows: number of rows read.
        repeated: number of rows whose prompt another row has too.
        bad: location and reason of each row that cannot be used.
        files: display names of the files, by source.
    """

    prompts: list[Prompt] = field(default_factory=list)
    rows: int = 0
    repeated: int = 0
    bad: list[tuple[str, RowError]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


def read_prompts(data: DataConf) -> Prompts:
    """Read the distinct prompts of all training rows, up to `data.max_train_samples`.

    Raises:
        ConfigError: a source sets what applies to pairs alone.
        DataError: a source cannot be read, has too many unusable rows, or there is no prompt.
    """
    _check_mixture(data)
    found, seen = Prompts(), set[str]()
    for name, conf in resolve_sources(data).items():
        _read_source(open_sources(conf, source_key(name, data))[0], conf, data, source_key(name, data), found, seen)
    if not found.prompts:
        raise DataError(f"data: no prompt in {found.rows:,} rows")
    return found


def read_split_prompts(data: DataConf, given: Prompts | None = None) -> tuple[Prompts, Prompts]:
    """Read the distinct prompts to train on, up to `data.max_train_samples`, and those held out.

    Held out are the `given` ones. Without, they are the prompts of a source's evaluation rows, or else a share of
    `data.eval_fraction`, chosen by the prompt alone.

    Raises:
        ConfigError: a source sets what applies to pairs alone.
        DataError: a source cannot be read, has too many unusable rows, or one of the sides has no prompt.
    """
    _check_mixture(data)
    every, trained, held_out = replace(data, max_train_samples=None), Prompts(), given or Prompts()
    seen = {prompt.key for prompt in held_out.prompts}  # training leaves out what is held out
    opened = {name: (conf, *open_sources(conf, source_key(name, data))) for name, conf in resolve_sources(data).items()}
    for name, (conf, _, evaluation) in opened.items():
        if evaluation is not None and given is None:
            _read_source(evaluation, conf, every, source_key(name, data), held_out, seen)
    divided: list[Prompt] = []
    for name, (conf, source, evaluation) in opened.items():
        first = len(trained.prompts)
        _read_source(source, conf, every, source_key(name, data), trained, seen)
        divided += trained.prompts[first:] if evaluation is None and given is None else []
    if divided and data.eval_fraction > 0:
        hashes = np.array([int(prompt.key, 16) for prompt in divided], np.uint64)
        (mask,) = hold_out([hashes], data.eval_fraction)
        moved = {prompt.key for prompt, is_held in zip(divided, mask, strict=True) if is_held}
        held_out.prompts += [prompt for prompt in trained.prompts if prompt.key in moved]
        trained.prompts = [prompt for prompt in trained.prompts if prompt.key not in moved]
    trained.prompts = trained.prompts[: data.max_train_samples]
    held_out.prompts = held_out.prompts[: data.max_eval_samples]
    for side, prompts in (("to train on", trained), ("held out", held_out)):
        if not prompts.prompts:
            raise DataError(f"data: no prompt is {side}; see data.eval_fraction and data.eval_path")
    return trained, held_out


def read_file_of_prompts(path: str, limit: int | None = None) -> Prompts:
    """Read the first distinct prompts of `samples.prompts`.

    Raises:
        DataError: the file cannot be read, or a row cannot be used.
    """
    try:
        return read_prompts(DataConf(path=path, max_train_samples=limit, on_bad_row="error"))
    except DataError as error:
        raise DataError(str(error).replace("`data.path=", "`samples.prompts=")) from None


def write_prompts(path: Path, prompts: Sequence[Prompt]) -> None:
    """Write prompts as rows that `read_prompts` reads as the same prompts."""
    write_lines(path, (json.dumps({"prompt": one.messages, **one.columns}, ensure_ascii=False) for one in prompts))


def _check_mixture(data: DataConf) -> None:
    mistakes = [
        f"`data.sources.{name}.{key}={getattr(source, key)}`: is about pairs, and has no effect on prompts; leave it "
        "out, or limit the prompts with data.max_train_samples"
        for name, source in data.sources.items()
        for key in ("weight", "max_train_samples")
        if getattr(source, key) is not None
    ]
    if mistakes:
        raise ConfigError(mistakes)


def _read_source(source: RowSource, conf: SourceConf, data: DataConf, key: str, found: Prompts, seen: set[str]) -> None:
    """Add a source's prompts to `found`, without those in `seen`."""
    found.files += source.files
    rows, bad = found.rows, len(found.bad)
    _read_rows(source, conf, data.max_train_samples, found, seen)
    _check_bad(found.bad[bad:], found.rows - rows, data, key)


def _read_rows(source: RowSource, conf: SourceConf, limit: int | None, found: Prompts, seen: set[str]) -> None:
    reader, layout, is_first = RowReader(conf), None, True
    for batch in source.batches(_ROWS_AT_ONCE):
        rows: list[tuple[int, list[Row] | RowError]] = []
        for number, row in decode_rows(batch):
            try:
                rows.append((number, reader.rows(row)))
            except LeftOut:
                found.rows += 1
            except RowError as error:
                rows.append((number, error))
        if is_first:
            layout, is_first = _find_layout(rows, conf, source), False
        for number, made in rows:
            if limit is not None and len(found.prompts) >= limit:
                return
            found.rows += 1
            where = source.locate(batch.file, number)
            try:
                if isinstance(made, RowError):
                    raise made
                for row in made:
                    prompt = _read_row(row, layout, where)
                    found.repeated += prompt.key in seen
                    if prompt.key not in seen:
                        seen.add(prompt.key)
                        found.prompts.append(prompt)
            except RowError as error:
                found.bad.append((where, error))


def _find_layout(rows: list[tuple[int, list[Row] | RowError]], conf: SourceConf, source: RowSource) -> Layout | None:
    """Return the layout of the first rows; None for rows that have a prompt and no answers.

    Raises:
        DataError: the rows have no column that could be a prompt.
    """
    readable = [row for _, made in rows if not isinstance(made, RowError) for row in made]
    if conf.format != "auto" or any(layout.matches(row) for row in readable for layout in LAYOUTS):
        return find_layout(readable, conf.format, source=source.setting)
    if readable and not any(first(row, _COLUMNS) for row in readable):
        columns = name_columns(dict.fromkeys(column for row in readable for column in row))
        raise DataError(
            f"`{source.setting}`: has no prompts; columns: {columns}; needed is prompt (or a layout of docs/data.md); "
            "name yours with data.columns or data.formatter"
        )
    return None


def _read_row(row: Row, layout: Layout | None, where: str) -> Prompt:
    """Return the prompt of a row.

    Raises:
        RowError: it has none that can be used.
    """
    if layout is not None and layout.name in _OF_PAIRS:
        pair = read_pairs(row, layout, "all_pairs")[0]
        messages, tools, kwargs = pair.prompt, pair.tools, pair.chat_template_kwargs
    else:
        row = layout.respell(row) if layout is not None and layout.spelling else row
        column = first(row, _COLUMNS)
        if column is None:
            raise RowError("missing column", f"`prompt`; the row has: {name_columns(row)}")
        if column in _CONVERSATIONS:
            messages = to_messages(row[column], "user", column)
            messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        else:
            messages = with_history(row, read_prompt(row[column], column))
        messages = with_system(row, messages) if messages else messages
        tools = parse_json(row.get("tools"), list, "tools")
        kwargs = parse_json(row.get("chat_template_kwargs"), dict, "chat_template_kwargs")
        if not messages:
            raise RowError("empty prompt")
    check_prompt(messages)
    return Prompt(where, messages, {**({"tools": tools} if tools else {}), **(kwargs or {})})


def _check_bad(bad: list[tuple[str, RowError]], rows: int, data: DataConf, key: str) -> None:
    if not bad:
        return
    where, error = bad[0]
    if data.on_bad_row == "error":
        raise DataError(f"{where}: {error}")
    if len(bad) / rows > data.max_bad_fraction:
        counts = Counter(error.reason for _, error in bad)
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
        raise DataError(
            f"`{key}`: {len(bad):,} of {rows:,} rows cannot be used, more than data.max_bad_fraction="
            f"{data.max_bad_fraction:g} ({reasons}); the first is {where}: {error}"
        )


def choose_prompts(rows: "Dataset", conf: RunFields, template: ChatTemplate) -> list[SamplePrompt]:
    """Return the prompts of `samples.prompts`, or else the first distinct ones of `rows`."""
    count = conf.samples.num_prompts
    if conf.samples.prompts is not None and count:
        given = read_file_of_prompts(conf.samples.prompts, count).prompts
        return [SamplePrompt(one.messages, template.render_prompt(one.messages, **one.variables)) for one in given]
    prompts: dict[str, SamplePrompt] = {}
    for row in rows:
        if len(prompts) == count:
            break
        if row["prompt"] not in prompts:
            prompts[row["prompt"]] = SamplePrompt(json.loads(row["prompt"]), row["prompt_ids"])
    return list(prompts.values())

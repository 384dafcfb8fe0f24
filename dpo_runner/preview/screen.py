"""Terminal output of the data preview: report tables, length histograms, training pairs."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from dpo_runner.data.report import PARTS, UNSCORED, DataReport
from dpo_runner.data.templates.rendering import find_special_ids
from dpo_runner.io.console import FoldingTable, visible
from dpo_runner.preview.page import Piece, Row, shorten_list

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dpo_runner.data.preferences import PreferenceData


_STYLES = {"prompt": "blue", "chosen": "green", "rejected": "red"}
_BARS = "▁▂▃▄▅▆▇█"
_BAR_WIDTH = 24
_CONTEXT = 4
_LONGEST_PIECE = 64


def split_pieces(ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase", before: Sequence[int] = ()) -> list[Piece]:
    """Decode tokens one by one, or together if several form one character.

    Each is decoded with the tokens before it, because many tokenizers drop a leading space.

    Args:
        ids: the tokens.
        tokenizer: the tokenizer of `ids`.
        before: the tokens that precede `ids`.

    Returns:
        Pieces whose joined texts are the text of `ids`.
    """
    special = find_special_ids(tokenizer)

    def decode(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    pieces: list[Piece] = []
    context, group = list(before)[-_CONTEXT:], list[int]()

    def close() -> None:
        nonlocal context, group
        beginning, both = decode(context), decode(context + group)
        text = both.removeprefix(beginning) if both.startswith(beginning) else decode(group)
        pieces.append(Piece(text, tuple(group), group[0] in special))
        context, group = group[-_LONGEST_PIECE:], []

    for index, token in enumerate(ids):
        group.append(token)
        last = index + 1 == len(ids)
        complete = token in special or last or ids[index + 1] in special or len(group) == _LONGEST_PIECE
        # U+FFFD is an incomplete character that the next token may complete, or a real U+FFFD.
        if complete or not decode(group).endswith("\ufffd"):
            close()
    return pieces


def pick_rows(data: "PreferenceData", tokenizer: "PreTrainedTokenizerBase", count: int) -> list[Row]:
    """Return `count` training pairs as the model sees them, evenly spaced over the training set."""
    total = len(data.train)
    rows = []
    for number in range(min(count, total)):
        index = number * total // min(count, total)
        row = data.train[index]
        prompt = row["prompt_ids"]
        pieces = {
            part: split_pieces(row[f"{part}_ids"], tokenizer, () if part == "prompt" else prompt) for part in PARTS
        }
        rows.append(Row(data.locate("train", index), pieces))
    return rows


def draw_bars(counts: Sequence[int], width: int = _BAR_WIDTH) -> str:
    """Return a histogram as one line of at most `width` characters; only empty bins are blank."""
    step = -(-len(counts) // width)  # the same number of bins per character, or uniform counts would look jagged
    sums = [sum(counts[start : start + step]) for start in range(0, len(counts), step)]
    most = max(sums)
    return "".join(_BARS[max(0, -(-count * len(_BARS) // most) - 1)] if count else " " for count in sums)


def show_report(report: DataReport, console: Console) -> None:
    """Print the report as tables."""
    table = FoldingTable("source", "files", "format", title="rows read", title_justify="left")
    for column in ("rows", "pairs"):
        table.add_column(column, justify="right")
    table.add_column("not used")
    for source in report.sources:
        not_used = _tally(source.bad, "bad: ") + _tally(source.left_out, "left out: ")
        not_used += [f"{source.unscored:,} {UNSCORED}"] if source.unscored else []
        if source.mismatched:
            cut = f"{source.mismatched:,} with the prompt cut to its common prefix"
            not_used.append(f"{cut}; {source.first_mismatch}")
        not_used += source.describe_unread()
        table.add_row(
            _text(f"{source.name} ({source.split})"),
            _text(shorten_list(source.files)),
            _text(source.format),
            f"{source.rows:,}",
            f"{source.pairs:,}",
            _lines(not_used),
        )
    console.print(table)
    table = FoldingTable("split", title="pairs used", title_justify="left")
    for column in ("pairs", "kept"):
        table.add_column(column, justify="right")
    mixed = any(len(split.by_source) > 1 for split in report.splits.values())
    for column in (*(["by source"] if mixed else []), "left out", "truncated"):
        table.add_column(column)
    table.add_column("exact duplicates", justify="right")
    for name, split in report.splits.items():
        left_out = _tally(split.dropped) + ([f"{split.unused:,} not drawn"] if split.unused else [])
        table.add_row(
            _text(name),
            f"{split.pairs:,}",
            f"{split.kept:,}",
            *([_lines(_tally(split.by_source))] if mixed else []),
            _lines(left_out),
            _lines(_tally(split.truncated)),
            f"{split.duplicates:,}",
        )
    console.print(table)
    _show_lengths(report, console)
    for name, split in report.splits.items():
        if split.length_bias:
            console.print(_text(f"length bias, {name}: {split.length_bias}"))
    for note in report.template:
        console.print(_text(f"chat template: {note}"))


def _show_lengths(report: DataReport, console: Console) -> None:
    table = FoldingTable("tokens", title="lengths", title_justify="left")
    for column in ("median", "mean", "p95", "max", "total"):
        table.add_column(column, justify="right")
    table.add_column("shortest to longest")
    bars = min(_BAR_WIDTH, max(7, console.width - 56))  # beside six columns
    for name, split in report.splits.items():
        for part, lengths in split.lengths.items():
            table.add_row(
                _text(f"{name} {part}"),
                f"{lengths.median:,.0f}",
                f"{lengths.mean:,.1f}",
                f"{lengths.p95:,.0f}",
                f"{lengths.max:,}",
                f"{lengths.total:,}",
                Text(draw_bars(lengths.counts, bars), style=_STYLES[part]),
            )
    console.print(table)


def _tally(counts: dict[str, int], what: str = "") -> list[str]:
    return [f"{count:,} {what}{reason}" for reason, count in counts.items()]


def _text(text: str) -> Text:
    """Return untrusted text for the terminal, without markup and control sequences."""
    return Text(visible(text))


def _lines(lines: Iterable[str]) -> Text:
    return _text("\n".join(lines) or "–")


def show_rows(rows: list[Row], console: Console) -> None:
    """Print training pairs, special tokens in reverse video."""
    for row in rows:
        console.print()
        console.rule(Text(visible(row.where), style="bold"), align="left")
        table = FoldingTable.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column()
        for part in PARTS:
            text = Text(style=_STYLES[part])
            for piece in row.parts[part]:
                text.append(visible(piece.text).replace("\n", "↵\n"), style="reverse" if piece.special else "")
            text.rstrip()
            table.add_row(Text(f"{part}\n{row.tokens(part):,} tokens", style="dim"), text)
        console.print(table)

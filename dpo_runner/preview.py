"""Show what a run would train on, without a model: `python -m dpo_runner.preview [OVERRIDES]`."""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_runner.config import load_conf
from dpo_runner.console import RunConsole, Terminal, visible
from dpo_runner.data.rendering import find_special_ids
from dpo_runner.data.report import PARTS, DataReport
from dpo_runner.errors import ConfigError
from dpo_runner.exits import honest_exit
from dpo_runner.masking import mask_override
from dpo_runner.preview_page import Piece, Row, build_page, shorten_list
from dpo_runner.report_files import check_targets, write_report

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dpo_runner.data import PreferenceData

_STYLES = {"prompt": "blue", "chosen": "green", "rejected": "red"}
_BARS = "▁▂▃▄▅▆▇█"
_BAR_WIDTH = 24
_CONTEXT = 4
_LONGEST_PIECE = 64


def split_pieces(ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase", before: Sequence[int] = ()) -> list[Piece]:
    """Decode tokens one by one, where several make one character together.

    Each is decoded with what stands before it, because many tokenizers drop the space that a text begins with.

    Args:
        ids: the tokens.
        tokenizer: theirs.
        before: the tokens that `ids` follow.

    Returns:
        Pieces whose texts, joined, are the text of `ids`.
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
        # U+FFFD stands for bytes that the next token may make whole, or for itself.
        if complete or not decode(group).endswith("\ufffd"):
            close()
    return pieces


def pick_rows(data: "PreferenceData", tokenizer: "PreTrainedTokenizerBase", count: int) -> list[Row]:
    """Return `count` training pairs as the model sees them, spread evenly over the training set."""
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
    """Return a histogram as one line of at most `width` characters; only an empty bin is blank."""
    step = -(-len(counts) // width)  # as many bins to each character, or even counts would look jagged
    sums = [sum(counts[start : start + step]) for start in range(0, len(counts), step)]
    most = max(sums)
    return "".join(_BARS[max(0, -(-count * len(_BARS) // most) - 1)] if count else " " for count in sums)


def show_report(report: DataReport, console: Console) -> None:
    """Print the report as tables."""
    table = Table("source", "files", "format", title="rows read", title_justify="left")
    for column in ("rows", "pairs"):
        table.add_column(column, justify="right")
    table.add_column("not used")
    for source in report.sources:
        not_used = _tally(source.bad, "bad: ") + _tally(source.left_out, "left out: ")
        if source.mismatched:
            cut = f"{source.mismatched:,} with the prompt cut to its common prefix"
            not_used.append(f"{cut}; {source.first_mismatch}")
        table.add_row(
            _text(f"{source.name} ({source.split})"),
            _text(shorten_list(source.files)),
            _text(source.format),
            f"{source.rows:,}",
            f"{source.pairs:,}",
            _lines(not_used),
        )
    console.print(table)
    table = Table("split", title="pairs used", title_justify="left")
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
    table = Table("tokens", title="lengths", title_justify="left")
    for column in ("median", "mean", "p95", "max", "total"):
        table.add_column(column, justify="right")
    table.add_column("shortest to longest", no_wrap=True)
    for name, split in report.splits.items():
        for part, lengths in split.lengths.items():
            table.add_row(
                _text(f"{name} {part}"),
                f"{lengths.median:,.0f}",
                f"{lengths.mean:,.1f}",
                f"{lengths.p95:,.0f}",
                f"{lengths.max:,}",
                f"{lengths.total:,}",
                Text(draw_bars(lengths.counts), style=_STYLES[part]),
            )
    console.print(table)


def _tally(counts: dict[str, int], what: str = "") -> list[str]:
    return [f"{count:,} {what}{reason}" for reason, count in counts.items()]


def _text(text: str) -> Text:
    """Return data's text for the terminal: no markup, no control sequences."""
    return Text(visible(text), overflow="fold")


def _lines(lines: Iterable[str]) -> Text:
    return _text("\n".join(lines) or "–")


def show_rows(rows: list[Row], console: Console) -> None:
    """Print training pairs; special tokens are inverse."""
    for row in rows:
        console.print()
        console.rule(Text(visible(row.where), style="bold"), align="left")
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for part in PARTS:
            text = Text(style=_STYLES[part])
            for piece in row.parts[part]:
                text.append(visible(piece.text).replace("\n", "↵\n"), style="reverse" if piece.special else "")
            text.rstrip()
            table.add_row(Text(f"{part}\n{row.tokens(part):,} tokens", style="dim"), text)
        console.print(table)


def main(argv: list[str] | None = None) -> None:
    """Run the command line.

    Exit codes: 0 done, 1 failed, 2 the configuration or data are of no use, 130 interrupted.
    """
    parser = argparse.ArgumentParser(prog="python -m dpo_runner.preview", description=__doc__, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="GROUP=OPTION or KEY=VALUE, as for a run")
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="show so many training pairs (default 3)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the same as one HTML page, with plots")
    parser.add_argument("--dropped", type=Path, metavar="FILE", help="write every dropped row as JSON lines")
    parser.add_argument("--config-dir", metavar="DIR", help="look for GROUP/OPTION.yaml in DIR first")
    args = parser.parse_intermixed_args(argv)
    with honest_exit("interrupted"):
        _preview(args)


def _preview(args: argparse.Namespace) -> None:
    if args.rows < 0:
        raise ConfigError(f"--rows {args.rows}: must be 0 or more")
    conf = load_conf(args.overrides, args.config_dir)
    targets = {flag: path for flag, path in (("--html", args.html), ("--dropped", args.dropped)) if path is not None}
    check_targets(targets)

    from dpo_runner.imports import quiet_imports

    with quiet_imports():
        from dpo_runner.data import load_preferences
        from dpo_runner.logs import route_library_logs
        from dpo_runner.tokenizer import describe_chat_template, load_tokenizer

    console = Terminal()
    with route_library_logs(None):
        tokenizer = load_tokenizer(conf.model)
        origin = describe_chat_template(conf.model, tokenizer)
        data = load_preferences(conf, tokenizer, origin, RunConsole(console).show_preparing)
        _check_overwriting(targets, data.report)
        rows = pick_rows(data, tokenizer, args.rows)
        show_report(data.report, console)
        show_rows(rows, console)
        for warning in data.report.warnings:
            console.print(Text.assemble(("warning: ", "yellow"), visible(warning)))
        if args.html is not None:
            facts = {
                "model": str(conf.model.model_name_or_path),
                "longest pair": f"training.max_length={conf.training.max_length}",
                "overrides": " ".join(map(mask_override, args.overrides)) or "none",
            }
            write_report("--html", args.html, build_page(data.report, rows, facts), console)
        if args.dropped is not None:
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in data.dropped()]
            # A lone surrogate has no UTF-8, but its escape is JSON.
            text = "".join(lines).encode("utf-8", "backslashreplace").decode("utf-8")
            write_report("--dropped", args.dropped, text, console)


def _check_overwriting(targets: dict[str, Path], report: DataReport) -> None:
    """Refuse to write over the data."""
    files = [Path(file).expanduser() for source in report.sources for file in source.files]
    for flag, path in targets.items():
        if path.exists() and any(file.exists() and file.samefile(path) for file in files):
            raise ConfigError(f"{flag} {path}: is the data itself; name another file")


if __name__ == "__main__":
    main()

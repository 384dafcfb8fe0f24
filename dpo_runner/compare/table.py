"""A comparison of runs as a table for the terminal, as CSV and as JSON."""

import csv
import io
import json
import math
import re
import textwrap
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from dpo_runner.compare.comparison import Comparison, Estimate, Row
from dpo_runner.config.metrics import DIFFERENCE, column_of, describe_difference
from dpo_runner.config.schema import shorten_keys
from dpo_runner.io.console import FoldingTable, visible

BEST, ON_FRONT = "★", "◆"
_NO_LIMIT = 10_000
_FOLDER = "directory"
_LEAST_NAME = 16  # columns are left out before run names fold into less
_FORMULA = re.compile(r"(?![+-]?[\d.]+(e[+-]?\d+)?$)[=+\-@\t]", re.IGNORECASE)
"""The start of a formula in Excel, LibreOffice and Google Sheets; does not match signed numbers."""
_STATES = {"finished": "green", "failed": "red", "running": "cyan"}


class _NameWrapper(textwrap.TextWrapper):
    """Folds a name after its separators where it can."""

    wordsep_re = re.compile(r"(\s+)|(?<=[/_,=])|(?<=[-.])(?!\d)")  # never within 5e-05 or 0.1


def format_value(value: Any) -> str:
    """Return a short text of a setting's or metric's value."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def format_estimate(estimate: Estimate | None) -> str:
    if estimate is None:
        return "–"
    text = format_value(estimate.mean)
    return text if estimate.error is None else f"{text} ± {estimate.error:.2g}"


def show_table(comparison: Comparison, console: Console) -> None:
    """Print the table, its legend, and the front of gain against distance from the reference."""
    table, left_out = _fit_table(comparison, console)
    console.print(table)
    direction = "less" if comparison.objective.minimize else "more"
    legend = f"{BEST} best finished run by {comparison.objective.metric} ({direction} is better)"
    front = sorted(
        (row for row in comparison.rows if row.on_front), key=lambda row: row.value(comparison.distance) or 0.0
    )
    if front:
        legend += (
            f"   {ON_FRONT} none has both a larger {_label(comparison.gain)} and less {_label(comparison.distance)}"
        )
    on_one_line = not console.is_terminal  # a terminal folds in the middle of a word, rich between words
    if left_out:
        told = f"too narrow for {', '.join(map(_label, left_out))}; see --html or --csv"
        console.print(_text(told), style="dim", soft_wrap=on_one_line)
    console.print(_text(legend), style="dim", soft_wrap=on_one_line)
    if len(front) > 1:
        path = " → ".join(
            f"{row.name} ({format_estimate(row.metrics[comparison.gain])} at "
            f"{format_estimate(row.metrics[comparison.distance])})"
            for row in front
        )
        console.print(
            _text(f"{_label(comparison.gain)} against {_label(comparison.distance)}: {path}"), soft_wrap=on_one_line
        )
    failed = [run for run in comparison.runs if run.error.strip()]
    failures = [f"{run.folder} {run.state}: {run.error.splitlines()[0]}" for run in failed]
    for note in [*failures, *comparison.notes]:
        console.print(_text(note), style="dim", soft_wrap=on_one_line)


def _fit_table(comparison: Comparison, console: Console) -> tuple[Table, list[str]]:
    """Return the table, with names folded and columns left out as the terminal's width demands.

    Returns:
        The table; the settings and metrics that are left out.
    """
    metrics, settings = comparison.metrics, comparison.settings
    keys = [*metrics[:2], *settings[:2], *metrics[2:], *settings[2:]]  # those that matter most first
    keys += [_FOLDER] if any(row.name.partition(" (+")[0] != row.folder for row in comparison.rows) else []
    wide, longest = console.options.update(max_width=_NO_LIMIT), max(cell_len(row.name) for row in comparison.rows)
    for count in range(len(keys), -1, -1):
        width = Measurement.get(console, wide, _build_table(comparison, keys[:count], longest)).maximum
        if not console.is_terminal:  # output to a file or pipe needs no folding
            console.width = max(console.width, width)
        room = longest - max(0, width - console.width)
        if room >= min(longest, _LEAST_NAME) or count <= 1:
            break
    return _build_table(comparison, keys[:count], max(room, 1)), keys[count:]


def _build_table(comparison: Comparison, keys: list[str], name_width: int) -> Table:
    title = f"{len(comparison.runs)} runs" + (
        f", {len(comparison.rows)} configurations" if len(comparison.rows) < len(comparison.runs) else ""
    )
    table = FoldingTable("", "run", "state", title=title, title_justify="left")
    short = shorten_keys(comparison.settings)
    settings = [key for key in comparison.settings if key in keys]
    metrics = [metric for metric in comparison.metrics if metric in keys]
    seeds = any(len(row.runs) > 1 for row in comparison.rows)
    for heading in [*(short[key] for key in settings), *(["n"] if seeds else []), *map(_label, metrics)]:
        table.add_column(_text(heading), justify="right")
    if _FOLDER in keys:
        table.add_column(_FOLDER)
    for row in comparison.rows:
        table.add_row(
            (BEST if row.best else " ") + (ON_FRONT if row.on_front else ""),
            _text("\n".join(_NameWrapper(name_width).wrap(row.name))),
            Text(visible(row.state) + (", guarded" if row.losses else ""), style=_STATES.get(row.state, "yellow")),
            *(_text(format_value(row.settings[key])) for key in settings),
            *([str(len(row.counted))] if seeds else []),
            *(_format_metric(row, metric) for metric in metrics),
            *([_text(row.folder)] if _FOLDER in keys else []),
            style="bold" if row.best else "",
        )
    return table


def _format_metric(row: Row, metric: str) -> str:
    """Return a metric's estimate; of a single run's difference to the reference, the 95 % interval."""
    estimate = row.metrics.get(metric)
    if metric.endswith(DIFFERENCE) and estimate is not None and estimate.n == 1:
        return describe_difference(metric.removesuffix(DIFFERENCE), row.figures)
    return format_estimate(estimate)


def _label(metric: str) -> str:
    return column_of(metric)


def _text(text: str) -> Text:
    """Return untrusted text for the terminal, without markup and control sequences."""
    return Text(visible(text))


def to_records(comparison: Comparison) -> list[dict[str, Any]]:
    """Return a JSON-ready record for each row, best first; non-finite values are None."""
    return [
        {
            "name": row.name,
            "state": row.state,
            "best": row.best,
            "pareto": row.on_front,
            "runs": [
                {
                    "path": str(run.path),
                    "state": run.state,
                    "seed": run.config.get("seed"),
                    "error": run.error or None,
                    "metrics": {key: _finite(value) for key, value in run.metrics.items()},
                }
                for run in row.runs
            ],
            "settings": row.settings,
            "metrics": {
                key: {"mean": _finite(e.mean), "standard_error": _finite(e.error), "n": e.n}
                for key, e in row.metrics.items()
            },
        }
        for row in comparison.rows
    ]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def to_json(comparison: Comparison) -> str:
    """Return the whole comparison as JSON."""
    direction = "minimize" if comparison.objective.minimize else "maximize"
    value = {
        "objective": {"metric": comparison.objective.metric, "direction": direction},
        "distance": comparison.distance,
        "settings": comparison.settings,
        "rows": to_records(comparison),
        "notes": comparison.notes,
    }
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def to_csv(comparison: Comparison) -> str:
    """Return a CSV line for each row, best first, with all metrics, and standard errors if seeds were joined."""
    names = list(dict.fromkeys([*comparison.metrics, *sorted({m for row in comparison.rows for m in row.metrics})]))
    seeds = any(len(row.runs) > 1 for row in comparison.rows)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    metrics = [column for name in names for column in ([name, f"{name} (standard error)"] if seeds else [name])]
    heading = ["run", "path", "state", "best", "pareto", "n", *comparison.settings, *metrics]
    for cells in (heading, *(_list_cells(comparison, row, names, seeds) for row in comparison.rows)):
        writer.writerow([_to_cell(cell) for cell in cells])
    return file.getvalue()


def _to_cell(value: Any) -> str:
    """Return a cell's text, prefixed with an apostrophe if a spreadsheet would run it as a formula."""
    text = visible(str(value))
    return f"'{text}" if isinstance(value, str) and _FORMULA.match(text) else text


def _list_cells(comparison: Comparison, row: Row, names: list[str], seeds: bool) -> list[Any]:
    paths = " ".join(str(run.path) for run in row.runs)
    cells: list[Any] = [row.name, paths, row.state, int(row.best), int(row.on_front), len(row.counted)]
    for key in comparison.settings:
        value = row.settings[key]
        cells.append("" if value is None else value if isinstance(value, (str, int, float)) else json.dumps(value))
    for name in names:
        estimate = row.metrics.get(name)
        cells.append("" if estimate is None else estimate.mean)
        if seeds:
            cells.append("" if estimate is None or estimate.error is None else estimate.error)
    return cells

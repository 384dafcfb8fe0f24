"""The section of the report on the growth of step time and memory."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from scripts.bench.parts import LENGTHS, ROW_COUNTS, SHARES

_KINDS: dict[str, tuple[str, Sequence[float], tuple[str, ...]]] = {
    "length": ("tokens of a row", LENGTHS, ("trl", "dpo_runner")),
    "share": ("prompt's share of 1024 tokens", SHARES, ("trl", "dpo_runner")),
    "rows": ("rows", ROW_COUNTS, ("dpo_runner",)),
}
"""Title, default values and sides of each varied quantity."""


def format_growth(data: Mapping[str, Any], not_measured: str) -> list[str]:
    lines = [
        "## Growth\n",
        "The steps after the first. Over length and share: one pair a step, the prompt half of the row unless told "
        "otherwise, `trl dpo` by default. Over rows: steps of 4 pairs of some 311 tokens, all rows prepared before; "
        "there the reference runs along, because the store would score every row first, and `trl dpo` is left out, "
        "because it would first tokenize them all. How fast rows are prepared is in [data.md](data.md).\n",
    ]
    for kind, (title, usual, sides) in _KINDS.items():
        cases = data.get(f"growth_{kind}", {})
        header = [f"{side} {what}" for side in sides for what in ("step, s", "GB")]
        lines += [f"| {title} | {' | '.join(header)} |", "|---" * (len(header) + 1) + "|"]
        for label in sorted({*cases, *(f"{case:g}" if kind == "share" else str(case) for case in usual)}, key=float):
            cells = []
            for side in sides:
                run = next(iter(cases.get(label, {}).get(side) or ()), None)
                cells += [_tell(run["step_seconds"]), f"{run['peak_gb']:.2f}"] if run else [not_measured, ""]
            lines.append(f"| {label} | {' | '.join(cells)} |")
        lines.append("")
    return lines


def _tell(seconds: Sequence[float]) -> str:
    text = f"{median(seconds):.2f}"
    return text if len(seconds) == 1 else f"{text} ({min(seconds):.2f}–{max(seconds):.2f})"

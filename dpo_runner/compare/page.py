"""A comparison of runs as one HTML page, without network access and with all data as inert text."""

import json
import math
import re
from itertools import islice
from pathlib import Path
from typing import Any

from dpo_runner.compare.comparison import DEFAULT_OBJECTIVE, MARGIN, Comparison, Row, choose_objective, compare_runs
from dpo_runner.config.metrics import column_of
from dpo_runner.config.schema import shorten_keys
from dpo_runner.io.console import visible
from dpo_runner.io.files import write_text
from dpo_runner.io.pages import render_page
from dpo_runner.records.figures import Curve
from dpo_runner.records.runs import RunRecord, read_runs

_TEMPLATE = Path(__file__).with_name("page.html")
_SCRIPT = Path(__file__).with_name("page.js")
_POINTS = 600_000
"""Approximate limit on the curve points of a page, which keeps a browser responsive."""
_MOST_POINTS, _LEAST_POINTS = 400, 60
_ANSWERS = 4_000_000
"""Approximate limit on the characters of all answers of a page."""
_LONGEST_ANSWER = 4_000
_EACH_ITS_OWN = ("run_dir", "wandb.name")
"""Settings that are unique to each run and irrelevant to the experiment."""

_NO_CURVE = re.compile(r"(^|[_/])(logits/\w+|entropy|mean_token_accuracy)$")


def rebuild_page(sweep_dir: Path) -> Path:
    """Write `compare.html` of all runs below a folder, atomically; called after each job of a sweep.

    Returns:
        The path of the page.

    Raises:
        ConfigError: the folder does not exist.
        OSError: the page cannot be written.
    """
    runs, _ = read_runs([sweep_dir])
    comparison = compare_runs(runs, choose_objective(None, None, runs))
    path = sweep_dir / "compare.html"
    write_text(path, build_page(comparison))
    return path


def build_page(comparison: Comparison) -> str:
    """Return the page as HTML."""
    from markupsafe import Markup

    runs, best = comparison.runs, comparison.best
    states = [run.state for run in runs]
    counts = [
        (f"{len(runs):,}", "runs", f"{len(comparison.rows):,} configurations"),
        *((f"{states.count(state):,}", state, "") for state in dict.fromkeys(states)),
    ]
    value = best.value(comparison.objective.metric) if best else None
    if best is not None and value is not None:
        counts.append((f"{value:.4g}", f"best {comparison.objective.metric}", best.name))
    return render_page(
        _TEMPLATE,
        {},
        title=_name(runs),
        objective=comparison.objective.metric,
        direction="less" if comparison.objective.minimize else "more",
        gain=column_of(comparison.gain),
        distance=column_of(comparison.distance),
        counts=counts if runs else [],
        notes=[*comparison.notes, *(f"{run.name}: {note}" for run in runs for note in run.notes)],
        payload=Markup(_embed(_build_payload(comparison))),
        script=Markup(_SCRIPT.read_text(encoding="utf-8")),
    )


def _name(runs: list[RunRecord]) -> str:
    """Return the page's title: the folder that all runs are in, or the number of runs."""
    parents = {run.path.resolve().parent for run in runs}
    return parents.pop().name if len(parents) == 1 else f"{len(runs)} runs"


def _embed(value: dict[str, Any]) -> str:
    """Return JSON that is safe inside a script element, with control characters made visible."""

    def clean(value: Any) -> Any:
        if isinstance(value, str):
            return visible(value)
        if isinstance(value, float):
            return float(f"{value:.6g}") if math.isfinite(value) else None
        if isinstance(value, dict):
            return {clean(str(key)): clean(item) for key, item in value.items()}
        return [clean(item) for item in value] if isinstance(value, (list, tuple)) else value

    text = json.dumps(clean(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&\u2028\u2029]", lambda match: f"\\u{ord(match[0]):04x}", text)


def _build_payload(comparison: Comparison) -> dict[str, Any]:
    """Return the data that the page's script draws, runs sorted by row, best first."""
    runs = [run for row in comparison.rows for run in row.runs]
    at = {id(run): index for index, run in enumerate(runs)}
    seeds = len(comparison.rows) < len(runs)
    settings = [*comparison.settings, *(["seed"] if seeds and "seed" not in comparison.settings else [])]
    metrics = list(dict.fromkeys([*comparison.metrics, *sorted({name for run in runs for name in run.metrics})]))
    rows = {id(run): row for row in comparison.rows for run in row.runs}
    best = comparison.find_best_run()
    common, own = _split_configs(runs)
    texts: dict[str, int] = {}
    answers = _collect_answers(runs, texts)
    short = shorten_keys(settings)
    return {
        "objective": {"metric": comparison.objective.metric, "minimize": comparison.objective.minimize},
        "gain": comparison.gain,
        "distance": comparison.distance,
        "settings": [{"key": key, "label": short[key]} for key in settings],
        "metrics": [{"key": name, "label": column_of(name)} for name in metrics],
        "columns": len(comparison.metrics),
        "runs": [
            {
                "name": run.name,
                "path": str(run.path),
                "state": run.state,
                "error": run.error,
                "best": run is best,
                "front": rows[id(run)].on_front,
                "settings": [rows[id(run)].settings.get(key, run.config.get("seed")) for key in settings],
                "metrics": [run.metrics.get(name) for name in metrics],
                "config": own[index],
                "answers": answers[index],
            }
            for index, run in enumerate(runs)
        ],
        "rows": [_build_row(row, comparison, at) for row in comparison.rows] if seeds else [],
        "common": common,
        "curves": _collect_curves(runs),
        "texts": list(texts),
    }


def _build_row(row: Row, comparison: Comparison, at: dict[int, int]) -> dict[str, Any]:
    figures = [row.metrics.get(name) for name in comparison.metrics]
    return {
        "runs": [at[id(run)] for run in row.runs],
        "n": len(row.counted),
        "name": row.name,
        "state": row.state,
        "best": row.best,
        "front": row.on_front,
        "metrics": [[figure.mean, figure.error] if figure is not None else [None, None] for figure in figures],
    }


def _split_configs(runs: list[RunRecord]) -> tuple[dict[str, Any], list[dict[str, Any] | None]]:
    """Return the settings that all runs share, and for each run the others; None if its settings are unknown."""
    told = [{key: value for key, value in run.config.items() if key not in _EACH_ITS_OWN} for run in runs]
    configs = [config for config in told if config]
    first = configs[0] if configs else {}
    common = {key: value for key, value in first.items() if all(key in c and c[key] == value for c in configs)}
    rest = [{key: value for key, value in config.items() if key not in common} for config in told]
    return common, [own if run.config else None for run, own in zip(runs, rest, strict=True)]


def _collect_curves(runs: list[RunRecord]) -> dict[str, list[list[Any]]]:
    """Return by metric, for each run that logged it, [index, steps, values], with long curves thinned."""
    names = dict.fromkeys(name for run in runs for name in run.curves if not _NO_CURVE.search(name))
    total = sum(len(run.curves) for run in runs)
    most = max(_LEAST_POINTS, min(_MOST_POINTS, _POINTS // max(total, 1)))
    preferred = (DEFAULT_OBJECTIVE, MARGIN, "eval_loss", "rewards/accuracies", "rewards/margins", "loss")
    ordered = sorted(names, key=lambda name: (preferred.index(name) if name in preferred else len(preferred), name))
    return {
        name: [[index, *_thin(run.curves[name], most)] for index, run in enumerate(runs) if name in run.curves]
        for name in ordered
    }


def _thin(curve: Curve, most: int) -> Curve:
    """Return at most `most` points of a curve, evenly spaced, including the first and the last."""
    steps, values = curve
    if len(steps) <= most:
        return curve
    kept = [round(index * (len(steps) - 1) / (most - 1)) for index in range(most)]
    return [steps[index] for index in kept], [values[index] for index in kept]


def _collect_answers(runs: list[RunRecord], texts: dict[str, int]) -> list[list[list[int | None]]]:
    """Return each run's prompts and answers before and after as indices into `texts`, adding each text once."""

    def place(text: str | None) -> int | None:
        if text is None:
            return None
        cut = text if len(text) <= _LONGEST_ANSWER else f"{text[:_LONGEST_ANSWER]} … ({len(text):,} characters)"
        return texts.setdefault(cut, len(texts))

    each = _ANSWERS // max(len(runs), 1)
    collected = []
    for run in runs:
        lengths, kept = 0, 0
        for sample in run.samples:
            lengths += sum(min(len(text), _LONGEST_ANSWER) for text in sample.values())
            kept += lengths <= each
        shown = islice(run.samples, max(kept, 1))
        collected.append([[place(sample.get(part)) for part in ("prompt", "before", "after")] for sample in shown])
    return collected

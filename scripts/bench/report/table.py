"""The Markdown report on training, built from the record alone."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from scripts.bench.measuring.profiling import GROUPS
from scripts.bench.parts import BETAS, COLD, RATES, WARM
from scripts.bench.report.growth import format_growth

TARGETS = {
    "training step, warm store": {"hh": 8.0, "bundled": 5.0, "demo": 4.0, "demo_fit": 4.0},
    "one run, cold store, start to end": {"hh": 4.5, "bundled": 3.0, "demo": 2.5, "demo_fit": 2.5},
    "peak memory": {"hh": 2.0, "bundled": 2.0, "demo": 2.0, "demo_fit": 2.0},
    "sweep of 9 points": {"hh": 11.0, "bundled": 7.0, "demo": 5.5},
    "share of the matmul peak": {"hh": 0.35, "bundled": 0.35, "demo": 0.35, "demo_fit": 0.35},
}
"""Targets by measure and shape: the factor over the best peer; for the matmul peak, the share."""
_NOT_RUN = (
    "Others were looked at and not run: OpenRLHF 0.11.2 requires flash-attn, which is for GPUs; the DPO trainers of "
    "axolotl 0.19.0 (trl==1.9.0), ms-swift 4.6.0 (trl<1.0) and Unsloth 2026.10.9 (trl<=1.15.0) are TRL's with changes "
    "around it, and torchtune 0.6.1 has DPO recipes for Llama 2 and 3.1 alone.\n"
)
_POINTS = len(BETAS) * len(RATES)
NOT_MEASURED = "not measured"
_OURS = (COLD, WARM)

Runs = Mapping[str, Sequence[Mapping[str, Any]]]


def write_report(data: Mapping[str, Any], path: Path) -> None:
    path.write_text(build_report(data), encoding="utf-8")


def build_report(data: Mapping[str, Any]) -> str:
    """Return the report as Markdown."""
    machine = data["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "trl", "peft"))
    parts = [
        "# Training beside its peers\n",
        "`make bench` (`scripts/bench/training.py`): each side's own command on the same pairs, the same tokens in the "
        "same order, the same LoRA (r=16 on all linear layers), bf16, 8 pairs a step, one epoch, in fresh processes, "
        "in turn. dpo_runner takes 4 × 2 rows at once; the peers run by default (4 × 2 too) and with the best settings "
        "that were found (below). *pairs/s* is of the training loop. *Total* is the command from start to end. *First "
        "step* is from the command's start to the end of its first step. *Memory* is the resident memory of the "
        "largest process. Figures are medians, with the smallest and the largest; ratios are taken run by run. *Cold*: "
        "the reference store was empty; *warm*: it had all pairs. A side that trained other tokens, or whose metrics "
        "differ by more than rounding, is not compared.\n",
        f"{machine['cores']} cores of {machine['cpu']} ({', '.join(machine['flags']) or 'no bf16'}), "
        f"{machine['memory_gb']} GB, {data['settings']['threads']} threads, Python {machine['python']}, {versions}; "
        f"model {data['settings']['model']}.\n",
        _NOT_RUN,
        *_format_targets(data),
        *(line for name in data["shapes"] for line in _format_shape(data, name)),
        *_format_tuning(data),
        *_format_sweeps(data),
        *format_growth(data, NOT_MEASURED),
        *_format_mfu(data),
        *_format_profile(data),
    ]
    return "\n".join(parts)


def rate(entry: Mapping[str, Any]) -> float:
    """Return pairs per second of the training loop."""
    return float(entry["pairs"] / entry["train_seconds"])


def peers_of(data: Mapping[str, Any], name: str) -> Runs:
    """Return the runs of all peers that did the same job as dpo_runner."""
    refused = data.get("refused", {}).get(name, {})
    runs = data.get("runs", {}).get(name, {})
    return {side: entries for side, entries in runs.items() if side not in (*_OURS, *refused) and entries}


def compare(data: Mapping[str, Any], name: str, ours: str, key: str) -> tuple[str, list[float]] | None:
    """Return the best peer by a lower-is-better measure, and its ratio to dpo_runner run by run."""
    peers, mine = peers_of(data, name), data.get("runs", {}).get(name, {}).get(ours)
    if not peers or not mine:
        return None
    best = min(peers, key=lambda side: median(entry[key] for entry in peers[side]))
    return best, [theirs[key] / entry[key] for theirs, entry in zip(peers[best], mine, strict=False)]


def spread(values: Iterable[float], pattern: str = "{:.2f}") -> str:
    """Return the median and, for several values, the smallest and largest."""
    values = list(values)
    text = pattern.format(median(values))
    return text if len(values) == 1 else f"{text} ({pattern.format(min(values))}–{pattern.format(max(values))})"


def _format_targets(data: Mapping[str, Any]) -> list[str]:
    measures: dict[str, Callable[[str], tuple[str, list[float]] | None]] = {
        "training step, warm store": lambda name: compare(data, name, WARM, "train_seconds"),
        "one run, cold store, start to end": lambda name: compare(data, name, COLD, "total_seconds"),
        "peak memory": lambda name: compare(data, name, COLD, "peak_gb"),
        "sweep of 9 points": lambda name: _best_sweep(data, name),
        "share of the matmul peak": lambda name: _mfu_of(data, name, WARM),
    }
    shapes = list(TARGETS["peak memory"])
    lines = [
        "How many times better than the best peer of that measure, with the target behind it; of the matmul peak, the "
        "share reached. The peer with the least memory may be another one than the fastest. *demo_fit*: rows of *demo* "
        "that no side cuts, beside LLaMA-Factory alone, which cuts rows otherwise than TRL.\n",
        f"| | {' | '.join(shapes)} |",
        "|---" * (len(shapes) + 1) + "|",
    ]
    for label, find in measures.items():
        cells = []
        for name in shapes:
            if (target := TARGETS[label].get(name)) is None:
                cells.append("")
                continue
            found, pattern = find(name), "{:.0%}" if target < 1 else "{:.1f}×"
            cells.append(
                f"{spread(found[1], pattern)} of {pattern.format(target)}, {found[0]}" if found else NOT_MEASURED
            )
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return [*lines, ""]


def _format_shape(data: Mapping[str, Any], name: str) -> list[str]:
    shape, runs = data["shapes"][name], data.get("runs", {}).get(name)
    if shape is None:
        return [f"## {name}\n", f"{NOT_MEASURED}: its data is not at hand.\n"]
    prompt, chosen, rejected = (sum(part) / shape["pairs"] for part in zip(*shape["lengths"], strict=True))
    lines = [
        f"## {name}\n",
        f"{shape['pairs']} pairs, on average {prompt:.0f} prompt, {chosen:.0f} chosen and {rejected:.0f} rejected "
        f"tokens, max_length {shape['max_length']}.\n",
    ]
    if not runs:
        reasons = [f"{side}: {reason}" for side, reason in data.get("refused", {}).get(name, {}).items()]
        return [*lines, f"{'; '.join([NOT_MEASURED, *reasons])}.\n"]
    refused, same = data.get("refused", {}).get(name, {}), data.get("same_job", {}).get(name, {})
    lines += [
        "| side | runs | pairs/s | total, s | first step, s | memory, GB | CPU time, s | last loss, margin |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for side, entries in runs.items():
        if side in refused or not entries:
            continue
        last = entries[-1]["history"][-1]
        end = ", ".join(f"{last[key]:.4f}" for key in ("loss", "rewards/margins") if key in last)
        columns = [spread(map(rate, entries), "{:.3f}")]
        for key, pattern in (
            ("total_seconds", "{:.1f}"),
            ("first_step_seconds", "{:.1f}"),
            ("peak_gb", "{:.2f}"),
            ("cpu_seconds", "{:.0f}"),
        ):
            columns.append(spread([entry[key] for entry in entries], pattern))
        lines.append(f"| {side} | {len(entries)} | {' | '.join(columns)} | {end} |")
    lines.append("")
    lines += [f"- {side}: {told}" for side, told in same.items() if side not in _OURS]
    lines += [f"- {side}: {NOT_MEASURED}; {reason}" for side, reason in refused.items()]
    loads = [float(entry["load_before"]) for entries in runs.values() for entry in entries if "load_before" in entry]
    if loads:
        lines.append(f"- load average of the minute before a run: {spread(loads)}; a run before it counts too")
    return [*lines, ""]


def _format_tuning(data: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, variants in data.get("tune", {}).items():
        lines += [f"| {name} | training, s | total, s | memory, GB |", "|---|---|---|---|"]
        for variant, entries in variants.items():
            if isinstance(entries, list):
                keys = ("train_seconds", "total_seconds", "peak_gb")
                lines.append(f"| {variant} | {' | '.join(f'{entries[0][key]:.1f}' for key in keys)} |")
            else:
                lines.append(f"| {variant} | {entries['failed'][:120].replace('|', '/')} | | |")
        lines.append("")
    about = (
        "One run each, on few pairs: first gradient checkpointing and the reference computed beforehand, with 4 × 2 "
        "rows at once, then other rows at once × accumulation with the best of these. The fastest training and the "
        "soonest end are measured above.\n"
    )
    return ["## Settings of the peers\n", about, *(lines or [f"{NOT_MEASURED}.\n"])]


def _best_sweep(data: Mapping[str, Any], name: str) -> tuple[str, list[float]] | None:
    """Return the settings of the fastest nine commands, and the ratio of their time to the sweep's."""
    return min(_sweep_ratios(data, name), key=lambda found: found[1], default=None)


def _sweep_ratios(data: Mapping[str, Any], name: str) -> list[tuple[str, list[float]]]:
    entries = data.get("sweep", {}).get(name, {})
    if "dpo_runner" not in entries:
        return []
    ours = entries["dpo_runner"]["total_seconds"]
    return [
        (variant, [sum(entry["total_seconds"] for entry in theirs) / ours])
        for variant, theirs in entries.items()
        if isinstance(theirs, list) and len(theirs) == _POINTS
    ]


def _format_sweeps(data: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, target in TARGETS["sweep of 9 points"].items():
        entries = data.get("sweep", {}).get(name, {})
        if "dpo_runner" not in entries:
            lines.append(f"{name}: {NOT_MEASURED}.\n")
            continue
        seconds = entries["dpo_runner"]["total_seconds"]
        lines.append(f"{name}, {entries['pairs']} pairs: {seconds:.1f} s as one sweep, target {target:.1f}×.")
        for variant, (ratio,) in _sweep_ratios(data, name):
            lines.append(f"As nine commands, {variant}: {ratio * seconds:.1f} s, {ratio:.1f} times as long.")
        lines.append("")
    about = (
        "3 beta × 3 learning rates, no run stopped early, the reference store cold, run by run the same job; beside "
        "nine commands of `trl dpo` with the settings that end soonest, and with those that train fastest where these "
        "are others and were measured.\n"
    )
    return ["## A sweep of 9 points\n", about, *lines]


def _mfu_of(data: Mapping[str, Any], name: str, side: str) -> tuple[str, list[float]] | None:
    entry, runs = data.get("mfu", {}).get(name), data.get("runs", {}).get(name, {}).get(side)
    if not entry or not runs:
        return None
    peak = entry["peak"]["flops_per_second"]
    return f"{peak / 1e12:.2f} TFLOP/s", [entry["flops_per_pair"] * rate(run) / peak for run in runs]


def _format_mfu(data: Mapping[str, Any]) -> list[str]:
    rows = []
    for name in data.get("mfu", {}):
        sides = [*peers_of(data, name), *_OURS]
        for side in sides:
            if found := _mfu_of(data, name, side):
                flops = data["mfu"][name]["flops_per_pair"] / 1e9
                rows.append(f"| {name} | {side} | {flops:.0f} | {found[0]} | {spread(found[1], '{:.1%}')} |")
    about = (
        "Operations of a step that scores no token twice (`scripts/bench/measuring/flops.py` has the formula), "
        "times pairs/s, over what bf16 matrix products of the model's own layers reach on as many tokens as a batch "
        "has. What a side computes beyond that (padding, prompts twice, recomputation) is no credit to it.\n"
    )
    head = ["| shape | side | GFLOP a pair | matmul peak | share |", "|---|---|---|---|---|"]
    return ["## Share of the matmul peak\n", about, *([*head, *rows, ""] if rows else [f"{NOT_MEASURED}.\n"])]


def _format_profile(data: Mapping[str, Any]) -> list[str]:
    entries = data.get("profile", {})
    about = (
        "Shares of the training loop's time on *hh*, by torch's profiler (`scripts/bench/measuring/profiling.py`), "
        "which slows it; the reference is computed before. The head's and attention's own matrix products count for "
        "them; the rest is Python, the optimizer and the profiler.\n"
    )
    lines = [f"| | pairs | seconds | {' | '.join(GROUPS)} |", "|---" * (len(GROUPS) + 3) + "|"]
    for name, entry in entries.items():
        shares = " | ".join(f"{entry['shares'][group]:.0%}" for group in GROUPS)
        lines.append(f"| {name} | {entry['pairs']} | {entry['seconds']:.1f} | {shares} |")
    return ["## Where the time goes\n", about, *([*lines, ""] if entries else [f"{NOT_MEASURED}.\n"])]

"""The report of the check, as far as it has come."""

from collections.abc import Mapping
from typing import Any

from scripts.gpu.inputs import SIZES, describe_size

_COLUMNS = ("model", "side", "pairs/s", "with the reference", "beside TRL's defaults", "peak, GB")
_SHARES = ("share of the measured peak", "of the data sheet's")
_SIDES, _DEFAULT = ("trl", "ours"), "trl"


def build_report(data: Mapping[str, Any]) -> str:
    """Return the report in Markdown.

    Args:
        data: the record's `machine` and `parts`.
    """
    machine, parts, on_gpu = data["machine"], data.get("parts", {}), data["settings"]["device"] == "cuda"
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "trl", "peft", "bitsandbytes"))
    where = _describe_card(parts) if on_gpu else f"No GPU: {machine['cores']} cores of {machine['cpu']}"
    lines = [f"# {'Training on a GPU' if on_gpu else 'The GPU check, run on a CPU'}", "", f"{where}; {versions}.", ""]
    for title, is_benchmark in (("Exactness", False), ("Memory, and other lines of the benchmark", True)):
        found: list[str] = []
        for name, entry in parts.items():
            if name != "card" and (name.partition(":")[0] in _SIDES) == is_benchmark:
                found += [_format_line(name, line) for line in entry["results"] if "history" not in line]
                found += [f"- {name}: **FAILED**: {entry['error']}."] if entry.get("error") else []
        lines += [f"## {title}", "", *found, ""] if found else []
    lines += _format_benchmark(data) if any(name.partition(":")[0] in _SIDES for name in parts) else []
    return "\n".join(lines).rstrip("\n") + "\n"


def _describe_card(parts: Mapping[str, Any]) -> str:
    results = parts.get("card", {}).get("results", [])
    return str(results[0]["text"]) if results else "A GPU that was not looked at"


def _format_line(name: str, line: Mapping[str, Any]) -> str:
    if "out_of_memory" in line:
        return f"- {name}, {line['text']}: out of memory ({line['out_of_memory']})."
    return f"- {name}: {'' if line['ok'] else '**FAILED**: '}{line['text']}."


def _format_benchmark(data: Mapping[str, Any]) -> list[str]:
    parts = data.get("parts", {})
    about = (
        f"Random weights in the shapes of known models, {data['settings']['pairs']} pairs with the lengths of "
        "Anthropic HH, LoRA r=16 on all linear layers, 8 pairs a step, both sides in a process that has imported "
        "everything. *pairs/s* is that of the training loop without its first step; *with the reference* counts the "
        "time in which the reference is scored before it. TRL's settings are its defaults, and those that a search "
        "tried which leaves the job as it is. *Peak* is the memory allocated by torch, on a CPU the process's. *Share* "
        "counts the operations of a step that scores no token twice, over what bf16 products of the model's layers "
        "reach, and over the dense bf16 peak of the card's data sheet.\n"
    )
    card = next((line["peak"] for line in _read(parts, "card") if "peak" in line), None)
    lines, sames = [f"| {' | '.join((*_COLUMNS, *_SHARES))} |", "|---" * 8 + "|"], []
    for size in SIZES:
        name = describe_size(size)
        theirs, ours = ([line for line in _read(parts, f"{side}:{size}") if "history" in line] for side in _SIDES)
        counted: dict[str, Any] = next((line for line in _read(parts, f"ours:{size}") if "flops" in line), {})
        default = next((line["with_reference"] for line in theirs if line["text"] == _DEFAULT), None)
        others = sorted(theirs[1:], key=lambda line: -line["with_reference"])
        for line in (*theirs[:1], *others, *ours):
            cells = [name, line["text"], f"{line['pairs_per_second']:.2f}", f"{line['with_reference']:.2f}"]
            cells += [f"{line['with_reference'] / default:.2f}×" if default else "", f"{line['peak_gb']:.2f}"]
            for peak in (counted.get("peak"), card):
                cells.append(f"{counted['flops'] * line['pairs_per_second'] / peak:.1%}" if counted and peak else "")
            lines.append(f"| {' | '.join(cells)} |")
            if "same" in line and (line["text"] == _DEFAULT or not line["ok"]):
                sames.append(f"- {name}, {line['text']}: {line['same']}.")
    same = ["", "Beside dpo_runner, step by step:", "", *sames] if sames else []
    return ["## Speed", "", about, *lines, *same]


def _read(parts: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    return list(parts.get(name, {}).get("results", []))

"""The model card of a run's result: README.md with metadata that a hub accepts, and plots.

The card in a run's directory and that of an exported folder differ in the folder's name in code, and in how much of
its origin is known.
"""

import json
import logging
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml

from dpo_runner.config.metrics import (
    BENCHMARKS,
    STDERR,
    describe_difference,
    find_first_update,
    label_of,
    list_benchmarks,
    mark_ties,
)
from dpo_runner.config.run_conf import config_keys
from dpo_runner.config.sections.data import SourceConf, resolve_sources
from dpo_runner.errors import reason_of
from dpo_runner.io.files import write_text
from dpo_runner.io.masking import mask_secrets
from dpo_runner.model.adapters import describe_adapter
from dpo_runner.model.card.facts import LABELS, RunFacts, build_metadata, find_provenance, list_citations
from dpo_runner.model.card.plots import Plot, write_plots
from dpo_runner.model.card.use import describe_use
from dpo_runner.model.quantization import name_quantization
from dpo_runner.records.figures import describe_band, describe_changes

logger = logging.getLogger(__name__)

PLOTS = "plots"
"""The folder of the plots, next to README.md."""


def write_card(
    folder: Path,
    facts: RunFacts,
    name: str,
    lineage: dict[str, Any] | None = None,
    say: Callable[[str], None] = logger.warning,
) -> None:
    """Write README.md and `plots/` to a folder that already holds a run's weights.

    Args:
        folder: has adapter_config.json if it holds an adapter.
        facts: the run's.
        name: the folder in the card's code: a path, or the id of the future repository.
        lineage: contents of lineage.json, for an export; None for the run's own folder.
        say: shows one line to the user if the curves cannot be drawn; the card is then written without them.
    """
    adapter_file = folder / "adapter_config.json"
    adapter = json.loads(adapter_file.read_text(encoding="utf-8")) if adapter_file.exists() else None
    conf, mask = facts.conf, mask_secrets
    plots = _draw_plots(folder / PLOTS, facts, say)
    config = yaml.safe_dump(mask(config_keys(conf)), sort_keys=False, allow_unicode=True)
    fence = "`" * max(3, *(len(ticks) + 1 for ticks in re.findall("`+", config)), 0)
    sections = {
        f"# {mask(conf.run_name)}": [
            "Tuned on preference pairs by Direct Preference Optimization "
            f"([paper](https://arxiv.org/abs/2305.18290)) with dpo_runner {facts.environment['dpo_runner']} and TRL's "
            "DPOTrainer.\n",
            *_table(["", ""], _describe(facts)),
        ],
        "## Use": describe_use(facts, name, adapter),
        "## Results": [
            *_describe_results(facts),
            *(f"\n![{plot.description}]({PLOTS}/{plot.file})" for plot in plots),
        ],
        **_compare_published(facts.summary),
        "## Data": _describe_data(facts),
        "## Hardware and time": _table(["", ""], _describe_machine(facts)),
        "## Where it comes from": _describe_origin(facts, lineage),
        "## Configuration": [
            "<details>\n<summary>The run's whole configuration, as composed</summary>\n",
            f"{fence}yaml\n{config}{fence}\n\n</details>",
        ],
        "## Citations": [f"- {entry}" for entry in list_citations(conf)],
    }
    body = "\n\n".join("\n".join([heading, "", *lines]) for heading, lines in sections.items())
    metadata = build_metadata(facts, adapter is not None)
    write_text(folder / "README.md", f"---\n{metadata.to_yaml()}\n---\n\n{body}\n")


def _draw_plots(folder: Path, facts: RunFacts, say: Callable[[str], None]) -> list[Plot]:
    try:
        first, model = find_first_update(facts.events), facts.conf.model
        return write_plots(folder, [mark_ties(event, event["step"], model, first) for event in facts.events])
    except Exception as error:  # a failed plot must not lose the weights
        logger.exception("the curves cannot be drawn")
        say(f"the model card has no curves; drawing them failed: {reason_of(error)}")
        shutil.rmtree(folder, ignore_errors=True)
        return []


def _table(head: list[str], rows: list[tuple[Any, ...]]) -> list[str]:
    cells = (" | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) for row in rows)
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {row} |" for row in cells)]


def _describe(facts: RunFacts) -> list[tuple[Any, ...]]:
    conf = facts.conf
    losses = conf.training.loss_type
    loss = losses if isinstance(losses, str) else " + ".join(losses)
    rows = {
        "base model": f"`{conf.model.model_name_or_path}`",
        "SFT adapter": f"`{conf.model.adapter}` ({conf.model.adapter_mode})" if conf.model.adapter else None,
        "trained": describe_adapter(conf),
        "base quantized to, in training": name_quantization(conf.quant) if conf.quant else None,
        "reference": facts.reference,
        "loss": f"{loss}, beta {conf.training.beta:g}",
        "learning rate": f"{conf.training.learning_rate:g}, {conf.training.lr_scheduler_type}",
        "optimizer steps": f"{facts.summary['steps']:,} (weights: {facts.summary['weights']})",
        "seed": conf.seed,
    }
    return [(key, mask_secrets(value)) for key, value in rows.items() if value is not None]


def _describe_results(facts: RunFacts) -> list[str]:
    before, after = mark_ties(facts.summary["before"], 0, facts.conf.model), facts.summary["after"]
    if not after:
        return ["The run had no evaluation pairs and answered no prompts."]
    order = list(LABELS)
    named = [(key, *_name_metric(key, facts)) for key in after if not key.startswith(BENCHMARKS)]
    named.sort(key=lambda row: (order.index(row[1]) if row[1] in order else len(order), row[2]))
    rows = [
        (
            f"{LABELS.get(metric, metric)}{f', {source}' if source else ''} (`{key}`)",
            *map(_round, (before.get(key), after[key])),
        )
        for key, metric, source in named
    ]
    return [*_table(["on evaluation pairs and sampled answers", "before", "after"], rows), *_describe_benchmarks(facts)]


def _describe_benchmarks(facts: RunFacts) -> list[str]:
    """Return a table of the benchmarks, else nothing."""
    before, after, conf = facts.summary["before"], facts.summary["after"], facts.conf.benchmarks

    def tell(figures: dict[str, Any], name: str) -> str:
        error = figures.get(name + STDERR)
        return _round(figures.get(name)) + (f" ± {error:.2g}" if error is not None else "")

    rows = [
        (label_of(name), tell(before, name), tell(after, name), describe_difference(name, after))
        for name in list_benchmarks(after)
    ]
    if not rows:
        return []
    limit = "" if conf.limit is None else f", limit {conf.limit:g}"
    shots = "" if conf.num_fewshot is None else f", num_fewshot {conf.num_fewshot}"
    head = [f"lm-evaluation-harness{limit}{shots}", "before", "after", "difference to the reference, 95 % interval"]
    return ["", *_table(head, rows), "", "± is one standard error."]


def _compare_published(summary: dict[str, Any]) -> dict[str, list[str]]:
    """Return the section on published figures, if the run had any."""
    if not (record := mask_secrets(summary.get("expected"))):
        return {}
    rows = [
        (
            each["step"],
            f"`{each['metric']}`",
            describe_band(each),
            _round(each["value"]),
            each["verdict"],
            each["source"],
        )
        for each in record["figures"]
    ]
    changes = record["changes"]
    told = [f"This run is set otherwise than the published one: {describe_changes(changes)}.\n"] if changes else []
    return {"## Published figures": [*told, *_table(["step", "", "published", "this run", "", "source"], rows)]}


def _name_metric(key: str, facts: RunFacts) -> tuple[str, str]:
    """Return a metric without its prefixes, and its source (`""` for all)."""
    metric = key.removeprefix("eval_")
    sources = resolve_sources(facts.conf.data)
    source = next((name for name in sources if len(sources) > 1 and metric.startswith(f"{name}_")), "")
    return metric.removeprefix(f"{source}_" if source else ""), source


def _round(value: Any) -> str:
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"


def _describe_data(facts: RunFacts) -> list[str]:
    def count(reasons: dict[str, int]) -> list[str]:
        return [f"{number:,} {reason}" for reason, number in reasons.items()]

    sources = resolve_sources(facts.conf.data)
    read: list[tuple[Any, ...]] = []
    for part in facts.report["sources"]:
        source = asdict(sources[part["name"]])
        path = source["eval_path"] if part["split"] == "eval" and source["eval_path"] else source["path"]
        of = [f"{key} {source[key]}" for key in ("subset", "revision") if source[key]]
        place = ", ".join([f"`{mask_secrets(path)}`", *of])
        unused = ", ".join([*count(part["bad"]), *count(part["left_out"])])
        read.append((place, part["split"], part["format"], f"{part['rows']:,}", f"{part['pairs']:,}", unused))
    used = []
    for split, pairs in facts.report["splits"].items():
        tokens = sum(lengths["total"] for lengths in pairs["lengths"].values())
        out = [*count(pairs["dropped"]), *([f"{pairs['unused']:,} not drawn"] if pairs["unused"] else [])]
        by_source = f" ({', '.join(count(pairs['by_source']))})" if len(sources) > 1 else ""
        kept = [f"{pairs['kept']:,}{by_source}", *count(pairs["truncated"])]
        used.append((split, f"{pairs['pairs']:,}", ", ".join(kept), f"{tokens:,}", ", ".join(out)))
    return [
        *_table(["source", "for", "layout", "rows read", "pairs made", "rows left out"], read),
        "",
        *_table(["split", "pairs", "pairs used", "tokens", "pairs dropped"], used),
        *(line for name, source in sources.items() for line in _describe_generation(name, source)),
    ]


def _describe_generation(name: str, source: SourceConf) -> list[str]:
    """Return a paragraph on the answers of a source that were generated, else nothing."""
    if (made := find_provenance(source)) is None:
        return []
    sampling = ", ".join(f"{key} {value}" for key, value in made["sampling"].items())
    terms = {
        key: ", ".join(f"{field} {value}" for field, value in term.items()) for key, term in made["reward"].items()
    }
    reward = "; ".join(f"{key} ({fields})" for key, fields in terms.items())
    return ["", f"Source {name} was generated by {made['made_by']}: {sampling}. Scored by {reward}."]


def _describe_machine(facts: RunFacts) -> list[tuple[Any, ...]]:
    hardware, summary, packages = facts.environment["hardware"], facts.summary, facts.environment["packages"]
    gpus = ", ".join(f"{number} x {gpu}" for gpu, number in Counter(hardware["gpus"]).items())
    return [
        ("GPU", gpus or "none"),
        ("CPU", f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['torch_threads']} threads"),
        (f"peak memory of the {'GPU' if gpus else 'process'}", f"{summary['peak_memory_gb']:.1f} GB"),
        ("training time (h:mm:ss)", timedelta(seconds=round(summary["train_runtime"]))),
        ("speed", f"{summary['pairs_per_second']:.2f} pairs/s"),
        ("Python", facts.environment["python"]),
        ("libraries", ", ".join(f"{name} {version}" for name, version in packages.items())),
    ]


def _describe_origin(facts: RunFacts, lineage: dict[str, Any] | None) -> list[str]:
    if lineage is None:
        model, environment = facts.conf.model, facts.environment
        sft = {"name": model.adapter, "mode": model.adapter_mode, "commit": model.adapter_revision}
        known: dict[str, Any] = {
            "base": {"name": model.model_name_or_path, "commit": environment["model"]["commit"] or model.revision},
            "sft_adapter": sft if model.adapter else None,
            "dpo_run": {"name": facts.conf.run_name, "commit": environment["commit"]},
        }
        rest = "This is the result in the run's directory. `python -m dpo_runner.export` creates a folder to publish "
        rest += "from it, with the digests of all weights in lineage.json."
    else:
        known = lineage
        rest = f"The run's configuration has sha256 {lineage['dpo_run']['config_sha256']}. Everything else is in "
        rest += "lineage.json."
    known, sft = mask_secrets(known), known["sft_adapter"]
    titles = {"base": "base", "sft_adapter": f"SFT adapter ({sft['mode']})" if sft else "", "dpo_run": "DPO run"}
    rows = []
    for key, title in titles.items():
        if step := known[key]:
            sums = [sum[:16] for file, sum in step.get("sha256", {}).items() if not file.endswith("config.json")]
            rows.append((title, step["name"], step["commit"] or "", ", ".join(sums)))
    head = ["", "name", "commit", "sha256 of the weights begins"]
    shown = len(head) if lineage else len(head) - 1
    return [*_table(head[:shown], [row[:shown] for row in rows]), f"\n{rest}"]

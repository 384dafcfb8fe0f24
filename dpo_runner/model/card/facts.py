"""Facts about a run for its model card: figures, metadata and citations."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from dpo_runner.config.metrics import evaluation_keys, label_of
from dpo_runner.config.run_conf import RunConf
from dpo_runner.config.sections.data import SourceConf, resolve_sources
from dpo_runner.data.rows.sources import is_hub_id
from dpo_runner.errors import ConfigError, RunError
from dpo_runner.io.masking import mask_secrets
from dpo_runner.records.reading import read_metrics, read_object

LABELS = {key: label_of(f"eval_{key}") for key in evaluation_keys()}
"""Labels of the metrics in a card, in its order; the keys lack the prefix `eval_`."""
_METRICS = {"rewards/accuracies": "accuracy", "rewards/margins": "reward_margin", "loss": "loss"}
"""Metrics in the metadata, with their metric types."""


PROVENANCE = "provenance.json"
"""A file beside generated answers that tells where they come from."""


@dataclass(frozen=True)
class RunFacts:
    """The facts about a finished run that its card shows.

    Attributes:
        conf: the run's configuration.
        reference: description of the reference.
        summary: contents of summary.json.
        report: contents of data_report.json.
        environment: contents of environment.json.
        events: contents of metrics.jsonl.
    """

    conf: RunConf
    reference: str
    summary: dict[str, Any]
    report: dict[str, Any]
    environment: dict[str, Any]
    events: list[dict[str, Any]]


def read_facts(run_dir: Path, conf: RunConf, reference: str, summary: dict[str, Any]) -> RunFacts:
    """Build the facts from the arguments and a run's directory, which may still lack summary.json."""
    report, environment = (read_object(run_dir / name) for name in ("data_report.json", "environment.json"))
    return RunFacts(conf, reference, summary, report, environment, read_metrics(run_dir))


def hub_base(conf: RunConf, environment: dict[str, Any]) -> str | None:
    """Return the hub id of the model beneath all adapters, or None if it is not from the hub."""
    name, loaded = conf.model.model_name_or_path, environment["model"]
    was_folder = loaded["base"] == name and loaded["fingerprint"] is not None
    return name if is_hub_id(name) and not was_folder else None


def build_metadata(facts: RunFacts, is_adapter: bool) -> ModelCardData:
    """Return a card's metadata, without values that the hub rejects, such as a path instead of an id."""
    conf = facts.conf
    base = hub_base(conf, facts.environment)
    is_lora = is_adapter and (conf.lora is None or conf.lora.peft_type == "LORA")
    relation: dict[str, Any] = {} if base is None else {"base_model_relation": "adapter" if is_adapter else "finetune"}
    sources = resolve_sources(conf.data)
    hub = [str(source.path) for name, source in sources.items() if _hub_split(facts, name, source, "train")]
    results = list(_list_results(facts, sources))
    return ModelCardData(
        base_model=mask_secrets(base),
        **relation,
        datasets=mask_secrets(list(dict.fromkeys(hub))) or None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["dpo", "trl", "dpo_runner", *(["lora"] if is_lora else [])],
        **({"model_name": mask_secrets(conf.run_name), "eval_results": results} if results else {}),
    )


def _hub_split(facts: RunFacts, name: str, source: SourceConf, split: str) -> str | None:
    """Return the hub dataset's split of a source's `train` or `eval` pairs; None for other data."""
    files = [
        file
        for part in facts.report["sources"]
        if (part["name"], part["split"]) == (name, split)
        for file in part["files"]
    ]
    if split == "eval" and not files:
        return _hub_split(facts, name, source, "train")  # held out from the training pairs
    return next((of for of in (source.split, source.eval_split) if files == [f"{source.path} (split {of})"]), None)


def _list_results(facts: RunFacts, sources: dict[str, SourceConf]) -> Iterator[EvalResult]:
    """Yield the evaluations on hub datasets; the metadata cannot hold others."""
    for name, source in sources.items():
        prefix = "eval_" if len(sources) == 1 else f"eval_{name}_"
        split = _hub_split(facts, name, source, "eval")
        for key, kind in _METRICS.items():
            if split is not None and prefix + key in facts.summary["after"]:
                yield EvalResult(
                    task_type="text-generation",
                    dataset_type=str(source.path),
                    dataset_name=str(source.path),
                    dataset_config=source.subset,
                    dataset_split=split,
                    dataset_revision=source.revision,
                    metric_type=kind,
                    metric_name=LABELS[key],
                    metric_value=round(facts.summary["after"][prefix + key], 4),
                )


def find_provenance(source: SourceConf) -> dict[str, Any] | None:
    """Return where the answers of a source come from, if `python -m dpo_runner.generate` made its file, unchanged."""
    path = Path(str(source.path)).expanduser()
    told = path.with_name(PROVENANCE)
    if not (path.is_file() and told.is_file()):
        return None
    try:
        provenance = read_object(told)
        matches = provenance["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        known = {"made_by", "sampling", "reward"} <= provenance.keys()
    except (ConfigError, RunError, KeyError):  # of another program
        return None
    return provenance if matches and known else None


_PAPERS = {  # by what a run uses, losses by `training.loss_type`
    "dpo": "Rafailov et al. 2023, *Direct Preference Optimization*, arXiv:2305.18290",
    "hinge": "Zhao et al. 2023, *SLiC-HF*, arXiv:2305.10425",
    "ipo": "Azar et al. 2023, *A General Theoretical Paradigm (IPO)*, arXiv:2310.12036",
    "exo_pair": "Ji et al. 2024, *Efficient Exact Optimization (EXO)*, arXiv:2402.00856",
    "nca_pair": "Chen et al. 2024, *Noise Contrastive Alignment*, arXiv:2402.05369",
    "robust": "Chowdhury et al. 2024, *Provably Robust DPO*, arXiv:2403.00409",
    "bco_pair": "Jung et al. 2024, *Binary Classifier Optimization*, arXiv:2404.04656",
    "sppo_hard": "Wu et al. 2024, *Self-Play Preference Optimization*, arXiv:2405.00675",
    "aot aot_unpaired": "Melnyk et al. 2024, *Alignment via Optimal Transport*, arXiv:2406.05882",
    "apo_zero apo_down": "D'Oosterlinck et al. 2024, *Anchored Preference*, arXiv:2408.06266",
    "discopop": "Lu et al. 2024, *Discovering Preference Optimization Algorithms*, arXiv:2406.08414",
    "trl": "von Werra et al. 2020, *TRL: Transformers Reinforcement Learning*, https://github.com/huggingface/trl",
    "lora": "Hu et al. 2021, *LoRA*, arXiv:2106.09685",
    "dora": "Liu et al. 2024, *DoRA*, arXiv:2402.09353",
    "qlora": "Dettmers et al. 2023, *QLoRA*, arXiv:2305.14314",
}


def list_citations(conf: RunConf) -> list[str]:
    """Return the sources of a run's methods, one line each."""
    used = {"dpo", "trl", *([losses] if isinstance(losses := conf.training.loss_type, str) else losses)}
    used |= {"lora"} if conf.model.adapter or (conf.lora and conf.lora.peft_type == "LORA") else set()
    used |= {"dora"} if conf.lora and conf.lora.use_dora else set()
    used |= {"qlora"} if conf.quant and conf.quant.load_in_4bit else set()
    return [paper for name, paper in _PAPERS.items() if used & {*name.split()}]

"""Facts about a run for its model card: figures, metadata and citations."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from dpo_runner.config.metrics import METRICS
from dpo_runner.config.run_conf import RunConf
from dpo_runner.config.sections.data import SourceConf, resolve_sources
from dpo_runner.data.rows.sources import is_hub_id
from dpo_runner.io.masking import mask_secrets
from dpo_runner.records.reading import read_metrics, read_object

LABELS = {metric.key.removeprefix("eval_"): metric.label for metric in METRICS}
"""Labels of the metrics in a card, in its order; the keys lack the prefix `eval_`."""
_METRICS = {"rewards/accuracies": "accuracy", "rewards/margins": "reward_margin", "loss": "loss"}
"""Metrics in the metadata, with their metric types."""


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


_DPO = """Rafael Rafailov, Archit Sharma, Eric Mitchell, Christopher D. Manning, Stefano Ermon, Chelsea Finn: *Direct
  Preference Optimization: Your Language Model is Secretly a Reward Model*. NeurIPS 2023. arXiv:2305.18290"""
_TRL = """Leandro von Werra et al.: *TRL: Transformers Reinforcement Learning*. 2020.
  https://github.com/huggingface/trl"""
_LORA = """Edward J. Hu et al.: *LoRA: Low-Rank Adaptation of Large Language Models*. ICLR 2022. arXiv:2106.09685"""
_DORA = """Shih-Yang Liu et al.: *DoRA: Weight-Decomposed Low-Rank Adaptation*. ICML 2024. arXiv:2402.09353"""
_QLORA = """Tim Dettmers et al.: *QLoRA: Efficient Finetuning of Quantized LLMs*. NeurIPS 2023. arXiv:2305.14314"""
_APO = """Karel D'Oosterlinck et al.: *Anchored Preference Optimization and Contrastive Revisions*. arXiv:2408.06266"""
_AOT = """Igor Melnyk et al.: *Distributional Preference Alignment of LLMs via Optimal Transport*. arXiv:2406.05882"""
_LOSSES = {
    "hinge": "Yao Zhao et al.: *SLiC-HF: Sequence Likelihood Calibration with Human Feedback*. arXiv:2305.10425",
    "ipo": """Mohammad Gheshlaghi Azar et al.: *A General Theoretical Paradigm to Understand Learning from Human
  Preferences*. AISTATS 2024. arXiv:2310.12036""",
    "exo_pair": "Haozhe Ji et al.: *Towards Efficient Exact Optimization of Language Model Alignment*. "
    "arXiv:2402.00856",
    "nca_pair": "Huayu Chen et al.: *Noise Contrastive Alignment of Language Models with Explicit Rewards*. "
    "arXiv:2402.05369",
    "robust": "Sayak Ray Chowdhury et al.: *Provably Robust DPO: Aligning Language Models with Noisy Feedback*. "
    "arXiv:2403.00409",
    "bco_pair": "Seungjae Jung et al.: *Binary Classifier Optimization for Large Language Model Alignment*. "
    "arXiv:2404.04656",
    "sppo_hard": "Yue Wu et al.: *Self-Play Preference Optimization for Language Model Alignment*. arXiv:2405.00675",
    "aot": _AOT,
    "aot_unpaired": _AOT,
    "apo_zero": _APO,
    "apo_down": _APO,
    "discopop": """Chris Lu et al.: *Discovering Preference Optimization Algorithms with and for Large Language
  Models*. arXiv:2406.08414""",
}
"""Citations by `training.loss_type`; the other losses are from the DPO paper or have no paper."""


def list_citations(conf: RunConf) -> list[str]:
    """Return the citations of a run's methods, one entry per paper."""
    losses = conf.training.loss_type
    named = [losses] if isinstance(losses, str) else losses
    cited = [_DPO, *(_LOSSES[loss] for loss in named if loss in _LOSSES), _TRL]
    if conf.model.adapter is not None or (conf.lora is not None and conf.lora.peft_type == "LORA"):
        cited.append(_LORA)
    if conf.lora is not None and conf.lora.use_dora:
        cited.append(_DORA)
    if conf.quant is not None and conf.quant.load_in_4bit:
        cited.append(_QLORA)
    return list(dict.fromkeys(cited))

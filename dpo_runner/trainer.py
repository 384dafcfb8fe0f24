"""From a RunConf to TRL's `DPOConfig` and a `DPOTrainer`, with the trainer's silent traps closed."""

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from peft import PeftModel, initialize_lora_eva_weights
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer

from dpo_runner.config import RunConf
from dpo_runner.data import PreferenceData
from dpo_runner.data.preferences import ID_COLUMNS
from dpo_runner.engine.install import install_engine
from dpo_runner.errors import ConfigError, RunError, reason_of
from dpo_runner.model import Policy
from dpo_runner.precision import choose_autocast
from dpo_runner.reference import describe_reference, silence_dropout, stores_reference, trains_all
from dpo_runner.sealing import explain_damage
from dpo_runner.stacking import complete_reference, put_reference, read_initial_weights
from dpo_runner.vocabulary import open_head
from dpo_runner.watching import WatchingTrainer

logger = logging.getLogger(__name__)

_EVA_ROWS = 64  # enough tokens for stable singular vectors at the usual ranks

# Private to TRL, and overridden here: an upgrade that renames it must not pass unnoticed.
for _name in (
    "_prepare_dataset",
    "_precompute_ref_logps",
    "_prepare_inputs",
    "_load_from_checkpoint",
    "_load_best_model",
):
    assert hasattr(DPOTrainer, _name), f"TRL's DPOTrainer.{_name} is gone"


class RunTrainer(WatchingTrainer):
    """TRL's trainer on rows that are tokenized already (`apply_chat_template` is stricter than TRL's templating)."""

    def __init__(
        self,
        model: Any,
        loaded: dict[str, torch.Tensor],
        reference_adapter: str | None = None,
        reference: str = "",
        stores_reference: bool = False,
        **kwargs: Any,
    ) -> None:
        self._stores_reference = stores_reference
        self._loaded = loaded
        self.attention = model.config._attn_implementation
        self._evaluates_part = False
        self._reference_adapter, self._reference = reference_adapter, reference
        super().__init__(model=model, **kwargs)
        self._settle_reference()

    def _settle_reference(self) -> None:
        if isinstance(self.model, PeftModel):
            open_head(self.model)
        if isinstance(self.model, PeftModel) and self.ref_model is None:
            complete_reference(self.model, self._loaded)
            put_reference(self.model, self._reference_adapter)
            self._reference_adapter = None

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        if self._stores_reference:
            return dataset  # the engine adds what its store has
        self._settle_reference()  # TRL calls this from its constructor
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def _prepare_dataset(self, dataset: Dataset, processing_class: Any, args: DPOConfig, dataset_name: str) -> Dataset:
        assert set(ID_COLUMNS) <= set(dataset.column_names), dataset.column_names
        # TRL files precomputed reference log-probabilities under the fingerprint of the rows and the weights alone,
        # though they depend on these too, and returns the wrong ones after any of them has changed.
        prepared = dataset.select_columns(list(ID_COLUMNS))
        settings = (
            args.max_length,
            args.truncation_mode,
            args.ld_alpha,
            args.bf16,
            args.fp16,
            self.attention,
            self._reference,
        )
        prepared._fingerprint = Hasher.hash((dataset._fingerprint, settings))
        return prepared

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate; where there are several sources, each by itself, and all together weighted by their pairs."""
        if eval_dataset is not None or not isinstance(self.eval_dataset, dict):
            return dict(super().evaluate(eval_dataset, ignore_keys, metric_key_prefix))
        self._evaluates_part = True
        try:
            parts = {name: super(RunTrainer, self).evaluate(name, ignore_keys) for name in self.eval_dataset}
        finally:
            self._evaluates_part = False
        metrics = merge_evaluations(parts, {name: len(rows) for name, rows in self.eval_dataset.items()})
        self.log(metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.correct_times(logs)
        if not self._evaluates_part:
            super().log(logs, start_time)
            return
        # TRL adds its averages to the event's metrics here; the event itself is told once, for all parts together.
        logs.update({f"eval_{key}": sum(values) / len(values) for key, values in self._metrics["eval"].items()})
        self._metrics["eval"].clear()

    def _load_best_model(self) -> None:
        """Load the best checkpoint; where it is not what was saved, transformers would go on with the last weights."""
        best = self.find_best()
        assert best is not None
        if damage := explain_damage(best, whole=True):
            raise RunError(f"{best}: the best checkpoint cannot be loaded; {damage}; the same command makes it again")
        self.state.best_model_checkpoint = str(best)
        super()._load_best_model()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none beside checkpoints: the run writes one card, for its result."""


def merge_evaluations(parts: dict[str, dict[str, float]], rows: dict[str, int]) -> dict[str, float]:
    """Join the evaluations of several sources into one event.

    Args:
        parts: by source, metrics under names that begin with `eval_`.
        rows: by source, how many pairs were evaluated.

    Returns:
        Each source's metrics as `eval_<source>_…`, and under their own names the averages weighted by pairs; times
        are sums.
    """
    total = sum(rows.values())
    merged: dict[str, float] = {}
    for key in next(iter(parts.values())):
        values = {name: metrics[key] for name, metrics in parts.items()}
        if key.endswith("_runtime"):
            merged[key] = sum(values.values())
        elif not key.endswith("_per_second"):
            merged[key] = sum(value * rows[name] for name, value in values.items()) / total
    for name, metrics in parts.items():
        merged |= {f"eval_{name}_{key[len('eval_') :]}": metrics[key] for key in metrics if key.startswith("eval_")}
    return merged


def build_dpo_config(conf: RunConf, output_dir: Path) -> DPOConfig:
    """Return TRL's `DPOConfig` for a run.

    Args:
        conf: the run.
        output_dir: where checkpoints go.

    Raises:
        ConfigError: TRL or transformers refuses the combination; its own first line says why.
    """
    fields = {field.name: getattr(conf.training, field.name) for field in dataclasses.fields(conf.training)}
    fields["use_cpu"] = fields["use_cpu"] or not torch.accelerator.is_available()  # else bf16 is refused on CPUs
    if fields["bf16"] is None:
        fields["bf16"] = choose_autocast(conf.training) == torch.bfloat16
    try:
        args = DPOConfig(
            **fields | {"disable_tqdm": True},  # the run shows its own progress, unless training.disable_tqdm=true
            output_dir=str(output_dir),
            seed=conf.seed,
            run_name=conf.run_name,
            report_to="none",
        )
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"`training`: {reason_of(error)}") from None
    if args.n_gpu > 1:  # one process takes the first; transformers would have DataParallel, which TRL refuses
        args._n_gpu = 1
    return args


def build_trainer(
    conf: RunConf,
    args: DPOConfig,
    policy: Policy,
    data: PreferenceData,
    tokenizer: PreTrainedTokenizerBase,
    callbacks: list[TrainerCallback],
    tell: Callable[[str], None] = logger.info,
) -> RunTrainer:
    """Return the trainer, its trainable weights in fp32, its reference free of dropout, and the engine in it.

    Raises:
        ConfigError: TRL or peft refuses the combination of model and settings.
    """
    if stores_reference(conf):  # with which TRL need not load a reference, nor hash all weights for a cache of its own
        args.precompute_ref_log_probs = trains_all(conf)
    loaded: dict[str, torch.Tensor] = {}
    if isinstance(policy.model, PeftModel):  # an adapter whose weights are not those of a new one
        loaded = {name: p.detach().clone() for name, p in policy.model.named_parameters() if p.requires_grad}
    try:
        trainer = RunTrainer(
            model=policy.model,
            loaded=loaded,
            ref_model=policy.ref_model,
            args=args,
            train_dataset=data.train,
            eval_dataset=data.eval_by_source if len(data.eval_by_source) > 1 else data.eval,
            processing_class=tokenizer,
            peft_config=policy.peft_config,
            callbacks=callbacks,
            reference_adapter=policy.reference_adapter,
            reference=_identify_reference(conf, policy),
            stores_reference=stores_reference(conf),
        )
    except (ValueError, NotImplementedError) as error:  # so TRL and peft refuse, anywhere in a constructor of theirs
        # with its cause, so that run.log has a traceback where it was no refusal
        raise ConfigError(f"`training`, `lora` or `model`: {reason_of(error)}") from error
    trainer.data, trainer.dumps, trainer.say = data, Path(args.output_dir).with_name("nonfinite"), tell
    trainer.max_skipped = conf.checks.max_skipped_batches if conf.checks.on_nonfinite == "skip_batch" else 0
    trainer.remove_callback(PrinterCallback)
    if isinstance(trainer.model, PeftModel):
        if conf.lora is not None and conf.lora.init_lora_weights == "eva":
            _initialize_eva(trainer)
        _cast_adapter_to_fp32(trainer.model, loaded or read_initial_weights(trainer.model))
    silence_dropout(trainer.model)
    longest = min(filter(None, (data.longest(), args.max_length)))
    description = {"model": conf.model.model_name_or_path, "reference": describe_reference(conf)}
    largest = sum(data.largest().cut(longest))
    install_engine(trainer, conf.engine, stores_reference(conf), longest, largest, description, tell)
    return trainer


def _identify_reference(conf: RunConf, policy: Policy) -> str:
    """Tell references apart by more than their path; TRL hashes only what it has loaded itself."""
    digests = [
        hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(Path(policy.reference_adapter).glob("adapter_*") if policy.reference_adapter else ())
    ]
    return " ".join([describe_reference(conf), *digests])


def _initialize_eva(trainer: RunTrainer) -> None:
    """Set lora_A from the activations of the first training rows (EVA, arXiv 2410.07170); B stays 0.

    Raises:
        ConfigError: PEFT cannot, as where there are too few tokens for the rank.
    """
    args = trainer.args
    rows = trainer.train_dataset.select(range(min(len(trainer.train_dataset), _EVA_ROWS)))
    loader = DataLoader(rows, args.per_device_train_batch_size, collate_fn=trainer.data_collator)

    def batches() -> Iterator[dict[str, Any]]:
        for batch in loader:
            kept = {key: batch[key].to(trainer.model.device) for key in ("input_ids", "attention_mask")}
            yield {**kept, "use_cache": False}

    try:
        initialize_lora_eva_weights(trainer.model, list(batches()), show_progress_bar=False)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"`lora.init_lora_weights=eva`: {reason_of(error)}") from None


def _cast_adapter_to_fp32(model: torch.nn.Module, loaded: dict[str, torch.Tensor]) -> None:
    """Train the adapter in fp32: TRL makes a QLoRA adapter bf16, in which most small updates round to nothing.

    Args:
        model: the trainer's model.
        loaded: the adapter's weights as loaded, by name; TRL has rounded them, though not the reference's copy.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = loaded.get(name, parameter.data).to(parameter.device, torch.float32)

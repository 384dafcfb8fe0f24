"""Build `DPOConfig` and the trainer."""

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, initialize_lora_eva_weights
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl import DPOConfig

from dpo_runner.config.run_conf import RunConf
from dpo_runner.data.preferences import PreferenceData
from dpo_runner.errors import ConfigError, reason_of
from dpo_runner.model.policy import Policy
from dpo_runner.model.reference import describe_reference, silence_dropout, stores_reference, trains_all
from dpo_runner.model.stacking import read_initial_weights
from dpo_runner.training.engine.install import install_engine
from dpo_runner.training.precision import choose_autocast
from dpo_runner.training.trainer import RunTrainer

logger = logging.getLogger(__name__)

_EVA_ROWS = 64  # enough tokens for stable singular vectors at the usual ranks


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

"""Build `DPOConfig` and the trainer."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import TrainerCallback
from trl import DPOConfig

from dpo_runner.config.run_conf import RunConf
from dpo_runner.data.preferences import PreferenceData
from dpo_runner.errors import ConfigError, RunError, reason_of
from dpo_runner.model.blueprint import Blueprint
from dpo_runner.model.policy import Policy, Say
from dpo_runner.training.precision import choose_autocast
from dpo_runner.training.trainer import RunTrainer

logger = logging.getLogger(__name__)


def build_dpo_config(conf: RunConf, output_dir: Path) -> DPOConfig:
    """Return TRL's `DPOConfig` for a run.

    Args:
        conf: the run's configuration.
        output_dir: the folder for checkpoints.

    Raises:
        ConfigError: TRL or transformers rejects the combination; carries the first line of its message.
    """
    fields = {field.name: getattr(conf.training, field.name) for field in dataclasses.fields(conf.training)}
    fields["use_cpu"] = fields["use_cpu"] or not torch.accelerator.is_available()  # else bf16 is rejected on CPUs
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
    if args.n_gpu > 1:  # use the first GPU; transformers would choose DataParallel, which TRL rejects
        args._n_gpu = 1
    return args


def build_trainer(
    conf: RunConf,
    args: DPOConfig,
    blueprint: Blueprint,
    policy: Policy,
    data: PreferenceData,
    callbacks: Sequence[TrainerCallback] = (),
    say: Say = logger.info,
) -> RunTrainer:
    """Return the trainer: trainable weights in fp32, reference without dropout, engine installed.

    Raises:
        ConfigError: TRL or peft rejects the combination of model and settings.
        RunError: a trained weight shares its memory with one that the reference uses.
    """
    if blueprint.reference.is_stored:  # then TRL neither loads a reference nor hashes all weights for its cache
        args.precompute_ref_log_probs = blueprint.trains_all
    trainer = RunTrainer(policy, blueprint, data, conf, args, callbacks, say)
    _check_memory(trainer)
    return trainer


def _check_memory(trainer: RunTrainer) -> None:
    """Check that no trained weight lies in the memory of a frozen one, which would move with it."""
    models = [model for model in (trainer.model, trainer.ref_model) if model is not None]
    weights = [each for model in models for each in (*model.named_parameters(), *model.named_buffers())]
    frozen = {weight.untyped_storage().data_ptr(): name for name, weight in weights if not weight.requires_grad}
    for name, weight in weights:
        address = weight.untyped_storage().data_ptr()
        if weight.requires_grad and address and address in frozen:
            raise RunError(f"{name} is trained in the memory of {frozen[address]}, so the reference would move with it")

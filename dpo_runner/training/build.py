"""Build `DPOConfig` and the trainer."""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.utils.import_utils import enable_tf32
from trl import DPOConfig

from dpo_runner.config.run_conf import RunConf
from dpo_runner.config.sections.training import TrainingConf
from dpo_runner.data.preferences import PreferenceData
from dpo_runner.errors import ConfigError, reason_of
from dpo_runner.io.upstream import find_private
from dpo_runner.model.blueprint import Blueprint
from dpo_runner.model.policy import Policy, Say
from dpo_runner.model.quantization import lacks_bf16
from dpo_runner.training.engine.precision import choose_autocast
from dpo_runner.training.ranks.group import is_first
from dpo_runner.training.trainer import RunTrainer, check_memory

logger = logging.getLogger(__name__)

_OF_SHARDING = ("fsdp", "fsdp_config", "parallelism_config")


@contextmanager
def undo_global_settings() -> Iterator[None]:
    """Restore on exit what `training.tf32` and `training.full_determinism` set for the whole process."""
    backends: Any = torch.backends
    cudnn = backends.cudnn
    precision, flags = backends.fp32_precision, (cudnn.deterministic, cudnn.benchmark)
    strict, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        yield
    finally:
        enable_tf32.cache_clear()  # it would not set again what it has set once
        backends.fp32_precision, (cudnn.deterministic, cudnn.benchmark) = precision, flags
        torch.use_deterministic_algorithms(strict, warn_only=warns)


def build_dpo_config(conf: RunConf, output_dir: Path) -> DPOConfig:
    """Return TRL's `DPOConfig` for a run.

    Args:
        conf: the run's configuration.
        output_dir: the folder for checkpoints.

    Raises:
        ConfigError: TRL or transformers rejects the combination; carries the first line of its message.
    """
    fields = {field.name: getattr(conf.training, field.name) for field in dataclasses.fields(conf.training)}
    fields |= dict.fromkeys(_OF_SHARDING)  # the runner itself divides the weights; see `ranks.sharding`
    fields["use_cpu"] = fields["use_cpu"] or not torch.accelerator.is_available()  # else bf16 is rejected on CPUs
    if fields["bf16"] is None:
        chosen = choose_autocast(conf.training)
        fields |= {"bf16": chosen == torch.bfloat16, "fp16": chosen == torch.float16}
    _check_precision(conf, fields["fp16"], fields["use_cpu"])
    fields = _drop_unknown(fields)
    try:
        args = DPOConfig(
            # The run shows its own progress, unless training.disable_tqdm=true, and feeds the trackers itself.
            **fields | {"disable_tqdm": True, "report_to": "none"},
            output_dir=str(output_dir),
            seed=conf.seed,
            run_name=conf.run_name,
        )
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise ConfigError(f"`training`: {reason_of(error)}") from None
    if args.n_gpu > 1:  # use the first GPU; transformers would choose DataParallel, which TRL rejects
        find_private("transformers", args, "_n_gpu")
        args._n_gpu = 1
    return args


def _drop_unknown(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields without those that the installed transformers, an older one, does not have.

    Raises:
        ConfigError: one of those is set.
    """
    known, unset = {field.name for field in dataclasses.fields(DPOConfig)}, TrainingConf()
    for name in sorted(fields.keys() - known):
        if fields[name] != getattr(unset, name):
            raise ConfigError(
                f"`training.{name}={fields[name]}`: transformers {version('transformers')} does not know it; "
                "pip install -U transformers"
            )
    return {name: value for name, value in fields.items() if name in known}


def _check_precision(conf: RunConf, in_fp16: bool, use_cpu: bool) -> None:
    """Check that the hardware computes in the 16 bits that a run asks for.

    Raises:
        ConfigError: it does not, or the run cannot use the fp16 that is taken on GPUs without bf16.
    """
    if in_fp16 and use_cpu:
        raise ConfigError("`training.fp16=True`: accelerate ignores it on a CPU; leave it out")
    if not lacks_bf16(use_cpu):
        return
    card = torch.cuda.get_device_name()
    if conf.training.bf16:
        raise ConfigError(
            f"`training.bf16=True`: {card} has no bf16 arithmetic; use training.bf16=null, which takes fp16"
        )
    if in_fp16 and conf.checks.on_nonfinite == "skip_batch":
        raise ConfigError(
            f"`checks.on_nonfinite=skip_batch`: {card} has no bf16 arithmetic, so the run uses fp16, whose loss scaler "
            "skips such steps by itself; use on_nonfinite=stop"
        )


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
    if not is_first():
        args.save_total_limit = None  # Trainer deletes checkpoints at its end
    trainer = RunTrainer(policy, blueprint, data, conf, args, callbacks, say)
    check_memory(trainer)
    return trainer

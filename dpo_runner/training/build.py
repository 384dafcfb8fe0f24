"""Build `DPOConfig` and the trainer; before weights are loaded, all of the trainer that takes none."""

import copy
import dataclasses
import inspect
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow.compute as pc
import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn.attention.flex_attention import flex_attention
from transformers import Trainer, TrainerCallback
from transformers.integrations.liger import apply_liger_kernel
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from trl import DPOConfig

from dpo_runner.config.metrics import evaluation_keys
from dpo_runner.config.overrides import write_override
from dpo_runner.config.run_conf import RunConf
from dpo_runner.config.sections.training import TrainingConf
from dpo_runner.data.preferences import ID_COLUMNS, PreferenceData
from dpo_runner.errors import ConfigError, RunError, reason_of, suggest
from dpo_runner.model.blueprint import Blueprint
from dpo_runner.model.policy import Policy, Say
from dpo_runner.model.vocabulary import build_meta_model, count_rows
from dpo_runner.training.precision import choose_autocast
from dpo_runner.training.trainer import RunTrainer, count_steps

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


def rehearse(args: DPOConfig, blueprint: Blueprint, data: PreferenceData) -> None:
    """Build all of the trainer that takes no weights, so that settings that fail do so before weights are loaded.

    transformers builds it: a Trainer of one weight stands for the run's.

    Args:
        args: TRL's settings.
        blueprint: the model's blueprint.
        data: the tokenized rows.

    Raises:
        ConfigError: optimizer, scheduler, batches, adapter or attention cannot be built; the best checkpoint would be
            chosen by a metric that no evaluation has; or a token has no row in the embeddings.
    """
    if args.metric_for_best_model is not None and data.eval is not None:
        _check_metric(args.metric_for_best_model, list(data.eval_by_source))
    _check_vocabulary(blueprint, data)
    _check_adapter_layers(blueprint)
    if args.use_liger_kernel:
        with _building("training.use_liger_kernel=True", "or leave it out"):
            apply_liger_kernel(torch.nn.Linear(1, 1), args.liger_kernel_config)
    if blueprint.conf.attn_implementation == "flex_attention":
        with _building("model.attn_implementation=flex_attention", "use sdpa"):
            heads = torch.zeros(1, 1, 1, 16, device=args.device, requires_grad=True)
            flex_attention(heads, heads, heads)
    args = copy.copy(args)
    args.remove_unused_columns = False
    with tempfile.TemporaryDirectory() as args.output_dir:  # Trainer makes the folder
        with _building("training"):
            trainer = Trainer(
                torch.nn.Linear(1, 1),
                args,
                train_dataset=data.train.select_columns(list(ID_COLUMNS)),
                eval_dataset=data.eval,
                processing_class=blueprint.tokenizer,
            )
        _check_batches(trainer, data)
        _check_optimizer(trainer, count_steps(args, len(data.train)))


@contextmanager
def _building(key: str, cure: str = "") -> Iterator[None]:
    """Turn what a library raises into one line that begins with the setting to change."""
    try:
        yield
    except (
        *(ValueError, TypeError, ImportError, LookupError),
        *(AttributeError, RuntimeError, AssertionError),
    ) as error:
        reason = reason_of(error).rstrip(".").replace("`args.", "`training.")
        raise ConfigError(f"`{key}`: {reason}{f'; {cure}' if cure else ''}") from error


def _check_metric(name: str, sources: Sequence[str]) -> None:
    groups = ["", *(f"{source}_" for source in sources if len(sources) > 1)]
    known = [f"{group}{key}" for group in groups for key in evaluation_keys()]
    if name.removeprefix("eval_") not in known:
        raise ConfigError(
            f"`training.metric_for_best_model={name}`: no evaluation has it{suggest(name.removeprefix('eval_'), known)}"
        )


def _check_adapter_layers(blueprint: Blueprint) -> None:
    """Put the adapter into the model on the meta device, where it has layers without weights."""
    config = blueprint.adapter_configs().get("default")
    if config is None:
        return
    lora, adapter = blueprint.lora, blueprint.conf.adapter
    key = f"model.adapter={adapter}" if lora is None else f"lora.target_modules={lora.target_modules}"
    meta = build_meta_model(blueprint.config, blueprint.conf)
    with torch.device("meta"), _building(key, "use all-linear"):
        policy = get_peft_model(meta, config)
    if isinstance(policy.get_output_embeddings(), BaseTunerLayer):
        raise ConfigError(
            f"`{key}`: TRL reads the weights of the output head past its adapter, so that it would never be trained; "
            "leave the head out, or put it into lora.modules_to_save"
        )


def _check_batches(trainer: Trainer, data: PreferenceData) -> None:
    args, strategy = trainer.args, trainer.args.train_sampling_strategy
    default = TrainingConf().train_sampling_strategy
    key = "training" if strategy == default else f"training.train_sampling_strategy={strategy}"
    with _building(key, "" if strategy == default else f"use {default}"):
        batches = {"per_device_train_batch_size": (len(data.train), trainer.get_train_dataloader())}
        for rows in data.eval_by_source.values():
            batches["per_device_eval_batch_size"] = (len(rows), trainer.get_eval_dataloader(rows))
    for name, (count, loader) in batches.items():
        if not len(loader):
            raise ConfigError(
                f"`training.dataloader_drop_last=True`: leaves out incomplete batches, and {count} rows make no "
                f"batch of {name}={getattr(args, name)}; use at most {count}, or dataloader_drop_last=false"
            )


def _check_optimizer(trainer: Trainer, steps: int) -> None:
    args = trainer.args
    optim = getattr(args.optim, "value", args.optim)
    key, cure = f"training.optim={optim}", f"use {TrainingConf().optim}"
    if args.optim_args is not None:
        key, cure = f"training.optim_args={args.optim_args}", f"write what {optim} takes, as NAME=NUMBER,NAME=NUMBER"
    if args.optim_target_modules:  # such an optimizer needs the run's own modules
        trainer.optimizer = torch.optim.SGD(trainer.model.parameters())
    with _building(key, cure):
        trainer.create_optimizer()
    kind, given = args.lr_scheduler_type.value, args.lr_scheduler_kwargs or {}
    parameters = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[args.lr_scheduler_type]).parameters
    of_trainer = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
    taken = [name for name in parameters if name not in of_trainer]
    key = f"training.lr_scheduler_kwargs={given}" if given else f"training.lr_scheduler_type={kind}"
    rule = f"lr_scheduler_kwargs for {kind}: {', '.join(taken) or 'none'}"
    is_open = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if not is_open and (unknown := [name for name in given if name not in taken]):  # some schedulers would ignore it
        raise ConfigError(f"`{key}`: there is no {unknown[0]}; {rule}")
    with _building(key, rule):
        trainer.create_scheduler(steps)


def _check_vocabulary(blueprint: Blueprint, data: PreferenceData) -> None:
    """Check that the embeddings have a row for the pad token and for each token of the data."""
    rows, tokenizer = blueprint.vocabulary.rows or count_rows(blueprint.meta), blueprint.tokenizer
    if (other := blueprint.reference_model) is not None:
        rows = min(rows, max(blueprint.vocabulary.rows or 0, count_rows(other.meta)))
    if len(tokenizer) <= rows:
        return
    if (pad := tokenizer.pad_token_id) >= rows:
        eos = write_override("model.pad_token", tokenizer.eos_token)
        raise ConfigError(
            f"`model.model_name_or_path={blueprint.name}`: its tokenizer's pad token {tokenizer.pad_token} has the id "
            f"{pad}, and the embeddings have {rows} rows; set {eos}, or {_add_token(tokenizer.pad_token)}"
        )
    for split, pairs in (("train", data.train), ("eval", data.eval)):
        size = 1000
        for start, batch in enumerate(pairs.with_format("arrow").iter(size) if pairs is not None else ()):
            for column in ID_COLUMNS:
                ids = batch[column].combine_chunks()
                if (pc.max(ids.flatten()).as_py() or 0) < rows:
                    continue
                at = next(at for at, row in enumerate(ids.to_pylist()) if max(row, default=0) >= rows)
                number = max(ids[at].as_py())
                token = str(tokenizer.convert_ids_to_tokens(number))
                added = tokenizer.added_tokens_decoder.get(number)
                cure = (
                    f"set {_add_token(token)}"
                    if added is not None and added.special
                    else "resize the model's embeddings first"
                )
                raise ConfigError(
                    f"{data.locate(split, start * size + at)}: holds the token {token}, for which the "
                    f"embeddings of {blueprint.name} have no row ({rows} rows, {len(tokenizer)} tokens); {cure}, or "
                    "leave it out of data and chat template"
                )


def _add_token(token: str) -> str:
    return f"'model.added_tokens=[\"{token}\"]'"

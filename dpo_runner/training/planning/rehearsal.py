"""Before weights are loaded, build all of the trainer that takes none, so that settings that fail do so early."""

import copy
import inspect
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pyarrow.compute as pc
import torch
from bitsandbytes.nn import Linear8bitLt
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint
from transformers import Trainer
from transformers.integrations.liger import apply_liger_kernel
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from trl import DPOConfig

from dpo_runner.config.metrics import check_metric
from dpo_runner.config.overrides import write_override
from dpo_runner.config.sections.training import TrainingConf
from dpo_runner.data.preferences import ID_COLUMNS, PreferenceData
from dpo_runner.errors import ConfigError, reason_of, renaming
from dpo_runner.model.blueprint import Blueprint
from dpo_runner.model.reference import count_learned_positions
from dpo_runner.model.tokenizer import find_other_token
from dpo_runner.model.vocabulary import build_meta_model, count_rows
from dpo_runner.training.engine.packed.head import check_kernel
from dpo_runner.training.trainer import count_steps


def rehearse(args: DPOConfig, blueprint: Blueprint, data: PreferenceData) -> None:
    """Build all of the trainer that takes no weights, so that settings that fail do so before weights are loaded.

    transformers builds it: a Trainer of one weight stands for the run's.

    Args:
        args: TRL's settings.
        blueprint: the model's blueprint.
        data: the tokenized rows.

    Raises:
        ConfigError: optimizer, scheduler, batches, adapter or attention cannot be built; the best checkpoint would be
            chosen by a metric that no evaluation has; a reference scored before training would be another one; a token
            has no row in the embeddings; or the GPU's kernels cannot be compiled.
    """
    if args.metric_for_best_model is not None and data.eval is not None:
        check_metric(args.metric_for_best_model, list(data.eval_by_source))
    _check_vocabulary(blueprint, data)
    _check_other_model(blueprint, data)
    _check_positions(blueprint, data.shape().cut(args.max_length).longest, args)
    _check_adapter_layers(blueprint, args)
    if args.precompute_ref_log_probs and (reason := blueprint.batch_dependence):
        raise ConfigError(
            f"`training.precompute_ref_log_probs=True`: {reason}, so a reference scored in other batches than the "
            "policy is another one; leave it out"
        )
    if args.device.type == "cuda":
        check_kernel(args.device)
    if not torch.accelerator.is_available() and blueprint.conf.device_map not in (None, "cpu", "auto"):
        raise ConfigError(f"`model.device_map={blueprint.conf.device_map}`: torch sees no GPU; leave it out")
    if args.router_aux_loss_coef and not hasattr(blueprint.config.get_text_config(), "output_router_logits"):
        raise ConfigError(
            f"`training.router_aux_loss_coef={args.router_aux_loss_coef}`: {blueprint.name} has no experts, whose load "
            "it balances; leave it out"
        )
    _check_checkpointing(args)
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
        steps = count_steps(args, len(data.train))
        _check_optimizer(trainer, steps)
        _check_best(args, steps)


@contextmanager
def _building(key: str, cure: str = "") -> Iterator[None]:
    """Turn what a library raises into one line that begins with the setting to change."""
    try:
        yield
    except (
        *(ValueError, TypeError, ImportError, LookupError),
        *(AttributeError, RuntimeError, AssertionError, ArithmeticError, OSError),
    ) as error:
        reason = reason_of(error).rstrip(".").replace("`args.", "`training.")
        raise ConfigError(f"`{key}`: {reason}{f'; {cure}' if cure else ''}") from error


def _check_best(args: DPOConfig, steps: int) -> None:
    """Check that an evaluation lies within the run, for the best checkpoint to be chosen by."""
    if not args.load_best_model_at_end or args.eval_strategy != "steps":
        return
    every = args.eval_steps if args.eval_steps >= 1 else math.ceil(args.eval_steps * steps)
    if max(math.ceil(args.eval_delay / every), 1) * every > steps:
        raise ConfigError(
            f"`training.load_best_model_at_end=True`: none of the {steps} steps has an evaluation "
            f"(eval_steps={args.eval_steps:g}, eval_delay={args.eval_delay:g}); use eval_steps=0.5"
        )


def _check_checkpointing(args: DPOConfig) -> None:
    # By their old names, which transformers keeps equal to the new ones; before 5.23 there are no others.
    given = dict(args.gradient_checkpointing_kwargs or {}) if args.gradient_checkpointing else {}
    with _building(f"training.activation_checkpointing_kwargs={given}"):
        if given.pop("every_n_layers", 1) < 1:
            raise ValueError("every_n_layers must be at least 1")
        if given.pop("offload", False) and args.device.type == "cpu":
            raise ValueError("offload needs a GPU, whose activations it moves to the CPU")
        checkpoint(torch.nn.Identity(), torch.zeros(1, requires_grad=True), **{"use_reentrant": False, **given})


def _check_adapter_layers(blueprint: Blueprint, args: DPOConfig) -> None:
    """Put the adapter into the model on the meta device, where it has layers without weights."""
    configs = blueprint.adapter_configs()
    if any(getattr(each, "use_dora", False) for each in configs.values()) and any(
        isinstance(layer, Linear8bitLt) for layer in blueprint.meta.modules()
    ):
        raise ConfigError("`quant=int8`: PEFT's DoRA cannot read the weights of int8 layers; use quant=nf4")
    config = configs.get("default")
    if config is None:
        return
    whole, dtype = getattr(config, "modules_to_save", None), str(blueprint.dtype).removeprefix("torch.")
    if whole and dtype in ("bfloat16", "float16") and not (args.bf16 or args.fp16):
        raise ConfigError(
            f"`lora.modules_to_save={list(whole)}`: are trained in float32, and without autocast the {dtype} layers "
            "beside them do not take their outputs; set training.bf16=true, or model.dtype=float32"
        )
    lora, adapter = blueprint.lora, blueprint.conf.adapter
    key = f"model.adapter={adapter}" if lora is None else f"lora.target_modules={lora.target_modules}"
    meta = build_meta_model(blueprint.config, blueprint.conf)
    cure = "use all-linear" if config.target_modules != "all-linear" else "leave them out with lora.exclude_modules"
    with _building(key, cure):
        policy = get_peft_model(meta, config, low_cpu_mem_usage=True)
    if isinstance(policy.get_output_embeddings(), BaseTunerLayer):
        raise ConfigError(
            f"`{key}`: TRL reads the weights of the output head past its adapter, so that it would never be trained; "
            "leave the head out, or put it into lora.modules_to_save"
        )


def _check_positions(blueprint: Blueprint, longest: int, args: DPOConfig) -> None:
    for model in filter(None, (blueprint, blueprint.reference_model)):
        if (room := count_learned_positions(model.meta)) is not None and longest > room:
            raise ConfigError(
                f"`training.max_length={args.max_length}`: rows have up to {longest} tokens, and {model.name} has "
                f"learned {room} positions; set training.max_length={room}"
            )


def _check_other_model(blueprint: Blueprint, data: PreferenceData) -> None:
    """Check on a few rows that another reference model has the policy's tokens."""
    other = blueprint.reference_model
    if other is None or other.base == blueprint.base:
        return
    ids = {token for row in data.train.take(min(len(data.train), 16)) for name in ID_COLUMNS for token in row[name]}
    if found := find_other_token(blueprint.tokenizer, other.conf, other.base, ids):
        raise ConfigError(
            f"`model.reference={blueprint.conf.reference}`: has other tokens than {blueprint.name}, such as {found}, "
            "so it would score other texts; name a reference with the same tokenizer"
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
    with _building(key, cure):
        if args.optim_target_modules:  # such an optimizer needs the run's own modules, which is a ValueError
            trainer.optimizer = torch.optim.SGD(trainer.model.parameters())
            with suppress(ValueError):
                trainer.get_optimizer_cls_and_kwargs(args)
        else:
            trainer.create_optimizer()
            _check_optim_args(args)
    kind, given = args.lr_scheduler_type.value, args.lr_scheduler_kwargs or {}
    if not isinstance(given, dict):
        raise ConfigError(f"`training.lr_scheduler_kwargs={given}`: must be a map, such as {{num_cycles: 1}}")
    parameters = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[args.lr_scheduler_type]).parameters
    of_trainer = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
    taken = [name for name in parameters if name not in of_trainer]
    key = f"training.lr_scheduler_kwargs={given}" if given else f"training.lr_scheduler_type={kind}"
    rule = f"lr_scheduler_kwargs for {kind}: {', '.join(taken) or 'none'}"
    is_open = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if not is_open and (unknown := [name for name in given if name not in taken]):  # some schedulers would ignore it
        raise ConfigError(f"`{key}`: there is no {unknown[0]}; {rule}")
    with _building(key, rule):
        _check_rates(trainer.create_scheduler(steps), steps)


def _check_optim_args(args: DPOConfig) -> None:
    """Check that the optimizer reads each of `optim_args`; transformers ignores names that it does not read."""
    given = [text for text in (args.optim_args or "").split(",") if text]
    whole = Trainer.get_optimizer_cls_and_kwargs(args)

    def is_whole(texts: list[str]) -> bool:
        other = copy.copy(args)
        other.optim_args = ",".join(texts)
        try:
            return bool(Trainer.get_optimizer_cls_and_kwargs(other) == whole)
        except (ValueError, AttributeError):  # it reads the value, which is of another type
            return False

    for at, text in enumerate(given):
        others, another = given[:at] + given[at + 1 :], f"{text.partition('=')[0]}=12345"
        if is_whole(others) and is_whole([*others, another]):  # a default may be written too
            raise ValueError(f"{text} changes nothing")


def _check_rates(scheduler: Any, steps: int) -> None:
    """Compute the learning rate at a thousand steps, the last one included, where some schedules divide by zero."""
    for factor in getattr(scheduler, "lr_lambdas", ()):
        for step in {*range(0, steps, steps // 1000 + 1), steps}:
            if not 0 <= factor(step) < math.inf:
                raise ValueError(f"the learning rate of step {step} is {factor(step):g} times that of the optimizer")


def _check_vocabulary(blueprint: Blueprint, data: PreferenceData) -> None:
    """Check that the embeddings have a row for the pad token and for each token of the data."""
    rows, tokenizer = blueprint.vocabulary.rows or count_rows(blueprint.meta), blueprint.tokenizer
    name, cure = blueprint.name, ""
    if (other := blueprint.reference_model) is not None:
        with renaming("model.reference", "model.model_name_or_path", blueprint.conf.reference):
            theirs = max(blueprint.vocabulary.rows or 0, count_rows(other.meta))
        if theirs < rows:
            rows, name, cure = theirs, f"the reference {other.name}", "name a reference with the same vocabulary"
    if len(tokenizer) <= rows:
        return
    if (pad := tokenizer.pad_token_id) >= rows:
        eos = write_override("model.pad_token", tokenizer.eos_token)
        raise ConfigError(
            f"`model.model_name_or_path={blueprint.name}`: its tokenizer's pad token {tokenizer.pad_token} has the id "
            f"{pad}, and the embeddings of {name} have {rows} rows; "
            f"{cure or f'set {eos}, or {_add_token(tokenizer.pad_token)}'}"
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
                cure = cure or (
                    f"set {_add_token(token)}"
                    if added is not None and added.special
                    else "resize the model's embeddings first"
                )
                raise ConfigError(
                    f"{data.locate(split, start * size + at)}: holds the token {token}, for which the "
                    f"embeddings of {name} have no row ({rows} rows, {len(tokenizer)} tokens); {cure}, or "
                    "leave it out of data and chat template"
                )


def _add_token(token: str) -> str:
    return f"'model.added_tokens=[\"{token}\"]'"

"""Installation of the engine into a trainer, part by part, with a reason for each part left out."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from trl import DPOTrainer

from dpo_runner.config.run_conf import RunConf
from dpo_runner.config.sections.run import EngineConf
from dpo_runner.data.splits import DataShape
from dpo_runner.model.blueprint import Blueprint
from dpo_runner.training.engine.layers.lean import make_lean
from dpo_runner.training.engine.packed.attention import IMPLEMENTATION
from dpo_runner.training.engine.packed.forward import is_certain, share_prefixes, trains_head, why_not_packable
from dpo_runner.training.engine.packed.self_check import find_difference
from dpo_runner.training.engine.reference.columns import add_reference_columns, find_active_adapters
from dpo_runner.training.engine.reference.identity import identify_reference
from dpo_runner.training.engine.reference.store import ReferenceStore
from dpo_runner.training.engine.token_batches import TokenBatches, choose_budget, why_not_grouped
from dpo_runner.training.memory.device import keep_freed_memory
from dpo_runner.training.ranks.group import is_first, share

_VERSION = 3
"""Version of the forward whose results the store keeps; raise it whenever the rounding may change."""


@dataclass
class Engine:
    """The engine's settings and datasets for a trainer.

    Attributes:
        max_tokens: limit of a micro-batch; None if micro-batches are counted in rows.
        has_reference_columns: whether the rows carry the reference's log-probabilities, so that it need not run.
        train_dataset: the trainer's training rows.
        eval_dataset: the trainer's evaluation rows; a dict by source if there are several.
    """

    max_tokens: int | None
    has_reference_columns: bool
    train_dataset: Any
    eval_dataset: Any


def install_engine(
    trainer: TokenBatches, conf: EngineConf, blueprint: Blueprint, shape: DataShape, say: Callable[[str], None]
) -> Engine:
    """Install the engine into a trainer that has not trained yet.

    Args:
        trainer: TRL's, with its reference in place.
        conf: selects the parts to install.
        blueprint: the model's.
        shape: row lengths after the trainer's truncation.
        say: shows one line to the user.
    """
    use_cpu = trainer.accelerator.device.type == "cpu"
    if conf.lean_layers:
        make_lean(trainer.model, use_cpu)
    reason = _share_prefixes(trainer, conf, shape.longest) if conf.shared_prefix else "engine.shared_prefix=false"
    shares = reason is None
    keep_freed_memory()  # after the self-check, whose blocks have other sizes and would leave gaps in the heap
    if conf.shared_prefix and reason is not None:
        say(f"engine.shared_prefix: TRL's own forward is taken; {reason}")
    engine = Engine(None, False, trainer.train_dataset, trainer.eval_dataset)
    if shares and not why_not_grouped(trainer.loss_types):
        batch = trainer.args.per_device_train_batch_size
        engine.max_tokens = choose_budget(conf, batch, sum(shape.largest), use_cpu)
    if blueprint.reference.is_stored:
        described = {"model": blueprint.name, "reference": blueprint.reference.described}
        _add_stored_reference(trainer, engine, conf, shares, described, say)
    return engine


def describe_engine(conf: RunConf, blueprint: Blueprint, longest: int) -> str:
    """Return one line for the plan: the parts of the engine that a run will use, and why not the others.

    Args:
        conf: the run's configuration.
        blueprint: its model's.
        longest: tokens of the longest row.
    """
    stored = "reference from the store" if blueprint.reference.is_stored else "reference run along"
    reason = why_not_packed(conf, blueprint, longest)
    if reason:
        return f"TRL's forward ({reason}), {stored}"
    shared = "shared prefixes" if is_certain(blueprint.meta) else "shared prefixes if both forwards agree"
    if conf.engine.max_tokens_per_micro_batch == 0:
        return f"{shared}, {stored}"
    reason = why_not_grouped(conf.training.loss_type)
    return f"{shared}, micro-batches by {f'rows ({reason})' if reason else 'tokens'}, {stored}"


def why_not_packed(conf: RunConf, blueprint: Blueprint, longest: int) -> str | None:
    """Return why a run's settings and model config require TRL's forward; None if they do not."""
    if not conf.engine.shared_prefix:
        return "engine.shared_prefix=false"
    chosen = conf.model.attn_implementation
    if chosen not in (None, IMPLEMENTATION):
        return f"model.attn_implementation is {chosen}, not {IMPLEMENTATION}"
    adapters = filter(None, [blueprint.build_peft()])
    return why_not_packable(blueprint.meta, longest, conf.training, adapters)


def _share_prefixes(trainer: DPOTrainer, conf: EngineConf, longest: int) -> str | None:
    """Install the packed forward in policy and reference, or return why not."""
    models = [model for model in (trainer.model, trainer.ref_model) if model is not None]
    for model in models:
        if reason := why_not_packable(model, longest, trainer.args):
            return reason
    is_trained = trains_head(trainer.model)
    if reason := share(find_difference(trainer, is_trained, repr(conf))):
        return reason
    for model in models:
        share_prefixes(model, is_trained)
    return None


def _add_stored_reference(
    trainer: DPOTrainer,
    engine: Engine,
    conf: EngineConf,
    shares: bool,
    description: Mapping[str, Any],
    say: Callable[[str], None],
) -> None:
    """Add the reference's log-probabilities to the engine's rows, from the store if they are there."""
    active = find_active_adapters(trainer)
    # On a CPU a trained head is scored by another kernel, with different rounding.
    head = "trained" if trains_head(trainer.model) and trainer.accelerator.device.type == "cpu" else "frozen"
    packed = f"packed {_VERSION}, head {head}"
    computed = f"{packed if shares else f'padded {_VERSION}'}, autocast {trainer.accelerator.mixed_precision}"
    products = torch.backends.mkldnn if trainer.accelerator.device.type == "cpu" else torch.backends.cuda
    computed += f", fp32 products {products.matmul.fp32_precision}"  # as training.tf32 has set it
    try:
        digest, made_of = identify_reference(trainer.ref_model or trainer.model, active, computed)
    except TypeError as error:
        say(
            "engine.reference_store: not used, the reference is computed in every step; it has "
            f"{error}, which cannot be hashed"
        )
        return
    limit = int(conf.reference_store_gb * 1e9)
    # Other processes than the first neither read nor write the file: network disks may lack locks.
    opened = ReferenceStore(digest, {**description, **made_of}, limit) if is_first() else nullcontext()
    with opened as store:

        def add(dataset: Any) -> Any:
            return add_reference_columns(trainer, dataset, store, say)

        engine.train_dataset = add(engine.train_dataset)
        if isinstance(engine.eval_dataset, dict):
            engine.eval_dataset = {name: add(rows) for name, rows in engine.eval_dataset.items()}
        elif engine.eval_dataset is not None:
            engine.eval_dataset = add(engine.eval_dataset)
    if store is not None and store.left_out:
        say(
            f"engine.reference_store_gb={conf.reference_store_gb:g}: the store is full; {store.left_out:,} pairs were "
            "scored and not kept; raise the limit, or run `python -m dpo_runner.cache clear reference`"
        )
    engine.has_reference_columns = True

"""Effects of configuration keys, removed keys and keys without effect. Imports no torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from dpo_runner.config.rules.training import LOSSES_WITH_LABEL_SMOOTHING
from dpo_runner.config.sections.run import RunFields


class Effect(Enum):
    """The effect of a configuration key."""

    COMPUTES = "what is computed: part of a sweep point's identity, fixed on resume"
    RECORDS = "what is recorded, or how fast: part of a sweep point's identity, may change on resume"
    PLACES = "names, places and execution: not part of the identity, may change on resume, not compared"


EFFECTS = {
    "sweep": Effect.PLACES,
    "wandb": Effect.PLACES,
    "run_name": Effect.PLACES,
    "run_dir": Effect.PLACES,
    "resume": Effect.PLACES,
    "dry_run": Effect.PLACES,
    "judge": Effect.PLACES,
    "benchmarks": Effect.PLACES,
    "generate": Effect.PLACES,
    "reward": Effect.PLACES,
    "rounds_patience": Effect.PLACES,
    "rounds_reference": Effect.PLACES,
    "expected": Effect.PLACES,
    "launch.timeout": Effect.PLACES,
    "hydra": Effect.PLACES,
    "training.output_dir": Effect.PLACES,
    "training.logging_dir": Effect.PLACES,
    "training.report_to": Effect.PLACES,
    "samples": Effect.RECORDS,
    "checks.on_out_of_memory": Effect.RECORDS,  # a run that ran out of memory is advised to set it and resume
    "training.save_strategy": Effect.RECORDS,
    "training.save_steps": Effect.RECORDS,
    "training.save_total_limit": Effect.RECORDS,
    "training.logging_strategy": Effect.RECORDS,
    "training.logging_steps": Effect.RECORDS,
    "training.logging_first_step": Effect.RECORDS,
    "training.log_level": Effect.RECORDS,
    "training.disable_tqdm": Effect.RECORDS,
    "training.dataloader_num_workers": Effect.RECORDS,
    "training.dataloader_prefetch_factor": Effect.RECORDS,
    "training.dataloader_pin_memory": Effect.RECORDS,
    "training.dataset_num_proc": Effect.RECORDS,
    "training.fsdp": Effect.RECORDS,
    "training.fsdp_config": Effect.RECORDS,
    "training.parallelism_config": Effect.RECORDS,
}
"""Keys and sections by effect; all others are `COMPUTES`.

training.dataloader_persistent_workers is `COMPUTES`: without it each epoch draws one more random number.
"""


_OF_ROUNDS = (
    *("generate", "reward", "rounds_patience", "rounds_reference"),
    *("samples.num_prompts", "samples.prompts", "samples.max_new_tokens", "samples.reward"),
)
"""Keys and sections that decide what rounds compute, beside those of a run."""


def effect_of(key: str, in_rounds: bool = False) -> Effect:
    """Return the effect of a dotted key, in a run or in a run of `rounds`."""
    parts = key.split(".")
    sections = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    if in_rounds and any(section in _OF_ROUNDS for section in sections):
        return Effect.COMPUTES
    return next((EFFECTS[section] for section in sections if section in EFFECTS), Effect.COMPUTES)


_QUANT = "use quant=nf4, fp4 or int8, or name a checkpoint that is quantized already"


@dataclass(frozen=True)
class RemovedKey:
    """A removed key.

    Attributes:
        advice: the replacement, for the error message.
        off: values without effect, the former default first.
        shapes_model: whether the run's model cannot be loaded without the key.
    """

    advice: str
    off: tuple[Any, ...]
    shapes_model: bool = False


REMOVED_KEYS = {
    "engine.compile_layers": RemovedKey("leave it out", (False,)),
    "engine.keep_dequantized": RemovedKey("leave it out", (None, False)),
    "quant.config": RemovedKey(_QUANT, ({},), shapes_model=True),
}
_NO_DEEPSPEED = "DeepSpeed writes pickles and programs into checkpoints; use distributed=fsdp2, which divides as much"
REMOVED_OPTIONS = {"quant=other": _QUANT}
"""Removed options of config groups, each with its replacement."""
OTHER_OPTIONS = {
    **{f"wandb={name}": "use wandb=disabled" for name in ("off", "none", "False", "dryrun")},
    **{f"distributed={name}": _NO_DEEPSPEED for name in ("zero2", "zero3", "deepspeed")},
    **{f"distributed={name}": "use distributed=fsdp2" for name in ("fsdp", "fsdp1")},
    **{f"{name}={none}": f"leave {name} out" for name in ("experiment", "sweep") for none in ("none", "None")},
}
"""Options that users of other tools may write, each with what it is here."""


def find_removed(key: str) -> str | None:
    """Return the error line if a dotted key, or one of its parents, was removed, else None."""
    for name, removed in REMOVED_KEYS.items():
        if key == name or key.startswith(f"{name}."):
            return f"`{name}`: was removed; {removed.advice}"
    return None


def split_removed(written: dict[Any, Any]) -> tuple[dict[Any, Any], dict[str, Any]]:
    """Split the contents of a run's config.yaml into current and removed keys.

    Args:
        written: the nested configuration, possibly damaged; not modified.

    Returns:
        The configuration without removed keys, and the removed keys that had an effect, with their values.
    """
    kept, active = dict(written), {}
    for key, removed in REMOVED_KEYS.items():
        section, _, name = key.partition(".")
        if isinstance(kept.get(section), dict) and name in kept[section]:
            kept[section] = dict(kept[section])
            value = kept[section].pop(name)
            if value not in removed.off:
                active[key] = value
    return kept, active


def add_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """Add removed keys with their former defaults, to reproduce the hashes of earlier versions."""
    added = dict(config)
    for key, removed in REMOVED_KEYS.items():
        section, _, name = key.partition(".")
        if isinstance(added.get(section), dict):
            added[section] = {**added[section], name: removed.off[0]}
    return added


@dataclass(frozen=True)
class NoOp:
    """A key that is ignored in some configurations.

    Attributes:
        key: the dotted key.
        applies: predicate: the key has no effect in this configuration.
        reason: explanation, phrased to follow the key.
    """

    key: str
    applies: Callable[[RunFields], bool]
    reason: str


def _losses(conf: RunFields) -> set[str]:
    loss = conf.training.loss_type
    return {loss} if isinstance(loss, str) else set(loss)


def _no_dropout(conf: RunFields) -> bool:
    return conf.training.disable_dropout


def _chooses_no_model(conf: RunFields) -> bool:
    training = conf.training
    on_plateau = training.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
    return not (training.load_best_model_at_end or training.save_strategy == "best" or on_plateau)


NO_OPS = (
    NoOp("lora.lora_dropout", _no_dropout, "has no effect with training.disable_dropout=true; set that to false"),
    NoOp("training.beta", lambda conf: _losses(conf) == {"sft"}, "training.loss_type=sft does not read it"),
    NoOp(
        "training.label_smoothing",
        lambda conf: not _losses(conf) & set(LOSSES_WITH_LABEL_SMOOTHING),
        f"has no effect on this training.loss_type; it is read by {', '.join(LOSSES_WITH_LABEL_SMOOTHING)}",
    ),
    NoOp(
        "training.discopop_tau",
        lambda conf: "discopop" not in _losses(conf),
        "has no effect on this training.loss_type; it is read by discopop",
    ),
    NoOp(
        "training.num_train_epochs",
        lambda conf: conf.training.max_steps > 0,
        "has no effect while training.max_steps is set; leave max_steps at -1",
    ),
    NoOp(
        "training.warmup_steps",
        lambda conf: conf.training.lr_scheduler_type == "constant",
        "has no effect with training.lr_scheduler_type=constant; use constant_with_warmup",
    ),
    *(
        NoOp(f"training.{name}", lambda conf: not conf.training.sync_ref_model, "needs training.sync_ref_model=true")
        for name in ("ref_model_mixup_alpha", "ref_model_sync_steps")
    ),
    NoOp(
        "training.f_alpha_divergence_coef",
        lambda conf: conf.training.f_divergence_type != "alpha_divergence",
        "needs training.f_divergence_type=alpha_divergence",
    ),
    NoOp(
        "training.liger_kernel_config", lambda conf: not conf.training.use_liger_kernel, "needs use_liger_kernel=true"
    ),
    NoOp("rounds_patience", lambda conf: not conf.rounds, "needs rounds=N"),
    NoOp("rounds_reference", lambda conf: not conf.rounds, "needs rounds=N"),
    NoOp("training.fsdp_config", lambda conf: not conf.training.fsdp, "needs training.fsdp"),
    NoOp(
        "training.optim_target_modules",
        lambda conf: not conf.training.optim.startswith(("galore", "apollo")),
        "is read by the optimizers galore_… and apollo_…",
    ),
    *(
        NoOp(f"training.{name}", _chooses_no_model, "needs training.load_best_model_at_end=true")
        for name in ("metric_for_best_model", "greater_is_better")
    ),
)


def find_no_op(key: str, confs: Sequence[RunFields]) -> str | None:
    """Return why an axis over `key` changes nothing in any of `confs`, or None if it may."""
    if effect_of(key, any(conf.rounds for conf in confs)) is Effect.PLACES:
        return "does not change what is computed, so its values would run the same thing again"
    rules = [rule for rule in NO_OPS if rule.key == key]
    return next((rule.reason for rule in rules if all(map(rule.applies, confs))), None)


def find_ignored(conf: RunFields, overrides: Sequence[str]) -> list[str]:
    """Return one line for each override of a run that has no effect in its configuration."""
    written = {text.lstrip("+").partition("=")[0] for text in overrides}
    readers = {} if conf.rounds else {"generate": "python -m dpo_runner.generate, and by a run with rounds=N"}
    if not (conf.samples.reward or conf.rounds):
        readers["reward"] = "python -m dpo_runner.generate, and by a run with samples.reward=4 or rounds=N"
    elsewhere = {key: readers[key.split(".")[0]] for key in sorted(written) if key.split(".")[0] in readers}
    ignored = [f"{rule.key}: {rule.reason}" for rule in NO_OPS if rule.key in written and rule.applies(conf)]
    return [*ignored, *(f"{key}: is read by {reader}" for key, reader in elsewhere.items())]


def ignored_keys(conf: RunFields) -> frozenset[str]:
    """Return the dotted keys that have no effect in this configuration."""
    return frozenset(rule.key for rule in NO_OPS if rule.applies(conf))

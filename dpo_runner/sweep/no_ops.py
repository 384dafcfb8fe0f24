"""Which keys have no effect beside which others, so that no sweep compares identical runs. Imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass

from dpo_runner.config import OUTSIDE, RunConf
from dpo_runner.training_rules import LOSSES_WITH_LABEL_SMOOTHING


@dataclass(frozen=True)
class NoOp:
    """A key that is not read.

    Attributes:
        key: the dotted key.
        applies: whether it has no effect in a configuration.
        reason: why, in words that follow the key.
    """

    key: str
    applies: Callable[[RunConf], bool]
    reason: str


def _losses(conf: RunConf) -> set[str]:
    loss = conf.training.loss_type
    return {loss} if isinstance(loss, str) else set(loss)


def _no_dropout(conf: RunConf) -> bool:
    return conf.training.disable_dropout


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
)


def find_no_op(key: str, confs: list[RunConf]) -> str | None:
    """Return why an axis over `key` changes nothing in any of `confs`, or None where it may."""
    if key.partition(".")[0] in OUTSIDE:
        return "does not change what is computed, so its values would run the same thing again"
    rules = [rule for rule in NO_OPS if rule.key == key]
    return next((rule.reason for rule in rules if all(map(rule.applies, confs))), None)


def ignored_keys(conf: RunConf) -> frozenset[str]:
    """Return the dotted keys that this configuration does not read."""
    return frozenset(rule.key for rule in NO_OPS if rule.applies(conf))

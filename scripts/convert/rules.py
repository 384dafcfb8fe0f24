"""Rules that turn another project's keys into overrides. docs/migration.md shows them as tables."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Config = Mapping[str, Any]
"""Another project's configuration, without keys that are null."""
Overrides = dict[str, Any]
"""Values by key or group, such as `{"quant": "nf4", "training.beta": 0.1}`."""


@dataclass(frozen=True)
class Rule:
    """The counterpart of another project's key.

    Attributes:
        ours: our key, or an override, as the table shows it; empty if there is none.
        note: what the reader should know: what differs, or what to do instead.
        build: makes overrides of the value and the whole configuration; without it, `ours` gets the value.
        idle: values without effect, which need no counterpart.
        tells: returns whether the note is also said, of a value and the overrides made of it.
    """

    ours: str = ""
    note: str = ""
    build: Callable[[Any, Config], Overrides] | None = None
    idle: tuple[Any, ...] = ()
    tells: Callable[[Any, Overrides], bool] = field(default=lambda value, made: False)


@dataclass(frozen=True)
class Project:
    """Another project.

    Attributes:
        name: its name.
        rules: by its key.
        defaults: its own defaults, in its keys, where ours differ.
        spellings: its former or other names of keys, with those in `rules`.
        refuse: returns why a configuration is none of DPO, or None.
    """

    name: str
    rules: dict[str, Rule]
    defaults: dict[str, Any]
    spellings: dict[str, str] = field(default_factory=dict)
    refuse: Callable[[Config], str | None] = field(default=lambda config: None)


def none(note: str, *idle: Any) -> Rule:
    """Return the rule of a key without counterpart."""
    return Rule(note=note, idle=idle)


def same(ours: str, note: str = "") -> Rule:
    """Return the rule of a key that takes the same values."""
    return Rule(ours, note)


def when(value: Any, ours: str, overrides: Overrides, note: str = "") -> Rule:
    """Return the rule of a switch: overrides for one value, and none for any other."""
    return Rule(ours, note, lambda given, config: overrides if given == value else {})


def split(text: Any) -> list[str]:
    """Return the items of a list that may be written with commas."""
    return [item.strip() for item in text.split(",")] if isinstance(text, str) else list(text)


HUB = "`python -m dpo_runner.export RUN_DIR --out DIR --push-to-hub ID` uploads the result"
TEMPLATE = "the chat template is the tokenizer's; `model.chat_template` sets another one"
CONTINUES = "the same command with the same `run_dir` continues a run"
LAYOUT = "the layout of rows is recognised; `data.format` and `data.columns` set it"
UNPADDED = "pairs are trained without padding"
DIVIDED = "for weights divided between GPUs use `distributed=fsdp2`"


def report_to(value: Any, config: Config) -> Overrides:
    """W&B is a group here; the other trackers have their names."""
    named = [name for name in split(value) if name not in ("none", "all")]
    known = [name for name in named if name in ("tensorboard", "mlflow", "trackio")]
    return {"wandb": "online" if "wandb" in named else "disabled"} | ({"training.report_to": known} if known else {})


def fsdp(value: Any, config: Config) -> Overrides:
    return {"distributed": "fsdp2"} if value else {}


def is_lost(value: Any, made: Overrides) -> bool:
    return bool(value) and not made


def mix_sft(alpha: float) -> Overrides:
    return {"training.loss_type": ["sigmoid", "sft"], "training.loss_weights": [1.0, alpha]} if alpha else {}


def dropout(value: float, config: Config) -> Overrides:
    adapts = config.get("use_peft") or config.get("adapter") or config.get("finetuning_type") == "lora"
    return {"lora.lora_dropout": value} if adapts and not config["disable_dropout"] else {}


DROPOUT = Rule("lora.lora_dropout", "has no effect there unless `disable_dropout` is false", dropout, tells=is_lost)

COMMON: dict[str, Rule] = {
    "output_dir": same("run_dir"),
    "run_name": same("run_name"),
    "seed": same("seed"),
    "trust_remote_code": same("model.trust_remote_code"),
    "warmup_ratio": same("training.warmup_steps", "below 1 it is a share of all steps"),
    "report_to": Rule("wandb=online", "also `training.report_to`", report_to),
    "deepspeed": none(DIVIDED),
    "fsdp": Rule("distributed=fsdp2", "", fsdp, (False, "", [])),
    "fsdp_config": none("`training.fsdp_config` has FSDP2's settings"),
    "hub_model_id": none(HUB),
    "hub_strategy": none(HUB),
    "push_to_hub": none(HUB, False),
    "resume_from_checkpoint": none(CONTINUES),
    "overwrite_output_dir": none("another `run_dir` starts another run", True, False),
    "max_prompt_length": none("was removed from TRL; `training.max_length` limits prompt and answer together"),
    "save_safetensors": none("all weights are written as safetensors", True),
    "group_by_length": none(UNPADDED, True, False),
    "do_train": none("a run always trains; `dry_run=true` stops before", True),
    "do_eval": none("`training.eval_strategy` decides", True, False),
    "remove_unused_columns": none("the trainer gets token ids alone", True, False),
    "ddp_timeout": none("`launch.timeout` limits the wait for other processes at the start"),
}
"""Keys that several projects share."""

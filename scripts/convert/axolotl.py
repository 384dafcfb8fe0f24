"""Keys of axolotl's files with `rl: dpo` or `rl: ipo`."""

from pathlib import Path
from typing import Any

from scripts.convert.rules import (
    COMMON,
    DROPOUT,
    LAYOUT,
    TEMPLATE,
    UNPADDED,
    Config,
    Overrides,
    Project,
    Rule,
    mix_sft,
    none,
    same,
    when,
)

_COLUMNS = {
    "field_messages": "prompt",
    "field_prompt": "prompt",
    "field_chosen": "chosen",
    "field_rejected": "rejected",
}


def _refuse(config: Config) -> str | None:
    return None if config.get("rl") in ("dpo", "ipo") else f"`rl: {config.get('rl')}`: is not DPO"


def _adapt(value: str, config: Config) -> Overrides:
    if not value or "lora_model_dir" in config:
        return {"lora": "none"}
    made: Overrides = {"lora.r": config.get("lora_r", 8), "lora.lora_alpha": config.get("lora_alpha", 16)}
    modules = "all-linear" if config.get("lora_target_linear") else config.get("lora_target_modules")
    return made | ({"lora.target_modules": modules} if modules else {})


def _schedule(strategy: str, steps: str) -> Rule:
    """Return the rule of a number of evaluations or checkpoints in each epoch."""

    def build(value: float, config: Config) -> Overrides:
        if value <= 0 or (strategy == "eval_strategy" and not _evaluates(config)):
            return {f"training.{strategy}": "no"}
        if value == 1:
            return {f"training.{strategy}": "epoch"}
        share = 1 / (value * float(config["num_epochs"]))
        return {f"training.{strategy}": "steps", f"training.{steps}": round(share, 6)}

    return Rule(f"training.{steps}", f"a share of all steps; 1: `training.{strategy}=epoch`", build)


def _evaluates(config: Config) -> bool:
    return bool(config["val_set_size"]) or "test_datasets" in config


def _evaluate_at(value: float, config: Config) -> Overrides:
    return {"training.eval_strategy": "steps", "training.eval_steps": value} if _evaluates(config) else {}


def _save_at(value: float, config: Config) -> Overrides:
    return {"training.save_strategy": "steps", "training.save_steps": value}


def _load(value: list[dict[str, Any]], config: Config) -> Overrides:
    made: Overrides = {"data": "local_file"}
    for number, source in enumerate(value, 1):
        place = "data" if len(value) == 1 else f"data.sources.source_{number}"
        fields = {"path": source["path"], "subset": source.get("name"), "split": source.get("split")}
        if files := source.get("data_files"):
            fields["path"] = files if isinstance(files, str) else files[0]
        columns = {source[key]: ours for key, ours in _COLUMNS.items() if source.get(key, ours) != ours}
        fields |= {"columns": columns} if columns else {}
        made |= {f"{place}.{key}": item for key, item in fields.items() if item is not None}
    return made


def _evaluate(value: list[dict[str, Any]], config: Config) -> Overrides:
    path = str(value[0].get("path"))
    if Path(path).suffix:
        return {"data.eval_path": path}
    return {"data.eval_split": value[0].get("split", "test")}


def _hold_out(value: float, config: Config) -> Overrides:
    if "test_datasets" in config:
        return {}
    if value > 1:
        return {"data.eval_fraction": "???"}
    return {"data.eval_fraction": float(value)} | ({} if value else {"training.eval_strategy": "no"})


def _lower_end(value: float, config: Config) -> Overrides:
    return {
        "training.lr_scheduler_type": "cosine_with_min_lr",
        "training.lr_scheduler_kwargs": {"min_lr_rate": value},
    }


def _track(tracker: str) -> Rule:
    return when(True, f"training.report_to={tracker}", {"training.report_to": [tracker]})


_ONLINE = Rule("wandb.project", "with `wandb=online`", lambda value, _: {"wandb": "online", "wandb.project": value})

AXOLOTL = Project(
    "axolotl",
    COMMON
    | {
        "base_model": same("model.model_name_or_path"),
        "revision_of_model": same("model.revision"),
        "model_type": none("the model's config names its class"),
        "tokenizer_type": none("the tokenizer's config names its class"),
        "strict": none("unknown keys are always errors", True, False),
        "rl": Rule(
            "training.loss_type=ipo",
            "for ipo",
            lambda value, _: {"training.loss_type": "ipo"} if value == "ipo" else {},
        ),
        "rl_beta": same("training.beta"),
        "dpo_loss_type": same("training.loss_type"),
        "dpo_loss_weights": same("training.loss_weights"),
        "dpo_label_smoothing": same("training.label_smoothing"),
        "dpo_use_weighting": same("training.use_weighting"),
        "rpo_alpha": Rule(
            "training.loss_weights", "with `training.loss_type=[sigmoid,sft]`", lambda value, _: mix_sft(value)
        ),
        "load_in_4bit": when(True, "quant=nf4", {"quant": "nf4"}),
        "load_in_8bit": when(True, "quant=int8", {"quant": "int8"}),
        "adapter": Rule("lora=r16", "without it: `lora=none`", _adapt),
        "lora_model_dir": same("model.adapter", "axolotl does not load its weights in DPO"),
        "lora_r": Rule("lora.r", "", lambda value, config: {}),
        "lora_alpha": Rule("lora.lora_alpha", "", lambda value, config: {}),
        "lora_dropout": DROPOUT,
        "lora_target_linear": Rule("lora.target_modules=all-linear", "", lambda value, config: {}),
        "lora_target_modules": Rule("lora.target_modules", "", lambda value, config: {}),
        "lora_modules_to_save": same("lora.modules_to_save"),
        "lora_fan_in_fan_out": none("PEFT sets it", False),
        "peft_use_dora": same("lora.use_dora"),
        "peft_use_rslora": same("lora.use_rslora"),
        "datasets": Rule("data.path", f"several: `data.sources.NAME.path`; {LAYOUT}", _load),
        "test_datasets": Rule("data.eval_path", "or `data.eval_split`", _evaluate),
        "val_set_size": Rule("data.eval_fraction", "a share; numbers of rows have no counterpart", _hold_out),
        "dataset_prepared_path": none("the cache of token ids is `$DPO_RUNNER_CACHE`"),
        "dataset_processes": same("training.dataset_num_proc"),
        "chat_template": none(TEMPLATE),
        "special_tokens": Rule(
            "model.pad_token",
            "for pad_token; other tokens are the tokenizer's, and answers end with the chat template's end of a turn",
            lambda value, _: {"model.pad_token": value["pad_token"]} if "pad_token" in value else {},
            tells=lambda value, _: bool(value.keys() - {"pad_token"}),
        ),
        "tokens": same("model.added_tokens"),
        "sequence_len": same("training.max_length"),
        "sample_packing": none(UNPADDED, True, False),
        "eval_sample_packing": none(UNPADDED, True, False),
        "pad_to_sequence_len": none(UNPADDED, True, False),
        "train_on_inputs": none("DPO scores answers alone", False),
        "micro_batch_size": same("training.per_device_train_batch_size"),
        "eval_batch_size": same("training.per_device_eval_batch_size"),
        "num_epochs": same("training.num_train_epochs"),
        "optimizer": same("training.optim"),
        "lr_scheduler": same("training.lr_scheduler_type"),
        "cosine_min_lr_ratio": Rule("training.lr_scheduler_kwargs", "{min_lr_rate: SHARE}", _lower_end),
        "evals_per_epoch": _schedule("eval_strategy", "eval_steps"),
        "saves_per_epoch": _schedule("save_strategy", "save_steps"),
        "eval_steps": Rule("training.eval_steps", "with `training.eval_strategy=steps`", _evaluate_at),
        "save_steps": Rule("training.save_steps", "with `training.save_strategy=steps`", _save_at),
        "bf16": Rule(
            "training.bf16", "auto: null, the default", lambda v, _: {} if v == "auto" else {"training.bf16": v}
        ),
        "flash_attention": when(True, "model.attn_implementation", {"model.attn_implementation": "flash_attention_2"}),
        "xformers_attention": none("`model.attn_implementation` has transformers' implementations", False),
        "sdp_attention": when(True, "model.attn_implementation", {"model.attn_implementation": "sdpa"}),
        "early_stopping_patience": none("`training.load_best_model_at_end=true` keeps the best checkpoint"),
        "eval_table_size": none("`samples.num_prompts` sets how many prompts are answered"),
        "eval_max_new_tokens": same("samples.max_new_tokens"),
        "use_tensorboard": _track("tensorboard"),
        "use_mlflow": _track("mlflow"),
        "wandb_project": _ONLINE,
        "wandb_entity": same("wandb.entity"),
        "wandb_name": same("wandb.name"),
        "wandb_mode": same("wandb.mode"),
        "wandb_watch": none("gradients are not logged"),
        "wandb_log_model": none("weights are not uploaded"),
    },
    {
        "adapter": "",
        "rl_beta": 0.1,
        "sequence_len": 512,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "num_epochs": 1.0,
        "optimizer": "adamw_torch_fused",
        "lr_scheduler": "cosine",
        "warmup_ratio": 0.03,
        "val_set_size": 0.0,
        "save_strategy": "epoch",
        "save_total_limit": 4,
        "disable_dropout": True,
        "seed": 42,
    },
    {"dpo_beta": "rl_beta"},
    _refuse,
)

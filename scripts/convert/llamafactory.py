"""Keys of LLaMA-Factory's training files with `stage: dpo`."""

import json
from pathlib import Path
from typing import Any

from scripts.convert.rules import (
    COMMON,
    DIVIDED,
    DROPOUT,
    TEMPLATE,
    UNPADDED,
    Config,
    Overrides,
    Project,
    Rule,
    mix_sft,
    none,
    same,
    split,
)

_ATTENTION = {"fa2": "flash_attention_2", "sdpa": "sdpa", "disabled": "eager"}


def _refuse(config: Config) -> str | None:
    stage, loss = config.get("stage"), config.get("pref_loss", "sigmoid")
    if stage != "dpo":
        return f"`stage: {stage}`: is not DPO"
    if loss not in ("sigmoid", "hinge", "ipo"):
        return f"`pref_loss: {loss}`: is another algorithm; see `training.loss_type`"
    if (kind := config.get("finetuning_type", "lora")) not in ("lora", "full"):
        return f"`finetuning_type: {kind}`: there are lora and full"
    return None


def _adapt(value: str, config: Config) -> Overrides:
    adapter = config.get("adapter_name_or_path")
    if value == "full" or (adapter and not config.get("create_new_adapter")):
        return {"lora": "none"}
    target, rank = config.get("lora_target", "all"), config.get("lora_rank", 8)
    shape = {"r": rank, "lora_alpha": config.get("lora_alpha", 2 * rank)}
    modules = "all-linear" if target == "all" else split(target)
    return {f"lora.{key}": item for key, item in shape.items()} | {"lora.target_modules": modules}


def _quantize(value: int, config: Config) -> Overrides:
    if value == 8:
        return {"quant": "int8"}
    kind, nested = config.get("quantization_type", "nf4"), config.get("double_quantization", True)
    return {"quant": kind, "quant.bnb_4bit_use_double_quant": nested}


def _find_rows(value: Any, config: Config) -> Overrides:
    """Look the data sets up in dataset_info.json, if it is there."""
    folder = Path(config.get("dataset_dir", "data"))
    file = folder / "dataset_info.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    names = split(value)
    made: Overrides = {"data": "local_file"}
    for name in names:
        entry = known.get(name, {})
        place = "data" if len(names) == 1 else f"data.sources.{name}"
        path = entry.get("hf_hub_url") or (str(folder / entry["file_name"]) if "file_name" in entry else "???")
        fields = {"path": path, "subset": entry.get("subset"), "split": entry.get("split")}
        made |= {f"{place}.{key}": item for key, item in fields.items() if item is not None}
        if "max_samples" in config:
            made[f"{place}.max_train_samples"] = config["max_samples"]
    return made


def _hold_out(value: float, config: Config) -> Overrides:
    if value >= 1:
        return {"data.eval_fraction": "???"}
    return {"data.eval_fraction": float(value)} | ({} if value else {"training.eval_strategy": "no"})


LLAMA_FACTORY = Project(
    "LLaMA-Factory",
    COMMON
    | {
        "stage": none("is always dpo", "dpo"),
        "model_name_or_path": same("model.model_name_or_path"),
        "model_revision": same("model.revision"),
        "adapter_name_or_path": same("model.adapter", "the reference has this adapter too; theirs does not"),
        "create_new_adapter": Rule(
            "model.adapter_mode=merge", "", lambda value, _: {"model.adapter_mode": "merge"} if value else {}
        ),
        "finetuning_type": Rule("lora=none", "for full; lora: `lora=r16`", _adapt),
        "lora_rank": Rule("lora.r", "", lambda value, config: {}),
        "lora_alpha": Rule("lora.lora_alpha", "", lambda value, config: {}),
        "lora_target": Rule("lora.target_modules", "all: `all-linear`", lambda value, config: {}),
        "lora_dropout": DROPOUT,
        "additional_target": Rule("lora.modules_to_save", "", lambda value, _: {"lora.modules_to_save": split(value)}),
        "use_rslora": same("lora.use_rslora"),
        "use_dora": same("lora.use_dora"),
        "quantization_bit": Rule("quant=nf4", "8: `quant=int8`", _quantize),
        "quantization_type": Rule("quant=fp4", "or nf4", lambda value, config: {}),
        "double_quantization": Rule("quant.bnb_4bit_use_double_quant", "", lambda value, config: {}),
        "flash_attn": Rule(
            "model.attn_implementation",
            "fa2: `flash_attention_2`",
            lambda value, _: {"model.attn_implementation": _ATTENTION[value]} if value in _ATTENTION else {},
        ),
        "pref_beta": same("training.beta"),
        "pref_loss": same("training.loss_type"),
        "pref_ftx": Rule(
            "training.loss_weights", "with `training.loss_type=[sigmoid,sft]`", lambda value, _: mix_sft(value)
        ),
        "dpo_label_smoothing": none("cDPO is not in TRL; `training.loss_type=robust` is the nearest", 0, 0.0),
        "ld_alpha": same("training.ld_alpha"),
        "ref_model": same("model.reference"),
        "dataset": Rule("data.path", "its file, or id on the hub, is looked up in dataset_info.json", _find_rows),
        "dataset_dir": Rule("data.path", "the folder of dataset_info.json", lambda value, config: {}),
        "eval_dataset": none("set `data.eval_path` or `data.eval_split`"),
        "template": none(TEMPLATE),
        "cutoff_len": same("training.max_length", "longer pairs are dropped; `data.on_overlong` cuts them"),
        "max_samples": Rule("data.max_train_samples", "", lambda value, config: {}),
        "val_size": Rule("data.eval_fraction", "a share; numbers of rows have no counterpart", _hold_out),
        "overwrite_cache": none("caches are keyed by content", True, False),
        "preprocessing_num_workers": same("training.dataset_num_proc"),
        "plot_loss": none("the model card has the curves", True, False),
        "packing": none(UNPADDED, True, False),
        "neat_packing": none(UNPADDED, True, False),
        "disable_gradient_checkpointing": Rule(
            "training.gradient_checkpointing", "", lambda value, _: {"training.gradient_checkpointing": not value}
        ),
        "enable_liger_kernel": same("training.use_liger_kernel"),
        "use_swanlab": none("trackers are W&B and those of `training.report_to`", False),
        "deepspeed": none(DIVIDED),
    },
    {
        "finetuning_type": "lora",
        "pref_beta": 0.1,
        "pref_loss": "sigmoid",
        "cutoff_len": 2048,
        "val_size": 0.0,
        "learning_rate": 5e-5,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "num_train_epochs": 3.0,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "save_steps": 500,
        "logging_steps": 500,
        "disable_dropout": True,
    },
    {"train_dataset": "dataset", "evaluation_strategy": "eval_strategy"},
    _refuse,
)

"""Keys of `trl dpo` and of alignment-handbook's recipes, which extend them."""

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
    none,
    same,
)

_PEFT_DEFAULT = ["q_proj", "v_proj"]


def _quantize(bits: int, config: Config) -> Overrides:
    if bits == 8:
        return {"quant": "int8"}
    nested = bool(config.get("use_bnb_nested_quant", False))
    return {"quant": config.get("bnb_4bit_quant_type", "nf4"), "quant.bnb_4bit_use_double_quant": nested}


def _adapt(value: Any, config: Config) -> Overrides:
    if not value:
        return {"lora": "none"}
    return {
        "lora.r": config.get("lora_r", 16),
        "lora.lora_alpha": config.get("lora_alpha", 32),
        "lora.target_modules": config.get("lora_target_modules", _PEFT_DEFAULT),
    }


def _lora(ours: str, note: str = "") -> Rule:
    return Rule(ours, note, lambda value, config: {ours: value} if config.get("use_peft") else {})


def _name(path: str, taken: Overrides) -> str:
    """Return a short name for a source that is not taken."""
    name = "".join(letter if letter.isalnum() else "_" for letter in path.rpartition("/")[2]).strip("_").lower()
    count = sum(key.startswith("data.sources.") and key.endswith(".path") for key in taken)
    return f"{name or 'source'}_{count + 1}"


def _mix(value: Any, config: Config) -> Overrides:
    """Turn a list of data sets, in TRL's or alignment-handbook's words, into `data.sources`."""
    listed = value["datasets"] if isinstance(value, dict) else value
    made: Overrides = {"data": "local_file"}
    for source in listed:
        name = f"data.sources.{_name(source.get('path') or source['id'], made)}"
        fields = {
            "path": source.get("path") or source["id"],
            "subset": source.get("name") or source.get("config"),
            "split": source.get("split"),
        }
        made |= {f"{name}.{key}": item for key, item in fields.items() if item not in (None, "default")}
    if any(source.get("weight", source.get("fraction", 1)) != 1 for source in listed):
        made["data.sources.NAME.weight"] = "???"
    held_out = value.get("test_split_size") if isinstance(value, dict) else None
    if held_out is not None:
        made["data.eval_fraction"] = held_out if held_out < 1 else "???"
    return made


def _mixer(value: dict[str, float], config: Config) -> Overrides:
    """Turn alignment-handbook's `dataset_mixer` with its `dataset_splits` into a source, or several."""
    train, *test = config.get("dataset_splits", ["train"])
    fields = {"split": train} | ({"eval_split": test[0]} if test else {})
    made: Overrides = {"data": "local_file"}
    for path in value:
        place = "data" if len(value) == 1 else f"data.sources.{_name(path, made)}"
        made |= {f"{place}.path": path} | {f"{place}.{key}": item for key, item in fields.items()}
    return made | ({"data.sources.NAME.weight": "???"} if set(value.values()) != {1} else {})


def _evaluate(value: Any, config: Config) -> Overrides:
    return {"training.eval_strategy": value} | ({"data.eval_fraction": 0.0} if value == "no" else {})


def _test_split(value: str, config: Config) -> Overrides:
    return {"data.eval_split": value} if config["eval_strategy"] != "no" and "dataset_name" in config else {}


_SHARES = "shares of a data set's rows have no counterpart; `weight` of `data.sources` is the share of the mixture"
_COLUMNS = {
    "dataset_name": Rule("data.path", LAYOUT, lambda value, _: {"data": "local_file", "data.path": value}),
    "dataset_config": same("data.subset"),
    "dataset_train_split": same("data.split"),
    "dataset_test_split": Rule("data.eval_split", "if it evaluates", _test_split),
    "dataset_streaming": none("all rows are read", False),
    "datasets": Rule("data.sources.NAME.path", _SHARES, _mix),
}

_RULES: dict[str, Rule] = COMMON | {
    "model_name_or_path": same("model.model_name_or_path"),
    "model_revision": same("model.revision"),
    "dtype": same("model.dtype"),
    "attn_implementation": same("model.attn_implementation"),
    "load_in_4bit": Rule("quant=nf4", "", lambda value, config: _quantize(4, config) if value else {}),
    "load_in_8bit": Rule("quant=int8", "", lambda value, config: _quantize(8, config) if value else {}),
    "bnb_4bit_quant_type": Rule("quant=fp4", "or nf4", lambda value, config: {}),
    "use_bnb_nested_quant": Rule("quant.bnb_4bit_use_double_quant", "", lambda value, config: {}),
    "use_peft": Rule("lora=r16", "false: `lora=none`", _adapt),
    "lora_r": _lora("lora.r"),
    "lora_alpha": _lora("lora.lora_alpha"),
    "lora_dropout": DROPOUT,
    "lora_target_modules": _lora("lora.target_modules", "TRL's default is PEFT's for the architecture, often q and v"),
    "lora_target_parameters": _lora("lora.target_parameters"),
    "lora_modules_to_save": _lora("lora.modules_to_save"),
    "lora_task_type": none("is always CAUSAL_LM", "CAUSAL_LM"),
    "use_rslora": _lora("lora.use_rslora"),
    "use_dora": _lora("lora.use_dora"),
    "eval_strategy": Rule("training.eval_strategy", "", _evaluate),
    "padding_free": none(UNPADDED, True, False),
    "truncation_mode": Rule(
        "training.truncation_mode",
        "rows that are too long are TRL's with `data.on_overlong=trl`; ours are dropped by default",
        lambda value, config: {"training.truncation_mode": value, "data.on_overlong": "trl"},
    ),
    "project": same("wandb.project"),
    **_COLUMNS,
}

_DEFAULTS: dict[str, Any] = {
    "use_peft": False,
    "lora_dropout": 0.05,
    "eval_strategy": "no",
    "truncation_mode": "keep_start",
    "dataset_test_split": "test",
    "beta": 0.1,
    "loss_type": "sigmoid",
    "learning_rate": 1e-6,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "max_length": 1024,
    "save_steps": 500,
    "logging_steps": 10,
    "disable_dropout": True,
}

_SPELLINGS = {"torch_dtype": "dtype", "evaluation_strategy": "eval_strategy"}

TRL = Project("TRL", _RULES, _DEFAULTS | {"dtype": "float32"}, _SPELLINGS)

HANDBOOK = Project(
    "alignment-handbook",
    _RULES
    | {
        "chat_template": none(TEMPLATE),
        "dataset_mixer": Rule("data.sources.NAME.path", f"one data set: `data.path`; {_SHARES}", _mixer),
        "dataset_splits": Rule("data.split", "the second: `data.eval_split`", lambda value, config: {}),
        "dataset_mixture": Rule("data.sources.NAME.path", _SHARES, _mix),
        "preprocessing_num_workers": same("training.dataset_num_proc"),
        "hub_model_revision": _RULES["hub_model_id"],
        "tee_stdout": none("run.log has the output", True, False),
    },
    _DEFAULTS,
    _SPELLINGS,
)

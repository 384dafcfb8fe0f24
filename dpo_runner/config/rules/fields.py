"""Rules of single fields: types, ranges, choices, texts. Imports no torch."""

import dataclasses
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo_runner.config.rules.training import OTHER_VALUES
from dpo_runner.config.sections.run import RunFields
from dpo_runner.errors import suggest
from dpo_runner.io.masking import holds_secret

# (key, low, low inclusive, high, high inclusive); None: no bound
RANGES: list[tuple[str, float | None, bool, float | None, bool]] = [
    ("training.beta", 0, False, None, False),
    ("training.learning_rate", 0, False, None, False),
    ("training.per_device_train_batch_size", 1, True, None, False),
    ("training.per_device_eval_batch_size", 1, True, None, False),
    ("training.gradient_accumulation_steps", 1, True, None, False),
    ("training.weight_decay", 0, True, None, False),
    ("training.warmup_steps", 0, True, None, False),
    ("training.adam_beta1", 0, True, 1, False),
    ("training.adam_beta2", 0, True, 1, False),
    ("training.adam_epsilon", 0, False, None, False),
    ("training.max_grad_norm", 0, True, None, False),
    ("training.label_smoothing", 0, True, 1, False),
    ("training.ld_alpha", 0, True, 1, True),
    ("training.max_length", 2, True, None, False),
    ("training.logging_steps", 0, False, None, False),
    ("training.save_steps", 0, False, None, False),
    ("training.eval_steps", 0, False, None, False),
    ("training.save_total_limit", 1, True, None, False),
    ("training.discopop_tau", 0, False, None, False),
    ("training.precompute_ref_batch_size", 1, True, None, False),
    ("training.dataset_num_proc", 1, True, None, False),
    ("training.dataloader_num_workers", 0, True, None, False),
    ("training.dataloader_prefetch_factor", 1, True, None, False),
    ("training.data_seed", 0, True, None, False),
    ("training.eval_accumulation_steps", 1, True, None, False),
    ("training.eval_delay", 0, True, None, False),
    ("training.torch_empty_cache_steps", 1, True, None, False),
    ("training.neftune_noise_alpha", 0, True, None, False),
    ("training.pad_to_multiple_of", 1, True, None, False),
    ("training.ref_model_mixup_alpha", 0, True, 1, True),
    ("training.ref_model_sync_steps", 1, True, None, False),
    ("lora.r", 1, True, None, False),
    ("lora.lora_alpha", 1, True, None, False),
    ("lora.lora_dropout", 0, True, 1, False),
    ("quant.llm_int8_threshold", 0, True, None, False),
    ("data.eval_fraction", 0, True, 1, False),
    ("data.max_bad_fraction", 0, True, 1, True),
    ("data.near_duplicate_threshold", 0.5, True, 1, True),
    ("data.decontaminate_ngram", 1, True, None, False),
    ("data.min_score_gap", 0, True, None, False),
    ("data.max_length_difference", 0, True, None, False),
    ("data.max_similarity", 0, True, 1, True),
    ("data.max_train_samples", 1, True, None, False),
    ("data.max_eval_samples", 1, True, None, False),
    ("checks.max_skipped_batches", 1, True, None, False),
    ("engine.max_tokens_per_micro_batch", 0, True, None, False),
    ("engine.reference_store_gb", 0, True, None, False),
    ("launch.processes", 1, True, None, False),
    ("launch.timeout", 0, False, None, False),
    ("rounds", 1, True, None, False),
    ("rounds_patience", 1, True, None, False),
    ("samples.num_prompts", 0, True, None, False),
    ("samples.max_new_tokens", 1, True, None, False),
    ("samples.show", 0, True, None, False),
    ("samples.reward", 0, True, None, False),
    ("judge.timeout", 0, False, None, False),
    ("benchmarks.limit", 0, False, None, False),
    ("benchmarks.num_fewshot", 0, True, None, False),
    ("benchmarks.batch_size", 1, True, None, False),
    ("benchmarks.max_drop", 0, True, 1, True),
    ("generate.num_answers", 1, True, None, False),
    ("generate.temperature", 0, True, None, False),
    ("generate.top_p", 0, False, 1, True),
    ("generate.max_new_tokens", 1, True, None, False),
    ("generate.seed", 0, True, 2**32 - 1, True),
    ("generate.max_prompt_tokens", 1, True, None, False),
    ("generate.batch_size", 1, True, None, False),
    ("generate.max_bad_fraction", 0, True, 1, True),
    ("reward.length.target", 0, True, None, False),
    ("reward.reward_model.max_length", 2, True, None, False),
    ("reward.reward_model.batch_size", 1, True, None, False),
    *((f"{key}.timeout", 0, False, None, False) for key in ("generate.endpoint", "reward.judge")),
    *((f"{key}.concurrency", 1, True, None, False) for key in ("generate.endpoint", "reward.judge")),
    *((f"{key}.requests_per_minute", 0, False, None, False) for key in ("generate.endpoint", "reward.judge")),
    ("sweep.workers", 1, True, None, False),
    ("sweep.threads_per_worker", 1, True, None, False),
    ("sweep.max_failures", 1, True, None, False),
    ("sweep.sample", 1, True, None, False),
    ("sweep.sample_seed", 0, True, None, False),
    ("sweep.search.trials", 1, True, None, False),
    ("sweep.search.seed", 0, True, None, False),
    ("sweep.search.startup_trials", 0, True, None, False),
    ("sweep.search.warmup_steps", 0, True, None, False),
    ("seed", 0, True, 2**32 - 1, True),
]
_RANGED = ("seed", "generate.seed")
_LARGEST_INT = 2**31 - 1
_LARGEST_FLOAT = 3.4e38  # float32 maximum; losses are computed in float32
SOURCE_RANGES: dict[str, tuple[float | None, bool, float | None, bool]] = {
    "weight": (0, False, None, False),
    "max_train_samples": (1, True, None, False),
    "max_eval_samples": (1, True, None, False),
    "seed": (0, True, 2**32 - 1, True),
    "min_score_gap": (0, True, None, False),
    "max_length_difference": (0, True, None, False),
    "max_similarity": (0, True, 1, True),
}


def walk_fields(conf: Any, prefix: str = "") -> Iterator[tuple[str, tuple["dataclasses.Field[Any]", Any]]]:
    """Yield (dotted key, (dataclass field, value)) for each leaf of a dataclass tree."""
    for field in dataclasses.fields(conf):
        value = getattr(conf, field.name)
        if dataclasses.is_dataclass(value):
            yield from walk_fields(value, f"{prefix}{field.name}.")
        elif isinstance(value, dict) and any(dataclasses.is_dataclass(item) for item in value.values()):
            for name, item in value.items():
                yield from walk_fields(item, f"{prefix}{field.name}.{name}.")
        else:
            yield f"{prefix}{field.name}", (field, value)


def check_field(key: str, field: "dataclasses.Field[Any]", value: Any) -> Iterator[str]:
    told = field.metadata.get("type")
    if value == "???":
        yield f"`{key}`: must be set (`{key}=VALUE`)"
    elif told and not any(_is_a(value, name) for name in told.split(" | ")):
        yield f"`{key}={value}`: must be {told}"
    elif any(isinstance(item, float) and not abs(item) <= _LARGEST_FLOAT for item in _items(value)):
        yield f"`{key}={value}`: must be a finite number"
    elif any(isinstance(item, int) and abs(item) > _LARGEST_INT for item in _items(value)) and key not in _RANGED:
        yield f"`{key}={value}`: must be at most {_LARGEST_INT}"
    elif texts := [line for item in _items(value) if isinstance(item, str) for line in check_text(key, item)]:
        yield from texts
    else:
        choices = field.metadata.get("choices")
        for item in _items(value):
            if choices and item is not None and item not in choices:
                other = OTHER_VALUES.get(key, {}).get(item)
                yield f"`{key}={item}`: {other or f'no such choice{suggest(item, choices)}'}"


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_a(value: Any, told: str) -> bool:
    if told == "None":
        return value is None
    kind, _, inner = told.partition("[")
    expected: dict[str, type | types.UnionType] = {"str": str, "list": list, "dict": dict, "bool": bool, "int": int}
    if kind == "int" and isinstance(value, bool):
        return False
    if isinstance(value, dict) and kind == "dict":
        return all(isinstance(name, str) for name in value)
    if isinstance(value, list) and kind == "list" and inner == "str]":
        return all(isinstance(item, str) for item in value)
    return isinstance(value, expected[kind])


def check_range(
    key: str, low: float | None, with_low: bool, high: float | None, with_high: bool, value: Any
) -> Iterator[str]:
    if value is None or isinstance(value, str):
        return
    too_low = low is not None and (value < low or (value == low and not with_low))
    too_high = high is not None and (value > high or (value == high and not with_high))
    if too_low or too_high:
        rules = []
        if low is not None:
            rules.append(f"{'at least' if with_low else 'above'} {low:g}")
        if high is not None:
            rules.append(f"{'at most' if with_high else 'below'} {high:g}")
        yield f"`{key}={value}`: must be {' and '.join(rules)}"


def check_names(conf: RunFields) -> Iterator[str]:
    for key, value in (
        ("run_name", conf.run_name),
        ("run_dir", conf.run_dir),
        ("sweep.dir", conf.sweep.dir),
        ("generate.dir", conf.generate.dir),
    ):
        if value is not None and holds_secret(value):
            yield f"`{key}={value}`: holds what looks like a secret, which would become the name of a folder"
    if any(character in conf.wandb.project for character in "/\\#?%:") or len(conf.wandb.project) > 128:
        yield f"`wandb.project={conf.wandb.project}`: W&B takes up to 128 characters, and none of / \\ # ? % :"
    if "/" in (conf.wandb.entity or ""):
        yield f"`wandb.entity={conf.wandb.entity}`: is a user or team alone; the project goes into wandb.project"
    for name, most in (("name", 128), ("group", 128), ("job_type", 64)):
        if len(text := getattr(conf.wandb, name) or "") > most:
            yield f"`wandb.{name}={text[:20]}…`: has {len(text)} characters, and W&B takes up to {most}"
    for tag in conf.wandb.tags:
        if len(tag) > 64:
            yield f"`wandb.tags={tag}`: W&B takes tags of up to 64 characters"
    if "/" in conf.run_name or conf.run_name in (".", ".."):
        yield f"`run_name={conf.run_name}`: names one folder under outputs/, so it must not be empty or hold a slash"


_PATHS = (
    *("run_dir", "path", "eval_path", "model_name_or_path", "adapter", "reference", "chat_template", "gguf_file"),
    *("decontaminate", "include_path"),
)
_LONGEST_NAME, _LONGEST_PATH = 255, 4095  # bytes, on Linux


def check_text(key: str, value: str) -> Iterator[str]:
    """Yield one line per mistake in a string value of the dotted `key`."""
    name = key.rpartition(".")[2]
    is_path = name in _PATHS or key in (
        "sweep.dir",
        "wandb.dir",
        "generate.dir",
        "reward.judge.prompt",
        "benchmarks.questions",
    )
    if not value and not key.startswith("training.") and name not in ("system_prompt", "notes"):
        yield f"`{key}=`: must not be empty; leave it out, or set it to null"
    elif not _is_unicode(value) or "\0" in value:
        yield f"`{key}={value}`: must be Unicode text, without NUL"
    elif (is_path or key == "run_name" or name == "name") and any(ord(character) < 32 for character in value):
        yield f"`{key}={value}`: must not hold control characters or line breaks"
    elif (is_path or key == "run_name") and max(len(part.encode()) for part in value.split("/")) > _LONGEST_NAME:
        yield f"`{key}={value}`: has a name of more than {_LONGEST_NAME} bytes, which no file can have"
    elif is_path and len(value.encode()) > _LONGEST_PATH:
        yield f"`{key}={value}`: has more than {_LONGEST_PATH} bytes, which no path can have"
    elif is_path and value.startswith("~") and not _has_home(value):
        yield f"`{key}={value}`: there is no such user; write the folder itself"


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _has_home(path: str) -> bool:
    try:
        Path(path).expanduser()
    except RuntimeError:
        return False
    return True

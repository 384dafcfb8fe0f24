"""Every rule of a run's configuration that needs no weights and no data. Imports no torch.

`find_mistakes` reports all broken rules at once, a line each: key, value, rule, and what would do.
"""

import dataclasses
import types
import typing
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_runner.masking import holds_secret
from dpo_runner.text_checks import check_text
from dpo_runner.training_rules import LOSSES_OF_WHOLE_BATCHES, LOSSES_WITH_LABEL_SMOOTHING

if TYPE_CHECKING:
    from dpo_runner.config import RunConf

# (key, lowest, is the lowest allowed, highest, is the highest allowed); None: no bound
_RANGES: list[tuple[str, float | None, bool, float | None, bool]] = [
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
    ("lora.r", 1, True, None, False),
    ("lora.lora_alpha", 1, True, None, False),
    ("lora.lora_dropout", 0, True, 1, False),
    ("quant.llm_int8_threshold", 0, True, None, False),
    ("data.eval_fraction", 0, True, 1, False),
    ("data.max_bad_fraction", 0, True, 1, True),
    ("data.near_duplicate_threshold", 0.5, True, 1, True),
    ("data.decontaminate_ngram", 1, True, None, False),
    ("data.min_score_gap", 0, True, None, False),
    ("data.max_train_samples", 1, True, None, False),
    ("data.max_eval_samples", 1, True, None, False),
    ("checks.max_skipped_batches", 1, True, None, False),
    ("engine.max_tokens_per_micro_batch", 0, True, None, False),
    ("engine.reference_store_gb", 0, True, None, False),
    ("samples.num_prompts", 0, True, None, False),
    ("samples.max_new_tokens", 1, True, None, False),
    ("samples.show", 0, True, None, False),
    ("judge.timeout", 0, False, None, False),
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
_RANGED = ("seed",)
_LARGEST_INT = 2**31 - 1
_LARGEST_FLOAT = 3.4e38  # of float32, in which losses are computed
_SOURCE_RANGES: dict[str, tuple[float | None, bool, float | None, bool]] = {
    "weight": (0, False, None, False),
    "max_train_samples": (1, True, None, False),
    "max_eval_samples": (1, True, None, False),
    "seed": (0, True, 2**32 - 1, True),
    "min_score_gap": (0, True, None, False),
}


def find_mistakes(conf: "RunConf") -> list[str]:
    """Return one line for each rule that `conf` breaks; an empty list means the run may start."""
    values = dict(walk_fields(conf))
    from dpo_runner.data_checks import check_data
    from dpo_runner.model_checks import check_model_groups
    from dpo_runner.search_config import check_search
    from dpo_runner.sweep_config import check_sweep

    told = {key: list(_check_field(key, field, value)) for key, (field, value) in values.items()}
    mistakes = [line for lines in told.values() for line in lines]
    ranges = [*_RANGES]
    for name in conf.data.sources:
        ranges += [(f"data.sources.{name}.{key}", *rest) for key, rest in _SOURCE_RANGES.items()]
    ranges = [rule for rule in ranges if rule[0] in values and not told[rule[0]]]
    mistakes += [line for rule in ranges for line in _check_range(*rule, values[rule[0]][1])]
    if not mistakes:  # contradictions between fields make sense only where each field does
        mistakes = [
            *check_model_groups(conf),
            *check_data(conf),
            *_check_training(conf),
            *_check_torch_compile(conf),
            *_check_evaluation(conf),
            *_check_names(conf),
            *check_sweep(conf.sweep),
            *check_search(conf),
        ]
    return mistakes


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


def suggest(wrong: object, right: typing.Iterable[str]) -> str:
    """Return "; did you mean …?" with the nearest of the valid names, or the whole list where none is near."""
    names = sorted(right)
    near = get_close_matches(str(wrong), names, n=1, cutoff=0.6)
    if near:
        return f"did you mean `{near[0]}`?"
    return "choose from " + ", ".join(names) if len(names) <= 25 else ""


def _check_field(key: str, field: "dataclasses.Field[Any]", value: Any) -> Iterator[str]:
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
                near = suggest(item, choices) or f"choose from {', '.join(choices)}"
                yield f"`{key}={item}`: no such choice; {near}"


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


def _check_range(
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


def _check_training(conf: "RunConf") -> Iterator[str]:
    training = conf.training
    losses = [training.loss_type] if isinstance(training.loss_type, str) else list(training.loss_type)
    if not losses:
        yield "`training.loss_type=[]`: must name at least one loss, such as sigmoid"
    if training.loss_weights is not None and len(training.loss_weights) != len(losses):
        yield f"`training.loss_weights={training.loss_weights}`: must have one weight for each of loss_type={losses}"
    if training.use_weighting and {"sft", "aot", "aot_unpaired"} & set(losses):
        yield f"`training.use_weighting=True`: TRL cannot weight sft, aot and aot_unpaired (loss_type={losses})"
    if "robust" in losses and not training.label_smoothing < 0.5:
        yield f"`training.label_smoothing={training.label_smoothing}`: robust divides by 1 - 2x; must be below 0.5"
    if "exo_pair" in losses and not training.label_smoothing > 0:
        yield "`training.label_smoothing=0`: the exo_pair loss takes its logarithm; must be above 0, such as 0.001"
    if training.label_smoothing and not set(losses) & set(LOSSES_WITH_LABEL_SMOOTHING):
        readers = ", ".join(LOSSES_WITH_LABEL_SMOOTHING)
        yield (
            f"`training.label_smoothing={training.label_smoothing}`: has no effect on loss_type={losses}; "
            f"it is read by {readers}"
        )
    if training.max_steps <= 0 and not training.num_train_epochs > 0:
        yield f"`training.num_train_epochs={training.num_train_epochs}`: must be above 0 unless max_steps is set"
    if training.max_steps == 0 or training.max_steps < -1:
        yield f"`training.max_steps={training.max_steps}`: must be above 0, or -1 for num_train_epochs to decide"
    for key in ("warmup_steps", "logging_steps", "eval_steps", "save_steps"):
        value = getattr(training, key)
        if value is not None and value > 1 and value != int(value):
            yield f"`training.{key}={value}`: must be a whole number of steps, or a share of all steps below 1"
    if training.bf16 and training.fp16:
        yield "`training.bf16=True`: contradicts training.fp16=true; choose one"
    if training.fp16 and conf.checks.on_nonfinite == "skip_batch":
        yield "`checks.on_nonfinite=skip_batch`: fp16's loss scaler skips such steps by itself; use on_nonfinite=stop"
    if conf.checks.on_out_of_memory == "smaller_batch":
        if not_sums := sorted(LOSSES_OF_WHOLE_BATCHES & set(losses)):
            yield (
                f"`checks.on_out_of_memory=smaller_batch`: loss_type={', '.join(not_sums)} is no sum over pairs, and "
                "another one with other batches; use on_out_of_memory=stop"
            )
        if training.sync_ref_model:
            yield (
                "`checks.on_out_of_memory=smaller_batch`: goes on from a checkpoint, and those of "
                "training.sync_ref_model=true lack the reference; use on_out_of_memory=stop"
            )


def _check_torch_compile(conf: "RunConf") -> Iterator[str]:
    training = conf.training
    for key in ("torch_compile", "torch_compile_backend", "torch_compile_mode"):
        if conf.engine.shared_prefix and getattr(training, key):
            yield (
                f"`training.{key}={getattr(training, key)}`: would compile the whole model anew for each batch's pair "
                "lengths, and give up after eight; leave it out, or use engine.shared_prefix=false"
            )


def _check_evaluation(conf: "RunConf") -> Iterator[str]:
    training, data = conf.training, conf.data
    sources = data.sources.values() if data.sources else [data]
    has_eval = data.eval_fraction > 0 or any(
        source.eval_path or source.eval_split or _may_bring_evaluation(source.path) for source in sources
    )
    if training.eval_strategy != "no" and not has_eval:
        yield (
            f"`training.eval_strategy={training.eval_strategy}`: there are no evaluation rows; set data.eval_path, "
            "data.eval_split or data.eval_fraction, or training.eval_strategy=no"
        )
    if not training.load_best_model_at_end or training.save_strategy == "best":
        return
    if training.eval_strategy == training.save_strategy == "steps":
        every = training.eval_steps or training.logging_steps
        if round(1e6 * training.save_steps) % round(1e6 * every):
            yield (
                f"`training.save_steps={training.save_steps:g}`: load_best_model_at_end needs a multiple of "
                f"eval_steps={every:g}"
            )
    if training.eval_strategy != training.save_strategy:
        yield (
            f"`training.load_best_model_at_end=True`: needs the same rhythm of evaluation and saving "
            f"(eval_strategy={training.eval_strategy}, save_strategy={training.save_strategy})"
        )


def _may_bring_evaluation(path: str | None) -> bool:
    """Whether a path may hold evaluation rows too: bundled pairs do, and a folder may."""
    return path is not None and (path.startswith("bundled:") or Path(path).expanduser().is_dir())


def _check_names(conf: "RunConf") -> Iterator[str]:
    for key, value in (("run_name", conf.run_name), ("run_dir", conf.run_dir), ("sweep.dir", conf.sweep.dir)):
        if value is not None and holds_secret(value):
            yield f"`{key}={value}`: holds what looks like a secret, which would become the name of a folder"
    if any(character in conf.wandb.project for character in "/\\#?%:") or len(conf.wandb.project) > 128:
        yield f"`wandb.project={conf.wandb.project}`: W&B takes up to 128 characters, and none of / \\ # ? % :"
    for tag in conf.wandb.tags:
        if len(tag) > 64:
            yield f"`wandb.tags={tag}`: W&B takes tags of up to 64 characters"
    if "/" in conf.run_name or conf.run_name in (".", ".."):
        yield f"`run_name={conf.run_name}`: names one folder under outputs/, so it must not be empty or hold a slash"

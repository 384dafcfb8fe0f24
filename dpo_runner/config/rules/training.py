"""Rules within `training` and against other sections; fields owned by the runner."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from dpo_runner.config.sections.data import DataConf
from dpo_runner.config.sections.run import RunFields
from dpo_runner.config.sections.training import TrainingConf
from dpo_runner.errors import suggest


def check_training(conf: RunFields) -> Iterator[str]:
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
    if "tpu_metrics_debug" in training.debug:
        yield f"`training.debug={training.debug}`: tpu_metrics_debug prints a TPU's metrics; leave it out"
    yield from check_trackers(training)
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


TRACKERS = {
    "tensorboard": ("tensorboard",),
    "mlflow": ("mlflow-skinny", "sqlalchemy", "alembic"),  # mlflow itself allows no recent pyarrow
    "trackio": ("trackio",),
}
"""The trackers of `training.report_to`, and the packages that each needs."""


def list_trackers(training: TrainingConf) -> list[str]:
    """Return the trackers besides W&B."""
    named = [training.report_to] if isinstance(training.report_to, str) else list(training.report_to or [])
    return [] if named == ["none"] else list(dict.fromkeys(named))


def check_trackers(training: TrainingConf) -> Iterator[str]:
    for name in list_trackers(training):
        if name == "wandb":
            yield "`training.report_to=wandb`: W&B is set with `wandb=offline`, `wandb=online` or `wandb=disabled`"
        elif name not in TRACKERS:
            yield f"`training.report_to={name}`: is no tracker here{suggest(name, TRACKERS)}"


def find_missing_trackers(training: TrainingConf) -> list[str]:
    """Return one line for each tracker whose packages are not installed; only a run that starts needs them."""
    return [
        f"`training.report_to={name}`: is not installed; pip install {' '.join(TRACKERS[name])}"
        for name in list_trackers(training)
        if not all(find_spec(package.removesuffix("-skinny")) for package in TRACKERS[name])
    ]


def check_torch_compile(conf: RunFields) -> Iterator[str]:
    training = conf.training
    for key in ("torch_compile", "torch_compile_backend", "torch_compile_mode"):
        if conf.engine.shared_prefix and getattr(training, key):
            yield (
                f"`training.{key}={getattr(training, key)}`: would compile the whole model anew for each batch's pair "
                "lengths, and give up after eight; leave it out, or use engine.shared_prefix=false"
            )


def may_have_evaluation(data: DataConf) -> bool:
    """Return whether there may be evaluation rows; only the data shows whether a folder has some."""
    sources = data.sources.values() if data.sources else [data]
    return data.eval_fraction > 0 or any(
        source.eval_path or source.eval_split or _may_bring_evaluation(source.path) for source in sources
    )


def find_vain_evaluation(training: TrainingConf, why: str | None = None) -> list[str]:
    """Return one line for each setting that needs evaluation rows, for a run without any; `why` it has none."""
    off = {"eval_strategy": "no", "load_best_model_at_end": False, "eval_on_start": False}
    wanted = {key: value for key, value in off.items() if getattr(training, key) != value}
    wanted |= {"save_strategy": "steps"} if training.save_strategy == "best" else {}
    why = why or NO_EVALUATION_ROWS
    return [
        f"`training.{key}={getattr(training, key)}`: {why}, or training.{key}={str(value).lower()}"
        for key, value in wanted.items()
    ]


def check_evaluation(conf: RunFields) -> Iterator[str]:
    training = conf.training
    if not may_have_evaluation(conf.data) and (vain := find_vain_evaluation(training)):
        yield from vain
        return
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
    """Return whether a path may also hold evaluation rows: bundled pairs do, folders may."""
    return path is not None and (path.startswith("bundled:") or Path(path).expanduser().is_dir())


NO_EVALUATION_ROWS = "there are no evaluation rows; set data.eval_path, data.eval_split or data.eval_fraction"

OWNED_FIELDS: dict[str, str] = {
    "output_dir": "use `run_dir`",
    "seed": "use the top-level `seed`",
    "run_name": "use the top-level `run_name`",
    "resume_from_checkpoint": "use `run_dir=PATH resume=auto`",
    "logging_dir": "logs go to the run directory; use `run_dir`",
    "project": "use `wandb.project`",
    "push_to_hub": "use `python -m dpo_runner.export RUN_DIR --out DIR --push-to-hub ID`",
    "hub_token": "use `python -m dpo_runner.export RUN_DIR --out DIR --push-to-hub ID`",
    "hub_private_repo": "use `python -m dpo_runner.export RUN_DIR --out DIR --push-to-hub ID`",
    "hub_model_id": "use `python -m dpo_runner.export RUN_DIR --out DIR --push-to-hub ID`",
    "hub_strategy": "use `python -m dpo_runner.export RUN_DIR --out DIR --push-to-hub ID`",
    "hub_always_push": "use `python -m dpo_runner.export RUN_DIR --out DIR --push-to-hub ID`",
    "hub_revision": "use `python -m dpo_runner.export RUN_DIR --out DIR --push-to-hub ID`",
    "trackio_space_id": "set the environment variable TRACKIO_SPACE_ID for training.report_to=trackio",
    "trackio_bucket_id": "set the environment variable TRACKIO_BUCKET_ID for training.report_to=trackio",
    "trackio_static_space_id": "`trackio freeze` of the shell does it afterwards",
    "model_init_kwargs": "use the `model` group",
    "trust_remote_code": "use `model.trust_remote_code`",
    "pad_token": "deprecated upstream; use `model.pad_token`",
    "remove_unused_columns": "the runner hands the trainer token ids alone",
    "ignore_data_skip": "a resumed run always continues with the data it has not seen",
    "enable_jit_checkpoint": "a run that is terminated would end as if it had finished; resume=auto continues it",
    "auto_find_batch_size": "it would change the effective batch size behind the plan's back",
    "save_only_model": "a run could not be continued from such a checkpoint",
    "bf16_full_eval": "the evaluation before training would leave the weights in bf16 for training too",
    "fp16_full_eval": "the evaluation before training would leave the weights in fp16 for training too",
    "local_rank": "set by the launcher",
    "do_train": "without effect upstream; `dry_run=true` stops before training",
    "do_eval": "without effect upstream; use `training.eval_strategy`",
    "do_predict": "without effect upstream; a DPO run has nothing to predict",
    "padding_free": "TRL 1.16 accepts it and ignores it",
    "label_smoothing_factor": "without effect on DPO's losses; use `training.label_smoothing`",
}
"""Fields of DPOConfig that `training.*` rejects, each with its replacement or the reason."""

_LENGTHS = "was removed from TRL; use training.max_length for prompt and answer together, and data.on_overlong"
_KTO = "belongs to KTO, another algorithm, which rates single answers"
_CPO = "belongs to CPO and SimPO, other algorithms, which have no reference model"
_GRPO = "belongs to GRPO, another algorithm, which generates its answers while it trains"
OTHER_FIELDS: dict[str, str] = {
    "rpo_alpha": "was removed from TRL; use training.loss_type=[sigmoid,sft] and training.loss_weights=[1,ALPHA]",
    "max_prompt_length": _LENGTHS,
    "max_completion_length": _LENGTHS,
    "max_target_length": _LENGTHS,
    "label_pad_token_id": "was removed from TRL; leave it out, labels are masked by TRL itself",
    "padding_value": "was removed from TRL; use model.pad_token",
    "is_encoder_decoder": "was removed from TRL; only decoders are trained",
    "generate_during_eval": "was removed from TRL; use samples.num_prompts",
    "reference_free": "was removed from TRL; there is no loss without a reference here, leave it out",
    "force_use_ref_model": "was removed from TRL; use model.reference",
    "ref_model_init_kwargs": "was removed from TRL; use model.reference",
    "model_adapter_name": "was removed from TRL; use model.adapter",
    "ref_adapter_name": "was removed from TRL; use model.reference",
    "use_logits_to_keep": "was removed from TRL; leave it out, only answers are scored anyway",
    "base_model_attribute_name": "was removed from TRL; leave it out",
    "desirable_weight": _KTO,
    "undesirable_weight": _KTO,
    "cpo_alpha": _CPO,
    "simpo_gamma": _CPO,
    "num_generations": _GRPO,
    "epsilon": _GRPO,
    "lr": "is called training.learning_rate",
    "batch_size": "is called training.per_device_train_batch_size",
    "epochs": "is called training.num_train_epochs",
    "warmup_ratio": "is called training.warmup_steps, which takes a share of all steps too (0.1)",
    "group_by_length": "is not needed, pairs are trained without padding; leave it out",
    "no_cuda": "is called training.use_cpu",
    "save_safetensors": "was removed from transformers, which writes safetensors only; leave it out",
    "overwrite_output_dir": "was removed from transformers; use another run_dir",
    "reference_model": "use model.reference",
    "ref_model": "use model.reference",
    "dataset_name": "use data.path",
    "use_peft": "use lora=r16, or lora=none",
    "lora_r": "use lora.r",
}
"""Fields that users of other versions or algorithms may write under `training`, each with the reason."""

_LOSSES: dict[str, str] = {
    **dict.fromkeys(("kto", "kto_pair"), f"{_KTO}; bco_pair is the nearest for pairs"),
    **dict.fromkeys(("simpo", "cpo"), f"{_CPO}; sigmoid_norm is the nearest with one"),
    "orpo": "belongs to ORPO, another algorithm, which has no reference model; use sigmoid, or [sigmoid,sft] for a mix",
    "rpo": "is a mix here: training.loss_type=[sigmoid,sft] training.loss_weights=[1,ALPHA]",
    "dpo": "is called sigmoid in TRL",
    "grpo": _GRPO,
    "wpo": "is training.use_weighting=true here, with another loss",
    "cdpo": "is not in TRL; robust with training.label_smoothing is the nearest",
    "dpop": "is not in TRL; [sigmoid,sft] is the nearest",
}

OTHER_VALUES: dict[str, dict[str, str]] = {
    "training.loss_type": _LOSSES,
    "training.optim": {
        **dict.fromkeys(("adam", "adamw", "adamw_hf"), "is called adamw_torch, or adamw_torch_fused, the default"),
        "paged_adamw": "is called paged_adamw_32bit",
    },
    "wandb.mode": dict.fromkeys(("off", "none"), "is called disabled"),
}
"""Values that users of other versions, algorithms or tools may write, by field, each with the reason."""

OUR_DEFAULTS: dict[str, tuple[object, str]] = {
    "disable_dropout": (
        False,
        "upstream's zeroes LoRA's dropout too, so that a sweep over lora_dropout compares identical runs",
    ),
    "logging_nan_inf_filter": (False, "upstream's logs a NaN loss as 0.0 and trains on"),
}
"""Defaults that differ from upstream: the value here, and the reason."""

LOSSES_WITH_LABEL_SMOOTHING = ("exo_pair", "robust", "aot", "aot_unpaired")
"""TRL's losses that read `label_smoothing`."""

LOSSES_OF_WHOLE_BATCHES = {"aot", "aot_unpaired", "sft"}
"""TRL's losses that are not sums over pairs: `aot` and `aot_unpaired` sort, `sft` averages over all tokens."""

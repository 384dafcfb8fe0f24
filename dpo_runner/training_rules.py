"""What the runner says about `training.*` beyond the types: fields it owns, its own defaults, and dead fields."""

OWNED_FIELDS: dict[str, str] = {
    "output_dir": "use `run_dir`",
    "seed": "use the top-level `seed`",
    "run_name": "use the top-level `run_name`",
    "report_to": "use `wandb=offline`, `wandb=online` or `wandb=disabled`",
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
    "trackio_space_id": "runs are tracked by W&B; use `wandb`",
    "trackio_bucket_id": "runs are tracked by W&B; use `wandb`",
    "trackio_static_space_id": "runs are tracked by W&B; use `wandb`",
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
    "parallelism_config": "one process trains; launching several is not supported yet",
    "do_train": "without effect upstream; `dry_run=true` stops before training",
    "do_eval": "without effect upstream; use `training.eval_strategy`",
    "do_predict": "without effect upstream; a DPO run has nothing to predict",
    "padding_free": "TRL 1.16 accepts it and ignores it",
    "label_smoothing_factor": "without effect on DPO's losses; use `training.label_smoothing`",
}
"""Fields of DPOConfig that `training.*` refuses, and what to use instead."""

OUR_DEFAULTS: dict[str, tuple[object, str]] = {
    "disable_dropout": (
        False,
        "upstream's zeroes LoRA's dropout too, so that a sweep over lora_dropout compares identical runs",
    ),
    "logging_nan_inf_filter": (False, "upstream's logs a NaN loss as 0.0 and trains on"),
}
"""Where the default differs from upstream's: the default here, and why."""

LOSSES_WITH_LABEL_SMOOTHING = ("exo_pair", "robust", "aot", "aot_unpaired")
"""TRL's losses that read `label_smoothing`."""

LOSSES_OF_WHOLE_BATCHES = {"aot", "aot_unpaired", "sft"}
"""TRL's losses that are no sums over pairs: `aot` and `aot_unpaired` sort them, `sft` averages over all tokens."""

"""What a run is going to do, in a few lines, before any weight is loaded."""

import math
from pathlib import Path
from typing import Any

import torch

from dpo_runner.config.run_conf import RunConf
from dpo_runner.config.sections.data import resolve_sources
from dpo_runner.data.preferences import PreferenceData
from dpo_runner.io.processes import count_processes
from dpo_runner.model.adapters import describe_adapter
from dpo_runner.model.quantization import describe_quantization


def build_plan(
    conf: RunConf,
    data: PreferenceData,
    run_dir: Path,
    reference: str,
    padding: str,
    engine: str,
    checkpointing: str | None,
    own_quantization: Any = None,
) -> dict[str, str]:
    """Return the plan as label and text, ready to be shown.

    Args:
        conf: the run.
        data: its data.
        run_dir: where the run will write.
        reference: what the policy is compared with, in words.
        padding: the pad token, in words.
        engine: which of its parts are on, and why others are not.
        checkpointing: why gradient checkpointing is switched on though it is not set; None where it is not.
        own_quantization: what the checkpoint's config says of its quantization.
    """
    model, training = conf.model, conf.training
    remote_code = ", RUNS CODE SHIPPED WITH THE MODEL (trust_remote_code)" if model.trust_remote_code else ""
    loss = training.loss_type if isinstance(training.loss_type, str) else "+".join(training.loss_type)
    gpus = 0 if training.use_cpu or model.device_map is not None else torch.cuda.device_count()
    return {
        "model": f"{model.model_name_or_path}, dtype {model.dtype}{remote_code}",
        "quantization": describe_quantization(conf.quant, own_quantization),
        "adapter": describe_adapter(conf),
        "reference": reference,
        **({"added tokens": ", ".join(model.added_tokens)} if model.added_tokens else {}),
        "padding": padding,
        "data": ", ".join(str(source.path) for source in resolve_sources(conf.data).values()),
        **data.report.lines(),
        "loss": f"{loss}, beta {training.beta:g}",
        "learning rate": f"{training.learning_rate:g}, {training.lr_scheduler_type}",
        "batch": (
            f"{count_pairs_per_step(conf)} pairs a step ({training.per_device_train_batch_size} per device x "
            f"{training.gradient_accumulation_steps} accumulation x {count_processes()} process)"
        ),
        **(
            {"device": f"the first of {gpus} GPUs; CUDA_VISIBLE_DEVICES=N has another be the first"} if gpus > 1 else {}
        ),
        "steps": str(count_steps(conf, len(data.train))),
        "engine": engine,
        **({"checkpointing": f"of gradients, switched on: {checkpointing}"} if checkpointing is not None else {}),
        "output": str(run_dir),
        "W&B": conf.wandb.mode,
    }


def count_pairs_per_step(conf: RunConf) -> int:
    """Return how many preference pairs one optimizer step sees."""
    return conf.training.per_device_train_batch_size * conf.training.gradient_accumulation_steps * count_processes()


def count_steps(conf: RunConf, rows: int) -> int:
    """Return the number of optimizer steps over `rows` training rows, as transformers' Trainer counts them."""
    training = conf.training
    if training.max_steps > 0:
        return training.max_steps
    per_batch = training.per_device_train_batch_size * count_processes()
    batches = rows // per_batch if training.dataloader_drop_last else math.ceil(rows / per_batch)
    per_epoch = max(math.ceil(batches / training.gradient_accumulation_steps), 1)
    return math.ceil(training.num_train_epochs * per_epoch)

"""The plan: a short summary of a run, shown before any weight is loaded."""

from pathlib import Path

import torch

from dpo_runner.config.run_conf import RunConf
from dpo_runner.config.sections.data import resolve_sources
from dpo_runner.data.preferences import PreferenceData
from dpo_runner.io.processes import count_processes
from dpo_runner.model.adapters import describe_adapter
from dpo_runner.model.blueprint import Blueprint
from dpo_runner.model.quantization import describe_quantization
from dpo_runner.model.vocabulary import describe_padding
from dpo_runner.training.engine.install import describe_engine
from dpo_runner.training.memory.settle import Settled
from dpo_runner.training.trainer import count_steps


def build_plan(settled: Settled, blueprint: Blueprint, data: PreferenceData, run_dir: Path) -> dict[str, str]:
    """Return the plan as a map from label to text.

    Args:
        settled: the run's settings.
        blueprint: the model's blueprint.
        data: the tokenized rows.
        run_dir: the run's directory.
    """
    conf = settled.asked
    model, training = conf.model, conf.training
    remote_code = ", RUNS CODE SHIPPED WITH THE MODEL (trust_remote_code)" if model.trust_remote_code else ""
    loss = training.loss_type if isinstance(training.loss_type, str) else "+".join(training.loss_type)
    gpus = 0 if training.use_cpu or model.device_map is not None else torch.cuda.device_count()
    return {
        "model": f"{model.model_name_or_path}, dtype {model.dtype}{remote_code}",
        "quantization": describe_quantization(conf.quant, blueprint.own_quantization),
        "adapter": describe_adapter(conf),
        "reference": blueprint.reference.described,
        **({"added tokens": ", ".join(model.added_tokens)} if model.added_tokens else {}),
        "padding": describe_padding(blueprint.tokenizer, data.stop_id),
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
        "steps": str(count_steps(training, len(data.train))),
        "engine": describe_engine(conf, blueprint, settled.shape.longest),
        **settled.notes,
        "output": str(run_dir),
        "W&B": conf.wandb.mode,
    }


def count_pairs_per_step(conf: RunConf) -> int:
    """Return the number of preference pairs per optimizer step."""
    return conf.training.per_device_train_batch_size * conf.training.gradient_accumulation_steps * count_processes()

"""The plan: a short summary of a run, shown before any weight is loaded."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from trl import DPOConfig

from dpo_runner.config.keys import find_ignored
from dpo_runner.config.run_conf import RunConf, count_processes
from dpo_runner.config.sections.data import resolve_sources
from dpo_runner.data.preferences import PreferenceData
from dpo_runner.errors import ConfigError
from dpo_runner.io.console import RunConsole
from dpo_runner.io.logs import route_library_logs
from dpo_runner.io.processes import list_gpus, list_installed_gpus
from dpo_runner.io.upstream import list_newer
from dpo_runner.model.adapters import describe_adapter
from dpo_runner.model.blueprint import Blueprint
from dpo_runner.model.quantization import describe_quantization
from dpo_runner.model.vocabulary import describe_padding
from dpo_runner.records.differences import find_changes
from dpo_runner.records.figures import describe_changes, list_figures
from dpo_runner.training.engine.install import describe_engine
from dpo_runner.training.memory.estimate import read_device
from dpo_runner.training.memory.settle import Settled
from dpo_runner.training.memory.sharded import count_parts
from dpo_runner.training.trainer import count_steps


def show_plan(
    settled: Settled,
    blueprint: Blueprint,
    data: PreferenceData,
    run_dir: Path,
    overrides: Sequence[str],
    console: RunConsole,
) -> None:
    """Show the plan and its warnings, and the memory estimate in a dry run."""
    with route_library_logs(None):
        console.show_plan(build_plan(settled, blueprint, data, run_dir))
    for warning in find_warnings(settled.asked, overrides, blueprint, data):
        console.warn(warning)
    if settled.asked.dry_run:
        show_memory(settled, blueprint, console)


def show_memory(settled: Settled, blueprint: Blueprint, console: RunConsole) -> None:
    """Show the peak memory estimate; warn if the device has too little memory."""
    try:
        with route_library_logs(None):
            estimate = settled.estimate(blueprint)
    except ConfigError as error:
        console.warn(f"the memory that this run takes is not known: {error}")
        return
    of_each = ", of each process" if count_processes(settled.asked) > 1 else ""
    console.show_sizes(f"{estimate.title}{of_each}", estimate.rows, estimate.totals)
    if not estimate.fits:
        console.warn(estimate.shortage)


def build_plan(settled: Settled, blueprint: Blueprint, data: PreferenceData, run_dir: Path) -> dict[str, str]:
    """Return the plan as a map from label to text.

    Args:
        settled: the run's settings.
        blueprint: the model's blueprint.
        data: the tokenized rows.
        run_dir: the run's directory.
    """
    conf = settled.asked
    model, training, processes = conf.model, conf.training, count_processes(conf)
    remote_code = ", RUNS CODE SHIPPED WITH THE MODEL (trust_remote_code)" if model.trust_remote_code else ""
    loss = training.loss_type if isinstance(training.loss_type, str) else "+".join(training.loss_type)
    steps = count_steps(settled.args, len(data.train))
    rate = f"{training.learning_rate:g}, {training.lr_scheduler_type}"
    if training.warmup_steps >= max(steps, 1) and training.lr_scheduler_type != "constant":
        rate += f", never reached: the warm-up takes {training.warmup_steps:g} steps (training.warmup_steps)"
    return {
        "model": f"{model.model_name_or_path}, dtype {model.dtype}{remote_code}",
        "quantization": describe_quantization(conf, blueprint.own_quantization),
        "adapter": describe_adapter(conf),
        "reference": blueprint.reference.described,
        **({"added tokens": ", ".join(model.added_tokens)} if model.added_tokens else {}),
        "padding": describe_padding(blueprint.tokenizer, data.stop_id),
        "data": ", ".join(str(source.path) for source in resolve_sources(conf.data).values()),
        **data.report.lines(),
        "loss": f"{loss}, beta {training.beta:g}",
        "learning rate": rate,
        "batch": (
            f"{count_pairs_per_step(conf)} pairs a step ({training.per_device_train_batch_size} per device x "
            f"{training.gradient_accumulation_steps} accumulation x {processes} process{'es' if processes > 1 else ''})"
        ),
        "device": describe_device(conf, settled.args),
        "steps": str(steps),
        **({"weights": describe_parts(conf)} if conf.training.fsdp else {}),
        "engine": describe_engine(conf, blueprint, settled.shape.longest),
        **settled.notes,
        **({"published": describe_published(conf)} if conf.expected else {}),
        "output": str(run_dir),
        "W&B": conf.wandb.mode,
    }


def describe_published(conf: RunConf) -> str:
    """Return how many published figures the run will be compared with, and why it will not be, in words."""
    told = f"{len(list_figures(conf))} figures (expected) beside this run's"
    changes = find_changes(conf, count_processes(conf))
    return f"{told}, which is set otherwise: {describe_changes(changes)}" if changes else told


def describe_parts(conf: RunConf) -> str:
    """Return how weights are divided between processes, in words."""
    parts = count_parts(conf)
    groups = count_processes(conf) // parts
    return f"each divided between {parts} processes {f'in {groups} groups (HSDP)' if groups > 1 else '(FSDP2)'}"


def describe_device(conf: RunConf, args: DPOConfig) -> str:
    """Return the device that trains, in words."""
    device, kind, gpus = read_device(args), args.device.type, torch.cuda.device_count()
    told = f"{device.name if kind in ('cpu', 'cuda') else kind}, {device.total / 1e9:.1f} GB"
    if kind == "cpu":
        return f"{told}{' (training.use_cpu=true)' if conf.training.use_cpu else ''}"
    if conf.model.device_map is not None:
        return f"{told}; {gpus} GPUs are there for model.device_map={conf.model.device_map}"
    return f"{told}{f'; the first of {gpus} GPUs, CUDA_VISIBLE_DEVICES=N selects another' if gpus > 1 else ''}"


def find_warnings(conf: RunConf, overrides: Sequence[str], blueprint: Blueprint, data: PreferenceData) -> Iterator[str]:
    """Yield what a user should know before training: libraries, GPUs, settings without effect, adapters, data."""
    yield from list_newer()
    yield from find_unseen_gpus(conf)
    yield from find_ignored(conf, overrides)
    yield from blueprint.find_other_bases()
    yield from data.report.warnings


def find_unseen_gpus(conf: RunConf) -> list[str]:
    """Return a warning if there are GPUs that torch does not see, so that training runs on the CPU."""
    if conf.training.use_cpu or torch.cuda.is_available() or not list_gpus():
        return []
    if not (count := len(list_installed_gpus())):  # CUDA_VISIBLE_DEVICES may name what is not there
        return []
    cure = "its build is without CUDA; install one with it"
    if torch.version.cuda is not None:
        cure = f"its build needs a driver for CUDA {torch.version.cuda}; update the driver, or install an older build"
    return [
        f"nvidia-smi lists {count} GPU{'s' if count > 1 else ''}, and torch {torch.__version__} sees none, so "
        f"training runs on the CPU: {cure} (https://pytorch.org/get-started), or set training.use_cpu=true"
    ]


def count_pairs_per_step(conf: RunConf) -> int:
    """Return the number of preference pairs per optimizer step."""
    return conf.training.per_device_train_batch_size * conf.training.gradient_accumulation_steps * count_processes(conf)

"""The same DPO job as a dpo_runner and a `trl dpo` command, and the reading of their results."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from dpo_runner.records.reading import read_metrics
from scripts.bench.measuring.process import Finished, run

_COMPARED = ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected", "num_tokens")

PAIRS_A_STEP = 8
BATCHES = (4, 2, 1, 8)
"""Micro-batch sizes in pairs, the default first; accumulation always makes steps of 8 pairs."""


@dataclass(frozen=True)
class Variant:
    """Settings of a peer that change speed and memory but not results."""

    gradient_checkpointing: bool = True
    precompute_ref_log_probs: bool = False
    batch: int = BATCHES[0]

    @property
    def flags(self) -> list[str]:
        """The flags of `trl dpo` for these settings, the micro-batch size aside."""
        flags = [] if self.gradient_checkpointing else ["--gradient_checkpointing", "false"]
        return [*flags, *(["--precompute_ref_log_probs"] if self.precompute_ref_log_probs else [])]

    def split(self, job: "Job") -> "Job":
        """Return the job with this micro-batch size and the same pairs per step."""
        return vary(job, batch=self.batch, accumulation=job.batch * job.accumulation // self.batch)


def name_split(name: str, batch: int) -> str:
    """Return the name of settings with this micro-batch size."""
    return name if batch == BATCHES[0] else f"{name}, {batch}×{PAIRS_A_STEP // batch}"


def add_splits(variants: Mapping[str, Variant]) -> dict[str, Variant]:
    """Return settings by name: the given ones, then the same with each other micro-batch size."""
    return {
        name_split(name, batch): replace(variant, batch=batch)
        for batch in BATCHES
        for name, variant in variants.items()
    }


TRL_VARIANTS = add_splits(
    {
        "trl": Variant(),
        "trl no checkpointing": Variant(gradient_checkpointing=False),
        "trl precompute": Variant(precompute_ref_log_probs=True),
        "trl precompute, no checkpointing": Variant(gradient_checkpointing=False, precompute_ref_log_probs=True),
    }
)
"""Settings of `trl dpo`, the default first. TRL 1.16 ignores padding_free."""


@dataclass(frozen=True)
class Job:
    """The training job of every side: one epoch of LoRA DPO.

    Attributes:
        rows: path of the JSON lines.
        pairs: number of rows.
        max_length: maximum tokens of a row.
        model: folder of the model.
        device: `cpu` or `cuda`.
        load_in_4bit: whether the base is quantized to nf4.
        dtype: dtype of the base's weights and of autocast, which float32 turns off.
        max_steps: optimizer steps; -1 for one epoch.
    """

    rows: str
    pairs: int
    max_length: int
    model: str
    device: str = "cpu"
    beta: float = 0.1
    learning_rate: float = 1.5e-4
    batch: int = 4
    accumulation: int = 2
    seed: int = 42
    load_in_4bit: bool = False
    dtype: str = "bfloat16"
    max_steps: int = -1


@dataclass(frozen=True)
class Measured:
    """Measurements of one run of one side.

    Attributes:
        side: name of the side.
        steps: optimizer steps.
        pairs: pairs trained on.
        train_seconds: time of the training loop.
        total_seconds: time of the command, start to end.
        first_step_seconds: time from the command's start to the end of the first step.
        peak_gb: peak resident host memory in GB, also on a GPU.
        cpu_seconds: CPU time.
        step_seconds: time of each step after the first.
        history: compared metrics by step.
    """

    side: str
    steps: int
    pairs: float
    train_seconds: float
    total_seconds: float
    first_step_seconds: float
    peak_gb: float
    cpu_seconds: float
    step_seconds: list[float]
    history: list[dict[str, float]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def build_ours(job: Job, run_dir: Path, further: Sequence[str] = ()) -> list[str]:
    """Return the command of dpo_runner, with its checks and records on as by default."""
    return [sys.executable, "-m", "dpo_runner", *_overrides(job), f"run_dir={run_dir}", *further]


def build_our_sweep(
    job: Job, sweep_dir: Path, betas: Sequence[float], rates: Sequence[float], threads: int
) -> list[str]:
    """Return the sweep command of the whole grid, with one worker per thread that a peer's command uses."""
    axes = [f"training.beta={','.join(map(str, betas))}", f"training.learning_rate={','.join(map(str, rates))}"]
    fixed = [text for text in _overrides(job) if not text.startswith(("training.beta", "training.learning_rate"))]
    return [
        sys.executable,
        "-m",
        "dpo_runner",
        "-m",
        *fixed,
        *axes,
        f"sweep.workers={threads}",
        f"sweep.dir={sweep_dir}",
    ]


_NF4 = ("quant=nf4", "quant.bnb_4bit_use_double_quant=false")


def _overrides(job: Job) -> list[str]:
    return [
        f"model.model_name_or_path={job.model}",
        f"model.dtype={job.dtype}",
        *(_NF4 if job.load_in_4bit else []),
        *([f"quant.bnb_4bit_compute_dtype={job.dtype}"] if job.load_in_4bit else []),
        "data=local_file",
        f"data.path={job.rows}",
        "data.eval_fraction=0",
        "data.on_overlong=trl",
        f"training.bf16={str(job.dtype == 'bfloat16').lower()}",
        f"training.fp16={str(job.dtype == 'float16').lower()}",
        f"training.max_length={job.max_length}",
        f"training.per_device_train_batch_size={job.batch}",
        f"training.gradient_accumulation_steps={job.accumulation}",
        f"training.learning_rate={job.learning_rate}",
        f"training.beta={job.beta}",
        f"training.max_steps={job.max_steps}",
        "training.lr_scheduler_type=cosine",
        "training.warmup_steps=0.1",
        "training.logging_steps=1",
        "training.eval_strategy=no",
        "training.save_strategy=steps",
        "training.save_steps=500",
        "wandb=disabled",
        "samples.num_prompts=0",  # the peers generate no samples
        f"seed={job.seed}",
    ]


def build_trl(job: Job, output_dir: Path, further: Sequence[str] = ()) -> list[str]:
    """Return the command of `trl dpo`."""
    settings = {
        "dataset_name": str(Path(job.rows).with_suffix("")),
        "model_name_or_path": job.model,
        "dtype": job.dtype,
        "output_dir": output_dir,
        "max_length": job.max_length,
        "per_device_train_batch_size": job.batch,
        "gradient_accumulation_steps": job.accumulation,
        "learning_rate": job.learning_rate,
        "beta": job.beta,
        "max_steps": job.max_steps,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "report_to": "none",
        "seed": job.seed,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0,
        "lora_target_modules": "all-linear",
        "bf16": str(job.dtype == "bfloat16").lower(),
        "fp16": str(job.dtype == "float16").lower(),
    }
    flags = ["--use_peft", *(["--use_cpu"] if job.device == "cpu" else [])]
    flags += ["--load_in_4bit"] if job.load_in_4bit else []
    command = [str(Path(sys.executable).with_name("trl")), "dpo"]
    return [*command, *(str(word) for key, value in settings.items() for word in (f"--{key}", value)), *flags, *further]


def measure_ours(
    side: str,
    job: Job,
    folder: Path,
    environment: Mapping[str, str],
    further: Sequence[str] = (),
) -> Measured:
    """Run dpo_runner and read its run directory."""
    finished = run(build_ours(job, folder, further), environment, folder.with_suffix(".log"))
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    times = [event["time"] for event in read_metrics(folder) if "loss" in event]
    return _measured(side, job, finished, folder / "checkpoints", summary["train_runtime"], times)


def measure_trl(
    side: str,
    job: Job,
    folder: Path,
    environment: Mapping[str, str],
    variant: Variant,
) -> Measured:
    """Run `trl dpo` and read its last checkpoint and output; the micro-batch size is that of `job`."""
    finished = run(build_trl(job, folder, variant.flags), environment, folder.with_suffix(".log"))
    return read_trainer(side, job, finished, folder)


def read_trainer(side: str, job: Job, finished: Finished, folder: Path) -> Measured:
    """Read the output and the checkpoints in `folder` of a command built on transformers' `Trainer`."""
    runtime = next(event["train_runtime"] for _, event in reversed(finished.events) if "train_runtime" in event)
    times = [when for when, event in finished.events if "loss" in event]
    return _measured(side, job, finished, folder, runtime, times)


def _measured(
    side: str, job: Job, finished: Finished, checkpoints: Path, runtime: float, times: Sequence[float]
) -> Measured:
    steps, history = read_state(checkpoints)
    return Measured(
        side=side,
        steps=steps,
        pairs=min(steps * job.batch * job.accumulation, job.pairs),
        train_seconds=runtime,
        total_seconds=finished.seconds,
        first_step_seconds=times[0] - finished.started,
        peak_gb=finished.peak_gb,
        cpu_seconds=finished.cpu_seconds,
        step_seconds=[after - before for before, after in pairwise(times)],
        history=history,
    )


def read_state(checkpoints: Path) -> tuple[int, list[dict[str, float]]]:
    """Return the step of the last checkpoint and the compared metrics of each step."""
    newest = max(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    state = json.loads((newest / "trainer_state.json").read_text(encoding="utf-8"))
    return state["global_step"], _select([event for event in state["log_history"] if "loss" in event])


def read_history(run_dir: Path) -> list[dict[str, float]]:
    """Return the compared metrics of each step of a dpo_runner run."""
    return _select([event for event in read_metrics(run_dir) if "loss" in event])


def _select(events: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    return [{key: event[key] for key in _COMPARED if key in event} for event in events]


def write_trl_dataset(rows: str) -> None:
    """Write the rows as a folder for `trl dpo`, because `load_dataset` takes a folder."""
    folder = Path(rows).with_suffix("")
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_bytes(Path(rows).read_bytes())


def vary(job: Job, **changes: Any) -> Job:
    return replace(job, **changes)

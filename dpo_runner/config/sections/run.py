"""`RunFields`: the fields of one run, and its sections `wandb`, `engine`, `checks`, `samples` and `judge`."""

from dataclasses import dataclass, field

from dpo_runner.config.sections.data import DataConf
from dpo_runner.config.sections.model import LoraConf, ModelConf, QuantConf
from dpo_runner.config.sections.sweep import SweepConf
from dpo_runner.config.sections.training import TrainingConf


@dataclass
class WandbConf:
    """Weights & Biases."""

    mode: str = field(default="offline", metadata={"choices": ("offline", "online", "disabled")})
    """`offline` writes to the disk, to be synchronized later or never."""
    project: str = "dpo_runner"
    """Project."""
    entity: str | None = None
    """User or team; null takes the account's default."""
    group: str | None = None
    """Group of runs; null takes none, in a sweep the name of its directory."""
    name: str | None = None
    """Display name; null takes run_name and the run directory's name, in a sweep what the run varies."""
    job_type: str | None = None
    """Kind of run; null takes none, in a sweep `sweep` or `search`."""
    dir: str | None = None
    """The folder that holds W&B's own, `wandb/`; null takes the run's directory, in a sweep the sweep's."""
    tags: list[str] = field(default_factory=list)
    """Tags."""
    notes: str | None = None
    """Free text."""


@dataclass
class EngineConf:
    """Exact speed-ups: losses, metrics and gradients are those of TRL's own way, which each can be put back to."""

    shared_prefix: bool = True
    """Score each pair's common prefix once, without padding, and the vocabulary at completion tokens alone; where that
    would not be exact, the plan says why TRL's own forward is taken."""
    max_tokens_per_micro_batch: int | None = None
    """Score the pairs of an optimizer step in groups of so many tokens, a shared prefix counted once, for the same
    gradient; null: as many as per_device_train_batch_size of the largest pairs have, on a CPU no more than 1024; 0: in
    TRL's batches."""
    lean_layers: bool = True
    """Keep less for the backward pass in LoRA layers, and on a CPU in the norms and MLPs of models built like Llama."""
    auto_gradient_checkpointing: bool = True
    """Switch training.gradient_checkpointing on where, by the memory estimate, the run would not fit without it."""
    reference_store: bool = True
    """Compute the reference's log-probabilities once for all runs that compare with it, and keep them in the cache."""
    reference_store_gb: float = 10.0
    """Gigabytes (1e9 bytes) that all stored references may take; the least recently used others make room, and what
    does not fit then is not kept."""
    keep_base_model: bool = True
    """Load and quantize the base model once for all runs of a sweep's worker that train adapters on the same one."""


@dataclass
class ChecksConf:
    """What is verified while the run goes on."""

    step0: bool = True
    """Before training: policy = reference, what is trained is fp32; after the first steps: it has moved."""
    on_nonfinite: str = field(default="stop", metadata={"choices": ("stop", "skip_batch")})
    """What a step does whose loss or gradient is NaN or infinite: end the run, or leave the weights as they are and be
    counted. Its pairs are written into nonfinite/ either way."""
    max_skipped_batches: int = 10
    """With on_nonfinite=skip_batch: how many steps may be skipped before the run ends."""
    on_out_of_memory: str = field(default="stop", metadata={"choices": ("stop", "smaller_batch")})
    """What a run does that finds too little memory: end, or go on from its last checkpoint with half the tokens to a
    micro-batch; where rows are counted, with half the rows and twice the accumulation. Evaluation halves its batches.
    status.json and summary.json tell of it."""


@dataclass
class SamplesConf:
    """Greedy answers to evaluation prompts, by the model before training and after."""

    num_prompts: int = 24
    """The first so many evaluation prompts are answered; `response_tokens` is the mean length over them."""
    max_new_tokens: int = 256
    """An answer's length limit in tokens."""
    show: int = 3
    """How many answers are printed side by side at the end."""


@dataclass
class JudgeConf:
    """The OpenAI-compatible endpoint that `python -m dpo_runner.evaluate` asks which of two answers is better."""

    base_url: str | None = None
    """Such as `http://127.0.0.1:8000/v1`; null: no win rate."""
    model: str | None = None
    """The judge's name at that endpoint."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; where it is not set, none is sent."""
    timeout: float = 60.0
    """Seconds to wait for one verdict."""


@dataclass
class RunFields:
    """The sections and fields of one run; `RunConf` adds the rules between them."""

    model: ModelConf = field(default_factory=ModelConf)
    quant: QuantConf | None = None
    lora: LoraConf | None = field(default_factory=LoraConf)
    data: DataConf = field(default_factory=DataConf)
    training: TrainingConf = field(default_factory=TrainingConf)
    wandb: WandbConf = field(default_factory=WandbConf)
    engine: EngineConf = field(default_factory=EngineConf)
    checks: ChecksConf = field(default_factory=ChecksConf)
    samples: SamplesConf = field(default_factory=SamplesConf)
    judge: JudgeConf = field(default_factory=JudgeConf)
    sweep: SweepConf = field(default_factory=SweepConf)
    run_name: str = "dpo"
    """Names the directory under outputs/ and the W&B run."""
    run_dir: str | None = None
    """The run's directory; null makes outputs/<run_name>/<timestamp>."""
    seed: int = 42
    """Seeds weights, data order and dropout."""
    resume: str = field(default="auto", metadata={"choices": ("auto", "never")})
    """`auto` continues what `run_dir` holds; `never` refuses a `run_dir` that holds anything."""
    dry_run: bool = False
    """Compose, check, load tokenizer and data, print the plan and an estimate of peak memory, and stop."""

"""`RunFields`, all fields of a run; sections `wandb`, `engine`, `launch`, `checks`, `samples` and `judge`."""

from dataclasses import dataclass, field

from dpo_runner.config.sections.benchmarks import BenchmarksConf
from dpo_runner.config.sections.data import DataConf
from dpo_runner.config.sections.expected import ExpectedConf
from dpo_runner.config.sections.generate import GenerateConf, RewardConf
from dpo_runner.config.sections.model import LoraConf, ModelConf, QuantConf
from dpo_runner.config.sections.sweep import SweepConf
from dpo_runner.config.sections.training import TrainingConf


@dataclass
class WandbConf:
    """Weights & Biases."""

    mode: str = field(default="offline", metadata={"choices": ("offline", "online", "disabled")})
    """`offline` writes to disk; synchronizing later is optional."""
    project: str = "dpo_runner"
    """Project."""
    entity: str | None = None
    """User or team; null: the account's default."""
    group: str | None = None
    """Group of runs; null: none, in a sweep the name of its directory."""
    name: str | None = None
    """Display name; null: run_name and the run directory's name, in a sweep the values that vary."""
    job_type: str | None = None
    """Job type; null: none, in a sweep `sweep` or `search`."""
    dir: str | None = None
    """Parent of W&B's folder `wandb/`; null: the run directory, in a sweep the sweep directory."""
    tags: list[str] = field(default_factory=list)
    """Tags."""
    notes: str | None = None
    """Free text."""


@dataclass
class EngineConf:
    """Exact speed-ups: losses, metrics and gradients equal TRL's. Each can be switched off."""

    shared_prefix: bool = True
    """Score each pair's common prefix once, without padding, and compute logits at completion tokens only. If that
    would not be exact, TRL's forward is used and the plan says why."""
    max_tokens_per_micro_batch: int | None = None
    """Token limit of a micro-batch, a shared prefix counted once; the gradient stays the same. null: the tokens of
    per_device_train_batch_size of the largest pairs, on a CPU at most 1024; 0: TRL's batches."""
    lean_layers: bool = True
    """Keep fewer activations for backward in LoRA layers and in the norms and MLPs of Llama-like models."""
    auto_gradient_checkpointing: bool = True
    """If the memory estimate says that the run would not fit otherwise, take fewer tokens at a time on a GPU, or else
    switch on training.gradient_checkpointing."""
    reference_store: bool = True
    """Compute the reference's log-probabilities once for all runs with the same reference, and cache them on disk."""
    reference_store_gb: float = 10.0
    """Size limit of all stored references in gigabytes (1e9 bytes). The least recently used are evicted; one that still
    does not fit is not kept."""
    keep_base_model: bool = True
    """Load and quantize a base model once for all runs of a sweep worker that train adapters on it."""


@dataclass
class LaunchConf:
    """Several processes for one run."""

    processes: int | str | None = None
    """Processes that share the work of each step, a GPU each; `auto`: one for each visible GPU. A step then has
    per_device_train_batch_size x gradient_accumulation_steps x processes pairs. null: one, or those that torchrun or
    another launcher has started."""
    timeout: float = 30.0
    """Minutes without a step or a scored batch after which a run of several processes ends."""


@dataclass
class ChecksConf:
    """Checks during the run, and the response to failures."""

    step0: bool = True
    """Verify before training that policy = reference and that trained weights are fp32; after the first steps that they
    have moved."""
    on_nonfinite: str = field(default="stop", metadata={"choices": ("stop", "skip_batch")})
    """If a step's loss or gradient is NaN or infinite: end the run, or skip and count the step. Its pairs are written
    to nonfinite/ either way."""
    max_skipped_batches: int = 10
    """With on_nonfinite=skip_batch: maximum skipped steps before the run ends."""
    on_out_of_memory: str = field(default="stop", metadata={"choices": ("stop", "smaller_batch")})
    """If memory runs out: end the run, or continue from the last checkpoint with half the tokens per micro-batch (if
    rows are counted: half the rows and twice the accumulation). Evaluation halves its batches. Recorded in status.json
    and summary.json."""


@dataclass
class SamplesConf:
    """Greedy answers to evaluation prompts, before and after training."""

    num_prompts: int = 24
    """Number of evaluation prompts answered (the first ones); `response_tokens` is their mean answer length."""
    prompts: str | None = None
    """File of prompts to answer instead of those of evaluation; `num_prompts` of them."""
    max_new_tokens: int = 256
    """Length limit of an answer in tokens."""
    show: int = 3
    """Number of answers printed side by side at the end."""
    reward: int = 0
    """Number of answers sampled to each of these prompts, before and after training, and scored by the group `reward`
    (`eval_reward` in summary.json); 0: none."""


@dataclass
class JudgeConf:
    """The OpenAI-compatible endpoint that judges answers in `python -m dpo_runner.evaluate`."""

    base_url: str | None = None
    """URL of the endpoint, such as `http://127.0.0.1:8000/v1`; null: no win rate."""
    model: str | None = None
    """Name of the judge model at that endpoint."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable with the API key; if it is not set, no key is sent."""
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
    launch: LaunchConf = field(default_factory=LaunchConf)
    checks: ChecksConf = field(default_factory=ChecksConf)
    samples: SamplesConf = field(default_factory=SamplesConf)
    judge: JudgeConf = field(default_factory=JudgeConf)
    benchmarks: BenchmarksConf = field(default_factory=BenchmarksConf)
    generate: GenerateConf = field(default_factory=GenerateConf)
    reward: RewardConf = field(default_factory=RewardConf)
    sweep: SweepConf = field(default_factory=SweepConf)
    rounds: int | None = None
    """Repeat this often: sample answers to the prompts of `data` (`generate`), score them (`reward`), train on the
    pairs, measure the reward on held-out prompts. Each round starts from the last one's policy. null: one run on the
    pairs of `data`."""
    rounds_patience: int | None = None
    """End the rounds when so many in a row have not raised the held-out reward; null: run all."""
    rounds_reference: str = field(default="previous", metadata={"choices": ("previous", "initial")})
    """The reference of each round: the policy that it starts from, or the model that the first round started from."""
    expected: list[ExpectedConf] = field(default_factory=list)
    """Figures of a published run with these settings, which the run shows beside its own; [] for none."""
    run_name: str = "dpo"
    """Name of the directory under outputs/ and of the W&B run."""
    run_dir: str | None = None
    """The run's directory; null: outputs/<run_name>/<timestamp>."""
    seed: int = 42
    """Seed of weights, data order and dropout."""
    resume: str = field(default="auto", metadata={"choices": ("auto", "never")})
    """`auto` continues the run in `run_dir`; `never` requires an empty `run_dir`."""
    dry_run: bool = False
    """Validate, load tokenizer and data, print the plan and a peak memory estimate, and stop."""

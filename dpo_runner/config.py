"""One run's configuration as typed dataclasses, and how it is composed from `conf/`. Imports no torch.

Every field is spelled as upstream spells it (TRL, PEFT, transformers, bitsandbytes, wandb).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from dpo_runner.adapter_config import recognise_adapter
from dpo_runner.data_config import DataConf
from dpo_runner.errors import ConfigError, reason_of
from dpo_runner.hydra_rules import check_composed
from dpo_runner.model_config import LoraConf, ModelConf, QuantConf
from dpo_runner.sweep_config import SweepConf
from dpo_runner.training_fields import TrainingConf

_PACKAGED_CONF = Path(__file__).parent / "conf"
CONF_DIR = _PACKAGED_CONF if _PACKAGED_CONF.is_dir() else Path(__file__).parents[1] / "conf"
CONFIG_NAME = "config"
OUTSIDE = ("sweep", "wandb", "run_name", "run_dir", "resume", "dry_run", "judge")
"""Keys of what a run is called, where it goes and how it is executed or looked at: never of what it computes."""


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
class RunConf:
    """Everything that defines one run.

    Raises:
        ConfigError: with one line for each field that is out of range or contradicts another.
    """

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

    def __post_init__(self) -> None:
        from dpo_runner.config_checks import find_mistakes

        mistakes = find_mistakes(self)
        if mistakes:
            raise ConfigError(mistakes)


ConfigStore.instance().store(name="base_config", node=RunConf)
# Only their names: the command registers the classes when it runs (see dpo_runner/sweep/sweeper.py).
for _group, _name, _class in (
    ("launcher", "workers", "WorkersLauncher"),
    ("sweeper", "grid", "GridSweeper"),
    ("sweeper", "optuna", "OptunaSweeper"),
):
    _target = {"_target_": f"hydra_plugins.dpo_runner.{_class}"}
    ConfigStore.instance().store(group=f"hydra/{_group}", name=_name, node=_target)


_INTO_MAP = re.compile(
    r"(data\.(?:sources\.[^.=]+\.)?columns|data\.sources|lora\.config|lora\.(?:rank|alpha)_pattern)(\.[^=]+)?="
)


def expand_overrides(overrides: Sequence[str]) -> list[str]:
    """Let overrides name new entries of maps such as `data.sources` and `lora.config`, which Hydra wants marked.

    `data.sources.mine.path=x` becomes `++data.sources={mine:{}}` and `++data.sources.mine.path=x`.
    """
    names = dict.fromkeys(match[1] for text in overrides if (match := re.match(r"data\.sources\.([^.=]+)[.=]", text)))
    expanded = [f"++{text}" if _INTO_MAP.match(text) else text for text in overrides]
    if names:  # beside the first of them: flags and overrides must not be mixed
        first = next(at for at, text in enumerate(overrides) if re.match(r"data\.sources\.", text))
        expanded.insert(first, f"++data.sources={{{','.join(f'{name}:{{}}' for name in names)}}}")
    return expanded


def compose_config(overrides: list[str], config_dir: str | None = None) -> DictConfig:
    """Compose `conf/config.yaml` with Hydra overrides, outside of a Hydra application.

    Args:
        overrides: as on the command line, such as `["quant=nf4", "training.beta=0.2"]`.
        config_dir: a folder of the user's own config groups, searched after `conf/`.

    Raises:
        ConfigError: something would set what Hydra acts on, and could run code.
    """
    GlobalHydra.instance().clear()
    search_path = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = compose(CONFIG_NAME, [*search_path, *expand_overrides(overrides)], return_hydra_config=True)
    assert isinstance(config, DictConfig)
    check_composed(config)
    with open_dict(config):
        del config["hydra"]
    return config


def build_run_conf(config: DictConfig, overrides: Sequence[str]) -> RunConf:
    """Turn a composed config into the typed object that a run is made of.

    An SFT adapter that is continued is trained in its own shape, so the default `lora`, which describes a new
    one, gives way where no override speaks of it.

    Args:
        config: what Hydra composed.
        overrides: what it was composed from.

    Raises:
        ConfigError: an unset `???`, an interpolation that leads nowhere, or what `RunConf` refuses.
    """
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError([f"`{key}`: must be set (`{key}=VALUE`)" for key in missing])
    recognise_adapter(config)
    spoken_of = {re.split(r"[.=]", text.lstrip("+"))[0] for text in overrides}
    continues = config.model.adapter is not None and config.model.adapter_mode == "continue"
    if continues and not {"lora", "experiment"} & spoken_of:
        config.lora = None
    try:
        conf = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError(f"`{error.full_key}`: {reason_of(error)}") from None
    assert isinstance(conf, RunConf)
    return conf


def load_conf(overrides: list[str] | None = None, config_dir: str | None = None) -> RunConf:
    """Compose and check a run's configuration from Python, with the command line's overrides.

    >>> load_conf(["quant=nf4", "training.beta=0.2"]).training.beta
    0.2

    Raises:
        ConfigError: with one line for each mistake found.
    """
    from dpo_runner.command_line import find_override_mistakes

    overrides = list(overrides or [])
    mistakes = find_override_mistakes(overrides, config_dir)
    if mistakes:
        raise ConfigError(mistakes)
    return build_run_conf(compose_config(overrides, config_dir), overrides)


def config_keys(conf: Any) -> dict[str, Any]:
    """Return a run's configuration as plain containers, ready for YAML and JSON."""
    plain = OmegaConf.to_container(OmegaConf.structured(conf))
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}

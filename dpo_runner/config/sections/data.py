"""The `data` section of a run's configuration: sources, and what is done with their rows. Imports no torch."""

from dataclasses import dataclass, field, fields

FORMATS = ("auto", "preference", "hh", "sharegpt", "alpaca", "orca", "scored", "helpsteer")
"""Layouts of rows; see `dpo_runner.data.layouts.known`."""
COLUMNS = (
    *("prompt", "chosen", "rejected", "system", "conversations", "history", "instruction", "input", "question"),
    *("output", "responses", "scores", "response", "score", "helpfulness", "score_chosen", "score_rejected"),
    *("context", "response1", "response2", "overall_preference", "tools", "chat_template_kwargs"),
)
"""Our names of columns, to which `data.columns` maps others."""


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


def resolve_sources(data: DataConf) -> dict[str, SourceConf]:
    """Return the sources by name: those of `data.sources`, or the one whose fields stand in `data` itself."""
    if data.sources:
        return dict(data.sources)
    return {"data": SourceConf(**{field.name: getattr(data, field.name) for field in fields(SourceFields)})}

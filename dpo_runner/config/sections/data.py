"""The `data` section as typed dataclasses: sources and row processing. Imports no torch."""

from dataclasses import dataclass, field, fields

FORMATS = ("auto", "preference", "hh", "sharegpt", "swift", "alpaca", "orca", "scored", "helpsteer", "kto")
"""Layouts of rows; see `dpo_runner.data.layouts.known`."""
COLUMNS = (
    *("prompt", "chosen", "rejected", "system", "conversations", "history", "instruction", "input", "question"),
    *("output", "responses", "scores", "response", "score", "helpfulness", "score_chosen", "score_rejected"),
    *("context", "response1", "response2", "overall_preference", "tools", "chat_template_kwargs", "messages"),
    *("rejected_response", "rejected_messages", "completion", "label", "system_prompt"),
)
"""Canonical column names, the targets of `data.columns`."""
PAIRINGS = ("best_vs_worst", "best_vs_random", "best_vs_rest", "all_pairs")
"""Pairs of a row with several answers."""
ROLES = ("system", "user", "assistant", "tool")
"""Roles of messages, the targets of `data.roles`."""


@dataclass
class SourceFields:
    """Location and layout of rows."""

    path: str | None = None
    """`bundled:concise`, a local file (JSON, JSONL, CSV, TSV, Parquet, Arrow; text also packed, such as .gz), a folder,
    a glob, or a hub dataset id."""
    eval_path: str | None = None
    """Local file, folder or glob of evaluation pairs; null: from `eval_split` or `eval_fraction`."""
    subset: str | None = None
    """Configuration name of a hub dataset, or of a folder whose README.md has configurations."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""
    split: str = "train"
    """Training split of a hub dataset, or of a folder that names its splits."""
    eval_split: str | None = None
    """Evaluation split of the same dataset."""
    format: str = field(default="auto", metadata={"choices": FORMATS})
    """Row layout; `auto` detects and reports it, or lists the candidates if ambiguous."""
    columns: dict[str, str] = field(default_factory=dict)
    """Column renames, source to canonical, such as `{question: prompt, good: chosen, bad: rejected}`."""
    formatter: str | None = None
    """Your `package.module:function`: maps a row to one in a known layout, a list of such rows, or None to drop it."""
    pairing: str = field(default="best_vs_worst", metadata={"choices": PAIRINGS})
    """Pairs made from a row with more than two answers; equal scores make no pair, `best_vs_random` draws one of the
    lower scores, and answers without scores need `all_pairs`, each chosen one with each rejected one."""
    min_score_gap: float = 0.0
    """Drop pairs whose scores differ by less than this (pairs without scores stay)."""
    max_length_difference: int | None = None
    """Drop pairs whose answers differ in length by more than this many characters."""
    max_similarity: float | None = None
    """Drop pairs whose answers are more alike than this: the share of common sequences of three words, from 0 to 1."""
    drop_columns: list[str] = field(default_factory=list)
    """Columns to ignore, by the names they have before `columns` renames them, such as `[rating]`."""
    roles: dict[str, str] = field(default_factory=dict)
    """Roles of messages by other names, theirs to `system`, `user`, `assistant` or `tool`, such as
    `{narrator: system}`."""


@dataclass
class SourceConf(SourceFields):
    """One of several sources of a mixture."""

    weight: float | None = None
    """Share of the training rows, relative to the other sources' weights. The source that is scarcest for its share
    is used in full, the others in part; no row is repeated. null (for all sources): all rows."""
    max_train_samples: int | None = None
    """Maximum training rows of this source, drawn with `seed`."""
    max_eval_samples: int | None = None
    """Maximum evaluation rows of this source, drawn with `seed`."""
    seed: int = 0
    """Seed of the row selection if not all rows are taken."""


@dataclass
class DataConf(SourceFields):
    """The preference pairs: a single source given here, or several in `sources`."""

    sources: dict[str, SourceConf] = field(default_factory=dict)
    """A mixture of named sources, each with the fields of a source. Evaluation reports each by name."""
    eval_fraction: float = 0.1
    """Share of prompts, chosen by a hash of the prompt alone, held out for evaluation if a source has no evaluation
    rows; 0: none."""
    max_train_samples: int | None = None
    """Maximum training rows (the first ones)."""
    max_eval_samples: int | None = None
    """Maximum evaluation rows (the first ones)."""
    system_prompt: str | None = None
    """System turn for conversations without one."""
    on_no_system_role: str = field(default="fold", metadata={"choices": ("fold", "error")})
    """If the chat template does not support a system role: `fold` the system turn into the first user turn, or stop."""
    on_template_mismatch: str = field(default="error", metadata={"choices": ("error", "longest_common_prefix")})
    """If a prompt tokenizes differently alone and before an answer: stop, or use the common prefix of both as the
    prompt."""
    on_bad_row: str = field(default="drop", metadata={"choices": ("drop", "error")})
    """Unusable rows: drop and report them, or stop at the first."""
    max_bad_fraction: float = 0.05
    """Stop if more than this share of a source's rows is unusable."""
    on_overlong: str = field(
        default="drop", metadata={"choices": ("drop", "truncate_prompt_left", "truncate_completion", "trl")}
    )
    """Pairs longer than `training.max_length`: drop them; cut the start of the prompt; cut the end of the answers
    (which loses their EOS); or leave them to TRL, which cuts prompt and answer as one by `training.truncation_mode`."""
    deduplicate: str | None = field(default=None, metadata={"choices": ("exact", "near")})
    """Keep only the first of identical or near-identical pairs, in training and in evaluation."""
    near_duplicate_threshold: float = 0.8
    """Minimum Jaccard similarity of token 5-grams (MinHash estimate) for `near` to treat two pairs as duplicates."""
    decontaminate: list[str] = field(default_factory=list)
    """Drop training pairs that share a word n-gram with any of these: `eval` (this run's evaluation pairs), a local
    file (text, or a format of `path`), or a hub dataset with subset and split (`openai/gsm8k/main:test`)."""
    decontaminate_ngram: int = 13
    """n-gram length in words; a shorter prompt matches only as a whole."""


def resolve_sources(data: DataConf) -> dict[str, SourceConf]:
    """Return the sources by name: `data.sources`, or the single source given in `data` itself."""
    if data.sources:
        return dict(data.sources)
    return {"data": SourceConf(**{field.name: getattr(data, field.name) for field in fields(SourceFields)})}

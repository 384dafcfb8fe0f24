"""The rows of a run, tokenized, with an account of every row that was dropped or cut."""

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dpo_runner.config import RunConf
from dpo_runner.data.chat_template import apply_chat_template
from dpo_runner.data.formats import Message, to_messages
from dpo_runner.data.sources import load_rows
from dpo_runner.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


@dataclass
class SplitReport:
    """What became of one split's rows.

    Attributes:
        rows: rows in the source.
        kept: rows the run uses.
        dropped: rows left out, by reason.
        cut: rows kept of which a completion loses its end to `training.max_length`.
        tokens: total tokens of prompt, chosen and rejected of the rows kept.
    """

    rows: int
    kept: int
    dropped: dict[str, int]
    cut: int
    tokens: dict[str, int]

    def __str__(self) -> str:
        parts = [f"{self.kept} of {self.rows} rows", f"{sum(self.tokens.values()):,} tokens"]
        parts += [f"{count} dropped: {reason}" for reason, count in self.dropped.items()]
        parts += [f"{self.cut} lose the end of an answer to training.max_length"] if self.cut else []
        return ", ".join(parts)


@dataclass
class PreferenceData:
    """A run's data.

    Attributes:
        train: columns `prompt_ids`, `chosen_ids`, `rejected_ids` (lists of int).
        eval: the same for evaluation, or None.
        prompts: the first evaluation prompts (training prompts where there is no evaluation), as messages, each once.
        reports: by split, what became of its rows.
    """

    train: "Dataset"
    eval: "Dataset | None"
    prompts: list[list[Message]]
    reports: dict[str, SplitReport] = field(default_factory=dict)


def load_preferences(conf: RunConf, tokenizer: "PreTrainedTokenizerBase") -> PreferenceData:
    """Load, template and tokenize a run's preference pairs.

    Raises:
        ConfigError: a source cannot be read, a row has no known form, or a split is left without rows.
    """
    train_rows, eval_rows = load_rows(conf.data, conf.seed)
    train, train_report = _tokenize(train_rows, "train", conf, tokenizer)
    reports = {"train": train_report}
    evaluation = None
    if eval_rows is not None:
        evaluation, reports["eval"] = _tokenize(eval_rows, "eval", conf, tokenizer)
    prompts = _first_prompts(eval_rows if eval_rows is not None else train_rows, conf.samples.num_prompts)
    return PreferenceData(train, evaluation, prompts, reports)


def _tokenize(
    rows: "Dataset", split: str, conf: RunConf, tokenizer: "PreTrainedTokenizerBase"
) -> tuple["Dataset", SplitReport]:
    max_length, keep_start = conf.training.max_length, conf.training.truncation_mode == "keep_start"

    def tokenize(row: dict[str, Any], index: int) -> dict[str, Any]:
        try:
            ids = apply_chat_template(row, tokenizer)
        except ConfigError as error:
            raise ConfigError(f"data, {split} row {index + 1}: {error}") from None
        longest = len(ids["prompt_ids"]) + max(len(ids["chosen_ids"]), len(ids["rejected_ids"]))
        problem = ""
        if ids["chosen_ids"] == ids["rejected_ids"]:
            problem = "chosen equals rejected"
        elif max_length is not None and keep_start and len(ids["prompt_ids"]) >= max_length:
            problem = "the prompt alone fills training.max_length"
        return {**ids, "problem": problem, "cut": max_length is not None and longest > max_length}

    # The cache is off: its key does not see changes of the code that `tokenize` calls.
    tokenized = rows.map(
        tokenize,
        with_indices=True,
        remove_columns=rows.column_names,
        num_proc=conf.training.dataset_num_proc,
        load_from_cache_file=False,
        desc=f"Tokenizing {split}",
    )
    problems = tokenized["problem"][:]
    kept = [index for index, problem in enumerate(problems) if not problem]
    dropped = Counter(problem for problem in problems if problem)
    if not kept:
        raise ConfigError(
            f"data, {split}: no row is left; {', '.join(f'{n} dropped: {p}' for p, n in dropped.items())}"
        )
    data = tokenized.select(kept)
    report = SplitReport(
        rows=len(rows),
        kept=len(kept),
        dropped=dict(dropped),
        cut=sum(data["cut"][:]),
        tokens={column.removesuffix("_ids"): sum(map(len, data[column][:])) for column in ID_COLUMNS},
    )
    return data.remove_columns(["problem", "cut"]), report


def _first_prompts(rows: "Dataset", count: int) -> list[list[Message]]:
    prompts: list[list[Message]] = []
    for row in rows:
        if len(prompts) == count:
            break
        prompt = to_messages(row)["prompt"]
        if prompt not in prompts:
            prompts.append(prompt)
    return prompts

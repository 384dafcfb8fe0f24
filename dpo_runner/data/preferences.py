"""A run's preference pairs: prepare each source, then split, clean, mix and report."""

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_runner.config.run_conf import RunConf
from dpo_runner.config.sections.data import DataConf, SourceConf, resolve_sources
from dpo_runner.data.bad_rows import check_bad_rows, check_outcome
from dpo_runner.data.overlap import find_contaminated, find_near_duplicates, load_reference_texts
from dpo_runner.data.overlong import Limit, cut_rows
from dpo_runner.data.prepare.batches import Outcome
from dpo_runner.data.prepare.cache import Prepared, prepare
from dpo_runner.data.prepare.recipe import Recipe
from dpo_runner.data.prompts import SamplePrompt, choose_prompts
from dpo_runner.data.report import DataReport, SourceReport
from dpo_runner.data.rows.sources import RowSource, open_sources, source_key
from dpo_runner.data.splits import DataShape, Mask, Split, hold_out
from dpo_runner.data.templates.chat_template import ChatTemplate
from dpo_runner.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")

NEAR_DUPLICATE, CONTAMINATED = "near-duplicate", "shares text with data.decontaminate"

Progress = Callable[[str, int], None]
"""Called with a source's name and the number of further rows prepared."""


@dataclass
class PreferenceData:
    """A run's data.

    Attributes:
        train: columns `prompt_ids`, `chosen_ids`, `rejected_ids` (lists of int), `prompt` (its messages as JSON) and
            the pair's origin.
        eval: the same for evaluation, or None.
        eval_by_source: `eval` by source, also with a single source; empty without evaluation.
        prompts: the first distinct evaluation prompts (training prompts if there is no evaluation).
        report: the data report.
        stop_id: the chat template's end-of-turn token, a stop token in addition to the tokenizer's EOS; or None.
    """

    train: "Dataset"
    eval: "Dataset | None"
    eval_by_source: "dict[str, Dataset]"
    prompts: list[SamplePrompt]
    report: DataReport
    stop_id: int | None
    _splits: dict[str, Split]
    _prepared: list[tuple[str, str, Prepared]]

    def locate(self, split: str, row: int) -> str:
        """Return the location of row `row` of `train` or `eval` in its source, such as `pairs.jsonl:12`."""
        return self._splits[split].locate(row)

    def fingerprint(self, split: str) -> str:
        """Return a digest of a split's token ids, in order."""
        return self._splits[split].fingerprint()

    def shape(self) -> DataShape:
        """Return the largest row sizes over all splits."""
        splits = self._splits.values()
        longest, largest = max(split.longest() for split in splits), max((s.largest() for s in splits), key=sum)
        return DataShape(longest, largest, self.eval is not None)

    def dropped(self) -> Iterator[dict[str, Any]]:
        """Yield source, split, file, line (or row), reason and detail of each dropped row or pair."""
        for name, split, prepared in self._prepared:
            for row in prepared.bad_rows():
                yield {"source": name, "split": split, **row}
        for name_of_split, pairs in self._splits.items():
            for source, place, reason in pairs.dropped():
                yield {"source": source, "split": name_of_split, **place, "reason": reason, "detail": ""}


def load_preferences(
    conf: RunConf,
    tokenizer: "PreTrainedTokenizerBase",
    origin: str = "the tokenizer's own",
    progress: Progress = lambda name, rows: None,
) -> PreferenceData:
    """Load, template and tokenize a run's preference pairs, or read them from the cache.

    Args:
        conf: the run.
        tokenizer: with its chat template.
        origin: origin of the chat template, for the report.
        progress: called as rows are prepared.

    Raises:
        ConfigError: `conf` is of rounds, which have no pairs yet.
        DataError: a source cannot be read, has too many unusable rows, or a split has no pairs left.
        RunError: a worker process died.
    """
    data = conf.data
    if conf.rounds:
        raise ConfigError(f"`rounds={conf.rounds}`: makes pairs in each round; dpo_runner.run_rounds runs them")
    template = ChatTemplate(tokenizer, data.system_prompt, data.on_no_system_role)
    sources = resolve_sources(data)
    prepared = [
        (name, split, _prepare(name, rows, source, template, conf, progress))
        for name, source in sources.items()
        for split, rows in zip(("train", "eval"), open_sources(source, source_key(name, data)), strict=True)
        if rows is not None
    ]
    for name, _, part in prepared:
        check_bad_rows(part, data, source_key(name, data))
    splits = _split(prepared, data)
    limit = Limit.of(conf, template)
    built: dict[str, Dataset] = {}
    for name in reversed(splits):  # evaluation first: training may be decontaminated against it
        built[name] = _build(name, splits[name], conf, limit, tokenizer, built.get("eval"))
    evaluation = built.get("eval")
    return PreferenceData(
        train=built["train"],
        eval=evaluation,
        eval_by_source=_by_source(evaluation, splits),
        prompts=choose_prompts(evaluation or built["train"], conf, template),
        report=DataReport(
            template=[origin, *template.describe()],
            sources=[_report_source(name, split, part) for name, split, part in prepared],
            splits={name: split.report() for name, split in splits.items()},
            warnings=[*_find_skipped(prepared), *_find_warnings(splits, data)],
        ),
        stop_id=template.end_of_turn,
        _splits=splits,
        _prepared=prepared,
    )


def _prepare(
    name: str, rows: RowSource, source: SourceConf, template: ChatTemplate, conf: RunConf, progress: Progress
) -> Prepared:
    data = conf.data
    recipe = Recipe(source, template, [data.system_prompt, data.on_no_system_role], source_key(name, data))

    def watch(outcome: Outcome, source: RowSource) -> None:
        progress(name, outcome.rows)
        check_outcome(outcome, source, data)

    return prepare(rows, recipe, conf.training.dataset_num_proc, watch)


def _split(prepared: list[tuple[str, str, Prepared]], data: DataConf) -> dict[str, Split]:
    """Assign pairs to train and eval: by the source's own evaluation rows, else by a hash of the prompt."""
    bring_evaluation = {name for name, split, _ in prepared if split == "eval"}
    undivided = [part for name, _, part in prepared if name not in bring_evaluation]
    held_out: list[Mask] = []
    if undivided and data.eval_fraction > 0:
        hashes = [part.rows.data.column("prompt_hash").to_numpy() for part in undivided]
        held_out = hold_out(hashes, data.eval_fraction)
    masks = iter(held_out)
    sides: dict[str, list[tuple[str, Prepared, Mask]]] = {"train": [], "eval": []}
    for name, split, part in prepared:
        if name in bring_evaluation or not held_out:
            sides[split].append((name, part, np.ones(len(part.rows), np.bool_)))
        else:
            mask = next(masks)
            sides["train"].append((name, part, ~mask))
            sides["eval"].append((name, part, mask))
    return {side: Split(parts) for side, parts in sides.items() if parts}


def _build(
    name: str,
    split: Split,
    conf: RunConf,
    limit: Limit | None,
    tokenizer: "PreTrainedTokenizerBase",
    evaluation: "Dataset | None",
) -> "Dataset":
    """Cut, deduplicate, decontaminate, draw and mix one split.

    Raises:
        DataError: no pair is left.
    """
    data = conf.data
    tables = None
    if limit is not None and limit.apply(split):
        tables = [cut_rows(source, limit) for source in split.sources]
        split.drop_equal(tables)
    if data.deduplicate:
        split.drop_repeats()
    if data.deduplicate == "near":
        rows = split.build(tables)
        split.drop_among_kept(find_near_duplicates(rows, data.near_duplicate_threshold), NEAR_DUPLICATE)
    if data.decontaminate and name == "train":
        rows = split.build(tables)
        texts = itertools.chain(
            load_reference_texts([item for item in data.decontaminate if item != "eval"]),
            _texts_of(evaluation, tokenizer) if "eval" in data.decontaminate and evaluation is not None else (),
        )
        mask = find_contaminated(rows, tokenizer, texts, data.decontaminate_ngram)
        split.drop_among_kept(mask, CONTAMINATED)
    confs = resolve_sources(data)
    chosen = [confs[source] for source in split.names]
    if name == "train":
        split.take(chosen, data.max_train_samples)
    else:
        split.take_for_evaluation(chosen, data.max_eval_samples)
    if not split.kept.any():
        report = split.report()
        reasons = ", ".join(f"{count:,} dropped: {reason}" for reason, count in report.dropped.items())
        raise DataError(f"data, {name}: no pair is left of {report.pairs:,}; {reasons or 'none could be used'}")
    return split.build(tables)


def _texts_of(rows: "Dataset", tokenizer: "PreTrainedTokenizerBase") -> Iterator[str]:
    """Yield the last message and both answers of each evaluation pair, as text."""
    for row in rows:
        yield json.loads(row["prompt"])[-1]["content"]
        yield from tokenizer.batch_decode([row["chosen_ids"], row["rejected_ids"]], skip_special_tokens=True)


def _by_source(evaluation: "Dataset | None", splits: dict[str, Split]) -> "dict[str, Dataset]":
    if evaluation is None:
        return {}
    sources = splits["eval"].sources_in_order()
    names = splits["eval"].names
    return {
        name: evaluation.select(np.flatnonzero(sources == index))
        for index, name in enumerate(names)
        if (sources == index).any()
    }


def _report_source(name: str, split: str, part: Prepared) -> SourceReport:
    facts = part.facts
    mismatched, mismatch = 0, ""
    if facts["first_mismatch"]:
        file, number, text = facts["first_mismatch"]
        mismatched = int(np.count_nonzero(part.rows.data.column("mismatched").to_numpy()))
        mismatch = f"{part.source.locate(file, number)}: {text}"
    return SourceReport(
        name=name,
        split=split,
        files=list(part.source.files),
        format=facts["format"],
        unread=facts["unread"],
        rows=facts["rows"],
        pairs=len(part.rows),
        bad=facts["bad"],
        left_out=facts["left_out"],
        unscored=facts["unscored"],
        mismatched=mismatched,
        first_mismatch=mismatch,
    )


def _find_skipped(prepared: list[tuple[str, str, Prepared]]) -> list[str]:
    return [
        f"{part.source.setting}: {len(skipped):,} of its files left out that `datasets` keeps for itself: {skipped[0]}"
        + (", …" if skipped[1:] else "")
        for _, _, part in prepared
        if (skipped := part.source.skipped)
    ]


def _find_warnings(splits: dict[str, Split], data: DataConf) -> list[str]:
    warnings = []
    report = splits["train"].report()
    for reason in (NEAR_DUPLICATE, CONTAMINATED):
        if 2 * report.dropped.get(reason, 0) > report.pairs:
            warnings.append(
                f"{report.dropped[reason]:,} of {report.pairs:,} training pairs were dropped: {reason}; "
                "a long text that all prompts share may make them look alike"
            )
    if "eval" in splits and "eval" not in data.decontaminate:
        shared = splits["train"].count_prompts_shared_with(splits["eval"])
        if shared:
            warnings.append(
                f"{shared:,} training pairs have a prompt that is in evaluation too, which makes evaluation look too "
                "good; data.decontaminate=[eval] leaves them out"
            )
    return warnings

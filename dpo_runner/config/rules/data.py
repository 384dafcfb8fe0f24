"""Rules of the `data` section that need no data. Imports no torch."""

import dataclasses
import re
from collections.abc import Iterator

from dpo_runner.config.sections.data import COLUMNS, ROLES, DataConf, SourceFields
from dpo_runner.config.sections.run import RunFields
from dpo_runner.errors import suggest


def check_data(conf: RunFields) -> Iterator[str]:
    """Yield one line per broken rule between the fields of `conf.data`."""
    data, training = conf.data, conf.training
    yield from _check_sources(data)
    for name, source in data.sources.items() or [("", data)]:
        yield from _check_source(source, f"data.sources.{name}" if name else "data")
    if training.truncation_mode != "keep_start" and data.on_overlong != "trl":
        yield (
            f"`training.truncation_mode={training.truncation_mode}`: has no effect with data.on_overlong="
            f"{data.on_overlong}; set data.on_overlong=trl, or leave it out"
        )
    if training.max_length is None and data.on_overlong not in ("drop", "trl"):
        yield f"`data.on_overlong={data.on_overlong}`: needs training.max_length, to which rows are cut"
    if data.deduplicate != "near" and data.near_duplicate_threshold != 0.8:
        yield f"`data.near_duplicate_threshold={data.near_duplicate_threshold:g}`: needs data.deduplicate=near"
    if not data.decontaminate and data.decontaminate_ngram != 13:
        yield f"`data.decontaminate_ngram={data.decontaminate_ngram}`: needs data.decontaminate, the texts"


def _check_sources(data: DataConf) -> Iterator[str]:
    if not data.sources:
        if data.path is None:
            yield "`data.path`: must be set (`data.path=FILE_OR_HUB_ID`), or several sources as data.sources.NAME.path"
        return
    blank = SourceFields()
    for field in dataclasses.fields(SourceFields):
        value = getattr(data, field.name)
        if value != getattr(blank, field.name):
            yield (
                f"`data.{field.name}={value}`: contradicts data.sources; set data.sources.NAME.{field.name}"
                + (", and data=local_file for a blank data.path" if field.name == "path" else "")
            )
    for name, source in data.sources.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name in ("train", "eval"):
            yield f"`data.sources.{name}`: a name is made of letters, digits, _ and -, and is not train or eval"
        if source.path is None:
            yield f"`data.sources.{name}.path`: must be set"
    weighted = [name for name, source in data.sources.items() if source.weight is not None]
    if weighted and len(weighted) < len(data.sources):
        missing = next(name for name in data.sources if name not in weighted)
        yield f"`data.sources.{missing}.weight`: must be set, since {weighted[0]} has one; or give no source a weight"


def _check_source(source: SourceFields, key: str) -> Iterator[str]:
    if source.eval_path and source.eval_split:
        yield f"`{key}.eval_split={source.eval_split}`: contradicts {key}.eval_path={source.eval_path}; set one of them"
    for theirs, ours in source.columns.items():
        if ours not in COLUMNS:
            yield f"`{key}.columns.{theirs}={ours}`: no such column of ours{suggest(ours, COLUMNS)}"
    if len(set(source.columns.values())) < len(source.columns):
        yield f"`{key}.columns`: maps two columns to the same name; a row has room for one"
    if source.formatter is not None and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", source.formatter):
        yield f"`{key}.formatter={source.formatter}`: must be package.module:function"
    for theirs, role in source.roles.items():
        if role not in ROLES:
            yield f"`{key}.roles.{theirs}={role}`: no such role{suggest(role, ROLES)}"
    one_pair = source.format not in ("auto", "scored", "helpsteer", "kto")
    if one_pair and (
        source.pairing in ("best_vs_rest", "best_vs_random")
        or (source.pairing == "all_pairs" and source.format == "hh")
    ):
        yield f"`{key}.pairing={source.pairing}`: has no effect with format={source.format}, which holds one pair a row"

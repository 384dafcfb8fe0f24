"""Pairs longer than `training.max_length`: dropped or cut as `data.on_overlong` says."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dpo_runner.config.run_conf import RunConf
from dpo_runner.data.prepare.cache import ROWS, Prepared, load_rows, open_entry
from dpo_runner.data.splits import Split
from dpo_runner.data.templates.chat_template import ChatTemplate
from dpo_runner.io.files import cache_dir

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

_BATCH = 1000
_EOS_LOST = "lose an answer's end to training.max_length (EOS lost)"
_PROMPT_CUT = "lose the prompt's beginning to training.max_length"


@dataclass(frozen=True)
class Limit:
    """The length limit of a pair and the treatment of longer ones.

    Attributes:
        max_length: tokens of prompt and completion together.
        treatment: `data.on_overlong`.
        keep_start: `training.truncation_mode=keep_start`, used by treatment `trl`.
        first: tokens at the start of a prompt that are never cut (BOS).
        last: tokens at the end of a prompt that are never cut (the generation prompt).
    """

    max_length: int
    treatment: str
    keep_start: bool
    first: int
    last: int

    @classmethod
    def of(cls, conf: RunConf, template: ChatTemplate) -> "Limit | None":
        """Return a run's limit; None if `training.max_length` is null."""
        training = conf.training
        if training.max_length is None:
            return None
        return cls(
            max_length=training.max_length,
            treatment=conf.data.on_overlong,
            keep_start=training.truncation_mode == "keep_start",
            first=0 if template.bos is None else 1,
            last=template.generation_prompt_length,
        )

    def apply(self, split: Split) -> bool:
        """Drop the pairs of `split` that cannot be used, and count those that will be cut.

        Returns:
            True if the rows have to be cut by `cut_rows`.
        """
        prompt, answer = split.lengths["prompt"], np.maximum(split.lengths["chosen"], split.lengths["rejected"])
        overlong = prompt + answer > self.max_length
        if self.treatment == "drop":
            split.drop(overlong, f"longer than training.max_length={self.max_length}")
            return False
        if self.treatment == "trl":
            if self.keep_start:
                split.drop(prompt >= self.max_length, "the prompt alone fills training.max_length")
            self._count(split, overlong, _EOS_LOST if self.keep_start else _PROMPT_CUT)
            return False
        if self.treatment == "truncate_completion":
            split.drop(prompt >= self.max_length, "the prompt alone fills training.max_length")
            self._count(split, overlong, _EOS_LOST)
            for part in ("chosen", "rejected"):
                split.lengths[part] = np.minimum(split.lengths[part], np.maximum(self.max_length - prompt, 1))
        else:
            split.drop(answer + self.first + self.last >= self.max_length, "an answer alone fills training.max_length")
            self._count(split, overlong, _PROMPT_CUT)
            split.lengths["prompt"] = np.minimum(prompt, np.maximum(self.max_length - answer, 1))
        return bool((overlong & split.kept).any())

    def _count(self, split: Split, overlong: npt.NDArray[np.bool_], what: str) -> None:
        count = int((overlong & split.kept).sum())
        if count:
            split.truncated[what] = count


def cut_rows(prepared: Prepared, limit: Limit) -> "Dataset":
    """Return a source's rows with prompts or completions cut to `limit`, from the cache if present."""
    key = hashlib.sha256(f"{prepared.key} {limit}".encode()).hexdigest()[:32]
    folder = cache_dir() / "data" / key

    def fill(staging: Path) -> None:
        import pyarrow as pa

        table = prepared.rows.data.table
        with pa.OSFile(str(staging / ROWS), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            for batch in table.to_batches(max_chunksize=_BATCH):
                writer.write_batch(_cut(batch, limit))

    return open_entry(folder, fill, lambda: load_rows(folder))


def _cut(batch: "pa.RecordBatch", limit: Limit) -> "pa.RecordBatch":
    prompt, chosen, rejected = (_lengths(batch.column(name)) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    if limit.treatment == "truncate_prompt_left":
        room = np.maximum(limit.max_length - np.maximum(chosen, rejected), 1)
        cut = np.maximum(prompt - room, 0)
        return batch.set_column(
            batch.schema.get_field_index("prompt_ids"),
            "prompt_ids",
            _keep(batch.column("prompt_ids"), limit.first, limit.first + cut),
        )
    room = np.maximum(limit.max_length - prompt, 1)
    for name, length in (("chosen_ids", chosen), ("rejected_ids", rejected)):
        index = batch.schema.get_field_index(name)
        batch = batch.set_column(index, name, _keep(batch.column(name), np.minimum(length, room), length))
    return batch


def _lengths(lists: "pa.ListArray") -> npt.NDArray[np.int64]:
    offsets: npt.NDArray[np.int32] = lists.offsets.to_numpy()
    return np.diff(offsets).astype(np.int64)


def _keep(lists: "pa.ListArray", first: Any, then: Any) -> "pa.ListArray":
    """Keep the elements of each list before position `first` and from position `then` on."""
    import pyarrow as pa

    lengths = _lengths(lists)
    values = lists.flatten().to_numpy()
    position = np.arange(len(values)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    keep = (position < np.repeat(np.broadcast_to(first, lengths.shape), lengths)) | (
        position >= np.repeat(np.broadcast_to(then, lengths.shape), lengths)
    )
    row = np.repeat(np.arange(len(lengths)), lengths)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row[keep], minlength=len(lengths)))]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values[keep]))

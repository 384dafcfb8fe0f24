"""The reference's log-probabilities as dataset columns, read from the store if they are there.

If its rows have `ref_chosen_logps` and `ref_rejected_logps`, TRL runs no reference in training or evaluation. On a CPU
each pair is scored alone, so that its value does not depend on which other pairs were missing: runs that find all,
some or none of the pairs in the store are bitwise the same.
"""

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset
from peft import PeftModel
from trl import DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from dpo_runner.errors import RunError
from dpo_runner.io.upstream import find_fingerprint, find_private, prepare_inputs
from dpo_runner.training.engine.logps import completion_logps, label_completions
from dpo_runner.training.engine.packed.head import log_probs_alone
from dpo_runner.training.engine.packed.packing import count_tokens
from dpo_runner.training.engine.reference.keys import read_keys
from dpo_runner.training.engine.reference.rounding import compare_pairs, find_rounding
from dpo_runner.training.engine.reference.store import PairLogps, ReferenceStore
from dpo_runner.training.ranks.division import deal
from dpo_runner.training.ranks.group import count, gather, rank, share
from dpo_runner.training.ranks.sharding import level
from dpo_runner.training.ranks.watch import note_progress

REF_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")

_SLICE = 10_000  # rows whose token log-probabilities are in memory at a time
_CHUNK = 64  # pairs of each process that are looked up again just before they are scored
_UNWRITTEN_SECONDS = 1.0  # of scoring that may be lost; a disk may take 20 ms for each write
_TOKENS = 16_384  # in one forward on an accelerator
_CHECKED = 3  # stored pairs that each run scores again
_SPARSE = 100  # a selection of fewer than one row in so many is written anew: a row takes kilobytes, a value 8 bytes

Row = dict[str, Any]


@dataclass
class Slice:
    """Rows of a dataset with their keys in the store and their tokens."""

    rows: Dataset
    keys: list[bytes]
    tokens: list[int]

    @classmethod
    def read(cls, rows: Dataset, collator: Any) -> Self:
        """Read keys and tokens; each process reads its share of the rows."""
        first, end = (len(rows) * turn // count() for turn in (rank(), rank() + 1))
        parts = gather(read_keys(rows.select(range(first, end)), collator) if end > first else ([], []))
        return cls(rows, [key for keys, _ in parts for key in keys], [size for _, sizes in parts for size in sizes])


def add_reference_columns(
    trainer: DPOTrainer, dataset: Dataset, store: ReferenceStore | None, say: Callable[[str], None]
) -> Dataset:
    """Return `dataset` with the reference's summed log-probabilities of each pair in `REF_COLUMNS`.

    The first process reads and writes the store; all processes compute keys, and score what the store lacks.

    Args:
        trainer: has the reference, the collator, and `ld_alpha`.
        dataset: rows of token ids.
        store: this reference's; None in processes other than the first.
        say: shows one line to the user.

    Raises:
        RunError: stored values differ from the reference's.
    """
    sums = np.empty((len(REF_COLUMNS), len(dataset)))
    unchecked = _CHECKED
    for start in range(0, len(dataset), _SLICE):
        some = Slice.read(dataset.select(range(start, min(start + _SLICE, len(dataset)))), trainer.data_collator)
        places = {key: place for place, key in enumerate(some.keys)}
        known = {} if store is None else store.find(list(places))
        checked = random.Random().sample(sorted(known), min(unchecked, len(known)))  # not from the run's own seed
        unchecked -= len(checked)
        with level(trainer.model):
            if store is not None:
                _verify(trainer, {key: (some.rows[places[key]], known[key]) for key in checked}, store)
        if missing := share([place for key, place in places.items() if key not in known]):
            say(f"scoring {len(missing):,} pairs with the reference; the store has {len(known):,} already")
            known |= _score_missing(trainer, some, missing, store)
        found = [sum_logps(known[key], trainer.ld_alpha) for key in some.keys] if store is not None else []
        sums[:, start : start + _SLICE] = share(np.array(found).T)
    return attach_columns(dataset, dict(zip(REF_COLUMNS, sums, strict=True)))


def attach_columns(dataset: Dataset, columns: Mapping[str, npt.NDArray[np.float64]]) -> Dataset:
    """Return `dataset` with more columns.

    `Dataset.add_column` first writes all rows anew, in each process, if `dataset` is a selection of a table's rows.
    Here the table gets the columns, with NaN in other rows, unless the selection is small.

    Args:
        dataset: memory-mapped rows, or a selection of them.
        columns: values by name, one of each row.
    """
    indices = find_private("datasets", dataset, "_indices")
    if indices is not None and len(dataset.data) > _SPARSE * len(dataset):
        dataset, indices = dataset.flatten_indices(), None
    whole = Dataset(dataset.data, info=dataset.info, fingerprint=find_fingerprint(dataset))
    for name, values in columns.items():
        if indices is not None:
            selected, values = values, np.full(len(whole), np.nan)
            values[indices.column(0).to_numpy()] = selected
        whole = whole.add_column(name, values)
    return Dataset(whole.data, whole.info, dataset.split, indices, find_fingerprint(whole))


def sum_logps(logps: PairLogps, ld_alpha: float | None) -> tuple[float, float]:
    """Sum each answer's log p; `ld_alpha` weights tokens beyond the shorter (LD-DPO, arXiv 2409.06411)."""
    shared = min(map(len, logps))
    alpha = 1.0 if ld_alpha is None else ld_alpha
    chosen, rejected = (
        float(values[:shared].sum(dtype=np.float64) + alpha * values[shared:].sum(dtype=np.float64)) for values in logps
    )
    return chosen, rejected


def _score_missing(
    trainer: DPOTrainer, some: Slice, missing: Sequence[int], store: ReferenceStore | None
) -> dict[bytes, PairLogps]:
    """Score pairs and store them; runs that score the same pairs at once share the work.

    Args:
        trainer: has the reference.
        some: rows with their keys.
        missing: places in `some` of the pairs to score.
        store: None in processes other than the first, which return nothing.
    """
    found: dict[bytes, PairLogps] = {}
    unwritten: dict[bytes, PairLogps] = {}
    written = time.monotonic()
    order = share(random.Random().sample(missing, len(missing)))
    for start in range(0, len(order), _CHUNK * count()):
        chunk = order[start : start + _CHUNK * count()]
        known = {} if store is None else store.find([some.keys[place] for place in chunk])
        rest = share([place for place in chunk if some.keys[place] not in known])
        owners = deal([some.tokens[place] for place in rest])
        own = [place for place, owner in zip(rest, owners, strict=True) if owner == rank()]
        note_progress()
        with level(trainer.model):
            scored_here = score_pairs(trainer, [some.rows[place] for place in own])
        scores = gather(scored_here)
        if store is not None:
            turns = [iter(part) for part in scores]
            scored = {some.keys[place]: next(turns[owner]) for place, owner in zip(rest, owners, strict=True)}
            unwritten |= scored
            found |= known | scored
            if time.monotonic() - written > _UNWRITTEN_SECONDS:
                store.add(unwritten)
                unwritten, written = {}, time.monotonic()
    if store is not None and unwritten:
        store.add(unwritten)
    return found


def _verify(trainer: DPOTrainer, known: Mapping[bytes, tuple[Row, PairLogps]], store: ReferenceStore) -> None:
    if not known:
        return
    rows = [row for row, _ in known.values()]
    difference = compare_pairs([logps for _, logps in known.values()], score_pairs(trainer, rows))
    if difference.exceeds(dtype := find_rounding(trainer)):
        raise RunError(
            f"{store.path}: has log-probabilities that the reference does not give: {len(rows)} pairs scored again "
            f"{difference.describe(dtype)}; `python -m dpo_runner.cache clear reference` deletes them"
        )


def score_pairs(trainer: DPOTrainer, rows: Sequence[Row]) -> list[PairLogps]:
    """Return the reference's log p of each pair's completion tokens, in the order of `rows`."""
    found: list[PairLogps] = []
    with being_reference(trainer) as model, trainer.accelerator.autocast():
        for batch in _batches(rows, isolate=trainer.accelerator.device.type == "cpu"):
            found += score_batch(trainer, model, batch)
    return found


def score_batch(trainer: DPOTrainer, model: Any, rows: Sequence[Row]) -> list[PairLogps]:
    """Return log p of each pair's completion tokens under `model`; all pairs are in one batch."""
    rows = [{name: values for name, values in row.items() if name not in REF_COLUMNS} for row in rows]
    inputs = label_completions(prepare_inputs(trainer, trainer.data_collator(rows)))
    with torch.no_grad(), log_probs_alone():
        log_probs = completion_logps(model, inputs)
    scored = (inputs["labels"] != -100)[:, 1:].cpu()
    values = [row[places].numpy() for row, places in zip(log_probs.float().cpu(), scored, strict=True)]
    return list(map(PairLogps, values[: len(rows)], values[len(rows) :]))


@contextmanager
def being_reference(trainer: DPOTrainer) -> Iterator[Any]:
    """Provide the reference, in evaluation mode.

    A caller scores all its batches in one context: switching PEFT's adapters takes as long as a small pair's forward.
    """
    with evaluating(trainer), _reference_adapter(trainer):
        yield trainer.ref_model or trainer.model


@contextmanager
def evaluating(trainer: DPOTrainer) -> Iterator[None]:
    """Put the policy's model, of which the reference may be part, in evaluation mode."""
    training = trainer.model.training
    trainer.model.eval()
    try:
        with disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs):
            yield
    finally:
        trainer.model.train(training)


def reference_adapter(trainer: DPOTrainer) -> str | None:
    """Return the model's adapter that is the reference; None if that is the model without adapters."""
    return "ref" if trainer.ref_model is None and "ref" in getattr(trainer.model, "peft_config", ()) else None


def find_active_adapters(trainer: DPOTrainer) -> list[str]:
    """Return all adapters that are on while the policy's model is the reference."""
    if reference_adapter(trainer) is None:
        return []
    with _reference_adapter(trainer):
        return list(trainer.model.base_model.active_adapters)


def _reference_adapter(trainer: DPOTrainer) -> Any:
    if trainer.ref_model is None and isinstance(trainer.model, PeftModel):
        return use_adapter(trainer.model, reference_adapter(trainer))
    return nullcontext()


def _batches(rows: Sequence[Row], isolate: bool) -> Iterator[Sequence[Row]]:
    """Yield batches of one pair if `isolate`, otherwise of as many pairs as fit into `_TOKENS`."""
    batch: list[Row] = []
    tokens = 0
    for row in rows:
        size = count_tokens(row)
        if batch and (isolate or tokens + size > _TOKENS):
            yield batch
            batch, tokens = [], 0
        batch.append(row)
        tokens += size
    if batch:
        yield batch

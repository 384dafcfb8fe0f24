"""The reference's log-probabilities as dataset columns, read from the store if they are there.

If its rows have `ref_chosen_logps` and `ref_rejected_logps`, TRL runs no reference in training or evaluation. On a CPU
each pair is scored alone, so that its value does not depend on which other pairs were missing: runs that find all,
some or none of the pairs in the store are bitwise the same.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import xxhash
from datasets import Dataset
from peft import PeftModel
from trl import DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from dpo_runner.errors import RunError
from dpo_runner.io.upstream import prepare_inputs
from dpo_runner.training.engine.logps import completion_logps, label_completions
from dpo_runner.training.engine.packed.head import log_probs_alone
from dpo_runner.training.engine.packed.packing import count_tokens
from dpo_runner.training.engine.reference.rounding import compare_pairs, find_rounding
from dpo_runner.training.engine.reference.store import PairLogps, ReferenceStore
from dpo_runner.training.ranks.division import deal
from dpo_runner.training.ranks.group import count, gather, rank, share
from dpo_runner.training.ranks.sharding import level
from dpo_runner.training.ranks.watch import note_progress

REF_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")

_SLICE = 10_000  # rows whose token log-probabilities are in memory at a time
_CHUNK = 64  # pairs that are looked up again just before they are scored, and written together
_TOKENS = 16_384  # in one forward on an accelerator
_CHECKED = 3  # stored pairs that each run scores again

Row = dict[str, Any]


def add_reference_columns(
    trainer: DPOTrainer, dataset: Dataset, store: ReferenceStore | None, say: Callable[[str], None]
) -> Dataset:
    """Return `dataset` with the reference's summed log-probabilities of each pair in `REF_COLUMNS`.

    The first process reads and writes the store; all processes score what it lacks.

    Args:
        trainer: has the reference, the collator, and `ld_alpha`.
        dataset: rows of token ids.
        store: this reference's; None in processes other than the first.
        say: shows one line to the user.

    Raises:
        RunError: stored values differ from the reference's.
    """
    sums: list[tuple[float, float]] = []
    unchecked = _CHECKED
    for start in range(0, len(dataset), _SLICE):
        rows = [dataset[index] for index in range(start, min(start + _SLICE, len(dataset)))]
        keys = [_digest(row, trainer.data_collator) for row in rows]
        by_key = dict(zip(keys, rows, strict=True))
        known = {} if store is None else store.find(list(by_key))
        checked = random.Random().sample(sorted(known), min(unchecked, len(known)))  # not from the run's own seed
        unchecked -= len(checked)
        with level(trainer.model):
            if store is not None:
                _verify(trainer, {key: (by_key[key], known[key]) for key in checked}, store)
        if missing := share([key for key in by_key if key not in known]):
            say(f"scoring {len(missing):,} pairs with the reference; the store has {len(known):,} already")
            known |= _score_missing(trainer, {key: by_key[key] for key in missing}, store)
        sums += share([sum_logps(known[key], trainer.ld_alpha) for key in keys] if store is not None else [])
    for name, values in zip(REF_COLUMNS, zip(*sums, strict=True), strict=True):
        dataset = dataset.add_column(name, list(values))
    return dataset


def sum_logps(logps: PairLogps, ld_alpha: float | None) -> tuple[float, float]:
    """Sum each answer's log p; `ld_alpha` weights tokens beyond the shorter (LD-DPO, arXiv 2409.06411)."""
    shared = min(map(len, logps))
    alpha = 1.0 if ld_alpha is None else ld_alpha
    chosen, rejected = (
        float(values[:shared].sum(dtype=np.float64) + alpha * values[shared:].sum(dtype=np.float64)) for values in logps
    )
    return chosen, rejected


def _digest(row: Row, collator: Any) -> bytes:
    """Return a digest of a pair's model inputs: both rows as `DataCollatorForPreference` cuts them."""
    digest = xxhash.xxh3_128()
    for answer in ("chosen_ids", "rejected_ids"):
        prompt, completion = row["prompt_ids"], row[answer]
        ids, scored = np.array([*prompt, *completion], np.int64), len(completion)
        if collator.max_length is not None and len(ids) > collator.max_length:
            if collator.truncation_mode == "keep_start":
                ids, scored = ids[: collator.max_length], max(collator.max_length - len(prompt), 0)
            else:
                ids, scored = ids[-collator.max_length :], min(scored, collator.max_length)
        digest.update(np.array([len(ids), scored], np.int64).tobytes())
        digest.update(ids.tobytes())
    return digest.digest()


def _score_missing(
    trainer: DPOTrainer, missing: Mapping[bytes, Row], store: ReferenceStore | None
) -> dict[bytes, PairLogps]:
    """Score pairs and store them; runs that score the same pairs at once share the work."""
    found: dict[bytes, PairLogps] = {}
    keys = share(random.Random().sample(list(missing), len(missing)))
    for start in range(0, len(keys), _CHUNK * count()):
        chunk = keys[start : start + _CHUNK * count()]
        known = {} if store is None else store.find(chunk)
        rest = share([key for key in chunk if key not in known])
        owners = deal([count_tokens(missing[key]) for key in rest])
        own = [key for key, owner in zip(rest, owners, strict=True) if owner == rank()]
        note_progress()
        with level(trainer.model):
            scored_here = score_pairs(trainer, [missing[key] for key in own])
        scores = gather(scored_here)
        if store is not None:
            turns = [iter(part) for part in scores]
            scored = {key: next(turns[owner]) for key, owner in zip(rest, owners, strict=True)}
            store.add(scored)
            found |= known | scored
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

"""Micro-batches with a token budget, formed across the batches of one optimizer step.

TRL's step over A batches of b pairs each has the gradient of

    L = 1/A Σ_i 1/b Σ_j ℓ_ij

with ℓ_ij the loss of one pair, so pairs may be grouped in any way: the mean of a micro-batch of n pairs is weighted
by n / (A b). Pairs of batches of different sizes, as at the end of an epoch, are not mixed, because their weights
differ.

TRL logs means over each of its batches, of pairs or of tokens. Once the gradients are computed, its `_compute_loss` is
called again for each original batch, with the recorded values of its tokens instead of a model, and logs the same
values as without the engine.

TRL's batches are kept for losses that are not sums over pairs (`aot` and `aot_unpaired` sort them, `sft` averages over
all tokens), and for models that do not take packed rows.

Several processes share the work of a step: pairs are dealt out to them by tokens, or whole batches where TRL's are
kept. Gradients are summed over the processes, scores of tokens are exchanged, and each process computes the metrics of
some batches, so that all have the step's gradient, loss and metrics.
"""

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import xxhash
from trl import DPOTrainer

from dpo_runner.config.rules.training import LOSSES_OF_WHOLE_BATCHES
from dpo_runner.config.sections.run import EngineConf
from dpo_runner.errors import RunError
from dpo_runner.io.upstream import check_names, prepare_inputs
from dpo_runner.training.engine.packed.packing import pack_pairs
from dpo_runner.training.engine.scores import Batch, Place, StepScores, forward_of
from dpo_runner.training.ranks.division import deal, seed_process
from dpo_runner.training.ranks.group import count, gather, rank, sum_gradients
from dpo_runner.training.ranks.sharding import is_divided, is_sharded

_ENOUGH = 1024
"""Tokens beyond which a larger micro-batch takes more memory and is not faster on a CPU."""

check_names("transformers", DPOTrainer, get_batch_samples="epoch_iterator num_batches device")
check_names("trl", DPOTrainer, _compute_loss="model inputs return_outputs")


@dataclass(frozen=True)
class MicroBatch:
    """Pairs that are scored together, and the divisor of their mean loss for TRL: A b / n."""

    places: list[Place]
    divisor: float


def why_not_grouped(loss_type: str | Sequence[str]) -> str | None:
    """Return why a loss, or a mix of several, requires TRL's batches; None if it does not."""
    kinds = LOSSES_OF_WHOLE_BATCHES.intersection([loss_type] if isinstance(loss_type, str) else loss_type)
    if kinds:
        return f"training.loss_type={', '.join(sorted(kinds))} is not a sum over pairs"
    return None


def choose_budget(conf: EngineConf, batch_size: int, largest: int, use_cpu: bool) -> int | None:
    """Return the token budget of a micro-batch; None if micro-batches are counted in rows.

    Args:
        conf: has `max_tokens_per_micro_batch`; None chooses a budget.
        batch_size: `training.per_device_train_batch_size`.
        largest: tokens of the largest pair, its prompt counted once.
        use_cpu: whether the run trains on a CPU.

    Returns:
        The setting, or the tokens of `batch_size` pairs of the largest size: the maximum of TRL's own batches, which
        every micro-batch now approaches. On a CPU it is capped, since larger is not faster there.
    """
    if conf.max_tokens_per_micro_batch is not None:
        return conf.max_tokens_per_micro_batch or None
    plain = batch_size * largest
    return min(plain, _ENOUGH) if use_cpu else plain


def group_pairs(sizes: Sequence[Sequence[int]], budget: int, process: int = 0) -> list[MicroBatch]:
    """Group a process's pairs of one optimizer step (first-fit decreasing).

    Args:
        sizes: tokens of each pair of each batch.
        budget: tokens that a micro-batch may have; a larger pair gets a micro-batch of its own.
        process: the process; pairs are dealt out to the processes by tokens.
    """
    places = [Place(batch, row) for batch, rows in enumerate(sizes) for row in range(len(rows))]
    owners = deal([sizes[place.batch][place.row] for place in places])
    places = [place for place, owner in zip(places, owners, strict=True) if owner == process]
    places.sort(key=lambda place: sizes[place.batch][place.row], reverse=True)
    bins: list[tuple[int, list[Place]]] = []
    for place in places:
        size, of = sizes[place.batch][place.row], len(sizes[place.batch])
        for index, (used, members) in enumerate(bins):
            if used + size <= budget and len(sizes[members[0].batch]) == of:
                bins[index] = (used + size, [*members, place])
                break
        else:
            bins.append((size, [place]))
    return [
        MicroBatch(sorted(members), len(sizes) * len(sizes[members[0].batch]) / len(members)) for _, members in bins
    ]


class TokenBatches(DPOTrainer):  # type: ignore[misc]
    """Trainer mixin that splits its steps into micro-batches of `max_tokens`, if that is set."""

    max_tokens: int | None = None
    _total_train_tokens: float  # TRL's

    def get_batch_samples(self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device) -> Any:
        """Return the batches of one optimizer step, and remember them."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        seed_process(self.args.seed, self.state.global_step)  # after the sampler may have drawn
        self._batches, self._taken = list(batches), 0
        return batches, items

    @property
    def figures(self) -> dict[str, Any]:
        """TRL's figures since the last log event, by mode (`train`, `eval`) and name."""
        figures: dict[str, Any] = self._metrics
        return figures

    def progress(self) -> dict[str, Any]:
        """Return TRL's state that a checkpoint needs in addition to Trainer's."""
        return {"num_tokens": self._total_train_tokens, "metrics": self.figures["train"]}

    def restore(self, progress: dict[str, Any]) -> None:
        self._total_train_tokens = progress["num_tokens"]
        self.figures["train"].update(progress["metrics"])

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: Any = None) -> torch.Tensor:
        """Do TRL's step for one of its batches; micro-batches all run at the last batch of the optimizer step."""
        micro_batches = self._regroup()
        if micro_batches is None and count() == 1:
            loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
            return loss
        self._taken += 1
        if self._taken < len(self._batches):
            return torch.zeros((), device=self.args.device)
        if micro_batches is None:
            own = self._train_own_batches(model, num_items_in_batch)
        else:
            models = [each for each in (self.model, self.ref_model) if each is not None]
            scores = StepScores(self._batches, self.args.device)
            with self._unlogged():
                for micro_batch in micro_batches:
                    self.current_gradient_accumulation_steps = micro_batch.divisor
                    inputs = select_pairs(self._batches, micro_batch.places)
                    around = scores.record(micro_batch.places) if micro_batch.divisor < math.inf else _unchanged
                    with forward_of(models, around):
                        super().training_step(model, inputs, num_items_in_batch)
            self.current_gradient_accumulation_steps = len(self._batches)
            if not micro_batches and self.args.fp16:  # the scaler begins with the first scaled loss
                self.accelerator.scaler.scale(torch.zeros((), device=self.args.device))
            scores.exchange()
            numbers = range(rank(), len(self._batches), count())
            # a forward of divided weights gathers some, even if it is replayed: all processes replay all batches
            replayed = range(len(self._batches)) if is_sharded(self.model) else numbers
            own = [self._score_batch(model, models, scores, index) for index in replayed]
            own = [record for record in own if record.number in numbers]
        sum_gradients([weight for weight in model.parameters() if weight.requires_grad and not is_divided(weight)])
        losses = self._log_records(own)
        return losses.sum() if micro_batches is None else losses.mean()

    def _regroup(self) -> list[MicroBatch] | None:
        """Return this process's micro-batches of the step; None if they equal TRL's batches."""
        if self.max_tokens is None:
            return None
        if self._taken == 0:
            sizes = [[pair.chosen + pair.tail for pair in pack_pairs(*_rows(batch)).pairs] for batch in self._batches]
            plain = [[Place(index, row) for row in range(len(rows))] for index, rows in enumerate(sizes)]
            groups = self._fill(sizes, group_pairs(sizes, self.max_tokens, rank()))
            self._groups = None if count() == 1 and sorted(group.places for group in groups) == plain else groups
        return self._groups

    def _fill(self, sizes: Sequence[Sequence[int]], groups: list[MicroBatch]) -> list[MicroBatch]:
        """Add micro-batches of weight 0, so that all processes gather divided weights equally often."""
        if not is_sharded(self.model):
            return groups
        assert self.max_tokens is not None
        most = max(len(group_pairs(sizes, self.max_tokens, process)) for process in range(count()))
        smallest = min((size, Place(index, row)) for index, rows in enumerate(sizes) for row, size in enumerate(rows))
        return groups + [MicroBatch([smallest[1]], math.inf)] * (most - len(groups))

    def _train_own_batches(self, model: Any, num_items_in_batch: Any) -> "list[_Record]":
        """Do TRL's step for this process's share of TRL's batches."""
        sizes = [batch["attention_mask"].sum().item() for batch in self._batches]
        owners, step = deal(sizes), super().training_step
        own = [index for index, owner in enumerate(owners) if owner == rank()]
        records = [self._record(index, partial(step, model, self._batches[index], num_items_in_batch)) for index in own]
        most = max(map(owners.count, range(count()))) if is_sharded(self.model) else len(own)
        self.current_gradient_accumulation_steps = math.inf  # of weight 0, as in `_fill`
        for _ in range(most - len(own)):
            index = min(range(len(sizes)), key=sizes.__getitem__)
            self._record(index, partial(step, model, self._batches[index], num_items_in_batch))
        self.current_gradient_accumulation_steps = len(self._batches)
        return records

    @contextlib.contextmanager
    def _unlogged(self) -> Iterator[None]:
        """Discard the metrics that TRL records for a micro-batch."""
        metrics, tokens = self.figures["train"], self._total_train_tokens
        self.figures["train"] = defaultdict(list)
        try:
            yield
        finally:
            self.figures["train"], self._total_train_tokens = metrics, tokens

    def _score_batch(self, model: Any, models: list[Any], scores: "StepScores", index: int) -> "_Record":
        """Compute TRL's loss and metrics of one of its batches from the scores of its tokens."""
        inputs = prepare_inputs(self, self._batches[index])
        with torch.no_grad(), self.compute_loss_context_manager(), forward_of(models, scores.replay(index)):
            return self._record(index, lambda: self.compute_loss(model, inputs))

    def _record(self, index: int, compute: Callable[[], torch.Tensor]) -> "_Record":
        """Compute the loss of one of TRL's batches; return it with TRL's figures, which are not logged yet."""
        before = self._total_train_tokens
        with self._unlogged():
            loss = compute().detach()
            return _Record(index, loss.cpu(), dict(self.figures["train"]), self._total_train_tokens - before)

    def _log_records(self, own: "list[_Record]") -> torch.Tensor:
        """Note the metrics of all batches, of all processes, in TRL's order; return the batches' losses."""
        digests, parts = zip(*gather((_digest(self._batches), own)), strict=True)
        if len(set(digests)) > 1:
            step = self.state.global_step + 1
            raise RunError(f"step {step} has other rows in some processes than in others; their samplers differ")
        records = sorted((record for part in parts for record in part), key=lambda record: record.number)
        for record in records:
            self._total_train_tokens += record.tokens
            for name, values in record.figures.items():
                self.figures["train"][name].extend(values)
        self.figures["train"]["num_tokens"] = [self._total_train_tokens]  # TRL replaces it at each batch
        return torch.stack([record.loss for record in records]).to(self.args.device)


class _Record(NamedTuple):
    """One of TRL's batches: its number in the step, its loss, TRL's figures, and its tokens."""

    number: int
    loss: torch.Tensor
    figures: dict[str, list[Any]]
    tokens: float


def _digest(batches: Sequence[Batch]) -> str | None:
    """Return a digest of a step's rows, which all processes must have; None for a single process."""
    if count() == 1:
        return None
    digest = xxhash.xxh3_64()
    for batch in batches:
        digest.update(batch["input_ids"].cpu().numpy().tobytes())
    return digest.hexdigest()


def _unchanged(forward: Callable[..., Any]) -> Callable[..., Any]:
    return forward


def _rows(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    return batch["input_ids"], batch["attention_mask"], labels


def select_pairs(batches: Sequence[Batch], places: Sequence[Place]) -> Batch:
    """Return these pairs as a batch of TRL's collator, padded to the widest of their batches."""
    width = max(batches[place.batch]["input_ids"].size(1) for place in places)
    selected: Batch = {}
    for key, first in batches[0].items():
        if first.dim() == 1:  # one value per pair
            selected[key] = torch.stack([batches[place.batch][key][place.row] for place in places])
            continue
        rows = []
        for answer in (0, 1):
            for place in places:
                pairs = batches[place.batch][key].size(0) // 2
                row = batches[place.batch][key][answer * pairs + place.row]
                rows.append(torch.nn.functional.pad(row, (0, width - row.size(0))))
        selected[key] = torch.stack(rows)
    return selected

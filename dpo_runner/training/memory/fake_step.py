"""One micro-batch on fake tensors, in the trainer's order: policy, reference, backward."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from torch import nn
from trl import DPOConfig
from trl.kernels import chunked_logprob
from trl.models.utils import disable_gradient_checkpointing

from dpo_runner.data.splits import PairShape
from dpo_runner.training.engine.logps import completion_logps
from dpo_runner.training.engine.packed.packing import Packing, PairLengths, Pairs
from dpo_runner.training.memory.fake_model import CHECKPOINT_KWARGS
from dpo_runner.training.memory.tracker import GRADIENTS, MemoryTracker


def run_phase(
    phase: str,
    policy: nn.Module,
    reference: nn.Module | None,
    trained: list[nn.Parameter],
    tracker: MemoryTracker,
    args: DPOConfig,
    inputs: dict[str, Any],
) -> None:
    """Run one micro-batch in the trainer's order: the policy, then the reference, then backward."""
    trains = phase == "training"
    int8 = any(isinstance(layer, bnb.nn.Linear8bitLt) for layer in policy.modules())
    policy.train(trains or int8)  # see _score_reference

    def score(model: nn.Module) -> torch.Tensor:
        dtype = torch.bfloat16 if args.bf16 else torch.float16
        with torch.autocast("cpu", dtype=dtype) if args.bf16 or args.fp16 else nullcontext():
            return completion_logps(model, inputs).float()

    def note_gradient(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            tracker.reclassify(parameter.grad, GRADIENTS)

    hooks = [parameter.register_post_accumulate_grad_hook(note_gradient) for parameter in trained]
    if trains and args.gradient_accumulation_steps > 1:  # gradients of earlier micro-batches
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
            note_gradient(parameter)
    with torch.set_grad_enabled(trains):
        logps = score(policy)
        difference = logps.sum(dim=1)
        if not args.precompute_ref_log_probs:
            with torch.no_grad(), disable_gradient_checkpointing(policy, CHECKPOINT_KWARGS):
                expected = _score_reference(policy, reference, score)
            difference = difference - expected
        chosen, rejected = difference.chunk(2)
        loss = -F.logsigmoid(args.beta * (chosen - rejected)).mean()
    if trains:
        loss.backward()
    for hook in hooks:
        hook.remove()
    for parameter in trained:
        parameter.grad = None


def build_padded_inputs(rows: int, length: int) -> dict[str, Any]:
    """Return a batch of `rows` rows of `length` tokens, all scored."""
    ids = torch.zeros(rows, length, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def build_packed_inputs(pair: PairShape, pairs: int, tokens: int | None = None) -> dict[str, Any]:
    """Return a packed batch: `pairs` equal pairs, or `tokens` tokens of them, the last one partial."""
    shapes = [pair] * pairs
    if tokens is not None:
        whole, rest = divmod(tokens, sum(pair))
        shapes = [pair] * whole + [PairShape(*(size * rest // sum(pair) for size in pair))] * bool(rest)
    length = pair.prompt + max(pair.chosen, pair.rejected)
    inputs = build_padded_inputs(2 * len(shapes), length)
    lengths = Pairs(PairLengths(shape.prompt, shape.prompt + shape.chosen, shape.rejected) for shape in shapes)
    ids = torch.zeros(1, sum(each.chosen + each.tail for each in lengths), dtype=torch.long)
    labels = torch.zeros(sum(shape.chosen + shape.rejected for shape in shapes), dtype=torch.long)
    mask = torch.ones(2 * len(shapes), max(length - 1, 0), dtype=torch.bool)
    return {**inputs, "packing": Packing(ids, ids, lengths, labels, labels, mask)}


def _score_reference(
    policy: Any, reference: nn.Module | None, score: Callable[[nn.Module], torch.Tensor]
) -> torch.Tensor:
    if reference is not None:
        return score(reference).sum(dim=1)
    training = policy.training
    # Linear8bitLt in evaluation mode finds outliers by value, which fake tensors lack; without dropout and gradients
    # both modes use the same memory.
    policy.train(training or any(isinstance(layer, bnb.nn.Linear8bitLt) for layer in policy.modules()))
    with policy.disable_adapter():
        scores = score(policy).sum(dim=1)
    policy.train(training)
    return scores


def count_dequantized_bytes(inputs: torch.Tensor, packed: torch.Tensor, shape: list[int], *rest: Any) -> int:
    """Return the bytes of dequantized weights that bitsandbytes' 4-bit product allocates internally."""
    return math.prod(shape) * inputs.dtype.itemsize


@contextmanager
def without_tile_copies() -> Iterator[None]:
    """Skip the head's tile computations, which a GPU runs in a Triton kernel that allocates nothing."""
    forward, backward = chunked_logprob._forward_tile, chunked_logprob._backward_tile
    chunked_logprob._forward_tile = chunked_logprob._backward_tile = lambda *args, **kwargs: None
    try:
        yield
    finally:
        chunked_logprob._forward_tile, chunked_logprob._backward_tile = forward, backward

"""One micro-batch on fake tensors, in the trainer's order: policy, reference, backward."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from trl import DPOConfig
from trl.kernels import chunked_logprob
from trl.models.utils import disable_gradient_checkpointing

from dpo_runner.data.splits import PairShape
from dpo_runner.io.upstream import check_names
from dpo_runner.training.engine.logps import completion_logps
from dpo_runner.training.engine.packed.attention import attend_pairs
from dpo_runner.training.engine.packed.packing import Packing, PairLengths, Pairs
from dpo_runner.training.engine.packed.varlen_attention import attend_varlen, supports_heads
from dpo_runner.training.memory.fake_model import CHECKPOINT_KWARGS
from dpo_runner.training.memory.tracker import GRADIENTS, MemoryTracker

check_names("trl", chunked_logprob, "_forward_tile", "_backward_tile")


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
    policy.train(trains)

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


def build_packed_inputs(
    pair: PairShape, pairs: int, tokens: int | None = None, attention: Callable[..., torch.Tensor] | None = None
) -> dict[str, Any]:
    """Return a packed batch: `pairs` equal pairs, or `tokens` tokens of them, the last one partial."""
    shapes = [pair] * pairs
    if tokens is not None:
        whole, rest = divmod(tokens, sum(pair))
        shapes = [pair] * whole + [PairShape(*(size * rest // sum(pair) for size in pair))] * bool(rest)
    length = pair.prompt + max(pair.chosen, pair.rejected)
    inputs = build_padded_inputs(2 * len(shapes), length)
    sizes = (PairLengths(shape.prompt, shape.prompt + shape.chosen, shape.rejected) for shape in shapes)
    lengths = Pairs(sizes, attention)
    ids = torch.zeros(1, sum(each.chosen + each.tail for each in lengths), dtype=torch.long)
    labels = torch.zeros(sum(shape.chosen + shape.rejected for shape in shapes), dtype=torch.long)
    mask = torch.ones(2 * len(shapes), max(length - 1, 0), dtype=torch.bool)
    return {**inputs, "packing": Packing(ids, ids, lengths, labels, labels, mask)}


def _score_reference(
    policy: Any, reference: nn.Module | None, score: Callable[[nn.Module], torch.Tensor]
) -> torch.Tensor:
    if reference is not None:
        return score(reference).sum(dim=1)
    with policy.disable_adapter():
        return score(policy).sum(dim=1)


def _count_dequantized(inputs: torch.Tensor, packed: torch.Tensor, shape: list[int], *rest: Any) -> int:
    """Return the bytes of dequantized weights that bitsandbytes' 4-bit product allocates internally."""
    return math.prod(shape) * inputs.dtype.itemsize


def _count_varlen(
    of_output: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any
) -> int:
    """Return the bytes that FlashAttention's backward pass allocates internally, [T, heads, head size] each.

    The queries' gradient in fp32, with 128 rows between segments, and gradients of keys and values for each head that
    shares them.
    """
    segments: int = rest[2].numel() - 1  # after output and log-sum-exp, the queries' offsets
    of_query = 4 * (query.size(0) + 128 * segments) * query.size(1) * (query.size(2) + 1)
    shared = key.size(1) != query.size(1)
    return of_query + shared * 2 * key.size(0) * query.size(1) * query.size(2) * key.dtype.itemsize


_COUNTS = (
    ("bitsandbytes", "gemm_4bit", _count_dequantized),  # before 0.50 bitsandbytes dequantizes by itself
    ("torch_attn", "_varlen_attn_backward", _count_varlen),
)
SCRATCH: dict[Any, Callable[..., int]] = {
    operator.default: count
    for library, name, count in _COUNTS
    if (operator := getattr(getattr(torch.ops, library), name, None)) is not None
}
"""Operators that allocate more than their outputs, and the bytes for their arguments."""


def choose_attention(has_varlen: bool) -> Callable[..., torch.Tensor]:
    """Return the attention of packed pairs on a GPU, for tensors that are not on it."""

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pairs: Pairs, scale: float) -> torch.Tensor:
        takes_varlen = has_varlen and supports_heads(query, key, value)
        return (attend_varlen if takes_varlen else attend_pairs)(query, key, value, pairs, scale)

    return attend


_OF_TILES = ("_forward_tile", "_backward_tile", "_addmm_fp32")


@contextmanager
def without_tile_copies() -> Iterator[None]:
    """Skip what TRL's head computes of a tile: on a GPU, Triton's kernel and cuBLAS allocate nothing for it."""
    own = {name: getattr(chunked_logprob, name) for name in _OF_TILES}
    for name in own:
        setattr(chunked_logprob, name, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        for name, function in own.items():
            setattr(chunked_logprob, name, function)

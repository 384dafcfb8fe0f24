"""Log-probabilities of tokens directly from hidden states, for a frozen head on a CPU.

With z = scale · W h the logits of one token, t its target and s = Σ_v exp(z_v):

    log p_t = z_t - log s,        ∂ log p_t / ∂h = scale · [(1 - p_t) W_t - Σ_{v≠t} p_v W_v]

The head is frozen, so the gradient is known up to one factor per token as soon as the logits are: the forward pass
computes it, a few hundred tokens at a time, and the backward pass only multiplies. TRL's kernel recomputes all logits
in the backward pass, and passes over them in fp32 after they have left the cache. 1 - p_t is computed as
Σ_{v≠t} p_v, which loses no precision if p_t is nearly 1.

Left to TRL's kernel: other devices (it is written in Triton for GPUs), a head that is trained or has a bias, and
`final_logit_softcapping`.
"""

import contextlib
import subprocess
import sysconfig
from collections.abc import Collection, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from trl.kernels import ChunkedLogProbFunction
from trl.trainer import utils as trl_utils

from dpo_runner.errors import ConfigError, reason_of
from dpo_runner.io.upstream import check_names

check_names("trl", trl_utils, "_ChunkedLogProbFunction")

_TOKENS = 256
"""Tokens per block: enough for fast products, few enough for logits to take tens of megabytes."""

_ALONE: ContextVar[bool] = ContextVar("_ALONE", default=False)

_CACHED = 2**20
"""Logits per block in elementwise operations, so that they stay in the processor's cache."""


class FrozenHeadLogProbs(torch.autograd.Function):
    """Log-probabilities of the targets, with the statistics of the distribution that TRL logs."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        scale: float,
        wanted: frozenset[str],
    ) -> tuple[torch.Tensor, ...]:
        """Score N tokens.

        Args:
            ctx: autograd's context.
            hidden: [N, H].
            weight: [V, H], frozen.
            targets: [N], int64.
            scale: factor of the logits.
            wanted: any of `entropy`, `log_sum_sq_probs`, `mean_logits` and `is_top1`; the others are returned as 0.

        Returns:
            As TRL's `ChunkedLogProbFunction`, each [N] and only the first with a gradient: log p, entropy in nats,
            log Σ_v p_v², mean logit (all fp32), whether the target is the first of the most likely tokens (bool).
        """
        device, count = hidden.device, hidden.size(0)
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else hidden.dtype
        weight = weight.to(dtype)
        log_probs, entropy, log_squares, mean_logits = torch.zeros(4, count, device=device).unbind()
        is_top1 = torch.zeros(count, dtype=torch.bool, device=device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, count, _TOKENS):
            logits = torch.mm(hidden[start : start + _TOKENS].to(dtype), weight.t())
            sums = torch.empty(logits.size(0), 1, device=device)
            rows = max(_CACHED // logits.size(1), 1)
            for first in range(0, logits.size(0), rows):
                block = logits[first : first + rows]
                some = slice(start + first, start + first + block.size(0))
                target = targets[some].unsqueeze(1)
                scored = [each[some] for each in (log_probs, entropy, log_squares, mean_logits, is_top1)]
                total, weights = _score_block(block, target, scale, wanted, scored)
                if gradient is not None:
                    weights.scatter_(1, target, 0)
                    weights.scatter_(1, target, -weights.sum(dim=1, keepdim=True))
                    block.copy_(weights)
                    sums[first : first + rows] = total
            if gradient is not None:
                gradient[start : start + _TOKENS] = torch.mm(logits, weight).float().div_(sums).mul_(-scale)
        ctx.mark_non_differentiable(entropy, log_squares, mean_logits, is_top1)
        ctx.save_for_backward(gradient)
        return log_probs, entropy, log_squares, mean_logits, is_top1

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None, None]:
        """Return ∂loss/∂hidden, [N, H], in the dtype of the hidden states."""
        (gradient,) = ctx.saved_tensors
        return (gradient * gradients[0].unsqueeze(1)).to(gradient.dtype), None, None, None, None


def _score_block(
    block: torch.Tensor, target: torch.Tensor, scale: float, wanted: Collection[str], scored: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score a block of logits.

    Args:
        block: [rows, V].
        target: [rows, 1].
        scale: of the logits.
        wanted: which results to compute.
        scored: receives log p, entropy, log Σ p², mean logit and is_top1, [rows] each.

    Returns:
        Σ_v w_v, [rows, 1], and the weights w, [rows, V]: probabilities relative to that of the most likely token.
    """
    log_probs, entropy, log_squares, mean_logits, is_top1 = scored
    if "is_top1" in wanted:
        largest, at = block.max(dim=1, keepdim=True)
        is_top1.copy_((at == target).squeeze(1))
    else:
        largest = block.amax(dim=1, keepdim=True)
    below = (block - largest.float()).mul_(scale)
    target_below = below.gather(1, target)
    if "mean_logits" in wanted:
        mean_logits.copy_(below.mean(dim=1) + largest.squeeze(1) * scale)
    weights = below.exp() if "entropy" in wanted else below.exp_()
    total = weights.sum(dim=1, keepdim=True)
    log_total = total.log().squeeze(1)
    log_probs.copy_(target_below.squeeze(1) - log_total)
    if "entropy" in wanted:
        entropy.copy_(log_total - torch.linalg.vecdot(weights, below) / total.squeeze(1))
    if "log_sum_sq_probs" in wanted:
        log_squares.copy_(torch.linalg.vecdot(weights, weights).log() - 2 * log_total)
    return total, weights


def check_kernel(device: torch.device) -> None:
    """Score a token with TRL's kernel; on a GPU Triton compiles it, with a C compiler and Python's headers.

    Raises:
        ConfigError: one of them is missing.
    """
    hidden, head = torch.zeros(1, 16, device=device), torch.zeros(32, 16, device=device)
    try:
        ChunkedLogProbFunction.apply(hidden, head, None, torch.zeros(1, dtype=torch.int64, device=device), 1.0, 32)
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        if isinstance(error, RuntimeError) and "compiler" not in str(error):
            raise
        header = Path(sysconfig.get_paths()["include"]) / "Python.h"
        reason = reason_of(error).rstrip(".") if header.exists() else f"{header} is missing"
        raise ConfigError(
            f"`training`: Triton cannot compile TRL's kernel for the GPU: {reason}; install a C compiler and Python's "
            "headers, such as Debian's gcc and python3-dev"
        ) from error


class _Dispatch:
    """Replacement for TRL's kernel with the same signature; it falls back to that kernel."""

    @staticmethod
    def apply(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> Any:
        if hidden.device.type != "cpu" or weight.requires_grad or bias is not None or final_logit_softcapping:
            return ChunkedLogProbFunction.apply(
                hidden,
                weight,
                bias,
                targets,
                temperature,
                chunk_size,
                final_logit_softcapping,
                logit_scale,
                outputs,
            )
        apply: Any = FrozenHeadLogProbs.apply
        wanted = frozenset() if _ALONE.get() else frozenset(outputs)
        return apply(hidden, weight, targets, logit_scale / temperature, wanted)


@contextlib.contextmanager
def log_probs_alone() -> Iterator[None]:
    """Skip the statistics that TRL logs if they are unused, such as for a reference that is only scored."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


@contextlib.contextmanager
def frozen_head() -> Iterator[None]:
    """Make TRL's scoring forward use this module's kernel if it applies."""
    trl_utils._ChunkedLogProbFunction = _Dispatch
    try:
        yield
    finally:
        trl_utils._ChunkedLogProbFunction = ChunkedLogProbFunction

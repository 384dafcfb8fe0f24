"""The frozen head gives the results of TRL's kernel, and skips unused statistics."""

import torch
from trl.kernels import ChunkedLogProbFunction
from trl.trainer import utils as trl_utils

from dpo_runner.training.engine.packed.head import frozen_head, log_probs_alone

ALL = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def score(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, outputs: tuple[str, ...] = ALL):
    """Return the five results and the gradient of the hidden states."""
    hidden = hidden.clone().requires_grad_()
    results = trl_utils._ChunkedLogProbFunction.apply(hidden, weight, None, targets, 0.7, 64, None, 1.5, outputs)
    (results[0] * torch.arange(len(targets))).sum().backward()
    return [result.detach() for result in results if result is not None], hidden.grad


def test_all_five_results_and_the_gradient_are_trls() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 32), 0.2 * torch.randn(700, 32)
    targets = torch.where(torch.arange(300) % 2 == 0, (hidden @ weight.t()).argmax(dim=1), torch.randint(700, (300,)))
    expected, gradient = score(hidden, weight, targets)
    assert trl_utils._ChunkedLogProbFunction is ChunkedLogProbFunction
    with frozen_head():
        assert trl_utils._ChunkedLogProbFunction is not ChunkedLogProbFunction
        found, ours = score(hidden, weight, targets)
    for theirs, mine in zip(expected[:4], found[:4], strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[4], expected[4]) and 0 < expected[4].sum() < 300
    assert (ours - gradient).norm() <= 1e-5 * gradient.norm()


def test_statistics_that_nobody_reads_are_left_out_and_log_probs_are_the_same_bits() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(90, 32).bfloat16(), torch.randn(500, 32).bfloat16()
    targets = (hidden @ weight.t()).argmax(dim=1)
    with frozen_head():
        everything, gradient = score(hidden, weight, targets)
        with log_probs_alone():
            alone, same = score(hidden, weight, targets)
        again, _ = score(hidden, weight, targets)
    assert torch.equal(alone[0], everything[0]) and torch.equal(same, gradient)
    assert all(everything[index].any() and not alone[index].any() for index in range(1, 5))
    assert torch.equal(again[1], everything[1])

"""Drift warnings appear for training that goes wrong, and only then."""

import math
from collections.abc import Iterable

import pytest

from dpo_runner.training.callbacks.drift import DriftWarnings


def watch(events: Iterable[dict[str, float]], beta: float = 0.1) -> list[str]:
    drift = DriftWarnings(beta)
    return [text for event in events for text in drift.note(event)]


def event(loss: float, chosen: float, margin: float) -> dict[str, float]:
    return {"loss": loss, "rewards/chosen": chosen, "rewards/margins": margin}


def test_a_training_that_goes_well_is_not_spoken_of() -> None:
    noise = [0.05 * math.sin(7.3 * step) for step in range(200)]
    assert not watch(
        event(0.69 * 0.99**step + noise[step], 0.01 * step + noise[step], 0.02 * step) for step in range(200)
    )


def test_chosen_answers_that_are_unlearnt_are_told_of_once() -> None:
    (told,) = watch(event(0.69 * 0.98**step, -0.1 * step, 0.2 * step) for step in range(100))
    assert "by 17 nats on average" in told  # -0.1 × 17 / 0.1 in the last five of the first twenty
    assert "training.beta" in told


@pytest.mark.parametrize(
    ("chosen", "margin"),
    [(-0.01, 0.02), (-0.1, -0.1), (0.1, 0.2)],
    ids=["by little", "the margin shrinks", "chosen ones rise"],
)
def test_other_movements_are_not(chosen: float, margin: float) -> None:
    assert not watch(event(0.6, chosen * step, margin * step) for step in range(60))


def test_a_loss_that_explodes_is_told_of_once() -> None:
    losses = [0.69, 0.6, 0.5, 0.45, 0.4, 0.4, 0.9, 2.0, 4.0, 9.0, 12.0, 15.0]
    (told,) = watch(event(loss, 0.0, 0.0) for loss in losses)
    assert told.startswith("the loss has risen from 0.4") and "training.learning_rate" in told


def test_an_event_without_a_loss_is_no_obstacle() -> None:
    assert not watch({"skipped_batches": 1.0} for _ in range(50))

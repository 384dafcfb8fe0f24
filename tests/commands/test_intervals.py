"""Coverage of bootstrap intervals, and pairs that count as correct."""

from typing import Any

import numpy as np
import pytest

from dpo_runner.evaluate.intervals import estimate_ratios, summarize_pairs


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    generator = np.random.default_rng(3)
    hits = 0
    for trial in range(200):
        values = generator.exponential(1.0, 60).tolist()
        names = [str(number) for number in range(60)]
        interval = estimate_ratios({"x": (values, [1.0] * 60)}, names, trial, resamples=1000)["x"]
        assert interval["low"] is not None and interval["high"] is not None
        hits += interval["low"] <= 1.0 <= interval["high"]
    assert 0.89 <= hits / 200 <= 0.99


def test_rows_of_one_prompt_are_drawn_together() -> None:
    values = [0.0, 1.0] * 10
    alone = estimate_ratios({"x": (values, [1.0] * 20)}, [str(i) for i in range(20)], 0)["x"]
    # ten copies of two prompts: a quarter of the resamples has only the first, a quarter only the second
    grouped = estimate_ratios({"x": (values, [1.0] * 20)}, [str(i % 2) for i in range(20)], 0)["x"]
    assert grouped == {"mean": 0.5, "low": 0.0, "high": 1.0}
    assert alone["low"] is not None and alone["high"] is not None
    expected = 1.96 * 0.5 / np.sqrt(20)  # for the mean of 20 coin tosses
    assert alone["high"] - 0.5 == pytest.approx(expected, abs=0.04) and 0.5 - alone["low"] == pytest.approx(
        expected, abs=0.04
    )
    assert estimate_ratios({"x": (values, [1.0] * 20)}, ["one"] * 20, 0)["x"]["low"] is None


def test_a_tie_is_not_right() -> None:
    same: dict[str, Any] = {"policy_logp": -2.0, "reference_logp": -3.0}
    better = {"policy_logp": -1.0, "reference_logp": -3.0}
    records = [
        {"prompt": "a", "chosen": same, "rejected": same},
        {"prompt": "b", "chosen": better, "rejected": same},
    ]
    result = summarize_pairs(records, 0.5, 0)
    assert result["reward_accuracy"]["mean"] == 0.5
    assert result["reward_margin"]["mean"] == pytest.approx(0.25)
    assert result["chosen_shift"]["mean"] == 1.5 and result["rejected_shift"]["mean"] == 1.0

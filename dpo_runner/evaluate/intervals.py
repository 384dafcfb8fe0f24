"""Metrics of scores and answers: means and ratios with bootstrap intervals."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

RESAMPLES = 10_000
"""Number of bootstrap resamples per interval."""
_RESAMPLES_AT_ONCE = 500

Floats = npt.NDArray[np.float64]


def draw_weights(groups: int, seed: int, resamples: int = RESAMPLES) -> Iterator[Floats]:
    """Yield bootstrap resamples of `groups` groups as weights, the number of times each was drawn.

    Yields:
        Arrays of shape [resamples in the batch, groups]; each row sums to `groups`.
    """
    generator = np.random.default_rng(seed)
    for start in range(0, resamples, _RESAMPLES_AT_ONCE):
        count = min(_RESAMPLES_AT_ONCE, resamples - start)
        drawn = generator.integers(0, groups, (count, groups)) + groups * np.arange(count)[:, None]
        yield np.bincount(drawn.ravel(), minlength=count * groups).reshape(count, groups).astype(np.float64)


def estimate_ratios(
    values: dict[str, tuple[Sequence[float], Sequence[float]]],
    groups: Sequence[str],
    seed: int,
    resamples: int = RESAMPLES,
) -> dict[str, dict[str, float | None]]:
    """Return ratios of sums, such as means, each with a 95 % bootstrap interval over groups of rows.

    Percentile interval of the cluster bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
    ch. 13): groups are drawn with replacement; rows of one group stay together because they are not independent.

    Args:
        values: by name, numerators and denominators of the rows; denominators of 1 give a mean.
        groups: each row's group, such as its prompt.
        seed: the seed of the resampling.
        resamples: the number of resamples.

    Returns:
        By name `mean`, `low` and `high`; the bounds are None for a single group, which has no variance to estimate.
    """
    names, members = np.unique(np.asarray(groups), return_inverse=True)
    columns = [np.asarray(side, np.float64) for both in values.values() for side in both]
    sums = np.stack([np.bincount(members, column, len(names)) for column in columns], axis=1)
    total = sums.sum(axis=0)
    parts = [weights @ sums for weights in draw_weights(len(names), seed, resamples)] if len(names) > 1 else []
    estimates: dict[str, dict[str, float | None]] = {}
    for at, name in enumerate(values):
        top, bottom = 2 * at, 2 * at + 1
        drawn = [part[:, top] / part[:, bottom] for part in parts]
        estimates[name] = to_estimate(float(total[top] / total[bottom]), drawn)
    return estimates


def to_estimate(mean: float, drawn: Sequence[Floats]) -> dict[str, float | None]:
    """Return an estimate with the central 95 % of its bootstrap values; bounds are None without values."""
    if not drawn:
        return {"mean": mean, "low": None, "high": None}
    low, high = np.quantile(np.concatenate(drawn), [0.025, 0.975])
    return {"mean": mean, "low": float(low), "high": float(high)}


def summarize_pairs(records: Sequence[dict[str, Any]], beta: float, seed: int) -> dict[str, Any]:
    """Return reward accuracy, reward margin and log-probability shifts, with 95 % intervals over prompts.

    The reward is β·(log π(y|x) − log π_ref(y|x)) (DPO paper, arXiv 2305.18290, Eq. 5 without its constant). The
    margin is the chosen reward minus the rejected one; a pair counts as correct if it is above 0, as in TRL.

    Args:
        records: the records of pairs.jsonl.
        beta: the run's β.
        seed: the seed of the bootstrap.

    Returns:
        By name `mean`, `low` and `high`; shifts in nats per completion.
    """
    shifts = {
        part: [record[part]["policy_logp"] - record[part]["reference_logp"] for record in records]
        for part in ("chosen", "rejected")
    }
    margins = [beta * (up - down) for up, down in zip(shifts["chosen"], shifts["rejected"], strict=True)]
    ones = [1.0] * len(records)
    values: dict[str, tuple[Sequence[float], Sequence[float]]] = {
        "reward_accuracy": ([float(margin > 0) for margin in margins], ones),
        "reward_margin": (margins, ones),
        "chosen_shift": (shifts["chosen"], ones),
        "rejected_shift": (shifts["rejected"], ones),
    }
    return dict(estimate_ratios(values, [record["prompt"] for record in records], seed))


def summarize_samples(records: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Return the KL divergence from the reference and the answer lengths, with 95 % intervals over prompts.

    KL(π‖π_ref) is estimated by the mean over the policy's samples of Σ_t log π − log π_ref, the unbiased estimator
    k1 (Schulman, Approximating KL Divergence, 2020), of answers up to `samples.max_new_tokens`. The estimate of a
    small KL may be negative.

    Args:
        records: the records of answers.jsonl.
        seed: the seed of the bootstrap.

    Returns:
        By name `mean`, `low` and `high`: KL in nats per answer and per token (total nats / total tokens), lengths in
        tokens, and the share of answers cut off at `samples.max_new_tokens`. Empty without answers.
    """
    if not records:
        return {}
    ones = [1.0] * len(records)
    samples = [record["sample"] for record in records]
    logratios = [sample["policy_logp"] - sample["reference_logp"] for sample in samples]
    values: dict[str, tuple[Sequence[float], Sequence[float]]] = {
        "kl_per_answer": (logratios, ones),
        "kl_per_token": (logratios, [float(sample["tokens"]) for sample in samples]),
    }
    for who in ("policy", "reference"):
        values[f"{who}_tokens"] = ([float(record[who]["tokens"]) for record in records], ones)
        values[f"{who}_cut_off"] = ([float(not record[who]["complete"]) for record in records], ones)
    return dict(estimate_ratios(values, [json.dumps(record["prompt"]) for record in records], seed))

"""What is measured of a tuned model and its reference: log-probabilities, sampled answers, and bootstrap intervals."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dpo_runner.artifacts import write_text
from dpo_runner.errors import RunError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RESAMPLES = 10_000
"""Bootstrap resamples behind each interval."""
_RESAMPLES_AT_ONCE = 500

Floats = npt.NDArray[np.float64]


class JsonLines:
    """Records in a file that grows as work is done, one JSON object a line.

    Args:
        path: the file. A last line that a kill has cut off is dropped.

    Raises:
        RunError: another line is no JSON.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        if not path.exists():
            return
        content = path.read_bytes()
        whole, _, cut = content.rpartition(b"\n")
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self.records.append(json.loads(line))
            except ValueError:
                raise RunError(f"{path}:{number}: is no JSON; delete the file to have its work done again") from None
        if cut:
            self.keep(len(self.records))

    def keep(self, count: int) -> None:
        """Drop all but the first `count` records."""
        self.records = self.records[:count]
        write_text(self.path, "".join(map(_to_line, self.records)))

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        """Add records, on disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(map(_to_line, records)))
            file.flush()
            os.fsync(file.fileno())
        self.records += records


def _to_line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"  # ASCII: a line separator or lone surrogate in an answer must not break a line


@dataclass
class Compared:
    """A policy and its reference.

    Attributes:
        policy: the tuned model, in evaluation mode.
        base: the reference of full fine-tuning, a model of its own; None: it is `policy` with its tuning off.
    """

    policy: "PreTrainedModel"
    base: "PreTrainedModel | None" = None

    @contextmanager
    def reference(self) -> "Iterator[PreTrainedModel]":
        """Lend the reference; afterwards `policy` is as it was."""
        from dpo_runner.tuned import untuned

        if self.base is not None:
            yield self.base
            return
        # peft unfreezes an adapter whenever it is switched on again
        trainable = [(parameter, parameter.requires_grad) for parameter in self.policy.parameters()]
        try:
            with untuned(self.policy):
                yield self.policy
        finally:
            for parameter, requires_grad in trainable:
                parameter.requires_grad_(requires_grad)


def score_completions(
    model: "PreTrainedModel", rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int
) -> list[float]:
    """Return log pi(y|x) of each row in nats, summed over the completion's tokens (DPO paper, arXiv 2305.18290, Eq. 7).

    Args:
        model: in evaluation mode.
        rows: prompt and completion tokens; scored as one right-padded batch of shape [rows, longest].
        pad_id: any token; what stands there is masked.

    Returns:
        One sum for each row. The softmax is taken in float32, whatever the model computes in.
    """
    import torch

    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids = torch.full((len(rows), width), pad_id, device=model.device)
    mask = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(rows):
        length = len(prompt) + len(completion)
        ids[row, :length] = torch.tensor([*prompt, *completion], device=model.device)
        mask[row, :length] = 1
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        sums = []
        for row, (prompt, completion) in enumerate(rows):  # one by one: float32 logits of all would be the peak
            first, end = len(prompt), len(prompt) + len(completion)
            logps = torch.log_softmax(logits[row, first - 1 : end - 1].float(), dim=-1)
            chosen = logps.gather(1, ids[row, first:end].unsqueeze(1))
            sums.append(chosen.double().sum().item())
    return sums


def sample_completions(
    model: "PreTrainedModel",
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
) -> list[list[int]]:
    """Sample one completion of each prompt at temperature 1, from the model's whole distribution.

    `generate` would apply what the model was published with (top_k, a repetition penalty, …), and the samples would
    not be the policy's. Each row has its own random numbers, so its sample does not depend on its batch.

    Args:
        model: in evaluation mode.
        prompts: tokens.
        seeds: one for each prompt, from 0 up to 2**63.
        max_new_tokens: where a completion is cut off.
        stop_ids: tokens that end a completion.
        pad_id: any token.

    Returns:
        Each completion's tokens, the stop token included.
    """
    import torch

    width, device = max(map(len, prompts)), model.device
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=device)
    position = (mask.cumsum(dim=1) - 1).clamp(min=0)
    draws = np.stack([np.random.default_rng(seed).random(max_new_tokens) for seed in seeds])
    completions: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    cache = None
    with torch.no_grad():
        for step in range(max_new_tokens):
            output = model(
                input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
            )
            cache = output.past_key_values
            # the inverse of the distribution function, in float64 so that rare tokens keep their share
            cumulated = torch.softmax(output.logits[:, -1].double(), dim=-1).cumsum(dim=-1)
            drawn = torch.tensor(draws[:, step : step + 1], device=device) * cumulated[:, -1:]
            ids = torch.searchsorted(cumulated, drawn, right=True).clamp(max=cumulated.shape[1] - 1)
            for row, token in enumerate(ids[:, 0].tolist()):
                if not ended[row]:
                    completions[row].append(token)
                    ended[row] = token in stop_ids
            if all(ended):
                break
            mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
            position = position[:, -1:] + 1
    return completions


def derive_seed(seed: int, number: int) -> int:
    """Return the seed of sample `number`, unlike that of any other sample or run."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:7], "big")


def draw_weights(groups: int, seed: int, resamples: int = RESAMPLES) -> Iterator[Floats]:
    """Yield bootstrap resamples of `groups` groups as weights: how often each was drawn.

    Yields:
        Arrays of shape [some resamples, groups]; each row sums to `groups`.
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
    """Estimate ratios of sums, such as means, each with a 95 % bootstrap interval over groups of rows.

    The percentile interval of the cluster bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
    ch. 13): groups are drawn with replacement, and rows of one group stay together, since they are not independent.

    Args:
        values: by name, numerators and denominators of the rows; denominators of 1 make a mean.
        groups: each row's group, such as its prompt.
        seed: of the resampling.
        resamples: how many.

    Returns:
        By name `mean`, `low` and `high`; the bounds are None for a single group, which says nothing about others.
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
    """Return an estimate and the middle 95 % of its bootstrap values; without such values, no bounds."""
    if not drawn:
        return {"mean": mean, "low": None, "high": None}
    low, high = np.quantile(np.concatenate(drawn), [0.025, 0.975])
    return {"mean": mean, "low": float(low), "high": float(high)}


def summarize_pairs(records: Sequence[dict[str, Any]], beta: float, seed: int) -> dict[str, Any]:
    """Return reward accuracy and margin and the log-probabilities' shifts, with 95 % intervals over prompts.

    The reward is β·(log π(y|x) − log π_ref(y|x)) (DPO paper, arXiv 2305.18290, Eq. 5 without its constant); the
    margin is that of chosen less that of rejected, and a pair counts as right where it is above 0, as in TRL.

    Args:
        records: of pairs.jsonl.
        beta: the run's β.
        seed: of the bootstrap.

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
    """Return the KL divergence from the reference and the answers' lengths, with 95 % intervals over prompts.

    KL(π‖π_ref) is estimated by the mean over the policy's samples of Σ_t log π − log π_ref, the unbiased estimator
    k1 (Schulman, Approximating KL Divergence, 2020), of answers up to `samples.max_new_tokens`. A small one may come
    out below 0.

    Args:
        records: of answers.jsonl.
        seed: of the bootstrap.

    Returns:
        By name `mean`, `low` and `high`: KL in nats per answer and per token (all nats by all tokens), lengths in
        tokens, and shares of answers that `samples.max_new_tokens` cut off. Empty without answers.
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

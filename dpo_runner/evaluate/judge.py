"""The win rate of a tuned model against its reference, judged by an OpenAI-compatible endpoint, length-controlled."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dpo_runner.config.rules.generate import check_endpoint
from dpo_runner.config.sections.run import JudgeConf
from dpo_runner.errors import ConfigError
from dpo_runner.evaluate.intervals import Floats, draw_weights, estimate_ratios, to_estimate
from dpo_runner.io.endpoint import Endpoint
from dpo_runner.io.files import JsonLines
from dpo_runner.io.masking import mask_secrets
from dpo_runner.training.answers.rewards.judge import Judge, parse_verdict, read_instruction

_NEWTON_STEPS = 50
_LARGEST_LOGIT = 40.0
LENGTH_PENALTY = 0.1
"""λ of the ridge penalty on the length coefficient."""


def check_judge(conf: JudgeConf) -> None:
    """Check a `judge` section.

    Raises:
        ConfigError: one line per mistake.
    """
    mistakes = list(check_endpoint(conf.base_url, conf.api_key_env, "judge"))
    if not conf.model:
        mistakes.append("`judge.model`: must be set with judge.base_url (`judge.model=NAME`), the judge's name there")
    if mistakes:
        raise ConfigError(mistakes)


def name_judge(conf: JudgeConf) -> dict[str, str]:
    """Return the judge's address and model without secrets, for records and results."""
    return {"base_url": str(mask_secrets(conf.base_url)), "model": str(conf.model)}


def judge_answers(
    conf: JudgeConf, answers: Sequence[dict[str, Any]], done: JsonLines, progress: Callable[[int], None]
) -> list[dict[str, Any]]:
    """Judge each pair of answers in both orders, because judges have a position bias.

    Args:
        conf: the judge.
        answers: records with `prompt` (messages), `policy` and `reference` (each with its `text`).
        done: verdicts so far, of this and other judges; one record is appended per pair judged.
        progress: called with the number of pairs newly judged.

    Returns:
        This judge's records, sorted by `answer` (its number): `policy_first` and `reference_first` (the judge's
        replies) and `verdict`: 1 policy, 0 reference, 0.5 if the orders disagree, None if a reply is unparsable.

    Raises:
        RunError: the endpoint refuses or cannot be reached.
    """
    access = (str(conf.base_url), conf.api_key_env, conf.timeout)
    endpoint = Endpoint("judge", *access, kept="the verdicts so far are kept")
    judge, name = Judge(endpoint, str(conf.model), read_instruction("pairwise")), name_judge(conf)
    known = {record["answer"]: record for record in done.records if record["judge"] == name}
    progress(len(known))
    for number, answer in enumerate(answers):
        if number in known:
            continue
        policy, reference = answer["policy"]["text"], answer["reference"]["text"]
        replies = [
            judge.compare(answer["prompt"], policy, reference),
            judge.compare(answer["prompt"], reference, policy),
        ]
        letters = [parse_verdict(reply) for reply in replies]
        verdict = None if None in letters else ((letters[0] == "A") + (letters[1] == "B")) / 2
        known[number] = {
            **{"answer": number, "judge": name, "policy_first": replies[0], "reference_first": replies[1]},
            "verdict": verdict,
        }
        done.append([known[number]])
        progress(1)
    return [known[number] for number in range(len(answers))]


def fit_length_control(verdicts: Floats, lengths: Floats, weights: Floats) -> Floats:
    """Return the win rate at equal length, by a logistic regression on length.

    AlpacaEval 2 (Dubois et al., arXiv 2404.04475, Eq. 2) for a single policy, so without the instruction-difficulty
    term, which takes many models to estimate:

        P(policy wins) = σ(θ + φ z),  z = tanh(Δ / std(Δ)),  Δ = policy's length − reference's

    θ and φ minimize Σ w·CE(y, P) + λ/2·φ², the paper's weak penalty on the length term (λ = LENGTH_PENALTY), by
    Newton steps; a tie is y = 0.5. The result is σ(θ), the rate at Δ = 0.

    Args:
        verdicts: y, shape [answers].
        lengths: Δ in characters, shape [answers].
        weights: w, the weight of each answer, shape [fits, answers].

    Returns:
        Rates in [0, 1], shape [fits].
    """
    spread = lengths.std()
    z = np.tanh(lengths / spread) if spread > 0 else np.zeros_like(lengths)
    theta, phi = np.zeros(len(weights)), np.zeros(len(weights))
    for _ in range(_NEWTON_STEPS):
        p = 1 / (1 + np.exp(-np.clip(theta[:, None] + phi[:, None] * z, -_LARGEST_LOGIT, _LARGEST_LOGIT)))
        slope, curve = weights * (p - verdicts), weights * p * (1 - p)
        gradient = slope.sum(axis=1), slope @ z + LENGTH_PENALTY * phi
        # 1e-12 keeps the system solvable if all verdicts agree and θ goes to infinity
        h_tt, h_tp = curve.sum(axis=1) + 1e-12, curve @ z
        h_pp = curve @ (z * z) + LENGTH_PENALTY
        determinant = np.maximum(h_tt * h_pp - h_tp**2, 1e-18)
        steps = np.stack([h_pp * gradient[0] - h_tp * gradient[1], h_tt * gradient[1] - h_tp * gradient[0]])
        steps = np.clip(steps / determinant, -1, 1)  # full Newton steps can overshoot far from the optimum
        theta = np.clip(theta - steps[0], -_LARGEST_LOGIT, _LARGEST_LOGIT)
        phi -= steps[1]
        if np.abs(steps).max() < 1e-9:
            break
    rates: Floats = 1 / (1 + np.exp(-theta))
    return rates


def summarize_verdicts(
    records: Sequence[dict[str, Any]], answers: Sequence[dict[str, Any]], seed: int
) -> dict[str, Any]:
    """Return the win rate and the length-controlled win rate with 95 % intervals, and counts of verdicts.

    Args:
        records: the records from `judge_answers`.
        answers: the judged answers in the same order, one per prompt.
        seed: the seed of the bootstrap.

    Returns:
        `win_rate` and `length_controlled_win_rate` (`mean`, `low`, `high`, or None if it cannot be estimated, with
        the reason in `note`), and the numbers of pairs `judged`, `ties` and `unparsable`.
    """
    both = [(record, answer) for record, answer in zip(records, answers, strict=True) if record["verdict"] is not None]
    summary: dict[str, Any] = {
        "judged": len(both),
        "ties": sum(record["verdict"] == 0.5 for record, _ in both),
        "unparsable": len(records) - len(both),
        "win_rate": None,
        "length_controlled_win_rate": None,
    }
    if not both:
        return {**summary, "note": "no verdict could be read"}
    verdicts = np.array([record["verdict"] for record, _ in both], np.float64)
    pairs = [(len(answer["policy"]["text"]), len(answer["reference"]["text"])) for _, answer in both]
    lengths = np.array([policy - reference for policy, reference in pairs], np.float64)
    groups = [f"{number:09}" for number in range(len(both))]  # sorted, so that the weights below match
    summary |= estimate_ratios({"win_rate": (verdicts.tolist(), [1.0] * len(both))}, groups, seed)
    if lengths.min() > 0 or lengths.max() < 0:
        longer = "policy" if lengths.min() > 0 else "reference"
        note = f"every answer of the {longer} is the longer one, so nothing tells what equal lengths would give"
        return {**summary, "note": note}
    mean = float(fit_length_control(verdicts, lengths, np.ones((1, len(both))))[0])
    several = draw_weights(len(both), seed) if len(both) > 1 else ()
    drawn = [fit_length_control(verdicts, lengths, weights) for weights in several]
    return {**summary, "length_controlled_win_rate": to_estimate(mean, drawn)}

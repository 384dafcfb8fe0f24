"""The reward of the answers of policy and reference."""

from collections.abc import Callable, Sequence
from typing import Any

from dpo_runner.config.run_conf import RunConf
from dpo_runner.errors import RowError, RunError
from dpo_runner.evaluate.intervals import estimate_ratios
from dpo_runner.training.answers.rewards.reward import build_reward, describe_reward
from dpo_runner.training.answers.rewards.term import Answered

_SIDES = ("policy", "reference")


def score_answers(conf: RunConf, answers: Sequence[dict[str, Any]], progress: Callable[[int], None]) -> dict[str, Any]:
    """Score the greedy answers of policy and reference by `reward`.

    Args:
        conf: has the reward, and the seed of the bootstrap.
        answers: records with `prompt` (messages), `policy` and `reference` (each with its `text`).
        progress: called with the number of scored answers.

    Returns:
        `name` (the reward's terms), `policy_reward`, `reference_reward` and `reward_win_rate` (the share of prompts
        with the higher reward for the policy, a tie counts half), each with a 95 % interval over prompts, and the
        number of prompts `left_out` because an answer has no score.

    Raises:
        ConfigError: the reward cannot be used.
        RunError: an endpoint refuses, or no prompt has two scores.
    """
    reward = build_reward(conf.reward)
    asked = [Answered(each["prompt"], list(dict.fromkeys(each[side]["text"] for side in _SIDES))) for each in answers]
    scored = reward.score(asked, lambda row, error: progress(1))
    both: list[tuple[float, float]] = []
    for one, scores in zip(asked, scored, strict=True):
        known = [None if isinstance(score, RowError) else score.total for score in scores]
        policy, reference = known[0], known[len(one.answers) - 1]
        if policy is not None and reference is not None:
            both.append((policy, reference))
    if not both:
        raise RunError("reward: no prompt has a score for both answers; `python -m dpo_runner.generate` says why")
    policy_rewards, reference_rewards = (list(side) for side in zip(*both, strict=True))
    wins = [(policy > reference) + (policy == reference) / 2 for policy, reference in both]
    ones = [1.0] * len(both)
    values = {"policy_reward": policy_rewards, "reference_reward": reference_rewards, "reward_win_rate": wins}
    estimates = estimate_ratios(
        {name: (side, ones) for name, side in values.items()}, list(map(str, range(len(both)))), conf.seed
    )
    return {"name": describe_reward(conf.reward), **estimates, "left_out": len(answers) - len(both)}

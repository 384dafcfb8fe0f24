"""The metrics of a run: labels and optimization direction. Imports no torch."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_runner.config.sections.model import ModelConf
from dpo_runner.errors import ConfigError, suggest

MAXIMIZE, MINIMIZE = "maximize", "minimize"


@dataclass(frozen=True)
class Metric:
    """One metric of a run.

    Attributes:
        key: the name in summary.json, or `evaluation/` plus the name in evaluation.json.
        label: the full name.
        column: the short name used as a table column, if any.
        better: `maximize`, `minimize`, or None if neither direction is better.
    """

    key: str
    label: str
    column: str | None = None
    better: str | None = None


METRICS = (
    Metric("eval_loss", "evaluation loss", "loss", MINIMIZE),
    Metric("eval_rewards/accuracies", "reward accuracy", "accuracy", MAXIMIZE),
    Metric("eval_rewards/margins", "reward margin", "margin", MAXIMIZE),
    Metric("eval_rewards/chosen", "reward of chosen answers", None, MAXIMIZE),
    Metric("eval_rewards/rejected", "reward of rejected answers"),
    Metric("eval_logps/chosen", "log-probability of chosen answers", None, MAXIMIZE),
    Metric("eval_logps/rejected", "log-probability of rejected answers"),
    Metric("eval_logits/chosen", "logits of chosen answers"),
    Metric("eval_logits/rejected", "logits of rejected answers"),
    Metric("eval_entropy", "entropy"),
    Metric("eval_mean_token_accuracy", "token accuracy", None, MAXIMIZE),
    Metric("eval_reward", "reward of sampled answers", "reward", MAXIMIZE),
    Metric("eval_reward_win_rate", "share of sampled answers better than before", None, MAXIMIZE),
    Metric("eval_reward_kl", "KL of sampled answers to the reference (nats)", "reward KL", MINIMIZE),
    Metric("response_tokens", "tokens per answer", "tokens"),
    Metric("responses_at_cap", "answers cut off at their limit"),
    Metric("evaluation/reward_accuracy", "reward accuracy", None, MAXIMIZE),
    Metric("evaluation/reward_margin", "reward margin", None, MAXIMIZE),
    Metric("evaluation/chosen_shift", "log-prob shift, chosen (nats)", None, MAXIMIZE),
    Metric("evaluation/rejected_shift", "log-prob shift, rejected (nats)"),
    Metric("evaluation/kl_per_answer", "KL to the reference (nats per answer)", "KL", MINIMIZE),
    Metric("evaluation/kl_per_token", "KL to the reference (nats per token)", None, MINIMIZE),
    Metric("evaluation/policy_tokens", "tokens per answer, policy"),
    Metric("evaluation/policy_cut_off", "share of answers cut off, policy"),
    Metric("evaluation/reference_tokens", "tokens per answer, reference"),
    Metric("evaluation/reference_cut_off", "share of answers cut off, reference"),
    Metric("evaluation/win_rate", "win rate", None, MAXIMIZE),
    Metric("evaluation/length_controlled_win_rate", "win rate, length-controlled", None, MAXIMIZE),
    Metric("evaluation/policy_reward", "reward, policy", "reward", MAXIMIZE),
    Metric("evaluation/reference_reward", "reward, reference"),
    Metric("evaluation/reward_win_rate", "share of answers better than the reference's", None, MAXIMIZE),
    Metric("drift", "shift of the chosen answers", None, MINIMIZE),
    Metric("perplexity", "perplexity", None, MINIMIZE),
    Metric("kl", "KL", None, MINIMIZE),
    Metric("accuracy", "accuracy", None, MAXIMIZE),
    Metric("margin", "margin", None, MAXIMIZE),
    Metric("runtime", "seconds", None, MINIMIZE),
    Metric("memory_gb", "memory (GB)", None, MINIMIZE),
    Metric("pairs_per_second", "pairs a second", None, MAXIMIZE),
)
"""All metrics, in display order."""

KEY_METRICS = ("eval_rewards/accuracies", "eval_rewards/margins", "eval_loss")
"""The metrics that a sweep shows for each job."""

OF_ROUNDS = ("eval_reward", "eval_reward_kl")
"""The metrics that a sweep shows for each job that has no `KEY_METRICS`, since it holds out prompts, not pairs."""

OF_SAMPLES = ("eval_reward", "eval_reward_win_rate", "eval_reward_kl")
"""Metrics of sampled answers, which are measured before and after training alone."""

BEFORE_AND_AFTER = ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins", *OF_SAMPLES, "response_tokens")
"""The metrics that a run shows before and after training."""

BENCHMARKS = "benchmarks/"
"""What the names of the harness's metrics begin with: benchmarks/<task>/<metric>, and /<filter> unless that is none."""

STDERR, DIFFERENCE, HALF_INTERVAL = "_stderr", "_diff", "_diff_ci95"
"""What follows the name of a benchmark's metric: its standard error, its difference to the reference, and half of that
difference's 95 % interval."""

_BENCHMARK_DIRECTIONS = {
    MINIMIZE: re.compile(r"perplexity|bits_per_byte|brier|loss|(^|_)(ter|wer)(_|$)"),
    MAXIMIZE: re.compile(r"acc|exact_match|(^|_)(em|f1|mcc|bleu|chrf|rouge\w*|pass@\d+|score)(_|$)", re.IGNORECASE),
}


def choose_shown(results: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the metrics that a table of jobs shows: `KEY_METRICS`, or `OF_ROUNDS` if the results have those alone."""
    known = {key for metrics in results for key in metrics}
    return OF_ROUNDS if known.intersection(OF_ROUNDS) and not known.intersection(KEY_METRICS) else KEY_METRICS


_BY_KEY = {metric.key: metric for metric in METRICS}
_PREFIX = re.compile(r"^(eval_|evaluation/)")


def label_of(key: str) -> str:
    """Return a metric's full name."""
    if key.startswith(BENCHMARKS):
        name = key.removeprefix(BENCHMARKS)
        return f"{name.removesuffix(DIFFERENCE)}, less the reference's" if name.endswith(DIFFERENCE) else name
    return _BY_KEY[key].label if key in _BY_KEY else key


def column_of(key: str) -> str:
    """Return a metric's column name in a table."""
    if key.startswith(BENCHMARKS):
        name = key.removeprefix(BENCHMARKS)
        return f"Δ {name.removesuffix(DIFFERENCE)}" if name.endswith(DIFFERENCE) else name
    return (_BY_KEY[key].column if key in _BY_KEY else None) or key


def direction_of(key: str) -> str | None:
    """Return a metric's direction, also of one source (`eval_<source>_…`); None if unknown."""
    if key.startswith(BENCHMARKS):
        parts = key.removesuffix(DIFFERENCE).split("/")
        metric = parts[2] if len(parts) > 2 else ""
        return next((better for better, names in _BENCHMARK_DIRECTIONS.items() if names.search(metric)), None)
    known = (metric for metric in METRICS if metric.better is not None)
    named = {_PREFIX.sub("", metric.key): metric.better for metric in known}
    found = [name for name in named if re.search(rf"(^|[/_]){re.escape(name)}$", key)]
    return named[max(found, key=len)] if found else None


def name_benchmark(task: str, key: str) -> str:
    """Return the name of a task's metric, which the harness calls `<metric>,<filter>`."""
    metric, _, kind = key.partition(",")
    return f"{BENCHMARKS}{task}/{metric}" + ("" if kind in ("", "none") else f"/{kind}")


def list_benchmarks(figures: Iterable[str]) -> list[str]:
    """Return the names of benchmarks' metrics among those of figures, without errors and differences."""
    further = (STDERR, DIFFERENCE, HALF_INTERVAL)
    return [name for name in figures if name.startswith(BENCHMARKS) and not name.endswith(further)]


def describe_difference(name: str, figures: Mapping[str, Any]) -> str:
    """Return how much a benchmark's metric differs from the reference's, with its 95 % interval; "" if not known."""
    difference, half = figures.get(name + DIFFERENCE), figures.get(name + HALF_INTERVAL)
    if difference is None:
        return ""
    return f"{difference:+.3f}" + (
        f" ({difference - half:+.3f} to {difference + half:+.3f})" if half is not None else ""
    )


def measure_losses(guard: Mapping[str, float], figures: Mapping[str, Any]) -> list[float | None]:
    """Return by how much each benchmark's difference to the reference is below its guard; above 0 it is violated.

    None stands for a difference that was not measured.
    """
    found = [(least, figures.get(name + DIFFERENCE)) for name, least in guard.items()]
    return [None if difference is None else least - difference for least, difference in found]


def describe_losses(guard: Mapping[str, float], figures: Mapping[str, Any]) -> str:
    """Return which guards a run violates, and its differences to the reference; "" if none."""
    told = [
        f"{label_of(name)} {least - loss:+.3g} (guard {least:+.3g})"
        for (name, least), loss in zip(guard.items(), measure_losses(guard, figures), strict=True)
        if loss is not None and loss > 0
    ]
    return ", ".join(told)


def label_results(figures: Mapping[str, Any]) -> dict[str, str]:
    """Return the label of each metric that a run shows before and after training, of benchmarks with the difference."""
    differences = {name: describe_difference(name, figures) for name in list_benchmarks(figures)}
    benchmarks = {name: label_of(name) + (f", {told}" if told else "") for name, told in differences.items()}
    return {**{key: label_of(key) for key in BEFORE_AND_AFTER}, **benchmarks}


TIE = "tie"
"""Shown instead of a reward accuracy that only rounding decides."""


def find_first_update(events: Iterable[Mapping[str, Any]]) -> int:
    """Return the first step that changes weights: the second if a warm-up begins with a learning rate of 0."""
    return 2 if any(event.get("step") == 1 and event.get("learning_rate") == 0 for event in events) else 1


def is_untrained_accuracy(key: str, step: float, first_update: int) -> bool:
    """Return whether a figure logged at a step is the reward accuracy of a model that has not been updated yet.

    Training logs a step's figures after its update, though they were computed before.
    """
    return key.endswith("rewards/accuracies") and step <= first_update - key.startswith("eval_")


def mark_ties(figures: dict[str, Any], step: int, model: ModelConf, first_update: int = 1) -> dict[str, Any]:
    """Return the figures of a step to show, with `TIE` for the accuracy of a policy that still equals its reference."""
    if not model.starts_as_reference:
        return figures
    return {key: TIE if is_untrained_accuracy(key, step, first_update) else value for key, value in figures.items()}


def evaluation_keys() -> list[str]:
    """Return the names of a run's evaluation metrics, without the prefix `eval_`."""
    names = (metric.key for metric in METRICS if metric.key not in OF_SAMPLES)
    return [name.removeprefix("eval_") for name in names if name.startswith("eval_")]


def check_metric(name: str, sources: Sequence[str]) -> None:
    """Check that evaluations have the metric that chooses the best model.

    Args:
        name: the metric, with or without `eval_`.
        sources: the names of the sources of evaluation rows.

    Raises:
        ConfigError: they lack it.
    """
    groups = ["", *(f"{source}_" for source in sources if len(sources) > 1)]
    known = [f"{group}{key}" for group in groups for key in evaluation_keys()]
    if name.removeprefix("eval_") not in known:
        raise ConfigError(
            f"`training.metric_for_best_model={name}`: no evaluation has it{suggest(name.removeprefix('eval_'), known)}"
        )

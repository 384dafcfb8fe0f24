"""Benchmarks of policy and reference, and the gate on what the policy may lose."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dpo_runner.config.metrics import DIFFERENCE, MAXIMIZE, label_of
from dpo_runner.config.run_conf import config_keys
from dpo_runner.config.sections.benchmarks import BenchmarksConf
from dpo_runner.errors import RunError
from dpo_runner.evaluate.scoring import Compared
from dpo_runner.training.answers.benchmarks.scores import Scorer, Scores, add_groups, compare, identify, name_figures
from dpo_runner.training.answers.benchmarks.tasks import load_tasks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PRECISIONS = {"None": "no", "torch.bfloat16": "bf16", "torch.float16": "fp16"}
"""accelerate's names of autocast dtypes."""
_RECORDED = ("tasks", "limit", "num_fewshot", "include_path", "batch_size")


def describe_benchmarks(conf: BenchmarksConf) -> dict[str, Any]:
    """Return what the scores depend on besides the models, for evaluation.json; {} without tasks."""
    return {key: value for key, value in config_keys(conf).items() if key in _RECORDED} if conf.tasks else {}


def score_benchmarks(
    compared: Compared,
    tokenizer: "PreTrainedTokenizerBase",
    stop_id: int | None,
    conf: BenchmarksConf,
    progress: Callable[[int], None],
) -> dict[str, Any]:
    """Score policy and reference in all tasks, each task on both before the next.

    Args:
        compared: policy and reference.
        tokenizer: with the chat template.
        stop_id: the chat template's end of a turn.
        conf: the section `benchmarks`.
        progress: called with the number of scored tasks, of each side.

    Returns:
        `settings`; `policy` and `reference` with figures by their names in summary.json, the policy's also with
        differences; `first`, the name of each task's first metric and the direction in which it is better.

    Raises:
        RunError: a task fails.
    """
    loaded = load_tasks(conf)
    sides: dict[str, Scores] = {"policy": {}, "reference": {}}

    def score(side: str, model: Any, adapters: list[str]) -> None:
        forward = f"autocast {_PRECISIONS[str(compared.autocast)]}"  # as a run describes it, whose scores can be reused
        scorer = Scorer(model, tokenizer, stop_id, conf, identify(model, adapters, forward))
        for name in loaded.tasks:
            sides[side][name] = scorer.score(name)
            progress(1)

    with compared.as_in_the_run():
        score("policy", compared.policy, list(getattr(compared.policy, "active_adapters", [])))
        with compared.reference() as model:
            score("reference", model, [compared.adapter] if compared.adapter is not None else [])
    policy, reference = (add_groups(side, loaded) for side in sides.values())
    return {
        "settings": describe_benchmarks(conf),
        "policy": name_figures(policy) | compare(policy, reference),
        "reference": name_figures(reference),
        "first": loaded.first_metrics(),
    }


def check_gate(benchmarks: dict[str, Any], most: float) -> str:
    """Check that the policy is not much worse than its reference in any task.

    Args:
        benchmarks: the section of evaluation.json.
        most: the largest loss of a task's first metric.

    Returns:
        A line that says so.

    Raises:
        RunError: it is; names the tasks.
    """
    policy, reference = benchmarks["policy"], benchmarks["reference"]
    lost = []
    for name, direction in benchmarks["first"].items():
        gain = policy[name + DIFFERENCE] * (1 if direction == MAXIMIZE else -1)
        if gain < -most:
            lost.append(f"{label_of(name)} went from {reference[name]:.3f} to {policy[name]:.3f}")
    if lost:
        raise RunError(f"gate: {'; '.join(lost)}; benchmarks.max_drop allows {most:g}")
    return f"gate: no task fell by more than {most:g} (benchmarks.max_drop)"

"""Scores of tasks: kept by what they depend on, joined into groups, and compared with another model's."""

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_runner.config.metrics import DIFFERENCE, HALF_INTERVAL, STDERR, name_benchmark
from dpo_runner.config.sections.benchmarks import BenchmarksConf
from dpo_runner.errors import RunError, reason_of
from dpo_runner.io.files import cache_dir, write_json
from dpo_runner.training.answers.benchmarks.tasks import Loaded, load_tasks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_VERSION = 2
"""Part of a score's name: increase it if the same model and task give other figures."""
_SAME_MEAN = 1e-9
_IDLE = ("use_cache", "inference_mode")
"""Keys of configs that differ between a model in training and the same one loaded again."""


@dataclass(frozen=True)
class TaskScores:
    """A model's scores in one task.

    Attributes:
        results: the harness's figures by its names, such as `acc,none`, `acc_stderr,none` and `sample_len`.
        values: by the same names, the value of each document, of metrics that are their means.
        seconds: how long the model took.
    """

    results: dict[str, Any]
    values: dict[str, list[float]]
    seconds: float = 0.0


Scores = dict[str, TaskScores]
"""By task; of a group without values."""


def benchmarks_dir() -> Path:
    """Return the folder of all scores that are kept."""
    return cache_dir() / "benchmarks"


class Scorer:
    """Scores a model in tasks, one at a time; what was scored before is read from the cache.

    Args:
        model: in evaluation mode.
        tokenizer: with the chat template.
        stop_id: the chat template's end of a turn.
        conf: the section `benchmarks`.
        identity: a digest of all that the model's outputs depend on; None if it is not known: then nothing is kept.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        stop_id: int | None,
        conf: BenchmarksConf,
        identity: str | None,
    ) -> None:
        from dpo_runner.training.answers.benchmarks.harness import LiveModel  # imports the harness

        self._lm = LiveModel(model, tokenizer, conf.batch_size, stop_id)
        self._conf, self._identity = conf, identity

    def score(self, name: str) -> TaskScores:
        """Score a task.

        Raises:
            RunError: the task fails.
        """
        from dpo_runner.training.answers.benchmarks.harness import build_requests, run_task

        task = load_tasks(self._conf).tasks[name]
        with _failing(name):
            requests = build_requests(self._lm, task, self._conf)
        kept = benchmarks_dir() / f"{self._digest(task, requests)}.json" if self._identity is not None else None
        if kept is not None and kept.exists():
            return TaskScores(**json.loads(kept.read_text(encoding="utf-8")))
        began = time.monotonic()
        with _failing(name):
            results, samples = run_task(self._lm, task, self._conf)
        figures = {key: value for key, value in results.items() if isinstance(value, int | float)}
        scores = TaskScores(figures, _collect_values(figures, samples), round(time.monotonic() - began, 3))
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_json(kept, asdict(scores))
        return scores

    def _digest(self, task: Any, requests: Any) -> str:
        packages = [metadata.version(name) for name in ("lm-eval", "torch", "transformers")]
        config = {key: str(value) for key, value in task.dump_config().items() if key != "metadata"}
        told = [_VERSION, self._identity, requests, config, str(task.VERSION), self._conf.batch_size, packages]
        return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:32]


def identify(model: Any, active: Sequence[str], forward: str) -> str | None:
    """Return a digest of all that a model's outputs depend on; None if its weights cannot be read as bytes."""
    from dpo_runner.training.engine.reference.identity import identify_reference

    try:
        return identify_reference(model, active, forward, _IDLE)[0]
    except TypeError:
        return None


@contextmanager
def _failing(name: str) -> Iterator[None]:
    """Turn what a task's functions raise into one line."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, AssertionError, ImportError, ArithmeticError) as error:
        raise RunError(f"benchmarks: {name} failed; {reason_of(error)}") from error


def _collect_values(figures: Mapping[str, float], samples: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Return each document's value of the metrics that are means of them."""
    values: dict[str, list[float]] = {}
    for name, figure in figures.items():
        metric, _, kind = name.partition(",")
        found = [sample.get(metric) for sample in samples if sample["filter"] == kind]
        numbers = [float(value) for value in found if isinstance(value, bool | int | float)]
        if numbers and len(numbers) == len(found) and abs(sum(numbers) / len(numbers) - figure) < _SAME_MEAN:
            values[name] = numbers
    return values


def add_groups(scores: Scores, loaded: Loaded) -> Scores:
    """Return the scores with those of groups, as the harness joins them."""
    results = {name: task.results for name, task in scores.items()}
    for group in loaded.list_groups():
        joined = group.aggregate(results)
        results[group.name] = {key: value for key, value in joined.items() if isinstance(value, int | float)}
    return {name: scores.get(name) or TaskScores(figures, {}) for name, figures in results.items()}


def name_figures(scores: Scores) -> dict[str, float]:
    """Return the figures by their names in summary.json, with standard errors."""
    named: dict[str, float] = {}
    for task, each in scores.items():
        for key, value in each.results.items():
            metric, _, kind = key.partition(",")
            if kind and not metric.endswith(STDERR):
                name = name_benchmark(task, key)
                named[name] = round(value, 6)
                error = each.results.get(f"{metric}{STDERR},{kind}")
                if error is not None:
                    named[name + STDERR] = round(error, 6)
    return named


def compare(scores: Scores, reference: Scores) -> dict[str, float]:
    """Return the differences to the reference's scores, with half of their 95 % intervals, by names in summary.json.

    Of a mean over documents the interval is that of the paired differences; otherwise both standard errors are added
    as those of independent figures, which makes it wider.
    """
    named: dict[str, float] = {}
    for task, mine in scores.items():
        theirs = reference[task]
        for key, value in mine.results.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith(STDERR) or key not in theirs.results:
                continue
            name = name_benchmark(task, key)
            named[name + DIFFERENCE] = round(value - theirs.results[key], 6)
            both = mine.values.get(key), theirs.values.get(key)
            errors = [each.results.get(f"{metric}{STDERR},{kind}") for each in (mine, theirs)]
            if both[0] is not None and both[1] is not None and len(both[0]) == len(both[1]) > 1:
                error = _paired_error(both[0], both[1])
            elif errors[0] is not None and errors[1] is not None:
                error = math.hypot(errors[0], errors[1])
            else:
                continue
            named[name + HALF_INTERVAL] = round(1.96 * error, 6)
    return named


def _paired_error(mine: list[float], theirs: list[float]) -> float:
    differences = [one - other for one, other in zip(mine, theirs, strict=True)]
    mean = sum(differences) / len(differences)
    variance = sum((value - mean) ** 2 for value in differences) / (len(differences) - 1)
    return math.sqrt(variance / len(differences))

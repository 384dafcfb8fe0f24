"""Comparison of runs: differing settings, runs joined over seeds, ranking, Pareto front."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from dpo_runner.config.metrics import DIFFERENCE, MINIMIZE, describe_losses, direction_of, list_benchmarks
from dpo_runner.errors import ConfigError
from dpo_runner.records.differences import find_differing, find_ignored, look_up
from dpo_runner.records.figures import to_number
from dpo_runner.records.runs import RunRecord

DEFAULT_OBJECTIVE = "eval_rewards/accuracies"
MARGIN = "eval_rewards/margins"
DISTANCES = ("evaluation/kl_per_answer", "eval_reward_kl", "drift")
"""Metrics of the distance from the reference: measured KL, or else the shift of chosen answers (nats per answer)."""
GAINS = ("eval_reward", MARGIN)
"""Metrics of what is gained by moving from the reference: the reward of sampled answers, or else the margin."""
_SEED = re.compile(r" seed=\S+|(^|(?<=/))seed=\S+ ?")
"""The seed in the name of a sweep's job, which does not name a row that joins seeds."""
_GUARD, _TOKENS = "sweep.search.guard.", "response_tokens"
_TELLS_APART = "samples.reward=4 reward=NAME in the runs, and --objective eval_reward, may tell them apart"


@dataclass(frozen=True)
class Objective:
    """The metric that runs are ranked by.

    Attributes:
        metric: the metric's name.
        minimize: whether lower is better.
    """

    metric: str
    minimize: bool

    def sign(self, value: float) -> float:
        """Return the value as a number to minimize."""
        return value if self.minimize else -value


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: the mean over the `n` runs that have a value.
        error: the standard error of the mean; None for a single run.
        n: the number of runs, each with a different seed.
    """

    mean: float
    error: float | None
    n: int


@dataclass
class Row:
    """One configuration: a run, or the runs that differ only in their seed.

    Attributes:
        runs: all runs of the configuration.
        counted: the runs that enter the metrics: the finished ones, or all if none is finished; one per seed.
        settings: values of the settings that differ between rows; None if the row does not have one.
        metrics: estimates by name.
        losses: the benchmarks in which it is further below the reference than its search's guard allows, in words.
        best: whether it is the best finished row.
        on_front: whether no other finished row has both more of the comparison's `gain` and a smaller distance.
    """

    runs: list[RunRecord]
    counted: list[RunRecord]
    settings: dict[str, Any]
    metrics: dict[str, Estimate]
    losses: str = ""
    best: bool = False
    on_front: bool = False

    @property
    def finished(self) -> bool:
        return self.counted[0].finished

    @property
    def state(self) -> str:
        states = [run.state for run in self.runs]
        if len(set(states)) == 1:
            return states[0]
        return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))

    @property
    def figures(self) -> dict[str, float]:
        """The means of its metrics."""
        return {name: estimate.mean for name, estimate in self.metrics.items()}

    @property
    def name(self) -> str:
        name, more = self.runs[0].name, len(self.runs) - 1
        if not more:
            return name
        return f"{_SEED.sub('', name) or name} (+{more})"

    @property
    def folder(self) -> str:
        return self.runs[0].folder

    def value(self, metric: str) -> float | None:
        """Return a metric's mean; None if it is missing or not finite."""
        estimate = self.metrics.get(metric)
        return estimate.mean if estimate is not None and math.isfinite(estimate.mean) else None


@dataclass
class Comparison:
    """The result of comparing runs.

    Attributes:
        runs: all runs.
        rows: the rows, best first; those without a value of the objective last.
        settings: the configuration keys that differ between rows.
        objective: the metric that rows are ranked by.
        gain, distance: the metrics of `GAINS` and `DISTANCES` that the front uses.
        notes: caveats for the reader, one line each.
    """

    runs: list[RunRecord]
    rows: list[Row]
    settings: list[str]
    objective: Objective
    gain: str
    distance: str
    notes: list[str] = field(default_factory=list)

    @property
    def best(self) -> Row | None:
        return next((row for row in self.rows if row.best), None)

    @property
    def metrics(self) -> list[str]:
        """Metrics for the columns of a table; only those that some run has."""
        wanted = [self.objective.metric, DEFAULT_OBJECTIVE, self.gain, MARGIN, "eval_loss", self.distance, _TOKENS]
        scored = dict.fromkeys(name for row in self.rows for name in list_benchmarks(row.metrics))
        wanted += [each for name in scored for each in (name, name + DIFFERENCE)]
        return [name for name in dict.fromkeys(wanted) if any(name in row.metrics for row in self.rows)]

    def find_best_run(self) -> RunRecord | None:
        """Return the best run of the best row."""
        metric = self.objective.metric
        measured = [run for run in self.best.counted if metric in run.metrics] if self.best else []
        return min(measured, key=lambda run: self.objective.sign(run.metrics[metric]), default=None)


def choose_objective(metric: str | None, minimize: bool | None, runs: Sequence[RunRecord]) -> Objective:
    """Return the objective, with the metric's known direction if `minimize` is None.

    Without a `metric` it is reward accuracy, or the reward of sampled answers if the runs have that alone.

    Raises:
        ConfigError: no run has the metric (the default one may be missing), or its direction is unknown.
    """
    known = {name for run in runs for name in run.metrics}
    if metric is None:
        metric = "eval_reward" if "eval_reward" in known and DEFAULT_OBJECTIVE not in known else DEFAULT_OBJECTIVE
    if known and metric not in known and metric != DEFAULT_OBJECTIVE:
        near = get_close_matches(metric, sorted(known), 1, cutoff=0.4)
        hint = f"did you mean `{near[0]}`?" if near else f"there are {', '.join(sorted(known))}"
        raise ConfigError(f"--objective {metric}: no run has it; {hint}")
    if minimize is None and (direction := direction_of(metric)) is None:
        raise ConfigError(f"--objective {metric}: add --minimize or --maximize; which is better is not known")
    return Objective(metric, direction == MINIMIZE if minimize is None else minimize)


def compare_runs(runs: Sequence[RunRecord], objective: Objective, per_seed: bool = False) -> Comparison:
    """Compare runs: find differing settings, join seeds, rank, and mark the best row and the front.

    Ties are ranked by the distance from the reference, the smaller one first.

    Args:
        runs: see `read_runs`.
        objective: the metric to rank by.
        per_seed: do not join runs that differ only in their seed.
    """
    ignored = find_ignored(runs)
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        compared = {key: value for key, value in run.config.items() if key not in ignored}
        seed = compared.pop("seed", None)
        # A run with unknown settings is not joined with any other.
        apart = per_seed or seed is None
        identity = run.name if apart else json.dumps(compared, sort_keys=True)
        groups.setdefault(identity, []).append(run)
    joined = any(len(group) > 1 for group in groups.values())
    settings = find_differing([group[0].config for group in groups.values()], ignored | ({"seed"} if joined else set()))
    notes: list[str] = []
    rows = [_build_row(group, settings, notes) for group in groups.values()]
    if not any(objective.metric in run.metrics for run in runs):
        notes.append(f"no run has {objective.metric} yet; nothing is ranked")
    if len({run.fingerprints["benchmarks"] for run in runs if "benchmarks" in run.fingerprints}) > 1:
        notes.append("benchmarks.limit or num_fewshot differ between the runs; their scores cannot be compared")
    comparison = Comparison(list(runs), rows, settings, objective, *_choose_axes(rows, notes), notes)
    _rank(comparison)
    _mark_front(comparison)
    notes += [f"{run.name}: {run.published}" for run in runs if run.published]
    return comparison


def _choose_axes(rows: list[Row], notes: list[str]) -> tuple[str, str]:
    """Return the first gain, and the first distance measured on the same data, that all finished rows have."""
    distances = list(DISTANCES)
    evaluated = {
        run.fingerprints["evaluation"] for row in rows for run in row.counted if "evaluation" in run.fingerprints
    }
    if len(evaluated) > 1:
        notes.append("the evaluations are not of the same data and prompts; their figures cannot be compared")
        distances.remove("evaluation/kl_per_answer")
    finished = [row for row in rows if row.finished and not row.metrics.keys().isdisjoint(GAINS)]

    def first(names: Sequence[str]) -> str:
        return next((name for name in names if finished and all(name in row.metrics for row in finished)), names[-1])

    return first(GAINS), first(distances)


def _build_row(group: list[RunRecord], settings: list[str], notes: list[str]) -> Row:
    """Join runs that differ only in their seed; of several with the same seed only one counts."""
    finished = [run for run in group if run.finished]
    by_seed: dict[str, RunRecord] = {}
    for run in finished or group:
        seed = json.dumps(run.config.get("seed", run.name))
        if seed in by_seed:
            notes.append(
                f"{run.name}: has the configuration and seed of {by_seed[seed].name}, and is not counted again"
            )
        else:
            by_seed[seed] = run
    counted = list(by_seed.values())
    names = dict.fromkeys(name for run in counted for name in run.metrics)
    metrics = {name: _estimate([run.metrics[name] for run in counted if name in run.metrics]) for name in names}
    row = Row(group, counted, {key: look_up(group[0].config, key) for key in settings}, metrics)
    row.losses = describe_losses(_read_guard(counted[0]), row.figures)
    if row.losses:
        notes.append(f"{row.name}: cannot win, sweep.search.guard excludes it: {row.losses}")
    return row


def _read_guard(run: RunRecord) -> dict[str, float]:
    """Return the guard of the search that a run is a point of."""
    found = {key: to_number(value) for key, value in run.config.items() if key.startswith(_GUARD)}
    return {key.removeprefix(_GUARD): value for key, value in found.items() if value is not None}


def _estimate(values: list[float]) -> Estimate:
    n = len(values)
    mean = sum(values) / n
    variance = sum((value - mean) ** 2 for value in values) / (n - 1) if n > 1 else None
    return Estimate(mean, None if variance is None else math.sqrt(variance / n), n)


def _rank(comparison: Comparison) -> None:
    objective = comparison.objective

    def rank(row: Row) -> tuple[float, float]:
        value, moved = row.value(objective.metric), row.value(comparison.distance)
        return (math.inf if value is None else objective.sign(value), math.inf if moved is None else moved)

    comparison.rows.sort(key=rank)
    measured = [row for row in comparison.rows if row.finished and row.value(objective.metric) is not None]
    candidates = [row for row in measured if not row.losses]
    if candidates:
        best = candidates[0]
        best.best = True
        equal = sum(row.value(objective.metric) == best.value(objective.metric) for row in candidates)
        if equal > 1:
            why = (
                "is the first by path" if best.value(comparison.distance) is None else "moved least from its reference"
            )
            advice = f"; {_TELLS_APART}" if objective.metric == DEFAULT_OBJECTIVE else ""
            note = f"{equal} are equally good by {objective.metric}; the one marked as best {why}{advice}"
            comparison.notes.append(note)


def _mark_front(comparison: Comparison) -> None:
    """Mark the finished rows on the Pareto front of gain and distance from the reference."""
    points = list(_list_points(comparison))
    for row, gain, moved in points:
        row.on_front = not any(
            other_gain >= gain and other_moved <= moved and (other_gain > gain or other_moved < moved)
            for _, other_gain, other_moved in points
        )


def _list_points(comparison: Comparison) -> Iterator[tuple[Row, float, float]]:
    for row in comparison.rows:
        gain, moved = row.value(comparison.gain), row.value(comparison.distance)
        if row.finished and gain is not None and moved is not None:
            yield row, gain, moved

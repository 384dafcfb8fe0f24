"""Rules of `sweep` and `sweep.search`. Imports neither torch nor Optuna."""

import dataclasses
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from dpo_runner.config.metrics import (
    BENCHMARKS,
    HALF_INTERVAL,
    METRICS,
    OF_SAMPLES,
    STDERR,
    direction_of,
    evaluation_keys,
)
from dpo_runner.config.rules.training import NO_EVALUATION_ROWS, may_have_evaluation
from dpo_runner.config.sections.run import RunFields
from dpo_runner.config.sections.sweep import SearchConf, SweepConf
from dpo_runner.errors import suggest

_ANSWERS = ("response_tokens", "responses_at_cap")
_OPTUNA = "optuna>=5,<6"
DRIVER = "psycopg"
"""The package that connects to PostgreSQL."""
_STORAGE = re.compile(
    rf"postgresql(\+{DRIVER})?://([^/\s@:]*(:[^/\s@:]*)?@)?(\[[\w:.]+\]|[^/\s@:?]*)(:\d+)?(/[^\s@?]*)?(\?[^\s@]*)?"
)


def read_direction(search: SearchConf) -> str | None:
    """Return `maximize` or `minimize`; None if unset and the objective has no default direction."""
    return search.direction or direction_of(search.objective)


def list_objectives(conf: RunFields) -> list[str]:
    """Return the metrics that a run's summary has of the tuned model."""
    sources = [f"{name}_" for name in conf.data.sources] if len(conf.data.sources) > 1 else []
    is_scored = conf.samples.reward or conf.rounds
    answers = (*_ANSWERS, *(OF_SAMPLES if is_scored else ())) if conf.samples.num_prompts else ()
    if conf.rounds:  # they hold out prompts, not pairs
        return list(answers)
    return [*(f"eval_{source}{name}" for source in ["", *sources] for name in evaluation_keys()), *answers]


def _check_benchmarks(conf: RunFields) -> Iterator[str]:
    """Yield mistakes in the names of benchmarks; whether a task has the metric is seen when it is loaded."""
    search, where = conf.sweep.search, "sweep.search."
    names = [(f"objective={search.objective}", search.objective)] if search.objective.startswith(BENCHMARKS) else []
    names += [(f"guard={search.guards}", name) for name in search.guards]
    for name, least in search.guards.items():
        if isinstance(least, bool) or not isinstance(least, int | float):
            yield f"`{where}guard={search.guards}`: must map {name} to a number, such as -0.01"
    for told, name in names:
        if not re.fullmatch(rf"{BENCHMARKS}[^/]+/[^/]+(/[^/]+)?", name) or name.endswith((STDERR, HALF_INTERVAL)):
            yield f"`{where}{told}`: must name a metric as {BENCHMARKS}TASK/METRIC, such as {BENCHMARKS}arc_easy/acc"
        elif not conf.benchmarks.tasks:
            task = name.split("/")[1]
            yield f"`{where}{told}`: no task is scored; add benchmarks.tasks=[{task}]"


def check_search(conf: RunFields) -> Iterator[str]:
    """Yield one line per broken rule of `sweep.search`."""
    search, where = conf.sweep.search, "sweep.search."
    changed = [
        field.name
        for field in dataclasses.fields(search)
        if field.name != "guard" and getattr(search, field.name) != getattr(SearchConf(), field.name)
    ]
    yield from _check_benchmarks(conf)
    if search.sampler is None:
        yield from (
            f"`{where}{name}{'' if name == 'storage' else f'={getattr(search, name)}'}`: is of a search; add "
            f"{where}sampler=tpe or random"
            for name in changed
        )
        return
    yield from _check_installation(search)
    yield from _check_storage(conf.sweep)
    for key in ("paired", "sample"):
        if value := getattr(conf.sweep, key):
            yield f"`sweep.{key}={value}`: is of a grid; leave it out, or {where}sampler"
    if search.objective.startswith(BENCHMARKS):
        if read_direction(search) is None:
            yield f"`{where}direction`: must be set for {search.objective} ({where}direction=maximize or minimize)"
    elif search.objective not in (objectives := list_objectives(conf)):
        of_table = {metric.column: metric.key for metric in METRICS}.get(search.objective, search.objective)
        yield f"`{where}objective={search.objective}`: no such metric{suggest(of_table, objectives)}"
    elif (
        search.objective.startswith("eval_")
        and search.objective not in OF_SAMPLES
        and not may_have_evaluation(conf.data)
    ):
        yield f"`{where}objective={search.objective}`: {NO_EVALUATION_ROWS}"
        return
    elif read_direction(search) is None:
        yield f"`{where}direction`: must be set for {search.objective} ({where}direction=maximize or minimize)"
    if search.sampler != "tpe" and search.pruner != "median" and "startup_trials" in changed:
        yield f"`{where}startup_trials={search.startup_trials}`: is read by sampler=tpe and pruner=median alone"
    if search.pruner is None and "warmup_steps" in changed:
        yield f"`{where}warmup_steps={search.warmup_steps}`: is read by a pruner; add {where}pruner=median"
    if search.pruner is not None and (search.objective in OF_SAMPLES or not search.objective.startswith("eval_")):
        yield f"`{where}pruner={search.pruner}`: {search.objective} is measured once, at the end; leave the pruner out"
    elif search.pruner is not None and conf.training.eval_strategy == "no":
        yield f"`{where}pruner={search.pruner}`: needs evaluations within the run (training.eval_strategy=steps)"


def _check_installation(search: SearchConf) -> Iterator[str]:
    try:
        found = version("optuna")
    except PackageNotFoundError:
        found = "none"
    if found.partition(".")[0] != "5":
        yield (
            f"`sweep.search.sampler={search.sampler}`: needs Optuna 5, and {found} is installed; "
            f"pip install '{_OPTUNA}' (or the extra: pip install 'dpo-runner[search]')"
        )


def _check_storage(sweep: SweepConf) -> Iterator[str]:
    storage, where = sweep.search.storage, "`sweep.search.storage`"
    if storage is None:
        return
    if not _STORAGE.fullmatch(storage):  # not shown: what is not a URL is not masked as one
        yield (
            f"{where}: must be a URL such as postgresql://me@host:5432/database; blanks and any of @:/ within the "
            "user's name or password are written as %20, %40, %3A and %2F"
        )
    if find_spec(DRIVER) is None:
        yield f"{where}: needs {DRIVER}, which is not installed; pip install '{DRIVER}[binary]>=3.3'"
    if sweep.dir is None and sweep.resume is None:
        yield f"{where}: needs sweep.dir, whose last part names the study; commands that share a study have it alike"


def check_sweep(sweep: SweepConf) -> Iterator[str]:
    """Yield one line per broken rule between the fields of `sweep`."""
    if sweep.dir is not None and sweep.resume is not None:
        yield f"`sweep.resume={sweep.resume}`: sweep.dir={sweep.dir} says already what to continue; set one of them"
    if sweep.on_error == "stop" and sweep.max_failures is not None:
        yield f"`sweep.max_failures={sweep.max_failures}`: with sweep.on_error=stop it is 1; leave one of them out"
    groups = sweep.paired if all(isinstance(item, list) for item in sweep.paired) else [sweep.paired]
    keys = [key for group in groups for key in group]
    if any(not isinstance(key, str) for key in keys) or len(set(keys)) < len(keys) or any(len(g) == 1 for g in groups):
        yield (
            f"`sweep.paired={sweep.paired}`: must be a list of two or more keys, such as [training.beta,seed], or a "
            "list of such lists, and name each key once"
        )

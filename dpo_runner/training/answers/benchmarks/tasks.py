"""Tasks of lm-evaluation-harness: found, loaded and checked. The harness is imported when it is needed."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_runner.config.metrics import MAXIMIZE, MINIMIZE, name_benchmark
from dpo_runner.config.sections.benchmarks import BenchmarksConf
from dpo_runner.config.sections.run import RunFields
from dpo_runner.errors import ConfigError, reason_of, suggest
from dpo_runner.io.logs import quiet_imports

BASICS = Path(__file__).parent / "basics"
"""The bundled tasks."""


@dataclass(frozen=True)
class Loaded:
    """The tasks that `benchmarks.tasks` names.

    Attributes:
        tasks: the harness's `Task` objects by name, those of groups and tags included.
        groups: its `Group` objects by name.
    """

    tasks: dict[str, Any]
    groups: dict[str, Any]

    def list_groups(self) -> list[Any]:
        """Return the groups that have figures of their own, members before the groups that hold them."""
        ordered: dict[str, Any] = {}

        def visit(group: Any) -> None:
            for member in group.get_all_groups(recursive=False):
                visit(member)
            ordered[group.name] = group

        for group in self.groups.values():
            visit(group)
        return [group for group in ordered.values() if group.has_aggregation]

    def directions(self) -> dict[str, bool | None]:
        """Return the name of each metric, as in summary.json, and whether higher is better."""
        found: dict[str, bool | None] = {}
        for task, metric, better in self._metrics():
            for kind in _filters(task):
                found[name_benchmark(task.task_name, f"{metric},{kind}")] = better
        for group in self.list_groups():
            for each in group.aggregate_metric_list:
                members = [task for task in group.get_all_tasks() if each.metric in task.higher_is_better()]
                kinds = each.filter_list or sorted({kind for task in members for kind in _filters(task)})
                for kind in [kinds] if isinstance(kinds, str) else kinds:
                    better = members[0].higher_is_better()[each.metric] if members else None
                    found[name_benchmark(group.name, f"{each.metric},{kind}")] = better
        return found

    def first_metrics(self) -> dict[str, str]:
        """Return the name of each task's first metric whose direction is known, and that direction."""
        found: dict[str, tuple[str, str]] = {}
        for task, metric, better in self._metrics():
            if better is not None:
                name = name_benchmark(task.task_name, f"{metric},{_filters(task)[0]}")
                found.setdefault(task.task_name, (name, MAXIMIZE if better else MINIMIZE))
        return dict(found.values())

    def _metrics(self) -> Iterator[tuple[Any, str, bool | None]]:
        for task in self.tasks.values():
            for metric, better in task.higher_is_better().items():
                yield task, metric, better


def _filters(task: Any) -> list[str]:
    kinds = getattr(task.config, "filter_list", None)
    return [kind["name"] for kind in kinds] if kinds else ["none"]


def load_tasks(conf: BenchmarksConf) -> Loaded:
    """Load tasks and their documents; once in a process.

    Raises:
        ConfigError: there is no such task, or it cannot be used.
    """
    return _load(tuple(conf.tasks), conf.num_fewshot, conf.include_path)


@functools.lru_cache(maxsize=1)
def _load(names: tuple[str, ...], num_fewshot: int | None, include_path: str | None) -> Loaded:
    manager = _open_index(names, include_path)
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    for name in names:
        with _task_errors(name):
            found = manager.load([name])
        tasks |= found["tasks"]
        groups |= found["groups"]
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigError(f"`benchmarks.tasks`: {name} runs code that the model writes; leave it out")
        if getattr(task, "MULTIMODAL", False):
            raise ConfigError(
                f"`benchmarks.tasks`: {name} has images or sound, which this program does not; leave it out"
            )
        # As in the harness's `simple_evaluate`: a task that sets 0 keeps it.
        default = task.get_config("num_fewshot")
        if default is None or (num_fewshot is not None and default != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
    return Loaded(tasks, groups)


def _open_index(names: tuple[str, ...], include_path: str | None) -> Any:
    """Return the harness's index of tasks. That of its own has thousands of files, which are read only if needed."""
    if include_path is not None and not Path(include_path).expanduser().is_dir():
        raise ConfigError(f"`benchmarks.include_path={include_path}`: there is no such folder")
    with quiet_imports():
        from lm_eval.tasks import TaskManager
    folders = [BASICS, *([Path(include_path).expanduser()] if include_path else [])]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if set(names) <= set(manager.all_tasks):
        return manager
    manager = TaskManager(include_path=folders)
    for name in names:
        if name not in manager.all_tasks:
            raise ConfigError(
                f"`benchmarks.tasks={list(names)}`: there is no task {name}{suggest(name, manager.all_tasks)}"
            )
    return manager


@contextmanager
def _task_errors(name: str) -> Iterator[None]:
    """Turn what a task raises into one line."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # a task's functions may raise anything
        raise ConfigError(f"`benchmarks.tasks`: {name} cannot be loaded; {reason_of(error)}") from error


def check_tasks(conf: RunFields) -> None:
    """Load a run's tasks, and check what a search reads of them.

    Raises:
        ConfigError: a task cannot be used, or has no metric that is named.
    """
    if not conf.benchmarks.tasks:
        return
    known = load_tasks(conf.benchmarks).directions()
    search = conf.sweep.search
    asked = {"objective": [search.objective], "guard": list(search.guards)}
    for key, names in asked.items():
        for name in names:
            if name.startswith("benchmarks/") and name not in known:
                raise ConfigError(f"`sweep.search.{key}`: no task has the metric {name}{suggest(name, known)}")

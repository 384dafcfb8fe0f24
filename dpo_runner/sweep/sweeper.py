"""Sweepers for Hydra: `grid` runs every point, `optuna` the points that a study suggests."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict, read_write

from dpo_runner.config.compose import compose_point
from dpo_runner.config.rules.sweep import read_direction
from dpo_runner.config.run_conf import RunConf
from dpo_runner.config.sections.sweep import SweepConf
from dpo_runner.errors import ConfigError, DpoRunnerError, RunError, SweepFailed, describe_failure
from dpo_runner.io.console import FoldingTable
from dpo_runner.records.reading import read_status
from dpo_runner.records.wandb_run import is_under_agent
from dpo_runner.sweep.axes import Axis, merge_axes, read_axis, read_sweep_conf
from dpo_runner.sweep.directory import (
    DONE,
    JobState,
    lock_sweep,
    name_points,
    prepare,
    read_job,
    read_progress,
    resolve_sweep_dir,
)
from dpo_runner.sweep.jobs import read_labels, write_place
from dpo_runner.sweep.launcher import WorkersLauncher
from dpo_runner.sweep.points import Point, build_points
from dpo_runner.sweep.screen import SweepScreen, list_failures
from dpo_runner.sweep.search.space import Space, read_axis_ends, read_space
from dpo_runner.sweep.workers import count_workers, group_gpus

if TYPE_CHECKING:
    from dpo_runner.sweep.search.trials import Search


def register_plugins() -> None:
    """Register launcher and sweepers with Hydra; `conf/config.yaml` names them as defaults.

    Hydra accepts plugins only from the package `hydra_plugins`, going by the module name at registration. The real
    module name is restored afterwards, because other launchers pickle the class and send it to other processes.
    """

    for plugin in (WorkersLauncher, GridSweeper, OptunaSweeper):
        home, plugin.__module__ = plugin.__module__, "hydra_plugins.dpo_runner"
        Plugins.instance().register(plugin)
        plugin.__module__ = home


class GridSweeper(Sweeper):  # type: ignore[misc]
    """Runs the points of a grid, or a sample of them, through any Hydra launcher.

    Args:
        params: axes of a sweep file (`hydra.sweeper.params`).
    """

    def __init__(self, params: dict[str, str] | None = None) -> None:
        self._params = params or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        if is_under_agent():
            raise ConfigError("-m: a sweep of W&B's own (WANDB_SWEEP_ID) runs one point at a time; leave -m out there")
        self._config, self._context, self._task_function = config, hydra_context, task_function

    def sweep(self, arguments: list[str]) -> Any:
        """Run the sweep that the command's overrides span.

        Raises:
            ConfigError: a point, an axis or the directory cannot be used; nothing was started.
            SweepFailed: jobs failed; lists all of them.
            RunInterrupted: a signal stopped the sweep.
        """
        config_dir = read_config_dir(self._config)
        axes = self._read_axes([*(f"{key}={value}" for key, value in self._params.items()), *arguments])
        points, merged = build_points(axes, config_dir)
        sweep = read_sweep_conf(axes, config_dir)
        path = resolve_sweep_dir(sweep, self._config.run_name)
        self._build_launcher(path)
        self._check_launcher()
        names = name_points(points, path)
        screen = SweepScreen()
        screen.show_plan(path, names, points, merged)
        if any(point.conf.dry_run for point in points):
            return None
        handle = lock_sweep(path, screen.say)
        names = name_points(points, path)  # another sweep may have ended while waiting for the lock
        prepare(path, names, points, sweep.threads_per_worker)
        waiting = [pair for pair in zip(names, points, strict=True) if read_job(path / pair[0]).state not in DONE]
        try:
            trouble = self._launch(path, waiting, config_dir, handle) if waiting else None
        finally:
            jobs = [read_job(path / name) for name in names]
            labels = [point.label for point in points]
            screen.show_result(path, jobs, labels, points[0].conf)
        failed = [(job, label) for job, label in zip(jobs, labels, strict=True) if job.state not in (*DONE, "pending")]
        if failed:
            raise list_failures(failed, len(jobs), path)
        if trouble is not None:
            raise RunError(f"the launcher failed: {describe_failure(trouble)}") from trouble
        return None

    def _build_launcher(self, path: Path) -> None:
        """Build the launcher with the sweep's directory set; some launchers write files there."""
        with read_write(self._config.hydra), open_dict(self._config.hydra):
            self._config.hydra.sweep.dir = str(path)
        self._launcher = Plugins.instance().instantiate_launcher(
            hydra_context=self._context, task_function=self._task_function, config=self._config
        )

    def _check_launcher(self) -> None:
        """Reject settings that Hydra's own launchers would ignore."""
        if isinstance(self._launcher, WorkersLauncher):
            return
        mistakes = [
            f"`sweep.{name}={self._config.sweep[name]}`: is of hydra/launcher=workers; leave one of them out"
            for name in ("workers", "threads_per_worker", "on_error", "max_failures")
            if self._config.sweep[name] != getattr(SweepConf(), name)
        ]
        if mistakes:
            raise ConfigError(mistakes)

    def _read_axes(self, texts: Sequence[str]) -> list[Axis]:
        return merge_axes([read_axis(override) for override in self._parse(texts)])

    def _parse(self, texts: Sequence[str]) -> list[Override]:
        parser = OverridesParser.create(config_loader=self._context.config_loader)
        return list(parser.parse_overrides(list(texts)))

    def _launch(
        self, path: Path, waiting: Sequence[tuple[str, Point]], config_dir: str | None, handle: int
    ) -> Exception | None:
        """Run jobs; return an exception of another launcher, since the jobs' directories have more detail."""
        if isinstance(self._launcher, WorkersLauncher):
            self._launcher.inherited, self._launcher.config_dir = [handle], config_dir
        overrides = [[*point.overrides, *write_place(path, name)] for name, point in waiting]
        try:
            self._launcher.launch(overrides, initial_job_idx=0)
        except DpoRunnerError:
            raise
        except Exception as error:
            if isinstance(self._launcher, WorkersLauncher):
                raise
            return error
        return None


def read_config_dir(config: DictConfig) -> str | None:
    """Return the user's folder of config groups (`--config-dir`)."""
    sources = config.hydra.runtime.config_sources
    return next((str(source.path) for source in sources if source.provider == "command-line"), None)


class OptunaSweeper(GridSweeper):
    """Runs a search through any Hydra launcher.

    The launcher `workers` gets a new point as soon as a job has ended; other launchers get batches of one point per
    worker.
    """

    def sweep(self, arguments: list[str]) -> Any:
        """Run the search that the command's overrides span.

        Raises:
            ConfigError: a point, an axis, the study or the directory cannot be used; nothing was started.
            SweepFailed: jobs failed; lists all of them.
            RunInterrupted: a signal stopped the search.
        """
        config_dir = read_config_dir(self._config)
        overrides = self._parse([*(f"{key}={value}" for key, value in self._params.items()), *arguments])
        axes = merge_axes([read_axis_ends(o) if o.is_interval_sweep() else read_axis(o) for o in overrides])
        space = read_space(overrides, axes)
        sweep = read_sweep_conf(axes, config_dir)
        path = resolve_sweep_dir(sweep, self._config.run_name)
        self._build_launcher(path)
        screen = SweepScreen()
        _show_plan(screen, space, sweep, path)
        corner = compose_point(space.corners()[0], config_dir)
        if corner.dry_run:
            return None
        handle = lock_sweep(path, screen.say)
        from dpo_runner.sweep.search.shared import open_search  # imports Optuna, which takes a second

        with open_search(path, space, sweep, config_dir) as search:
            with search.alive():
                count = count_workers(sweep.workers, group_gpus([corner]))
                self._run(search, path, count, config_dir, handle)
            return _report_outcome(search, path, corner, screen)

    def _run(self, search: "Search", path: Path, count: int, config_dir: str | None, handle: int) -> None:
        def follow(name: str, goes_on: bool) -> list[list[str]]:
            search.settle(name)
            jobs = search.take(1) if goes_on else []
            return [[*point.overrides, *write_place(path, new)] for new, point in jobs]

        one_by_one = isinstance(self._launcher, WorkersLauncher)
        if one_by_one:
            self._launcher.follow, self._launcher.total = follow, search.left()
        while jobs := search.take(count):
            trouble = self._launch(path, jobs, config_dir, handle)
            if trouble is not None:
                raise RunError(f"the launcher failed: {describe_failure(trouble)}") from trouble
            if one_by_one:
                return  # `follow` has settled and taken all trials
            for name, _ in jobs:
                search.settle(name)


def _show_plan(screen: SweepScreen, space: Space, sweep: SweepConf, path: Path) -> None:
    """Show the search space, sampler, pruner and objective."""
    search = sweep.search
    table = FoldingTable("searched", "values")
    for key, dimension in space.dimensions.items():
        table.add_row(key, str(dimension))
    screen.console.print(table)
    guard = "".join(f", {name} at least {least:+g} of the reference's" for name, least in search.guards.items())
    pruner = f", stopped early by {search.pruner}" if search.pruner else ""
    screen.say(
        f"{search.trials} trials, chosen by {search.sampler}{pruner}, to {read_direction(search)} {search.objective}"
        f"{guard}"
    )
    screen.say(f"sweep directory  {path}")


def _report_outcome(search: "Search", path: Path, conf: RunConf, screen: SweepScreen) -> None:
    """Show every job and the search's outcome.

    Raises:
        SweepFailed: jobs failed; lists all of them.
    """
    all_labels = read_labels(path)
    jobs = [read_job(path / name) for name in search.list_jobs()]
    labels = [all_labels[job.name] for job in jobs]
    screen.show_result(path, jobs, labels, conf)
    refused = search.refused()
    for line in [*summarize(jobs, path, len(refused)), *search.summarize()]:
        screen.say(line)
    if (best := search.find_best()) is not None:
        name, value = best
        label = f" with {all_labels[name]}" if name in all_labels else ""  # another command's is not known here
        screen.say(f"best: {conf.sweep.search.objective} {value:.4g}{label}")
        screen.say(f"best directory   {path / name if label else name}")
    elif conf.sweep.search.guards and any(job.state == "finished" for job in jobs):
        screen.say("best: none, all are outside sweep.search.guard")
    failed = [(job, label) for job, label in zip(jobs, labels, strict=True) if job.state not in (*DONE, "pending")]
    unfit = f"{len(refused)} trials chose what cannot be run:"
    table = [f"  {line}" for line in refused]
    if failed:
        failure = list_failures(failed, len(jobs), path)
        raise SweepFailed(failure.message, [*failure.table, *([unfit, *table] if refused else [])])
    if refused:
        raise SweepFailed(unfit, table)


def summarize(jobs: Sequence[JobState], path: Path, refused: int = 0) -> list[str]:
    """Return lines with the number of runs by state, and the optimizer steps executed and saved.

    Args:
        jobs: the sweep's jobs.
        path: the sweep's directory.
        refused: the number of trials without a job.
    """
    states = [job.state for job in jobs]
    counts = {state: states.count(state) for state in ("finished", "pruned", "failed")}
    counts["failed"] += refused
    executed = sum(read_progress(path / job.name) for job in jobs)
    pruned = [status for job in jobs if job.state == "pruned" and (status := read_status(path / job.name))]
    saved = sum(status["steps"] - status["step"] for status in pruned)
    return [
        "runs: " + ", ".join(f"{count} {state}" for state, count in counts.items()),
        f"optimizer steps: {executed} executed, {saved} saved",
    ]

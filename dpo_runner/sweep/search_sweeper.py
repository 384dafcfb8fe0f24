"""The Hydra sweeper `optuna`: points that a study chooses while it runs, through the jobs that a grid has."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from dpo_runner.config import RunConf
from dpo_runner.errors import RunError, SweepFailed, describe_failure
from dpo_runner.reading import read_status
from dpo_runner.search_config import read_direction
from dpo_runner.sweep.axes import compose_point, merge_axes, read_axis, read_sweep_conf
from dpo_runner.sweep.directory import lock, resolve_sweep_dir
from dpo_runner.sweep.failures import list_failures
from dpo_runner.sweep.jobs import read_labels, write_place
from dpo_runner.sweep.launcher import WorkersLauncher
from dpo_runner.sweep.screen import SweepScreen
from dpo_runner.sweep.space import Space, read_axis_ends, read_space
from dpo_runner.sweep.states import DONE, JobState, read_job, read_progress
from dpo_runner.sweep.sweeper import GridSweeper, read_config_dir
from dpo_runner.sweep.workers import count_workers
from dpo_runner.sweep_config import SweepConf

if TYPE_CHECKING:
    from dpo_runner.sweep.search import Search


class OptunaSweeper(GridSweeper):
    """Runs a search through any of Hydra's launchers.

    The launcher `workers` gets a new point as soon as a job has ended; to others they are given as many at once as
    there are workers.
    """

    def sweep(self, arguments: list[str]) -> Any:
        """Run the search that the command's overrides span.

        Raises:
            ConfigError: a point, an axis, the study or the directory cannot be used; nothing was started.
            SweepFailed: jobs failed, all of which it names.
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
        handle = lock(path, screen.say)
        from dpo_runner.sweep.search import Search  # Optuna, which takes a second to import

        search = Search(path, space, sweep, config_dir)
        with search.alive():
            self._run(search, path, sweep, config_dir, handle)
        return _judge(search, path, corner, screen)

    def _run(self, search: "Search", path: Path, sweep: SweepConf, config_dir: str | None, handle: int) -> None:
        count = count_workers(sweep.workers)

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
                return  # `follow` has told and taken everything
            for name, _ in jobs:
                search.settle(name)


def _show_plan(screen: SweepScreen, space: Space, sweep: SweepConf, path: Path) -> None:
    """Show what is searched, by whom and for what."""
    search = sweep.search
    table = Table("searched", "values")
    for key, dimension in space.dimensions.items():
        table.add_row(key, str(dimension))
    screen.console.print(table)
    pruner = f", stopped early by {search.pruner}" if search.pruner else ""
    screen.say(
        f"{search.trials} trials, chosen by {search.sampler}{pruner}, to {read_direction(search)} {search.objective}"
    )
    screen.say(f"sweep directory  {path}")


def _judge(search: "Search", path: Path, conf: RunConf, screen: SweepScreen) -> None:
    """Show every job and the search's outcome.

    Raises:
        SweepFailed: jobs failed, all of which it names.
    """
    all_labels = read_labels(path)
    jobs = [read_job(path / name) for name in search.list_jobs()]
    labels = [all_labels[job.name] for job in jobs]
    screen.show_result(path, jobs, labels, conf.wandb)
    refused = search.refused()
    for line in summarize(jobs, path, len(refused)):
        screen.say(line)
    if (best := search.find_best()) is not None:
        name, value = best
        screen.say(f"best: {conf.sweep.search.objective} {value:.4g} with {all_labels[name]}")
        screen.say(f"best directory   {path / name}")
    failed = [(job, label) for job, label in zip(jobs, labels, strict=True) if job.state not in (*DONE, "pending")]
    unfit = f"{len(refused)} trials chose what cannot be run:"
    table = [f"  {line}" for line in refused]
    if failed:
        failure = list_failures(failed, len(jobs), path)
        raise SweepFailed(failure.message, [*failure.table, *([unfit, *table] if refused else [])])
    if refused:
        raise SweepFailed(unfit, table)


def summarize(jobs: Sequence[JobState], path: Path, refused: int = 0) -> list[str]:
    """Return how many runs there were and how they ended, and the optimizer steps executed and saved.

    Args:
        jobs: of the sweep.
        path: the sweep's directory.
        refused: how many trials had no job at all.
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

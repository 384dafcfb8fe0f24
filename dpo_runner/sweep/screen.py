"""Terminal output of a sweep: plan, job starts and ends, results, failures."""

import math
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from dpo_runner.config.metrics import choose_shown, column_of, describe_losses
from dpo_runner.config.overrides import write_override
from dpo_runner.config.sections.run import RunFields
from dpo_runner.errors import SweepFailed, describe_failure
from dpo_runner.io.console import FoldingTable, format_clock, open_terminal, visible
from dpo_runner.io.masking import mask_text
from dpo_runner.records.wandb_files import find_folder, list_commands
from dpo_runner.sweep.directory import DONE, JobState, read_job, show_metrics
from dpo_runner.sweep.jobs import Job, Outcome
from dpo_runner.sweep.points import Point


def list_failures(failed: Sequence[tuple[JobState, str]], total: int, path: Path) -> SweepFailed:
    """Return an error with a table of all failures.

    Args:
        failed: the failed jobs, each with its label.
        total: the number of jobs.
        path: the sweep's directory.
    """
    lines = []
    for job, label in failed:
        lines += [f"  {job.name}  {label}", *(f"      {line}" for line in str(job.error).splitlines())]
        lines += [f"      log: {job.log}"] if job.log else []
    again = f"{write_override('sweep.dir', path)} with the same command tries them again"
    told = f"{len(failed)} of {total} runs of the sweep failed; {again}"
    return SweepFailed(told, lines)


class SweepScreen:
    """Prints one sweep.

    Args:
        total: the number of points; 0 while unknown.
        done: the number of points that are done already.
        workers: the number of jobs that run in parallel.
        console: the output; None for the terminal.
    """

    def __init__(self, total: int = 0, done: int = 0, workers: int = 1, console: Console | None = None) -> None:
        self.console = console or open_terminal(soft_wrap=True)
        self._total, self._ended, self._workers = total, done, workers
        self._started = time.monotonic()
        self._seconds: list[float] = []

    def say(self, text: str) -> None:
        self.console.print(escape(visible(mask_text(text))))

    def show_plan(self, path: Path, names: Sequence[str], points: Sequence[Point], merged: int) -> None:
        """Show each point with its steps and the state of its directory."""
        table = FoldingTable("job", "varies", "steps", "state")
        jobs = [read_job(path / name) for name in names]
        for job, point in zip(jobs, points, strict=True):
            state = job.state if (path / job.name).exists() else "new"
            if job.checkpoint is not None:
                state += f", continues at step {job.checkpoint}"
            table.add_row(job.name, escape(visible(mask_text(point.label))), point.steps, state)
        self.console.print(table)
        duplicates = f", {merged} duplicates merged" if merged else ""
        waiting = any(job.state not in DONE for job in jobs)
        later = "; the time is estimated once the first has finished" if waiting else ""
        self.say(f"{len(points)} points{duplicates}{later}")
        self.say(f"sweep directory  {path}")

    def show_start(self, job: Job) -> None:
        self.say(f"started  {job.path.name}  {job.label}")

    def show_end(self, outcome: Outcome, state: JobState) -> None:
        """Show how a job ended, its key metrics, and the estimated time left."""
        self._ended += 1
        left = self._total - self._ended
        told = show_metrics(state.metrics) if outcome.error is None else outcome.error.splitlines()[0]
        if outcome.state == "finished":
            self._seconds.append(outcome.seconds)
        rest = ""
        if left and self._seconds:
            mean = sum(self._seconds) / len(self._seconds)
            rest = f"  about {format_clock(mean * math.ceil(left / self._workers))} left"
        self.say(
            f"{outcome.state}  {outcome.job.path.name}  {outcome.job.label}  {told}  "
            f"[{self._ended}/{self._total}, {format_clock(outcome.seconds)}]{rest}"
        )

    def renew_page(self, path: Path) -> bool:
        """Rewrite compare.html of the whole sweep.

        Returns:
            Whether it was written; a failure is shown and does not affect any job.
        """
        from dpo_runner.compare.page import rebuild_page

        try:
            rebuild_page(path)
        except Exception as error:
            self.say(f"compare.html cannot be written; {describe_failure(error)}")
            return False
        return True

    def show_result(self, path: Path, jobs: Sequence[JobState], labels: Sequence[str], conf: RunFields) -> None:
        """Show every job with its state and key metrics, and where to find the comparison and the curves."""
        search, wandb = conf.sweep.search, conf.wandb
        table = FoldingTable("job", "varies", "state")
        metrics = dict.fromkeys(
            [*([search.objective] if search.sampler else []), *choose_shown(job.metrics or {} for job in jobs)]
        )
        for metric in metrics:
            table.add_column(column_of(metric), no_wrap=True)
        for job, label in zip(jobs, labels, strict=True):
            figures = [f"{job.metrics[key]:.3f}" if job.metrics and key in job.metrics else "" for key in metrics]
            losses = describe_losses(search.guards, job.metrics or {})
            state = f"{job.state}, cannot win: {losses}" if losses else job.state
            table.add_row(job.name, escape(visible(label)), escape(state), *figures)
        self.console.print(table)
        self.say(f"sweep directory  {path}")
        if self.renew_page(path):
            self.say(f"comparison       {path / 'compare.html'}")
        for use, command in list_commands(find_folder(wandb.dir, path)).items():
            self.say(f"{use:<17}{command}")

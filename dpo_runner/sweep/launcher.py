"""The Hydra launcher `workers`, the default for `-m`: runs jobs on a pool of worker processes."""

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from dpo_runner.config.overrides import write_override
from dpo_runner.config.sections.sweep import SweepConf
from dpo_runner.errors import RunError, RunInterrupted
from dpo_runner.sweep.directory import DONE, read_job
from dpo_runner.sweep.jobs import Job, Outcome, build_job, read_labels, read_place
from dpo_runner.sweep.screen import SweepScreen
from dpo_runner.sweep.workers import WorkerPool, group_gpus


class WorkersLauncher(Launcher):  # type: ignore[misc]
    """Runs jobs in reused worker processes; a job that dies does not take the sweep down.

    Attributes:
        inherited: file descriptors that workers keep open until they end.
        config_dir: the user's folder of config groups.
        follow: called after each job with its directory's name, and whether more jobs are started; returns further
            jobs as overrides.
        total: the expected number of jobs; None for the number launched.
    """

    def __init__(self) -> None:
        self.inherited: list[int] = []
        self.config_dir: str | None = None
        self.follow: Callable[[str, bool], Sequence[Sequence[str]]] | None = None
        self.total: int | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Read the sweep's settings. The task function is unused: workers call `run` themselves."""
        sweep = OmegaConf.to_object(config.sweep)
        assert isinstance(sweep, SweepConf)
        self._sweep = sweep

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run a batch of jobs.

        Args:
            job_overrides: for each job, its point's overrides with `hydra.sweep.dir` and `subdir`; at least one job.
            initial_job_idx: unused; the directories have names already.

        Raises:
            RunInterrupted: a signal has stopped the sweep.
            RunError: workers cannot start.
        """
        place = read_place(job_overrides[0])[0]
        jobs = self._build_jobs(job_overrides, place)
        gpus = group_gpus([job.conf for job in jobs])
        pool = WorkerPool(self._sweep.workers, self._sweep.threads_per_worker, place, self.inherited, gpus)
        screen = SweepScreen(self.total or len(jobs), 0, min(pool.count, len(jobs)))
        queue = deque(jobs)
        outcomes: dict[Path, Outcome] = {}

        def end(outcome: Outcome) -> None:
            outcomes[outcome.job.path] = outcome
            screen.show_end(outcome, read_job(outcome.job.path))
            screen.renew_page(place)
            enough = self._has_failed_enough(list(outcomes.values()))
            if self.follow is not None and pool.signal is None:
                more = self._build_jobs(self.follow(outcome.job.path.name, not enough), place)
                jobs.extend(more)
                queue.extend(more)
            if enough and queue and pool.signal is None:
                screen.say(f"no more jobs are started (sweep.on_error, sweep.max_failures); {len(queue)} are left")
                queue.clear()

        pool.run(queue, screen.show_start, end)
        if pool.signal is not None:
            raise RunInterrupted(
                f"interrupted; continue with the same command and {write_override('sweep.dir', place)}",
                signal_number=pool.signal,
            )
        return [_job_return(job, outcomes.get(job.path)) for job in jobs]

    def _build_jobs(self, job_overrides: Sequence[Sequence[str]], place: Path) -> list[Job]:
        labels = read_labels(place)
        return [build_job(overrides, self.config_dir, labels) for overrides in job_overrides]

    def _has_failed_enough(self, outcomes: Sequence[Outcome]) -> bool:
        failures = sum(outcome.state not in DONE for outcome in outcomes)
        allowed = 1 if self._sweep.on_error == "stop" else self._sweep.max_failures
        return allowed is not None and failures >= allowed


def _job_return(job: Job, outcome: Outcome | None) -> JobReturn:
    """Return a job's outcome for Hydra; reading `return_value` raises if the job failed."""
    done = outcome is not None and outcome.state in DONE
    result = JobReturn(overrides=list(job.overrides), status=JobStatus.COMPLETED if done else JobStatus.FAILED)
    if not done:
        result.return_value = RunError(f"{job.path.name}: {outcome.error if outcome else 'not started'}")
    return result

"""Search loop: the study suggests points, the points become jobs, and the jobs' results go back to the study."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from dpo_runner.config.compose import compose_point
from dpo_runner.config.keys import ignored_keys
from dpo_runner.config.metrics import measure_losses
from dpo_runner.config.rules.sweep import read_direction
from dpo_runner.config.sections.sweep import SweepConf
from dpo_runner.errors import ConfigError
from dpo_runner.sweep.directory import DONE, name_points, prepare, read_job
from dpo_runner.sweep.points import Point, digest_config
from dpo_runner.sweep.search.space import Space
from dpo_runner.sweep.search.study import CONFIGURATION, JOB, LOSSES, ask, build_sampler, heartbeat, id_of, open_study

EFFECT, RETRY_OF = "effect", "retry_of"
"""Further user attributes of a trial."""
_REFUSED = "refused"


class Search:
    """Takes points from a study and reports their results to it.

    Results are read from the jobs' directories, so nothing is lost if this process dies: a trial that was running
    continues with its parameters and from its checkpoint, and a failed one is tried again.

    Args:
        path: the sweep's directory, locked by this process.
        space: the search space.
        sweep: the sweep's settings.
        config_dir: the user's folder of config groups.

    Raises:
        ConfigError: the study in `path` belongs to another search.
    """

    def __init__(self, path: Path, space: Space, sweep: SweepConf, config_dir: str | None) -> None:
        self._path, self._space, self._sweep, self._config_dir = path, space, sweep, config_dir
        first = compose_point(space.corners()[0], config_dir)
        definition = {
            **space.describe(),
            "sweep.search.objective": sweep.search.objective,
            "sweep.search.direction": str(read_direction(sweep.search)),
            CONFIGURATION: digest_config(first),
            **({"sweep.search.guard": sweep.search.guards} if sweep.search.guard else {}),
        }
        prepare(path, [], [], sweep.threads_per_worker)  # before study.db: files without a sweep.json are rejected
        self.study = self._open_study(definition, first.run_name)
        self._waiting: dict[str, list[optuna.Trial]] = {}
        self._failed: set[str] = set()
        self._resumed: deque[optuna.Trial] = deque()
        self._names: dict[str, str] = {}
        self._recover()

    def _open_study(self, definition: dict[str, Any], run_name: str) -> optuna.Study:
        return open_study(self._path, self._sweep.search, definition)

    def _own(self, *states: TrialState) -> list[optuna.trial.FrozenTrial]:
        """Return the trials that this directory has jobs of, those of any state if none is named."""
        trials: list[optuna.trial.FrozenTrial] = self.study.get_trials(deepcopy=False, states=states or None)
        return trials

    def _recover(self) -> None:
        tried_again = {trial.user_attrs.get(RETRY_OF) for trial in self.study.get_trials(deepcopy=False)}
        for trial in self._own():
            if JOB in trial.user_attrs:
                self._names[trial.user_attrs[EFFECT]] = trial.user_attrs[JOB]
            if trial.state == TrialState.RUNNING:
                self._resumed.append(optuna.Trial(self.study, id_of(trial)))
            elif (
                trial.state == TrialState.FAIL and trial.number not in tried_again and _REFUSED not in trial.user_attrs
            ):
                self.study.enqueue_trial(trial.params, user_attrs={RETRY_OF: trial.number})

    def _count_new(self) -> int:
        """Return the number of trials still to ask for; retries do not count."""
        trials = self.study.get_trials(deepcopy=False)
        return self._sweep.search.trials - sum(RETRY_OF not in trial.user_attrs for trial in trials)

    def left(self) -> int:
        """Return the number of trials still to run, including running ones."""
        begun = [trial for trial in self.study.get_trials(deepcopy=False) if not trial.state.is_finished()]
        return max(self._count_new(), 0) + len(begun)

    def take(self, count: int) -> list[tuple[str, Point]]:
        """Return up to `count` jobs to run now; fewer if the study has no more trials.

        A point that is running already, or whose result is known, needs no job.
        """
        jobs: list[tuple[str, Point]] = []
        while len(jobs) < count and (trial := self._next_trial()) is not None:
            point = self._build_point(trial)
            if point is None:
                continue
            name = self._name(point, trial)
            waiting = self._waiting.setdefault(name, [])
            waiting.append(trial)
            if name in self._failed or read_job(self._path / name).state in DONE:
                self.settle(name)
            elif len(waiting) == 1:
                jobs.append((name, point))
        return jobs

    def settle(self, name: str) -> None:
        """Report a job's result to the study; the trial of an interrupted job stays running."""
        job = read_job(self._path / name)
        objective, guard = self._sweep.search.objective, self._sweep.search.guards
        if job.state not in (*DONE, "failed"):
            return
        for trial in self._pop_waiting(name):
            losses = measure_losses(guard, job.metrics or {})
            if job.state == "finished" and job.metrics and objective in job.metrics and None not in losses:
                if guard:
                    trial.set_user_attr(LOSSES, losses)
                self.study.tell(trial, float(job.metrics[objective]))
            elif job.state == "pruned":
                self.study.tell(trial, state=TrialState.PRUNED)
            elif job.state == "finished":
                missing = f"{objective}, or no difference to the reference for the guard" if guard else objective
                self._refuse(trial, f"{name}: its summary has no {missing}")
            else:
                self._failed.add(name)
                self.study.tell(trial, state=TrialState.FAIL)

    def _pop_waiting(self, name: str) -> list[optuna.Trial]:
        return self._waiting.pop(name)

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Send heartbeats of running trials to the study while the context is open."""
        with heartbeat(self.study, lambda: [id_of(trial) for group in [*self._waiting.values()] for trial in group]):
            yield

    def refused(self) -> list[str]:
        """Return why trials could not be run, one line each, in the order of the trials."""
        refused = [trial for trial in self._own() if _REFUSED in trial.user_attrs]
        return [f"trial {trial.number}: {trial.user_attrs[_REFUSED]}" for trial in refused]

    def list_jobs(self) -> list[str]:
        """Return the directory names of all jobs of the study that are here, sorted by index."""
        names = {trial.user_attrs[JOB] for trial in self._own() if JOB in trial.user_attrs}
        return sorted(names, key=lambda name: int(name.partition("-")[0]))

    def find_best(self) -> tuple[str, float] | None:
        """Return the job with the best value, and the value; None if no trial has finished within the guard."""
        best = self._find_winner()
        return None if best is None or best.value is None else (best.user_attrs[JOB], best.value)

    def _find_winner(self) -> optuna.trial.FrozenTrial | None:
        finished = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        allowed = [trial for trial in finished if max(trial.user_attrs.get(LOSSES, ()), default=0) <= 0]
        if not allowed:
            return None
        sign = 1 if self.study.direction == optuna.study.StudyDirection.MINIMIZE else -1
        return min(allowed, key=lambda trial: sign * trial.value)

    def summarize(self) -> list[str]:
        """Return lines about the study, beyond those about the jobs."""
        return []

    def _next_trial(self) -> optuna.Trial | None:
        if self._resumed:
            return self._resumed.popleft()
        enqueued = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        return ask(self.study) if enqueued or self._count_new() > 0 else None

    def _build_point(self, trial: optuna.Trial) -> Point | None:
        """Compose a trial's point; if it breaks a rule, mark the trial as failed, never to be retried."""
        self.study.sampler = build_sampler(self._sweep.search, trial.number)
        overrides, varied = self._space.suggest(trial)
        try:
            conf = compose_point(overrides, self._config_dir)
        except ConfigError as error:
            self._refuse(trial, f"{' '.join(varied)}: {error.mistakes[0]}")
            return None
        return Point(overrides, varied, conf, digest_config(conf))

    def _refuse(self, trial: optuna.Trial, reason: str) -> None:
        trial.set_user_attr(_REFUSED, reason)
        self.study.tell(trial, state=TrialState.FAIL)

    def _name(self, point: Point, trial: optuna.Trial) -> str:
        """Return the name of a point's directory; points that compute the same share one."""
        effect = digest_effect(point)
        name = self._names.get(effect)
        if name is None:
            name = self._names[effect] = name_points([point], self._path)[0]
            prepare(self._path, [name], [point], self._sweep.threads_per_worker)
        if JOB not in trial.user_attrs:
            trial.set_user_attr(EFFECT, effect)
            trial.set_user_attr(JOB, name)
        return name


def digest_effect(point: Point) -> str:
    """Return a digest that points that compute the same share."""
    return digest_config(point.conf, ignored_keys(point.conf))

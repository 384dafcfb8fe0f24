"""A search that takes trials from a study in a database, beside other commands with directories of their own."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from dpo_runner.config.sections.sweep import SweepConf
from dpo_runner.sweep.points import Point
from dpo_runner.sweep.search.database import describe_place, join, locking, reporting
from dpo_runner.sweep.search.space import Space
from dpo_runner.sweep.search.study import (
    JOB,
    LOSSES,
    MEMBER,
    find_stale,
    heartbeat,
    id_of,
    open_shared,
    open_study,
    storage_of,
)
from dpo_runner.sweep.search.trials import EFFECT, RETRY_OF, Search, digest_effect

_LOST = "lost"
"""User attribute of a trial that another command has taken over."""


@contextmanager
def open_search(path: Path, space: Space, sweep: SweepConf, config_dir: str | None) -> Iterator[Search]:
    """Open the search of a sweep's directory, with its study there or in the database of `sweep.search.storage`.

    Raises:
        ConfigError: the study belongs to another search.
        RunError: the database cannot be used, or no longer.
    """
    kind = Search if sweep.search.storage is None else SharedSearch
    with reporting(sweep.search.storage):
        yield kind(path, space, sweep, config_dir)


class SharedSearch(Search):
    """Takes trials from a study that other commands take trials from, too.

    A trial belongs to the command that asked for it, and its job is in that command's directory. Whatever reads the
    study to decide does so under a lock of the database. A trial of a command that is gone is tried again by another.
    """

    def _open_study(self, definition: dict[str, Any], run_name: str) -> optuna.Study:
        url = self._sweep.search.storage
        assert url is not None
        self._locked, self._storage = False, open_shared(url)
        membership = join(self._path, run_name)
        self._member, self._lock_name = membership.member, membership.study
        with self._lock():
            study = open_study(self._path, self._sweep.search, definition, self._storage)
            study.set_user_attr(self._member, describe_place(self._path))
        return study

    @contextmanager
    def _lock(self) -> Iterator[None]:
        if self._locked:
            yield
            return
        with locking(self._storage.engine, self._lock_name):
            self._locked = True
            try:
                yield
            finally:
                self._locked = False

    def _own(self, *states: TrialState) -> list[optuna.trial.FrozenTrial]:
        trials = super()._own(*states)
        return [t for t in trials if t.user_attrs.get(MEMBER) == self._member and _LOST not in t.user_attrs]

    def _recover(self) -> None:
        with self._lock():
            super()._recover()

    def take(self, count: int) -> list[tuple[str, Point]]:
        """As in `Search`; a point that another command runs, or has run, needs no job either."""
        with self._lock():
            return super().take(count)

    def settle(self, name: str) -> None:
        """As in `Search`."""
        with self._lock():
            super().settle(name)

    def _pop_waiting(self, name: str) -> list[optuna.Trial]:
        """Return the running trials that wait for a job, those that others have left to it included."""
        self._waiting.pop(name, None)
        waiting = [trial for trial in self._own(TrialState.RUNNING) if trial.user_attrs.get(JOB) == name]
        return [optuna.Trial(self.study, id_of(trial)) for trial in waiting]

    @contextmanager
    def alive(self) -> Iterator[None]:
        """As in `Search`."""
        with heartbeat(self.study, lambda: [id_of(trial) for trial in self._own(TrialState.RUNNING)]):
            yield

    def find_best(self) -> tuple[str, float] | None:
        """As in `Search`; the job of another command comes with its machine and directory."""
        found, winner = super().find_best(), self._find_winner()
        if found is None or winner is None or (member := winner.user_attrs[MEMBER]) == self._member:
            return found
        return f"{self.study.user_attrs[member]}/{found[0]}", found[1]

    def summarize(self) -> list[str]:
        """Return a line with the number of trials of all commands."""
        states = [trial.state for trial in self.study.get_trials(deepcopy=False)]
        counted = ", ".join(f"{states.count(state)} {state.name.lower()}" for state in TrialState if state in states)
        return [f"study {self.study.study_name}: {counted or 'no trials'}"]

    def _next_trial(self) -> optuna.Trial | None:
        trial = super()._next_trial()
        if trial is None and self._take_over():
            trial = super()._next_trial()
        if trial is not None:
            trial.set_user_attr(MEMBER, self._member)
            storage_of(self.study).record_heartbeat(id_of(trial))
        return trial

    def _take_over(self) -> bool:
        """Enqueue the trials of commands that are gone; return whether there are any."""
        stale = find_stale(self.study)
        lost = [
            trial
            for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            if trial.user_attrs.get(MEMBER) != self._member
            and (id_of(trial) in stale or MEMBER not in trial.user_attrs)  # it was killed while it held the lock
        ]
        for trial in lost:
            optuna.Trial(self.study, id_of(trial)).set_user_attr(_LOST, True)
            self.study.tell(trial.number, state=TrialState.FAIL)
            self.study.enqueue_trial(trial.params, user_attrs={RETRY_OF: trial.number})
        return bool(lost)

    def _build_point(self, trial: optuna.Trial) -> Point | None:
        point = super()._build_point(trial)
        return None if point is None or self._leave_to_others(point, trial) else point

    def _leave_to_others(self, point: Point, trial: optuna.Trial) -> bool:
        """Give a trial the result of another command's that computes the same; return whether there is one.

        If that one still runs, its command reports the result of both.
        """
        states, effect = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING), digest_effect(point)
        alike = [
            other
            for other in self.study.get_trials(deepcopy=False, states=states)
            if other.user_attrs.get(EFFECT) == effect and other.number != trial.number
        ]
        if not alike or any(other.user_attrs[MEMBER] == self._member for other in alike):
            return False
        other = min(alike, key=lambda each: states.index(each.state))
        for key in (EFFECT, JOB, MEMBER, *([LOSSES] if LOSSES in other.user_attrs else [])):
            trial.set_user_attr(key, other.user_attrs[key])
        if other.state != TrialState.RUNNING:
            self.study.tell(trial, other.value if other.state == TrialState.COMPLETE else None, other.state)
        return True

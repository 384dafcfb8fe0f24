"""The Optuna study of a search and its running jobs: an SQLite file in the sweep's directory, or in a database."""

import hashlib
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import optuna

from dpo_runner.config.rules.sweep import read_direction
from dpo_runner.config.sections.sweep import SearchConf
from dpo_runner.errors import ConfigError, RunError
from dpo_runner.io.upstream import find_private
from dpo_runner.sweep.search.database import check_place, find_membership, open_database, reporting

STUDY_FILE = "study.db"
CONFIGURATION = "configuration"
"""Key in a study's definition of the digest of what all points share."""
JOB, MEMBER, LOSSES = "job", "member", "losses"
"""User attributes of a trial: its job's directory; in a database also whose it is; with a guard by how much each of its
differences is below it, as Optuna's constraints: above 0 it is violated."""
_NAME = "dpo_runner"
_HEARTBEAT_SECONDS = 30
_GRACE_SECONDS = 180
_LOCK_SECONDS = 120  # the search and its jobs write to one file

optuna.logging.set_verbosity(optuna.logging.WARNING)


def open_study(
    sweep_dir: Path,
    search: SearchConf,
    definition: dict[str, Any],
    storage: optuna.storages.RDBStorage | None = None,
) -> optuna.Study:
    """Open a sweep's study, or create it.

    Args:
        sweep_dir: an existing folder.
        search: the search's settings.
        definition: what must stay the same when the search is continued.
        storage: the database that has the study, locked by this process; None for the file in `sweep_dir`.

    Raises:
        ConfigError: the study there belongs to another search, or the search in `sweep_dir` has another study.
    """
    check_place(sweep_dir, search.storage, STUDY_FILE)
    study = optuna.create_study(
        study_name=_name_study(sweep_dir),
        storage=storage or _open_storage(sweep_dir),
        direction=read_direction(search),
        pruner=_build_pruner(search),
        load_if_exists=True,
    )
    found = study.user_attrs.get("definition")
    if found is None:
        study.set_user_attr("definition", definition)
    elif found != definition:
        keys = sorted({**definition, **found}, key=CONFIGURATION.__eq__)  # the digest last: an axis is more informative
        differing = next(key for key in keys if found.get(key) != definition.get(key))
        if differing == CONFIGURATION:
            raise ConfigError(
                f"`sweep.dir={sweep_dir}`: the search there has other settings besides what is searched; use the same, "
                "or another sweep.dir"
            )
        raise ConfigError(
            f"`{differing}`: the search in {sweep_dir} has {found.get(differing, 'no such axis')} and this one "
            f"{definition.get(differing, 'no such axis')}; use the same, or another sweep.dir"
        )
    return study


def open_trial(sweep_dir: Path, search: SearchConf, job: str) -> optuna.Trial:
    """Return the running trial of a job, to report values to.

    Raises:
        RunError: no trial is running for the job, or the database cannot be used.
    """
    membership = find_membership(sweep_dir)
    member = membership.member if membership else None
    with reporting(search.storage):
        study = optuna.load_study(
            study_name=_name_study(sweep_dir),
            storage=open_shared(search.storage) if search.storage else _open_storage(sweep_dir),
            pruner=_build_pruner(search),
        )
        for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            if trial.user_attrs.get(JOB) == job and trial.user_attrs.get(MEMBER) == member:
                return optuna.Trial(study, id_of(trial))
    raise RunError(f"{membership.study if membership else sweep_dir / STUDY_FILE}: no trial is running for {job}")


def _name_study(sweep_dir: Path) -> str:
    membership = find_membership(sweep_dir)
    return membership.study if membership else _NAME


def ask(study: optuna.Study) -> optuna.Trial:
    """Return an enqueued trial, or else a new one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Heartbeat of storage")  # `heartbeat` below sends it
        return study.ask()


def build_sampler(search: SearchConf, number: int) -> optuna.samplers.BaseSampler:
    """Return the sampler for one trial, seeded by its number so that a continued search repeats no draws."""
    digest = hashlib.sha256(f"{search.seed}/{number}".encode()).digest()
    seed = int.from_bytes(digest[:4], "big")
    if search.sampler == "random":
        return optuna.samplers.RandomSampler(seed)
    constraints = {"constraints_func": lambda trial: trial.user_attrs.get(LOSSES, ())} if search.guards else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # constraints_func is experimental
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=search.startup_trials, **constraints)


def id_of(trial: optuna.Trial | optuna.trial.FrozenTrial) -> int:
    """Return the number of a trial in its storage, which is not its number in the study."""
    number: int = find_private("optuna", trial, "_trial_id")
    return number


def find_stale(study: optuna.Study) -> list[int]:
    """Return the ids of running trials that had a heartbeat once and no longer have."""
    storage, study_id = storage_of(study), find_private("optuna", study, "_study_id")
    found: list[int] = find_private("optuna", storage, "_get_stale_trial_ids")(study_id)
    return found


def storage_of(study: optuna.Study) -> Any:
    return find_private("optuna", study, "_storage")


@contextmanager
def heartbeat(study: optuna.Study, running: Callable[[], Sequence[int]]) -> Iterator[None]:
    """Record heartbeats of the trials whose ids `running` returns, while the context is open."""
    stopped, storage = threading.Event(), storage_of(study)

    def beat() -> None:
        while not stopped.is_set():
            with suppress(optuna.exceptions.StorageInternalError):  # a database may be away for a while
                for trial_id in running():
                    storage.record_heartbeat(trial_id)
            stopped.wait(_HEARTBEAT_SECONDS)

    thread = threading.Thread(target=beat, name="study-heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def _build_pruner(search: SearchConf) -> optuna.pruners.BasePruner:
    if search.pruner == "median":
        return optuna.pruners.MedianPruner(search.startup_trials, n_warmup_steps=search.warmup_steps)
    if search.pruner == "successive_halving":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=search.warmup_steps or "auto")
    return optuna.pruners.NopPruner()


def open_shared(url: str) -> optuna.storages.RDBStorage:
    """Open the database of `sweep.search.storage`.

    Raises:
        RunError: it cannot be used.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # heartbeat_interval is experimental
        return open_database(url, _HEARTBEAT_SECONDS, _GRACE_SECONDS)


def _open_storage(sweep_dir: Path) -> optuna.storages.RDBStorage:
    path = re.sub(r"[%?{}]", lambda match: quote(match[0]), str(sweep_dir.resolve() / STUDY_FILE))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # heartbeat_interval is experimental
        return optuna.storages.RDBStorage(
            f"sqlite:///{path}",
            engine_kwargs={"connect_args": {"timeout": _LOCK_SECONDS}},
            heartbeat_interval=_HEARTBEAT_SECONDS,
            grace_period=_GRACE_SECONDS,
        )

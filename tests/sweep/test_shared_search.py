"""Searches with a study in PostgreSQL: commands share its trials, repeat none, and take over what another left."""

import multiprocessing
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from dpo_runner.config.compose import compose_point, load_conf
from dpo_runner.config.sections.sweep import SearchConf, SweepConf
from dpo_runner.errors import ConfigError, RunError
from dpo_runner.io.files import write_json
from dpo_runner.records.directory import update_status
from dpo_runner.sweep.directory import read_jobs
from dpo_runner.sweep.search import study as studies
from dpo_runner.sweep.search.shared import open_search
from dpo_runner.sweep.search.study import ask, open_shared, open_trial
from dpo_runner.sweep.search.trials import Search
from tests.support.postgres import find_binaries, serve
from tests.support.spaces import space_of
from tests.support.sweeps import finish, furnish, start

MARGINS = "eval_rewards/margins"
BETA = ("training.beta=tag(log,interval(0.01,0.5))",)
CHOICES = ("training.beta=0.1,0.2",)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    if (binaries := find_binaries()) is None:
        pytest.skip("apt-get install postgresql")
    with serve(binaries) as url:
        yield url


def build_search(path: Path, url: str, *texts: str, trials: int = 5, **settings: Any) -> Search:
    path.mkdir(parents=True, exist_ok=True)
    conf = SearchConf(sampler="random", trials=trials, objective=MARGINS, storage=url, **settings)
    with open_search(path, space_of(*(texts or BETA)), SweepConf(search=conf), None) as search:
        return search


def end(search: Search, path: Path, name: str, margin: float | None = None, state: str = "finished") -> None:
    """Write the files of a job without running it."""
    if margin is not None:
        write_json(path / name / "summary.json", {"steps": 4, "after": {MARGINS: margin}})
    update_status(path / name, state=state)
    search.settle(name)


def run_out(path: Path, url: str, trials: int) -> None:
    search = build_search(path, url, trials=trials)
    while jobs := search.take(1):
        for name, point in jobs:
            end(search, path, name, point.conf.training.beta)


def states_of(search: Search) -> list[str]:
    return [trial.state.name for trial in search.study.trials]


def test_commands_that_run_at_once_share_the_trials_and_repeat_none(tmp_path: Path, url: str) -> None:
    compose_point(("training.beta=0.2",), None)  # once, before the forks
    fork = multiprocessing.get_context("fork")
    paths = [tmp_path / node / "at_once" for node in "ab"]
    nodes = [fork.Process(target=run_out, args=(path, url), kwargs={"trials": 6}) for path in paths]
    for node in nodes:
        node.start()
    for node in nodes:
        node.join(60)
    assert [node.exitcode for node in nodes] == [0, 0]
    search = build_search(paths[0], url, trials=6)
    assert states_of(search) == ["COMPLETE"] * 6 and search.take(1) == []
    done = [job for path in paths for job in read_jobs(path)]
    assert len(done) == 6 and len({trial.params["training.beta"] for trial in search.study.trials}) == 6
    assert {trial.user_attrs["member"] for trial in search.study.trials} <= set(search.study.user_attrs)
    name, value = search.find_best() or ("", 0)
    assert value == max(trial.value for trial in search.study.trials)
    assert (Path(name.partition(":")[2]) if ":" in name else paths[0] / name).is_dir()


def test_a_point_is_run_by_one_command_and_its_result_is_of_all(tmp_path: Path, url: str) -> None:
    one, two = tmp_path / "a" / "points", tmp_path / "b" / "points"
    first = build_search(one, url, *CHOICES, trials=4)
    jobs = first.take(9)
    second = build_search(two, url, *CHOICES, trials=6)
    assert len(jobs) == 2 and second.take(1) == []  # both points run already
    for margin, (name, _) in enumerate(jobs):
        end(first, one, name, margin)
    assert states_of(first) == ["COMPLETE"] * 6 and first.take(1) == second.take(1) == []
    assert build_search(two, url, *CHOICES, trials=7).take(1) == []  # known results
    told = {(trial.params["training.beta"], trial.value) for trial in second.study.trials}
    assert len(told) == 2 and second.list_jobs() == []
    assert second.find_best() == (f"{socket.gethostname()}:{one}/{jobs[1][0]}", 1)


def test_each_command_continues_its_own_trials_and_those_of_one_that_is_gone(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = tmp_path / "a" / "gone", tmp_path / "b" / "gone"
    first = build_search(one, url, trials=3)
    ((name, point),) = first.take(1)
    search = SearchConf(sampler="random", storage=url)
    assert open_trial(one, search, name).number == 0
    second = build_search(two, url, trials=3)
    ((other, other_point),) = second.take(1)
    with pytest.raises(RunError, match="no trial is running for"):
        open_trial(one, search, other)
    ((again, _),) = build_search(one, url, trials=3).take(1)  # it was killed
    assert again == name
    ask(first.study)  # killed before its parameters were chosen
    monkeypatch.setattr(studies, "_GRACE_SECONDS", 1)
    with psycopg.connect(url) as database:
        database.execute("update trial_heartbeats set heartbeat = heartbeat - interval '1 hour'")
    second = build_search(two, url, trials=3)
    taken = [second.take(1)[0] for _ in range(3)]
    assert taken[0][1].conf == other_point.conf and taken[1][1].conf == point.conf
    for job, _ in taken:
        end(second, two, job, 1.0)
    assert sorted(states_of(second)) == ["COMPLETE"] * 3 + ["FAIL"] * 2
    first = build_search(one, url, trials=3)  # it is back
    assert first.take(1) == [] and first.list_jobs() == []
    assert second.summarize() == ["study dpo/gone: 3 complete, 2 fail"]


def test_what_does_not_fit_is_refused(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a" / "refused"
    build_search(path, url)
    with pytest.raises(ConfigError, match=r"`training.beta`: the search in .* has 0.01 to 0.5 \(log\) and "):
        build_search(tmp_path / "b" / "refused", url, *CHOICES)
    with pytest.raises(ConfigError, match=r"has its study, .*/refused, in a database; name it"):
        open_search(path, space_of(*BETA), SweepConf(search=SearchConf(sampler="random")), None).__enter__()
    (tmp_path / "c" / "refused").mkdir(parents=True)
    (tmp_path / "c" / "refused" / "study.db").touch()
    with pytest.raises(ConfigError, match=r"has its study in study\.db there; leave it out"):
        build_search(tmp_path / "c" / "refused", url)
    for wrong, told in ((url.replace("hunter2", "other"), "password authentication failed"), (url + "/no", "No such")):
        with pytest.raises(RunError, match=rf"^`sweep.search.storage`: .*{told}.*; once that is mended") as caught:
            open_shared(wrong)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr("dpo_runner.config.rules.sweep.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs psycopg, which is not installed; pip install"):
        load_conf(["sweep.search.sampler=tpe", "sweep.dir=a", f'sweep.search.storage="{url}"'])


def test_no_file_or_line_of_a_command_has_the_password(tmp_path: Path, url: str, own_cache: None) -> None:
    furnish(tmp_path)
    arguments = (
        *("training.beta=0.1,0.4,0.7", "training.max_steps=1", "sweep.search.sampler=tpe", "sweep.search.trials=1"),
        *(f"sweep.search.objective={MARGINS}", "sweep.search.pruner=median", f'sweep.search.storage="{url}"'),
    )
    code, out, err = finish(start(tmp_path, *arguments, "sweep.dir=real"))
    assert code == 0 and "study dpo/real: 1 complete" in out, err
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not [text for text in (out.encode(), err.encode(), *files) if b"hunter2" in text]
    assert any(b"postgresql://***@/postgres" in text for text in files)

"""Searches: study and jobs stay consistent after any kill; a pruner does not change runs that it does not stop."""

import hashlib
import json
import pickle
import sqlite3
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from dpo_runner.config.compose import load_conf
from dpo_runner.config.rules.sweep import list_objectives
from dpo_runner.config.sections.sweep import SearchConf, SweepConf
from dpo_runner.errors import ConfigError, RunError, RunPruned
from dpo_runner.io.files import write_json
from dpo_runner.records.directory import update_status
from dpo_runner.records.reading import read_status
from dpo_runner.records.runs import read_runs
from dpo_runner.sweep.directory import read_job, read_jobs, resolve_sweep_dir
from dpo_runner.sweep.search.pruning import Pruning
from dpo_runner.sweep.search.study import ask, open_trial
from dpo_runner.sweep.search.trials import Search
from dpo_runner.sweep.sweeper import summarize
from tests.support.programs import run_python
from tests.support.spaces import space_of
from tests.support.sweeps import finish, furnish, kill_while_held, start, wait_until

MARGINS = "eval_rewards/margins"
AXES = ("training.beta=tag(log,interval(0.01,0.5))", "lora.r=choice(8,16)")


def build_search(path: Path, *texts: str, trials: int = 5, **settings: Any) -> Search:
    path.mkdir(exist_ok=True)
    search = SearchConf(**{"sampler": "random", "trials": trials, "objective": MARGINS, **settings})
    return Search(path, space_of(*(texts or AXES)), SweepConf(search=search), None)


def end(search: Search, path: Path, name: str, margin: float | None = None, state: str = "finished") -> None:
    """Write the files of a job without running it."""
    update_status(path / name, state=state)
    if margin is not None:
        write_json(path / name / "summary.json", {"steps": 4, "after": {MARGINS: margin}})
    search.settle(name)


def run_out(search: Search, path: Path) -> list[str]:
    """Finish every remaining job with its beta as its result; return the names."""
    names = []
    while jobs := search.take(2):
        for name, point in jobs:
            end(search, path, name, point.conf.training.beta)
            names.append(name)
    return names


def params_of(search: Search) -> list[dict[str, Any]]:
    return [trial.params for trial in search.study.get_trials()]


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_trials_that_were_running_go_on_with_their_parameters_and_none_is_lost_or_repeated(
    tmp_path: Path, sampler: str
) -> None:
    undisturbed = build_search(tmp_path / "u", sampler=sampler)
    assert len(run_out(undisturbed, tmp_path / "u")) == 5
    path = tmp_path / "k"
    build_search(path, sampler=sampler)  # killed before it had a job
    assert resolve_sweep_dir(SweepConf(dir=str(path)), "x") == path
    search = build_search(path, sampler=sampler)
    (first, point), (second, _) = search.take(2)
    end(search, path, first, point.conf.training.beta)
    params = search.study.trials[1].params
    ask(search.study)  # killed before its parameters were chosen

    search = build_search(path, sampler=sampler)
    assert search.left() == 4
    ((name, point),) = search.take(1)
    assert (name, search.study.trials[1].params) == (second, params)
    write_json(path / name / "summary.json", {"steps": 4, "after": {MARGINS: point.conf.training.beta}})
    update_status(path / name, state="finished")  # killed after the job, before its result was reported to the study

    search = build_search(path, sampler=sampler)
    names = run_out(search, path)
    assert len(names) == 3 and not {first, second} & set(names)
    trials = search.study.trials
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 5
    assert [trial.value for trial in trials] == [trial.params["training.beta"] for trial in trials]
    assert build_search(path, sampler=sampler).take(1) == []
    assert len({trial.params["training.beta"] for trial in trials}) == 5
    if sampler == "random":
        assert params_of(search) == params_of(undisturbed)
        assert params_of(search) != params_of(build_and_run(tmp_path / "s", seed=1))


def build_and_run(path: Path, **settings: Any) -> Search:
    search = build_search(path, **settings)
    run_out(search, path)
    return search


def test_a_point_that_is_suggested_again_is_not_run_again(tmp_path: Path) -> None:
    texts = ("training.beta=0.1,0.2", "training.loss_type=sft,sigmoid")  # sft does not read beta: three points
    search = build_search(tmp_path / "s", *texts, trials=12)
    jobs = search.take(9)
    assert len(jobs) == 3  # the others wait for these
    for margin, (name, _) in enumerate(jobs):
        end(search, tmp_path / "s", name, margin)
    assert search.take(1) == []
    trials = search.study.trials
    assert len(trials) == 12 and {trial.state for trial in trials} == {TrialState.COMPLETE}
    told: dict[str, set[float]] = {}
    for trial in trials:
        told.setdefault(trial.user_attrs["job"], set()).add(trial.value)
    assert told == {name: {margin} for margin, (name, _) in enumerate(jobs)}
    assert search.find_best() == (jobs[2][0], 2)


def test_failed_jobs_are_tried_again_when_the_search_goes_on_and_pruned_ones_are_not(tmp_path: Path) -> None:
    path = tmp_path / "s"
    search = build_search(path, trials=3)
    (bad, point), (given_up, _), _ = search.take(3)
    end(search, path, bad, state="failed")
    end(search, path, given_up, state="pruned")
    assert search.take(5) == []
    search = build_search(path, trials=3)
    names = run_out(search, path)
    assert len(names) == 2 and bad in names and given_up not in names
    states = [trial.state.name for trial in search.study.trials]
    assert states == ["FAIL", "PRUNED", "COMPLETE", "COMPLETE"]
    assert search.study.trials[3].params == search.study.trials[0].params
    assert search.study.trials[3].value == point.conf.training.beta
    assert build_search(path, trials=3).take(1) == []
    assert len(build_search(path, trials=4).take(5)) == 1  # more trials give more points


def test_a_point_that_breaks_a_rule_is_told_and_not_tried_again(tmp_path: Path) -> None:
    texts = ("training.loss_type=sigmoid,robust", "training.label_smoothing=0.0,0.2")
    search = build_search(tmp_path / "s", *texts, trials=20)
    assert all(
        "sigmoid" not in point.overrides[0] or point.conf.training.label_smoothing == 0 for _, point in search.take(9)
    )
    refused = search.refused()
    assert refused and "loss_type=sigmoid training.label_smoothing=0.2: " in refused[0]
    assert build_search(tmp_path / "s", *texts, trials=20).refused() == refused


@pytest.mark.parametrize(
    ("texts", "settings", "expected"),
    [
        ((AXES[0], "lora.r=choice(8,32)"), {}, "`lora.r`: the search in .* has 8, 16 and this one 8, 32"),
        (AXES[:1], {}, "`lora.r`: the search in .* has 8, 16 and this one no such axis"),
        (
            AXES,
            {"objective": "eval_loss"},
            "`sweep.search.objective`: .* has eval_rewards/margins and this one eval_loss",
        ),
        ((*AXES, "training.max_steps=9"), {}, "has other settings besides what is searched"),
    ],
)
def test_a_study_takes_no_results_of_another_search(
    tmp_path: Path, texts: tuple[str, ...], settings: dict[str, Any], expected: str
) -> None:
    build_search(tmp_path / "s")
    with pytest.raises(ConfigError, match=expected):
        build_search(tmp_path / "s", *texts, **settings)
    build_search(tmp_path / "s", *AXES, "wandb.notes=other", trials=9, sampler="tpe", seed=3, pruner="median")


def test_running_trials_have_a_heartbeat_and_odd_paths_hold_a_study(tmp_path: Path) -> None:
    path = tmp_path / "a {b} %20?#"
    search = build_search(path)
    search.take(1)
    with search.alive():
        wait_until(lambda: _count_heartbeats(path))
    assert [file.name for file in path.glob("*.db")] == ["study.db"]


def _count_heartbeats(path: Path) -> int:
    with sqlite3.connect(path / "study.db") as database:
        return database.execute("select count(*) from trial_heartbeats").fetchone()[0]


def test_steps_saved_are_counted(tmp_path: Path) -> None:
    search = build_search(tmp_path / "s")
    (first, _), (second, _), (third, _) = search.take(3)
    end(search, tmp_path / "s", first, 0.1)
    update_status(tmp_path / "s" / second, step=10, steps=35)
    end(search, tmp_path / "s", second, state="pruned")
    update_status(tmp_path / "s" / third, step=7)
    end(search, tmp_path / "s", third, state="failed")
    (tmp_path / "s" / third / "metrics.jsonl").write_text('{"step": 8, "loss": 0.5}\n{"step": 9, "lo')  # it was killed
    lines = summarize(read_jobs(tmp_path / "s"), tmp_path / "s", refused=2)
    assert lines[0] == "runs: 1 finished, 1 pruned, 3 failed"
    assert lines[1] == "optimizer steps: 22 executed, 25 saved"


@pytest.mark.parametrize("pruner", ["median", "successive_halving"])
def test_the_callback_asks_the_pruner_after_each_evaluation_of_the_training(tmp_path: Path, pruner: str) -> None:
    path = tmp_path / "s"
    settings = {"pruner": pruner, "startup_trials": 1, "warmup_steps": 2}
    search = build_search(path, trials=8, **settings)
    conf = SearchConf(sampler="random", objective=MARGINS, **settings)

    def log(callback: Pruning, step: int, margin: float) -> None:
        state = SimpleNamespace(global_step=step, max_steps=32, is_world_process_zero=True)
        callback.on_log(None, state, None, {MARGINS: margin})

    for margin in (3.0, 2.0, 4.0, 2.5):
        ((name, _),) = search.take(1)
        callback = pickle.loads(pickle.dumps(Pruning(path / name, conf)))  # as to the processes of a run
        log(callback, 0, -9.0)  # the untuned model
        callback.on_train_begin(None, None, None)
        try:
            for step in range(2, 34, 2):
                log(callback, step, margin)
        except RunPruned as error:
            assert error.step < error.steps == 32
            end(search, path, name, state="pruned")
        else:
            callback.on_train_end(None, None, None)
            log(callback, 32, -9.0)
            end(search, path, name, margin)
    trials = search.study.trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "PRUNED", "COMPLETE", "PRUNED"]
    assert min(trials[1].intermediate_values) == 2 and len(trials[0].intermediate_values) == 16
    ((name, _),) = search.take(1)
    again = Pruning(path / name, conf)
    again.on_train_begin(None, None, None)
    log(again, 2, 5.0)
    again = Pruning(path / name, conf)  # the job resumes from a checkpoint before that evaluation
    again.on_train_begin(None, None, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Optuna warns about a step that is reported twice
        log(again, 2, 5.0)


def test_a_grid_needs_no_optuna(tmp_path: Path) -> None:
    code = """
import sys
for name in [name for name in sys.modules if name.startswith(("optuna", "dpo_runner.sweep"))]:
    del sys.modules[name]  # the program has them from its start
sys.modules["optuna"] = None
from dpo_runner import load_conf
from dpo_runner.sweep.sweeper import register_plugins
from dpo_runner.sweep.executor import perform
register_plugins()
outcome = perform(load_conf(["data=local_file", "data.path=absent.jsonl", "model=tiny_random", "run_dir=r"]), [])
assert "no such file" in outcome["error"], outcome
"""
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


# Real runs from here on: five trials; the median pruner stops all but the first and the last.
SEARCH = (
    *("training.beta=0.1,0.4,0.7", "training.learning_rate=tag(log,interval(1e-5,1e-3))"),
    *("sweep.search.sampler=random", "sweep.search.seed=7", "sweep.search.trials=5"),
    f"sweep.search.objective={MARGINS}",
)


def read_results(sweep: Path) -> dict[str, tuple[str, str]]:
    """Return adapter digest and metrics of each finished job, by name."""
    return {
        job.name: (
            hashlib.sha256((sweep / job.name / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest(),
            json.dumps(job.metrics, sort_keys=True),
        )
        for job in read_jobs(sweep)
        if job.state == "finished"
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return furnish(tmp_path_factory.mktemp("searches"))


@pytest.fixture(scope="module")
def undisturbed(folder: Path, own_cache: None) -> dict[str, tuple[str, str]]:
    code, out, err = finish(start(folder, *SEARCH, "sweep.dir=undisturbed"))
    assert code == 0, err
    assert "runs: 5 finished, 0 pruned, 0 failed" in out and "20 executed, 0 saved" in out
    results = read_results(folder / "undisturbed")
    best = max(results, key=lambda name: json.loads(results[name][1])[MARGINS])
    assert f"best directory   undisturbed/{best}" in out
    metrics = json.loads(results[best][1])
    assert {name for name in metrics if name != "eval_num_tokens"} == set(list_objectives(load_conf()))
    return results


def test_a_search_that_is_killed_within_a_job_ends_as_if_undisturbed(
    folder: Path, undisturbed: dict[str, tuple[str, str]]
) -> None:
    sweep, held = folder / "killed", folder / "held"
    process = start(folder, *SEARCH, "sweep.dir=killed", HOLD="0.4")  # the third
    kill_while_held(process, sweep, held)
    before = read_results(sweep)
    assert len(before) == 2
    times = {name: (sweep / name / "summary.json").stat().st_mtime_ns for name in before}
    code, out, err = finish(start(folder, *SEARCH, "sweep.dir=killed"))
    assert code == 0, err
    assert out.count("started") == 3
    third = next(job.name for job in read_jobs(sweep) if job.name.startswith("2-"))
    assert "continuing from" in (sweep / third / "job.log").read_text()
    assert read_results(sweep) == undisturbed
    assert {name: (sweep / name / "summary.json").stat().st_mtime_ns for name in before} == times
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{sweep / 'study.db'}")
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 5
    code, out, _ = finish(start(folder, *SEARCH, "sweep.dir=killed"))
    assert code == 0 and "started" not in out and "runs: 5 finished" in out


def test_runs_that_the_pruner_leaves_alone_are_the_same_to_the_last_bit(
    folder: Path, undisturbed: dict[str, tuple[str, str]]
) -> None:
    pruner = ("sweep.search.pruner=median", "sweep.search.startup_trials=1", "sweep.dir=pruned")
    code, out, err = finish(start(folder, *SEARCH, *pruner))
    assert code == 0, err
    assert out.count("given up by the search at step 2 of 4") == 3
    assert "runs: 2 finished, 3 pruned, 0 failed" in out and "14 executed, 6 saved" in out
    sweep = folder / "pruned"
    results = read_results(sweep)
    assert len(results) == 2 and results == {name: undisturbed[name] for name in results}
    assert [job.state for job in read_jobs(sweep)] == ["finished", *["pruned"] * 3, "finished"]
    given_up = sweep / read_jobs(sweep)[1].name
    status = read_status(given_up)
    assert status is not None and (status["step"], status["steps"]) == (2, 4)
    events = [json.loads(line) for line in (given_up / "metrics.jsonl").read_text().splitlines()]
    assert any(MARGINS in event and event["step"] == 2 for event in events)
    left_out = ("summary.json", "samples.jsonl", "checkpoints")
    assert not any((given_up / name).exists() for name in left_out)
    compared, notes = read_runs([sweep])
    assert notes == [] and [run.state for run in compared] == [job.state for job in read_jobs(sweep)]
    assert all(MARGINS in run.metrics for run in compared)
    code, out, _ = finish(start(folder, *SEARCH, *pruner))
    assert code == 0 and "started" not in out and "2 finished, 3 pruned" in out


def test_hydras_own_launcher_runs_a_search_several_points_at_once(folder: Path, own_cache: None) -> None:
    own = (
        "hydra/launcher=basic",
        "sweep.dir=basic",
        "sweep.workers=2",
        "training.max_steps=1",
        "sweep.search.trials=3",
    )
    code, out, err = finish(start(folder, *SEARCH, *own))
    assert code == 0, err
    assert "runs: 3 finished" in out
    assert {read_job(path).state for path in (folder / "basic").glob("?-*")} == {"finished"}
    with pytest.raises(RunError, match="no trial is running for 0-00000000"):
        open_trial(folder / "basic", SearchConf(sampler="random"), "0-00000000")

"""A sweep in W&B: one folder, one command to upload it, names that show what differs, correct outcomes."""

import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo_runner.records.reading import read_status
from dpo_runner.sweep.directory import read_jobs
from tests.support.programs import run_python
from tests.support.sweeps import finish, furnish, start, wait_until
from tests.support.wandb_server import API_KEY, WandbServer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return furnish(tmp_path_factory.mktemp("tracked"))


@pytest.fixture
def server() -> Iterator[WandbServer]:
    server = WandbServer()
    yield server
    server.stop()


def run_printed(out: str, program: str, folder: Path, server: WandbServer) -> str:
    """Run the last command that the sweep printed for a W&B program, as the user would in that folder."""
    *_, line = (
        line for line in out.splitlines() if line.startswith(("curves ", "upload ")) and f"wandb {program} " in line
    )
    env = {**os.environ, "WANDB_BASE_URL": server.url, "WANDB_API_KEY": API_KEY}
    result = run_python("-m", "wandb", *shlex.split(line)[2:], cwd=folder, env=env)
    assert result.returncode == 0, result.stderr
    return str(result.stderr)


def list_parts(sweep: Path) -> dict[str, list[str]]:
    """Return the folders of W&B runs by run id."""
    parts: dict[str, list[str]] = {}
    for path in sorted(sweep.rglob("*.wandb")):
        assert path.parent.parent == sweep / "wandb"
        parts.setdefault(path.stem.removeprefix("run-"), []).append(path.parent.name)
    return parts


def release_recorded(folder: Path, sweep: Path) -> None:
    """Release a held job once W&B has written what was logged, which takes two seconds."""
    wait_until((folder / "held").exists)
    wait_until(lambda: all(b"train/loss" in path.read_bytes() for path in sweep.rglob("*.wandb")))
    (folder / "held").unlink()


def read_wandb_state(run_dir: Path) -> str:
    status = read_status(run_dir)
    assert status is not None
    return str(status["wandb"])


def test_a_sweep_is_in_one_folder_which_one_command_uploads(folder: Path, own_cache: None, server: WandbServer) -> None:
    points = ("training.beta=0.1,0.2,0.4", "sweep.dir=one", "wandb=offline")
    process = start(folder, *points, "wandb.tags=[mine]", "sweep.workers=2", FAULTS="1", HOLD="0.4")
    release_recorded(folder, folder / "one")
    code, out, _ = finish(process)
    assert code == 1 and out.count("wandb sync ") == 1
    jobs = read_jobs(folder / "one")
    assert [job.state for job in jobs] == ["finished", "failed", "failed"]
    ids = [(folder / "one" / job.name / "wandb" / "run_id.txt").read_text() for job in jobs]
    assert set(list_parts(folder / "one")) == set(ids) and len(set(ids)) == 3
    assert [read_wandb_state(folder / "one" / job.name) for job in jobs] == ["offline"] * 3

    run_printed(out, "sync", folder, server)
    assert set(server.runs) == set(ids)
    runs = [server.runs[run_id] for run_id in ids]
    assert [run.variables["displayName"] for run in runs] == ["beta=0.1", "beta=0.2", "beta=0.4"]
    assert {(run.variables["groupName"], run.variables["jobType"]) for run in runs} == {("one", "sweep")}
    assert {tuple(run.variables["tags"]) for run in runs} == {("mine",)}
    assert [run.config["training"]["beta"] for run in runs] == [0.1, 0.2, 0.4]
    places = {key: value for key, value in runs[0].config.items() if runs[2].config.get(key) != value}
    assert set(places) <= {"training", "data_report", "_wandb"}  # the last two belong to the run that was killed early
    assert not {"wandb", "sweep", "run_dir", "resume", "dry_run"} & set(runs[0].config)
    assert runs[0].summary["run_dir"] == f"one/{jobs[0].name}"
    # One finished, one raised, one was killed before it could record its end.
    assert [run.exit_code for run in runs] == [0, 1, 1]
    assert [run.summary.get("state") for run in runs] == ["finished", "failed", None]
    assert runs[0].history and runs[1].history
    metrics = jobs[0].metrics
    assert metrics is not None
    assert runs[0].summary["objective"] == metrics["eval_rewards/accuracies"]
    assert runs[0].summary["eval/rewards/accuracies"] == metrics["eval_rewards/accuracies"]
    assert runs[0].summary["after/eval_rewards/margins"] == metrics["eval_rewards/margins"]

    # Failed runs resume under their old ids, in further parts.
    code, out, err = finish(start(folder, *points, "wandb.tags=[mine]"))
    assert code == 0, err
    parts = list_parts(folder / "one")
    assert [len(parts[run_id]) for run_id in ids] == [1, 2, 2]
    run_printed(out, "sync", folder, server)
    assert set(server.runs) == set(ids)
    assert [run.exit_code for run in runs] == [0] * 3
    assert {run.summary["state"] for run in runs} == {"finished"}
    code, out, _ = finish(start(folder, *points, "wandb.tags=[mine]"))
    assert "wandb leet one/wandb" in out and "wandb sync" not in out  # nothing is left to upload


def test_of_an_online_sweep_the_server_lacks_what_was_killed_alone(
    folder: Path, own_cache: None, server: WandbServer
) -> None:
    points = ("training.beta=0.1,0.4", "sweep.dir=live", "wandb=online")
    environment = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": API_KEY}
    process = start(folder, *points, FAULTS="1", HOLD="0.4", **environment)
    release_recorded(folder, folder / "live")
    code, out, _ = finish(process)
    jobs = read_jobs(folder / "live")
    assert (code, [job.state for job in jobs]) == (1, ["finished", "failed"])
    ids = [(folder / "live" / job.name / "wandb" / "run_id.txt").read_text() for job in jobs]
    assert set(list_parts(folder / "live")) == set(server.runs) == set(ids)
    places = [f"online at {server.url}/me/dpo_runner/runs/{run_id}" for run_id in ids]
    assert [read_wandb_state(folder / "live" / job.name) for job in jobs] == places
    finished, killed = (server.runs[run_id] for run_id in ids)
    assert (finished.exit_code, killed.exit_code) == (0, None)
    rows = len(finished.history)

    assert "wandb sync --include-online live/wandb" in out
    run_printed(out, "sync", folder, server)
    assert (killed.exit_code, len(finished.history)) == (1, rows)
    code, out, err = finish(start(folder, *points, **environment))
    assert code == 0, err
    assert (killed.exit_code, killed.summary["state"]) == (0, "finished")
    assert len(list_parts(folder / "live")[ids[1]]) == 2
    assert "wandb leet live/wandb" in out and "wandb sync" not in out


def test_hydras_own_launcher_and_a_search_do_the_same(folder: Path, own_cache: None, server: WandbServer) -> None:
    search = (
        *("sweep.dir=found", "wandb=offline", "wandb.job_type=mine", "hydra/launcher=basic", "training.eval_steps=2"),
        *("training.beta=tag(log,interval(0.01,0.5))", "sweep.search.sampler=random", "sweep.search.trials=3"),
        *("sweep.search.objective=eval_rewards/margins", "sweep.search.pruner=median"),
        "sweep.search.startup_trials=1",
    )
    code, out, err = finish(start(folder, *search))
    assert code == 0, err
    jobs = read_jobs(folder / "found")
    assert {job.state for job in jobs} == {"finished", "pruned"}
    run_printed(out, "sync", folder, server)
    list_parts(folder / "found")
    for job in jobs:
        run = server.runs[(folder / "found" / job.name / "wandb" / "run_id.txt").read_text()]
        assert run.exit_code == 0 and run.summary["state"] == job.state
        assert run.variables["displayName"].startswith("beta=0.")
        assert (run.variables["jobType"], run.variables["groupName"]) == ("mine", "found")
        assert ("pruned" in run.variables.get("tags", [])) == (job.state == "pruned")
        assert ("objective" in run.summary) == (job.state == "finished")


def test_the_folder_can_be_elsewhere(folder: Path, own_cache: None, server: WandbServer) -> None:
    own = ("training.beta=0.1,0.7", "training.max_steps=1", "sweep.dir=shown", "wandb=offline", f"wandb.dir={folder}/w")
    code, out, err = finish(start(folder, *own))
    assert code == 0, err
    parts = [path.parent.name for path in (folder / "w" / "wandb").rglob("*.wandb")]
    assert len(parts) == 2 and not (folder / "shown" / "wandb").exists()
    assert f"wandb leet {folder}/w/wandb" in out
    for path in (folder / "w" / "wandb").rglob("*.wandb"):
        assert "train/loss" in run_python("-m", "wandb", "leet", "inspect", "--json", str(path)).stdout


def test_a_sweep_of_ours_is_none_of_their_agents_runs(folder: Path, own_cache: None) -> None:
    code, _, err = finish(start(folder, "training.beta=0.1,0.7", WANDB_SWEEP_ID="s", WANDB_RUN_ID="r"))
    assert code == 2 and err.startswith("error: -m: a sweep of W&B's own") and json.dumps(err).count("\\n") == 1

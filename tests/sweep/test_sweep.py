"""End-to-end sweeps: whatever fails or is killed, no result is lost, repeated or mixed up."""

import csv
import hashlib
import io
import json
import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest

from dpo_runner.records.reading import read_status
from dpo_runner.sweep.directory import read_jobs
from tests.support.browser_data import read_payload
from tests.support.programs import run_python
from tests.support.sweeps import finish, furnish, kill_while_held, release_stopped, start, wait_until


def has_states(sweep: Path, states: list[str]) -> bool:
    return [job.state for job in read_jobs(sweep)] == states


def read_results(sweep: Path) -> dict[float, tuple[str, str]]:
    """Return adapter digest and metrics of each finished job, by its beta."""
    results = {}
    for job in read_jobs(sweep):
        if job.state == "finished":
            beta = json.loads((sweep / job.name / "config.yaml").read_text().split("beta: ")[1].split("\n")[0])
            adapter = (sweep / job.name / "adapter" / "adapter_model.safetensors").read_bytes()
            results[beta] = hashlib.sha256(adapter).hexdigest(), json.dumps(job.metrics, sort_keys=True)
    return results


def read_times(sweep: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in sweep.glob("*/summary.json")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return furnish(tmp_path_factory.mktemp("sweeps"))


@pytest.fixture(scope="module")
def undisturbed(folder: Path, own_cache: None) -> Iterator[dict[float, tuple[str, str]]]:
    """Results of three points on one worker with fresh imports; other sweeps must match them bit for bit."""
    code, out, err = finish(start(folder, "training.beta=0.1,0.4,0.7", "sweep.dir=undisturbed", afresh=True))
    assert code == 0, err
    assert "about" in out and "left" in out and "accuracy" in out
    statuses = [read_status(folder / "undisturbed" / job.name) for job in read_jobs(folder / "undisturbed")]
    assert len({status["pid"] for status in statuses}) == 1, "a worker is kept from one job to the next"
    yield read_results(folder / "undisturbed")


def test_failing_jobs_cost_nobody_else_and_are_all_listed(
    folder: Path, undisturbed: dict[float, tuple[str, str]]
) -> None:
    betas = "training.beta=0.2,0.3,0.1,0.4,0.5,0.6,0.15"
    code, out, err = finish(start(folder, betas, "sweep.dir=faults", "sweep.workers=2", FAULTS="1"))
    assert code == 1, err
    jobs = read_jobs(folder / "faults")
    assert [job.state for job in jobs] == [*["failed"] * 2, "finished", *["failed"] * 3, "finished"]
    assert "error: 5 of 7 runs of the sweep failed" in err and "Traceback" not in err
    told = {
        0: "ValueError: this job raises",
        1: "the run called sys.exit(3)",
        3: "its process was killed by SIGKILL",
        4: "out of memory in training: 3.22 GB were asked for in one piece, with ",
        5: "its process ended with exit code 7",
    }
    for index, words in told.items():
        assert words in str(jobs[index].error) and words in err
        assert Path(folder, str(jobs[index].log)).is_file() and f"log: {jobs[index].log}" in err
    assert "try engine.max_tokens_per_micro_batch=" in err
    assert "sweep.workers=1" in err
    # Two workers, one started after another's job failed: bitwise the same as on one worker.
    assert read_results(folder / "faults")[0.1] == undisturbed[0.1]

    # The same directory with a changed grid: the failed job resumes from its checkpoint, nothing is stale.
    before = read_times(folder / "faults")
    code, out, err = finish(start(folder, "training.beta=0.4,0.1,0.7", "sweep.dir=faults"))
    assert code == 0, err
    assert "failed, continues at step 2" in out and out.count("started ") == 2
    results = read_results(folder / "faults")
    assert {beta: results[beta] for beta in undisturbed} == undisturbed
    after = read_times(folder / "faults")
    assert {name: after[name] for name in before} == before
    assert [job.name.partition("-")[0] for job in read_jobs(folder / "faults")] == list("01234567")


def test_a_sweep_that_is_stopped_and_killed_again_and_again_ends_as_if_undisturbed(
    folder: Path, undisturbed: dict[float, tuple[str, str]]
) -> None:
    sweep, held = folder / "stopped", folder / "held"
    arguments = ("training.beta=0.1,0.4,0.7", "sweep.dir=stopped")

    process = start(folder, *arguments, HOLD="0.1")
    wait_until(held.exists)
    os.killpg(process.pid, signal.SIGINT)  # Ctrl-C reaches the terminal's whole group, the workers only once
    release_stopped(sweep, held)
    code, out, err = finish(process)
    assert code == 130 and "interrupted" in err and "sweep.dir=stopped" in err and "stop after their step" in err
    assert read_jobs(sweep)[0].error == "SIGTERM"
    assert [job.state for job in read_jobs(sweep)] == ["interrupted", "pending", "pending"]
    assert read_jobs(sweep)[0].checkpoint == 3, "of the step in which it was stopped"

    process = start(folder, *arguments, HOLD="0.4")
    kill_while_held(process, sweep, held)
    before = read_times(sweep)
    assert len(before) == 1
    process = start(folder, *arguments)  # killed as soon as a job has ended
    wait_until(lambda: sum(job.state == "finished" for job in read_jobs(sweep)) == 2)
    process.kill()
    process.communicate()

    process = start(folder, *arguments, HOLD="0.7")
    wait_until(held.exists)
    workers = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None and workers[0].is_running()
    os.killpg(process.pid, signal.SIGINT)  # twice: stops at once
    began = time.monotonic()
    assert finish(process)[0] == 130 and time.monotonic() - began < 20
    assert not any(worker.is_running() for worker in workers)
    assert [job.state for job in read_jobs(sweep)] == ["finished", "finished", "interrupted"]
    held.unlink()

    code, out, err = finish(start(folder, *arguments, "sweep.workers=2"))
    assert code == 0, err
    assert out.count("started ") == 1 and "continues at step 2" in out
    assert read_results(sweep) == undisturbed
    assert {name: read_times(sweep)[name] for name in before} == before
    code, out, _ = finish(start(folder, *arguments))
    assert code == 0 and "started " not in out and out.count("finished") == 6  # in the plan and in the result


def read_table(sweep: Path) -> list[dict[str, str]]:
    """Return the rows of `compare --csv` for a sweep, without machine-dependent columns."""
    shown = run_python("-m", "dpo_runner.compare", ".", "--csv", "-", cwd=sweep)
    assert (shown.returncode, shown.stderr) == (0, "")
    timed = {"train_runtime", "pairs_per_second", "peak_memory_gb"}
    rows = list(csv.DictReader(io.StringIO(shown.stdout)))
    assert len(rows) == 3 and timed < rows[0].keys() and rows[0]["best"] == "1"
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


def test_a_sweep_killed_at_each_boundary_of_its_jobs_and_within_one_repeats_and_skips_none(
    folder: Path, undisturbed: dict[float, tuple[str, str]]
) -> None:
    arguments = ("training.beta=0.1,0.4,0.7", "run_name=boundaries")
    kills = (
        ({"HALT": "show_start:1"}, ["pending"] * 3),
        ({"HALT": "show_end:1"}, ["finished", "pending", "pending"]),
        ({"KILL": "0.4"}, ["finished", "died", "pending"]),
        ({"HALT": "show_start:2"}, ["finished", "finished", "pending"]),
        ({"HALT": "show_end:1"}, ["finished"] * 3),
        ({"HALT": "show_result:1"}, ["finished"] * 3),
    )
    for environment, states in kills:
        resume = ["sweep.resume=last"] if (folder / "outputs/sweeps/boundaries").exists() else []
        code, _, err = finish(start(folder, *arguments, *resume, **environment))
        assert (code, err) == (-signal.SIGKILL, "")
        (sweep,) = (folder / "outputs/sweeps/boundaries").iterdir()
        wait_until(partial(has_states, sweep, states))  # the worker may outlive the sweep briefly
        if environment.get("HALT") == "show_start:2":  # the page is written after each job
            shown = read_payload((sweep / "compare.html").read_text(encoding="utf-8"))["runs"]
            assert sorted(run["state"] for run in shown) == ["finished", "finished", "pending"]
    code, out, err = finish(start(folder, *arguments, "sweep.resume=last"))
    assert code == 0 and "started " not in out, err
    assert read_results(sweep) == undisturbed
    assert read_table(sweep) == read_table(folder / "undisturbed")
    logs = [(sweep / job.name / "job.log").read_text() for job in read_jobs(sweep)]
    assert [log.count("loading the model") for log in logs] == [1, 2, 1]
    assert "continuing from" in logs[1]


def test_no_value_leads_out_of_the_sweeps_directory(tmp_path: Path, own_cache: None) -> None:
    home = tmp_path / "one" / "two" / "three"
    home.mkdir(parents=True)
    furnish(home)
    (home / "pairs.jsonl").rename(home.parent / "pairs.jsonl")
    before = set(tmp_path.rglob("*"))
    long = "./" * 1500
    paths = f"data.path=../pairs.jsonl,{long}../pairs.jsonl,{home.parent}/pairs.jsonl"
    odd = ("wandb=offline", "wandb.name=../../x", "wandb.group=../../x", "wandb.tags=[../../x]", "wandb.notes=../../x")
    small = ("training.max_steps=1", "training.eval_strategy=no", "data.max_eval_samples=2", "samples.num_prompts=0")
    code, _, err = finish(start(home, paths, *odd, *small, "sweep.dir=s", "sweep.threads_per_worker=2"))
    assert code == 0, err
    assert [job.state for job in read_jobs(home / "s")] == ["finished"] * 3
    environment = json.loads(next((home / "s").glob("0-*/environment.json")).read_text())
    assert environment["hardware"]["torch_threads"] == 2
    written = {path for path in set(tmp_path.rglob("*")) - before if not path.is_relative_to(home / "s")}
    assert {path for path in written if "__pycache__" not in path.parts} == set()


def test_a_sweep_stops_at_the_first_failure_where_it_is_told_to(folder: Path, own_cache: None) -> None:
    code, out, err = finish(
        start(folder, "data.path=absent.jsonl,missing.jsonl,pairs.jsonl", "sweep.dir=one", "sweep.on_error=stop")
    )
    assert code == 1
    assert [job.state for job in read_jobs(folder / "one")] == ["failed", "pending", "pending"]
    assert "1 of 3 runs of the sweep failed" in err and "2 are left" in out


def test_a_launcher_of_others_has_its_files_in_the_sweeps_directory_and_its_dead_jobs_are_told(
    folder: Path, undisturbed: dict[float, tuple[str, str]]
) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="pip install hydra-submitit-launcher==1.2.0")
    arguments = ("training.beta=0.1,0.4", "hydra/launcher=submitit_local", "sweep.dir=submitted")
    code, _, err = finish(start(folder, *arguments, FAULTS="1"))
    sweep = folder / "submitted"
    assert code == 1 and "1 of 2 runs of the sweep failed" in err and "was killed" in err
    assert [job.state for job in read_jobs(sweep)] == ["finished", "died"]
    assert list((sweep / ".submitit").iterdir()) and not (folder / "multirun").exists()
    code, out, err = finish(start(folder, *arguments))
    assert code == 0 and "continues at step 2" in out, err
    assert read_results(sweep) == {beta: undisturbed[beta] for beta in (0.1, 0.4)}


def test_a_job_of_another_launcher_has_processes_of_its_own(
    folder: Path, undisturbed: dict[float, tuple[str, str]]
) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="pip install hydra-submitit-launcher==1.2.0")
    own = ("training.beta=0.1", "hydra/launcher=submitit_local", "sweep.dir=several", "launch.processes=2")
    code, _, err = finish(start(folder, *own))
    [job] = read_jobs(folder / "several")
    status = read_status(folder / "several" / job.name)
    assert (code, job.state) == (0, "finished") and status is not None and len(status["processes"]) == 2, err


def test_hydras_own_launcher_still_works(folder: Path, own_cache: None) -> None:
    code, _, err = finish(
        start(
            folder, "seed=1,2", "training.beta=0.2", "hydra/launcher=basic", "sweep.dir='a dir'", "training.max_steps=1"
        )
    )
    assert code == 0, err
    jobs = read_jobs(folder / "a dir")
    assert [job.state for job in jobs] == ["finished", "finished"]
    assert not (folder / "multirun").exists()

"""A sweep's directory: its choice, lock, records and job states, and the report of failures."""

import io
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from dpo_runner.config.compose import load_conf
from dpo_runner.config.schema import ONLY_POINT
from dpo_runner.config.sections.sweep import SweepConf
from dpo_runner.errors import ConfigError
from dpo_runner.records.directory import update_status
from dpo_runner.sweep.axes import Axis
from dpo_runner.sweep.directory import JobState, lock_sweep, name_points, prepare, read_jobs, resolve_sweep_dir
from dpo_runner.sweep.jobs import build_job, place_conf, read_place, write_place
from dpo_runner.sweep.points import build_points
from dpo_runner.sweep.screen import list_failures
from dpo_runner.sweep.workers import advise_on_memory, describe_death


def make_sweep(path: Path) -> list[str]:
    points, _ = build_points([Axis("seed", ("seed=1", "seed=2", "seed=3"))], None)
    path.mkdir(parents=True)
    names = name_points(points, path)
    prepare(path, names, points, threads=1)
    return names


def test_a_new_sweep_is_pending_and_its_record_holds_no_secret(tmp_path: Path) -> None:
    token = "hf_" + "a1B2" * 8
    points, _ = build_points([Axis("wandb.notes", (f"wandb.notes={token}",)), Axis("seed", ("seed=1", "seed=2"))], None)
    prepare(tmp_path, name_points(points, tmp_path), points, threads=1)
    assert [job.state for job in read_jobs(tmp_path)] == ["pending", "pending"]
    text = (tmp_path / "sweep.json").read_text()
    assert token not in text and json.loads(text)["jobs"]


def test_states_are_read_as_they_are_and_a_dead_process_has_died(tmp_path: Path) -> None:
    names = make_sweep(tmp_path / "s")
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie, as if PID 1 of a container reaps none
    now = datetime.now(UTC).isoformat(timespec="seconds")
    update_status(tmp_path / "s" / names[0], state="running", pid=child.pid, heartbeat=now)
    update_status(tmp_path / "s" / names[1], state="running", pid=os.getpid(), heartbeat=now)
    update_status(tmp_path / "s" / names[2], state="failed", error="ValueError: no", log="somewhere")
    (tmp_path / "s" / "10-0123abcd").mkdir()
    (tmp_path / "s" / "notes").mkdir()
    jobs = read_jobs(tmp_path / "s")
    assert [job.state for job in jobs] == ["died", "running", "failed", "pending"]
    child.wait()
    assert read_jobs(tmp_path / "s")[0].state == "died"
    assert f"its process, {child.pid}, was killed" in str(jobs[0].error)
    assert (jobs[2].error, jobs[2].log, jobs[3].name) == ("ValueError: no", "somewhere", "10-0123abcd")


def test_which_directory_a_sweep_goes_into(tmp_path: Path) -> None:
    parent = Path("outputs/sweeps/mine")
    fresh = resolve_sweep_dir(SweepConf(), "mine")
    assert fresh.parent == parent and not fresh.exists()
    with pytest.raises(ConfigError, match="no sweep is in outputs/sweeps/mine"):
        resolve_sweep_dir(SweepConf(resume="last"), "mine")
    for name in ("2026-01-02_00-00-00", "2026-01-03_00-00-00", "2026-01-01_00-00-00"):
        make_sweep(parent / name)
    (parent / "2027-01-01_00-00-00").mkdir()  # not a sweep
    assert resolve_sweep_dir(SweepConf(resume="last"), "mine") == parent / "2026-01-03_00-00-00"
    assert resolve_sweep_dir(SweepConf(dir=str(tmp_path / "new")), "mine") == tmp_path / "new"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="holds something other than a sweep"):
        resolve_sweep_dir(SweepConf(dir=str(tmp_path / "full")), "mine")
    with pytest.raises(ConfigError, match="runs with 1, on which results depend"):
        resolve_sweep_dir(SweepConf(resume="last", threads_per_worker=2), "mine")


def test_two_sweeps_cannot_work_in_one_directory(tmp_path: Path) -> None:
    handle = lock_sweep(tmp_path / "s", print)
    with pytest.raises(ConfigError, match=f"process {os.getpid()} is running this sweep"):
        lock_sweep(tmp_path / "s", print)
    os.close(handle)
    os.close(lock_sweep(tmp_path / "s", print))


def test_workers_of_a_killed_sweep_are_waited_for(tmp_path: Path) -> None:
    handle = lock_sweep(tmp_path / "s", print)
    orphan = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(2)"], pass_fds=[handle])
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / "s" / "sweep.lock").write_text(str(gone.pid))
    os.close(handle)
    said: list[str] = []
    os.close(lock_sweep(tmp_path / "s", said.append))
    assert orphan.wait() == 0 and "waiting for the last workers" in said[0]


@pytest.mark.parametrize("path", ["plain", "with space", 'it\'s, "odd"=x', "back\\slash\\", 'a\\"b', "[x]{y}"])
def test_any_directory_reaches_hydra_and_comes_back(path: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    texts = write_place(Path(path), "0-01234567")
    assert read_place(texts) == (Path(path), "0-01234567")
    parsed = OverridesParser.create().parse_override(texts[0]).value()
    assert parsed == path


def test_a_job_has_its_place_also_in_w_and_b() -> None:
    job = build_job(["seed=5", *write_place(Path("sweeps/s1"), "3-01234567")], None, {"3-01234567": "seed=5"})
    assert (job.conf.run_dir, job.conf.seed) == ("sweeps/s1/3-01234567", 5)
    wandb = job.conf.wandb
    assert (wandb.group, wandb.name, wandb.job_type, wandb.dir) == ("s1", "seed=5", "sweep", "sweeps/s1")
    given = ["wandb.group=mine", "wandb.name=one", "wandb.job_type=kind", "wandb.dir=w"]
    placed = place_conf(load_conf(given), Path("a/b"), "seed=5")
    assert placed.wandb == load_conf(given).wandb
    assert place_conf(load_conf(["sweep=optuna_random"]), Path("a/b"), "").wandb.job_type == "search"
    assert place_conf(load_conf(), Path("a/b"), ONLY_POINT).wandb.name is None  # the run's own name is more informative


def test_how_a_worker_died_is_told() -> None:
    assert describe_death(-9, oom_kills=1) == ("its process was killed by SIGKILL: the machine was out of memory", True)
    assert describe_death(-9, oom_kills=0)[1] is False
    assert describe_death(7, oom_kills=1) == ("its process ended with exit code 7", False)


def test_the_advice_names_keys_and_values_that_compose() -> None:
    conf = load_conf(["training.per_device_train_batch_size=6", "training.gradient_accumulation_steps=2"])
    advice = advise_on_memory(conf, workers=2, has_advice=False)
    ways = advice.removeprefix("try ").split(", or ")
    assert ways[:2] == [
        "sweep.workers=1",
        "training.per_device_train_batch_size=3 training.gradient_accumulation_steps=4",
    ]
    for way in ways[1:]:
        smaller = load_conf(way.partition(" (")[0].split())
        assert smaller != conf
    assert "quant=nf4" in advice and "training.max_length=512" in advice
    small = load_conf(["training.per_device_train_batch_size=1", "training.gradient_checkpointing=true", "quant=nf4"])
    advice = advise_on_memory(small, workers=1, has_advice=False)
    assert advice.startswith("try training.per_device_eval_batch_size=2, or ")
    assert advise_on_memory(small, workers=3, has_advice=True) == "try sweep.workers=2"
    assert advise_on_memory(small, workers=1, has_advice=True) == ""


def test_the_table_of_failures_names_all_with_their_logs() -> None:
    jobs = [JobState(f"{n}-01234567", "failed", error=f"error {n}\nadvice", log=f"log {n}") for n in range(3)]
    text = str(list_failures([(job, f"beta=0.{n}") for n, job in enumerate(jobs)], 5, Path("s")))
    assert text.startswith("3 of 5 runs of the sweep failed; sweep.dir=s")
    for n in range(3):
        assert f"{n}-01234567  beta=0.{n}\n      error {n}\n      advice\n      log: log {n}" in text


def test_a_comparison_that_cannot_be_written_costs_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from dpo_runner.compare import page as compare_page
    from dpo_runner.sweep.screen import SweepScreen

    def fail(path: Path) -> None:
        raise KeyError("broken")

    monkeypatch.setattr(compare_page, "rebuild_page", fail)
    output = io.StringIO()
    assert not SweepScreen(console=Console(file=output, width=200)).renew_page(tmp_path)
    assert output.getvalue() == "compare.html cannot be written; KeyError: 'broken'\n"

"""The pool of workers: placement, signals, and failures."""

import fcntl
import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
from omegaconf import OmegaConf

from dpo_runner.config.compose import load_conf
from dpo_runner.config.sections.sweep import SweepConf
from dpo_runner.errors import RunError
from dpo_runner.io.processes import list_gpus
from dpo_runner.records.directory import update_status
from dpo_runner.records.reading import read_status
from dpo_runner.sweep.directory import lock_sweep, read_job
from dpo_runner.sweep.executor import perform
from dpo_runner.sweep.jobs import Job, Outcome, place_conf, write_place
from dpo_runner.sweep.launcher import WorkersLauncher
from dpo_runner.sweep.workers import Worker, WorkerPool, group_gpus
from tests.support.gpus import LISTING, put_program
from tests.support.programs import run_python


def test_there_is_a_worker_for_each_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    put_program(tmp_path, "nvidia-smi", LISTING, monkeypatch)
    assert list_gpus() == ["GPU-aaaa-1", "GPU-bbbb-2"]
    conf = load_conf(["model=tiny_random"])
    assert WorkerPool(None, 1, tmp_path, gpus=group_gpus([conf])).count == 2
    assert WorkerPool(5, 1, tmp_path, gpus=group_gpus([conf])).count == 5
    put_program(tmp_path, "nvidia-smi", LISTING + "  MIG 1g.10gb Device 0: (UUID: MIG-cccc-3)\n", monkeypatch)
    assert list_gpus() == ["MIG-cccc-3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert list_gpus() == ["3", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
    several = {number: load_conf(["model=tiny_random", f"launch.processes={number}"]) for number in (2, 9, "auto")}
    assert group_gpus([conf, several[2]]) == ["0,1", "2,3"] and len(group_gpus([conf])) == 5
    assert group_gpus([several[9]]) == group_gpus([several["auto"]]) == ["0,1,2,3,4"]
    assert group_gpus([load_conf(["training.use_cpu=true"])]) == []
    for nothing in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", nothing)
        assert list_gpus() == group_gpus([conf]) == [] and WorkerPool(None, 1, tmp_path).count == 1


def test_where_no_worker_can_start_the_sweep_says_why_and_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "torch.py").write_text("raise ImportError('libtorch.so is not there')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"), prepend=":")
    job = Job(place_conf(load_conf(["model=tiny_random"]), tmp_path / "0-01234567", "seed=1"), [], "seed=1")
    started: list[Job] = []
    with pytest.raises(RunError, match=r"a worker could not start .*worker-0\.log"):
        WorkerPool(2, 1, tmp_path).run(deque([job]), started.append, lambda outcome: None)
    assert "libtorch.so is not there" in (tmp_path / "worker-0.log").read_text()
    assert started == [] and read_job(job.path).state == "pending"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_asks_running_jobs_to_stop_and_a_second_ctrl_c_kills(tmp_path: Path, number: signal.Signals) -> None:
    pool = WorkerPool(2, 1, tmp_path)
    busy, idle = Mock(), Mock(job=None)
    pool._workers = {0: busy, 1: idle}
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pool._handle_signals():
        os.kill(os.getpid(), number)
        assert pool.signal == number and busy.process.terminate.called
        assert not idle.process.terminate.called and not busy.kill.called
        os.kill(os.getpid(), signal.SIGTERM)
        assert not busy.kill.called  # schedulers repeat SIGTERM
        os.kill(os.getpid(), signal.SIGINT)
        assert busy.kill.called and idle.kill.called and pool.signal == number
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.parametrize(
    ("settings", "started"), [({"on_error": "stop"}, 1), ({"max_failures": 2}, 2), ({"max_failures": 9}, 4), ({}, 4)]
)
def test_no_more_jobs_are_started_after_so_many_failures(
    settings: dict, started: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FailingPool:
        count, signal = 1, None

        def __init__(self, *args: object) -> None:
            self.started = 0

        def run(self, jobs: deque[Job], on_start: Callable[[Job], None], on_end: Callable[[Outcome], None]) -> None:
            while jobs:
                on_start(jobs[0])
                update_status(jobs[0].path, state="failed", error="no")
                on_end(Outcome(jobs.popleft(), "failed", 1.0, "no"))

    monkeypatch.setattr("dpo_runner.sweep.launcher.WorkerPool", FailingPool)
    launcher = WorkersLauncher()
    launcher.setup(hydra_context=None, task_function=None, config=OmegaConf.create({"sweep": SweepConf(**settings)}))
    launcher.launch([[f"seed={n}", *write_place(tmp_path, f"{n}-01234567")] for n in range(4)], 0)
    assert len(list(tmp_path.glob("*/status.json"))) == started


def test_a_job_that_fails_again_is_told_by_its_new_error(tmp_path: Path) -> None:
    update_status(tmp_path / "r", state="failed", error="the old one")
    outcome = perform(load_conf(["model=tiny_random", "data=local_file", "data.path=absent.jsonl", "run_dir=r"]), [])
    assert "no such file" in outcome["error"]
    status = read_status(tmp_path / "r")
    assert status is not None and "no such file" in status["error"]


def test_other_launchers_can_send_our_classes_to_their_processes() -> None:
    from hydra.core.plugins import Plugins

    from dpo_runner.sweep.sweeper import GridSweeper, register_plugins

    register_plugins()
    assert Plugins.instance().class_name_to_class["hydra_plugins.dpo_runner.GridSweeper"] is GridSweeper
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer).__name__)"
    sent = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(GridSweeper), capture_output=True, check=True
    )
    assert sent.stdout == b"GridSweeper\n"


def test_settings_that_another_launcher_would_ignore_are_refused(tmp_path: Path) -> None:
    command = ["-m", "seed=1,2", "hydra/launcher=basic", "sweep.workers=2", "sweep.on_error=stop"]
    result = run_python("-m", "dpo_runner", *command)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "error: `sweep.workers=2`: is of hydra/launcher=workers; leave one of them out",
        "error: `sweep.on_error=stop`: is of hydra/launcher=workers; leave one of them out",
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_field_of_a_section_that_an_axis_brings_reaches_every_point(tmp_path: Path) -> None:
    command = ["-m", "quant=nf4,fp4", "quant.bnb_4bit_use_double_quant=false", "dry_run=true"]
    result = run_python("-m", "dpo_runner", *command)
    assert result.returncode == 0, result.stderr
    assert "2 points" in result.stdout and "double_quant" not in result.stdout
    assert "estimated once the first has finished" in result.stdout and "1 epoch" in result.stdout
    assert "sweep directory  outputs/sweeps/dpo/" in result.stdout and list(tmp_path.iterdir()) == []


def test_a_directory_stays_locked_until_the_last_worker_has_ended(tmp_path: Path) -> None:
    handle = lock_sweep(tmp_path / "s", print)
    worker = Worker({"OMP_NUM_THREADS": "1"}, tmp_path / "worker.log", [handle])
    os.close(handle)
    again = os.open(tmp_path / "s" / "sweep.lock", os.O_RDWR)
    with pytest.raises(BlockingIOError):
        fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
    worker.kill()
    worker.process.wait()
    fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(again)

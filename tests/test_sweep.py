"""Sweeps from end to end: whatever happens to jobs, workers or the sweep, no result is lost, repeated or another's."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROWS

from dpo_runner.sweep.states import read_jobs

# Found by Python before anything else where it is on PYTHONPATH. In the last of four steps, jobs come to grief by
# their beta, and the one of HOLD waits for a file.
FAULTS = """
import importlib.machinery, os, signal, sys, time

def fault(beta):
    if beta == 0.2:
        raise ValueError("this job raises")
    if beta == 0.3:
        sys.exit(3)
    if beta == 0.4:
        os.kill(os.getpid(), signal.SIGKILL)
    if beta == 0.5:
        import torch
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")
    if beta == 0.6:
        os._exit(7)

def hold(beta):
    if os.environ.get("HOLD") == str(beta):
        open("held", "w").close()
        try:
            time.sleep(300)
        except KeyboardInterrupt:
            if "DEAF" not in os.environ:
                raise
            time.sleep(300)

class Patch:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "dpo_runner.trainer":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module
        def exec_module(module):
            load(module)
            plain = module.RunTrainer.training_step
            def training_step(trainer, *args, **kwargs):
                if trainer.state.global_step == 3:
                    hold(trainer.args.beta)
                    if "FAULTS" in os.environ:
                        fault(trainer.args.beta)
                return plain(trainer, *args, **kwargs)
            module.RunTrainer.training_step = training_step
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Patch)
"""


def furnish(folder: Path) -> Path:
    """Put pairs to train on into a folder, and what makes jobs fail where they are told to."""
    (folder / "sitecustomize.py").write_text(FAULTS)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def start(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [
        *(sys.executable, "-m", "dpo_runner", "-m", "model=tiny_random", "training=smoke", "data=local_file"),
        *("data.path=pairs.jsonl", "samples.num_prompts=2", "samples.max_new_tokens=4", "wandb=disabled"),
    ]
    return subprocess.Popen(
        [*command, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a group of its own, as a terminal gives it
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=400)
    return process.returncode, out, err


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def read_results(sweep: Path) -> dict[float, tuple[str, str]]:
    """Return the adapter's digest and the metrics of each finished job, by its beta."""
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
    """Three points on one worker."""
    code, out, err = finish(start(folder, "training.beta=0.1,0.4,0.7", "sweep.dir=undisturbed"))
    assert code == 0, err
    assert "about" in out and "left" in out and "accuracy" in out
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
        1: "the job called sys.exit(3)",
        3: "its process was killed by SIGKILL",
        4: "OutOfMemoryError: CUDA out of memory",
        5: "its process ended with exit code 7",
    }
    for index, words in told.items():
        assert words in str(jobs[index].error) and words in err
        assert Path(folder, str(jobs[index].log)).is_file() and f"log: {jobs[index].log}" in err
    assert "training.per_device_train_batch_size=1 training.gradient_accumulation_steps=2" in err
    assert "sweep.workers=1" in err
    # Two workers, one after a failure of another's job: the same to the last bit as on one worker.
    assert read_results(folder / "faults")[0.1] == undisturbed[0.1]

    # The same directory with a changed grid: the failed one goes on from its checkpoint, nothing is stale.
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
    os.killpg(process.pid, signal.SIGINT)  # Ctrl-C reaches all of the terminal's group, but its workers only once
    code, out, err = finish(process)
    assert code == 130 and "interrupted" in err and "sweep.dir=stopped" in err
    assert read_jobs(sweep)[0].error == "SIGTERM"
    assert [job.state for job in read_jobs(sweep)] == ["interrupted", "pending", "pending"]
    held.unlink()

    process = start(folder, *arguments, HOLD="0.1")  # killed within a job, which its worker notices
    wait_until(held.exists)
    process.kill()
    process.communicate()
    held.unlink()
    process = start(folder, *arguments)  # killed as soon as a job has ended
    wait_until(lambda: any(job.state == "finished" for job in read_jobs(sweep)))
    process.kill()
    process.communicate()
    before = read_times(sweep)
    assert len(before) == 1

    process = start(folder, *arguments, HOLD="0.7", DEAF="1")
    wait_until(held.exists)
    process.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)  # twice: now
    assert finish(process)[0] == 143
    assert [job.state for job in read_jobs(sweep)] == ["finished", "finished", "interrupted"]

    code, out, err = finish(start(folder, *arguments, "sweep.workers=2"))
    assert code == 0, err
    assert out.count("started ") == 1 and "continues at step 2" in out
    assert read_results(sweep) == undisturbed
    assert {name: read_times(sweep)[name] for name in before} == before
    code, out, _ = finish(start(folder, *arguments))
    assert code == 0 and "started " not in out and out.count("finished") == 6  # plan and result


def test_a_sweep_stops_at_the_first_failure_where_it_is_told_to(folder: Path, own_cache: None) -> None:
    code, out, err = finish(
        start(folder, "data.path=absent.jsonl,missing.jsonl,pairs.jsonl", "sweep.dir=one", "sweep.on_error=stop")
    )
    assert code == 1
    assert [job.state for job in read_jobs(folder / "one")] == ["failed", "pending", "pending"]
    assert "1 of 3 runs of the sweep failed" in err and "2 are left" in out


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

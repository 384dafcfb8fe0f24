"""Helpers for sweep tests: sweeps as processes whose jobs fail, wait or are killed on demand."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo_runner.sweep.directory import read_jobs
from tests.support.common import ROWS
from tests.support.programs import start_python

# A sitecustomize.py, which Python imports at startup if it is on PYTHONPATH. In the last of four steps, a job fails in
# a way that depends on its beta, and the job with beta KILL kills the sweep and itself; in the third step, the job with
# beta HOLD waits while the file `held` exists. HALT=show_end:2 kills the sweep and its workers just before it shows the
# second end of a job.
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
        while os.path.exists("held"):
            time.sleep(0.02)

def kill(beta):
    if os.environ.get("KILL") == str(beta):
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

def change_trainer(module):
    plain = module.RunTrainer.training_step
    def training_step(trainer, *args, **kwargs):
        if trainer.state.global_step == 2:
            hold(trainer.args.beta)
        if trainer.state.global_step == 3:
            kill(trainer.args.beta)
            if "FAULTS" in os.environ:
                fault(trainer.args.beta)
        return plain(trainer, *args, **kwargs)
    module.RunTrainer.training_step = training_step

def change_screen(module):
    if "HALT" not in os.environ:
        return
    method, _, left = os.environ["HALT"].partition(":")
    plain, calls = getattr(module.SweepScreen, method), list(range(int(left)))
    def halting(*args, **kwargs):
        calls.pop()
        if not calls:
            import psutil
            for worker in psutil.Process().children(recursive=True):
                worker.kill()
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*args, **kwargs)
    setattr(module.SweepScreen, method, halting)

CHANGES = {"dpo_runner.training.trainer": change_trainer, "dpo_runner.sweep.screen": change_screen}
for name in CHANGES.keys() & sys.modules.keys():
    CHANGES[name](sys.modules[name])

class Patch:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name not in CHANGES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module
        def exec_module(module):
            load(module)
            CHANGES[name](module)
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Patch)
"""


def furnish(folder: Path) -> Path:
    """Write training pairs and the sitecustomize.py with faults into a folder."""
    (folder / "sitecustomize.py").write_text(FAULTS)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def start(folder: Path, *arguments: str, afresh: bool = False, **environment: str) -> "subprocess.Popen[str]":
    """Start a sweep of small runs in a folder prepared by `furnish`.

    Args:
        folder: the working directory.
        arguments: further arguments of the command.
        afresh: whether the sweep and its workers import everything themselves.
        environment: variables added to this process's own.
    """
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [
        *("-m", "dpo_runner", "-m", "model=tiny_random", "training=smoke", "data=local_file"),
        *("data.path=pairs.jsonl", "samples.num_prompts=2", "samples.max_new_tokens=4", "wandb=disabled", *arguments),
    ]
    settings: dict[str, Any] = {
        "cwd": folder,
        "env": {**os.environ, "PYTHONPATH": path, **environment},
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "start_new_session": True,  # a separate group, as in a terminal
    }
    if afresh:
        return subprocess.Popen([sys.executable, *command], text=True, **settings)
    return start_python(*command, **settings)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=400)
    return process.returncode, out, err


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def release_stopped(sweep: Path, held: Path) -> None:
    """Release a held job once it has received the request to stop."""
    wait_until(lambda: any("stopping after this step" in log.read_text() for log in sweep.glob("*/job.log")))
    held.unlink()
    wait_until(lambda: any(job.state == "interrupted" for job in read_jobs(sweep)))


def kill_while_held(process: "subprocess.Popen[str]", sweep: Path, held: Path) -> None:
    """Kill a sweep during a held job; the worker notices and interrupts the job."""
    wait_until(held.exists)
    process.kill()
    process.communicate()
    release_stopped(sweep, held)

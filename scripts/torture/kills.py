"""Kill and signal runs at random times, resume them, and compare them with undisturbed runs.

    python -m scripts.torture.kills --kills 90 --real-kills 10 --signals 20

Each trial is a separate process with its own run directory. It is killed (or sent a signal) at a time drawn uniformly
from the duration of an undisturbed run. The same command is repeated until it exits with 0. Adapter, metrics, results
and answers must then equal those of the undisturbed run bit for bit. Failed trials are printed with their seed, and the
exit code is 1.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from dpo_runner.io.interrupts import SIGNALS
from dpo_runner.records.reading import read_metrics, read_status, read_summary

TINY = [
    "model=tiny_random",
    "training=smoke",
    "training.max_steps=24",
    "training.save_steps=2",
    "training.eval_steps=8",
    "training.logging_steps=3",
    "samples.num_prompts=2",
    "samples.max_new_tokens=4",
    "wandb=disabled",
]
REAL = [
    "data.max_train_samples=8",
    "data.max_eval_samples=4",
    "training.max_steps=6",
    "training.per_device_train_batch_size=1",
    "training.gradient_accumulation_steps=1",
    "training.save_steps=1",
    "training.eval_steps=3",
    "samples.num_prompts=1",
    "samples.max_new_tokens=8",
    "wandb=disabled",
]
ROUNDS = [
    *TINY,
    *("rounds=3", "data=reviews", "data.max_train_samples=12", "reward=length", "samples.reward=2"),
    *("training.max_steps=8", "generate.max_new_tokens=8", "generate.batch_size=8", "generate.max_bad_fraction=0.5"),
]
TWO = [*TINY, "launch.processes=2"]
_OF_THE_MACHINE = re.compile(r"^time$|(runtime|per_second|preparation_time)$")
_ATTEMPTS = 5

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(
    ["dpo_runner.generate.rounds", "dpo_runner.training.memory.estimate"]
)  # importing them takes longer than a tiny run


@dataclass
class Outcome:
    """Results of a series of trials.

    Attributes:
        name: name of the series.
        trials: number of trials.
        failures: one line per failed trial.
        states: number of disturbed trials by phase of the run.
        slowest: longest time from the disturbance to the end of the process, in seconds.
    """

    name: str
    trials: int = 0
    failures: list[str] = field(default_factory=list)
    states: dict[str, int] = field(default_factory=dict)
    slowest: float = 0.0

    def __str__(self) -> str:
        whole = self.trials - len(self.failures)
        states = ", ".join(f"{self.states[state]} in {state}" for state in sorted(self.states))
        return f"{self.name}: {whole} of {self.trials} ({states}); ended within {self.slowest:.1f} s"


def train(overrides: list[str], log: str) -> None:
    """Run dpo_runner as the main program of this process, with its output in `log`."""
    from dpo_runner.__main__ import main

    with Path(log).open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["dpo_runner", *overrides]
    main()


def start(overrides: list[str], run_dir: Path) -> Any:
    process = _processes.Process(target=train, args=([*overrides, f"run_dir={run_dir}"], f"{run_dir}.log"))
    process.start()
    return process


def read_result(run_dir: Path) -> dict[str, Any]:
    """Return the results of a finished run that do not depend on machine or clock."""
    summary = read_summary(run_dir)
    events = [
        {key: value for key, value in event.items() if not _OF_THE_MACHINE.search(key)}
        for event in read_metrics(run_dir)
    ]
    return {
        "weights": (run_dir / "adapter" / "adapter_model.safetensors").read_bytes(),
        "answers": (run_dir / "samples.jsonl").read_text(encoding="utf-8"),
        "metrics": json.dumps(events, sort_keys=True),
        "results": json.dumps([summary["before"], summary["after"], summary["steps"]], sort_keys=True),
    }


def torture(
    name: str, overrides: list[str], trials: int, disturb: Callable[[Any, int], int], seed: int, folder: Path
) -> Outcome:
    """Disturb `trials` runs one after the other; a run that ends before its time does not count.

    Args:
        name: name of the series.
        overrides: overrides of the run.
        trials: number of trials.
        disturb: takes the process and the trial's number, disturbs the process, and returns the expected exit code.
        seed: seed of the times.
        folder: parent of the run directories; those of passed trials are removed.
    """
    outcome, draw = Outcome(name), random.Random(seed)
    for undisturbed in ("first", "undisturbed"):  # only the first one waits for imports
        begin = time.monotonic()
        (process := start(overrides, folder / undisturbed)).join()
        duration = time.monotonic() - begin
    expected, steps = read_result(folder / "undisturbed"), read_summary(folder / "undisturbed")["steps"]
    number = 0
    while outcome.trials < trials:
        run_dir, instant = folder / f"trial-{number}", draw.uniform(0, duration)
        number += 1
        begin = time.monotonic()
        process = start(overrides, run_dir)
        process.join(instant)
        if not process.is_alive():
            duration = time.monotonic() - begin  # the machine has become faster
            _remove(run_dir)
            continue
        phase = _describe_phase(run_dir, steps)
        outcome.states[phase] = outcome.states.get(phase, 0) + 1
        begin = time.monotonic()
        code = disturb(process, outcome.trials)
        process.join()
        outcome.trials += 1
        outcome.slowest = max(outcome.slowest, time.monotonic() - begin)
        told = f"{run_dir}, seed {seed}, after {instant:.2f} s, {phase}"
        if (ended := _as_shell(process.exitcode)) not in (code, 0):  # 0: the run finished first
            outcome.failures.append(f"{told}: exit code {ended}, not {code}")
            continue
        for _ in range(_ATTEMPTS):
            (process := start(overrides, run_dir)).join()
            if process.exitcode == 0:
                break
        wrong = (
            [key for key, value in read_result(run_dir).items() if value != expected[key]]
            if (run_dir / "summary.json").exists()
            else ["no result"]
        )
        if process.exitcode or wrong:
            outcome.failures.append(f"{told}: exit code {process.exitcode}; differs in {', '.join(wrong) or 'nothing'}")
        else:
            _remove(run_dir)
    return outcome


def _remove(run_dir: Path) -> None:
    shutil.rmtree(run_dir)
    Path(f"{run_dir}.log").unlink()


def _describe_phase(run_dir: Path, steps: int) -> str:
    """Return the phase of a run, judged by its directory."""
    if read_status(run_dir) is None:
        return "start-up"
    if any((run_dir / "checkpoints").glob(".saving-*")):
        return "saving"
    events = [event["step"] for event in read_metrics(run_dir)]
    if not events:
        return "loading"
    return "training" if events[-1] < steps else "results"


def _as_shell(code: int) -> int:
    """Return an exit code as in shells: 128 + N if signal N killed a process that did not catch it yet."""
    return code if code >= 0 else 128 - code


def kill(process: Any, number: int) -> int:
    process.kill()
    return 128 + signal.SIGKILL


def kill_one(process: Any, number: int) -> int:
    """Kill a run's launcher, or in turn one of its processes, if they have started."""
    children = psutil.Process(process.pid).children()
    targets = [process, *(each for each in children if "dpo_runner.training.ranks.child" in each.cmdline())]
    targets[number % len(targets)].kill()
    return 128 + signal.SIGKILL


def send_in_turn(process: Any, number: int) -> int:
    chosen = SIGNALS[number % len(SIGNALS)]
    with contextlib.suppress(ProcessLookupError):  # the process has just ended
        os.kill(process.pid, chosen)
    return 128 + chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=90, help="kill -9 on the tiny model")
    parser.add_argument("--real-kills", type=int, default=10, help="kill -9 on the default model")
    parser.add_argument("--signals", type=int, default=20, help=f"instants for each of {len(SIGNALS)} signals")
    parser.add_argument("--process-kills", type=int, default=30, help="kill -9 on two processes and their launcher")
    parser.add_argument("--round-kills", type=int, default=20, help="kill -9 on rounds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where runs go; a temporary folder unless told otherwise")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="torture-"))
    rows = [
        ("kill -9, tiny model", TINY, args.kills, kill),
        ("SIGINT, SIGTERM, SIGUSR1 and SIGHUP, tiny model", TINY, len(SIGNALS) * args.signals, send_in_turn),
        ("kill -9 of a launcher or a process, tiny model", TWO, args.process_kills, kill_one),
        ("the same with divided weights", [*TWO, "distributed=fsdp2"], args.process_kills // 2, kill_one),
        ("kill -9 of three rounds, tiny model", ROUNDS, args.round_kills, kill),
        ("kill -9, default model", REAL, args.real_kills, kill),
    ]
    failed = False
    for place, (name, overrides, trials, disturb) in enumerate(rows):
        if trials:
            (folder / str(place)).mkdir(parents=True, exist_ok=True)
            outcome = torture(name, overrides, trials, disturb, args.seed, folder / str(place))
            print(outcome, *outcome.failures, sep="\n  ", flush=True)
            failed |= bool(outcome.failures)
    if args.folder is None and not failed:
        shutil.rmtree(folder)
    sys.exit(failed)


if __name__ == "__main__":
    main()

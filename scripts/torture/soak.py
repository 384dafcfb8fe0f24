"""Make many tiny runs in one process and check that memory, open files and threads do not grow.

    python -m scripts.torture.soak --runs 200

The runs cycle through LoRA, nf4, full fine-tuning and a run that fails during training; each logs to W&B offline.
Samples are taken after each cycle. The exit code is 1 if memory grows by more than `--slope` MB per run after the
warm-up, or if open files, threads or child processes have increased since then.
"""

import argparse
import ctypes
import gc
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import linear_regression
from typing import Any

import psutil
from transformers import TrainerCallback

from dpo_runner import run
from dpo_runner.config.compose import load_conf
from dpo_runner.errors import RunError
from dpo_runner.records.find import RUN_FILES

TINY = [
    "model=tiny_random",
    "training=smoke",
    "data.max_train_samples=8",
    "data.max_eval_samples=4",
    "training.max_steps=2",
    "training.eval_steps=2",
    "training.save_steps=1",
    "samples.num_prompts=1",
    "samples.max_new_tokens=2",
    "wandb=offline",
]
TURN: tuple[list[str], ...] = ([], ["quant=nf4"], ["lora=none", "training.learning_rate=1e-4"], ["run_name=fails"])
WARM_UP = 20
"""Runs after which nothing is allocated for the first time."""
SLOPE = 0.15
"""MB per run: a third of the tiny model's size, the smallest leak that matters."""


@dataclass
class Sample:
    """Resources of the process after a number of runs.

    Attributes:
        runs: number of runs.
        megabytes: anonymous memory.
        files: open file descriptors.
        threads: threads known to the system.
        children: child processes not waited for.
    """

    runs: int
    megabytes: float
    files: int
    threads: int
    children: int


@dataclass
class Soak:
    """The samples of a soak, oldest first."""

    samples: list[Sample]

    def warm(self, warm_up: int) -> list[Sample]:
        return [sample for sample in self.samples if sample.runs >= warm_up]

    def slope(self, warm_up: int = WARM_UP) -> float:
        """Return the memory growth in MB per run after the warm-up, as the least-squares slope."""
        warm = self.warm(warm_up)
        fit = linear_regression([sample.runs for sample in warm], [sample.megabytes for sample in warm])
        return fit.slope

    def find_growth(self, slope: float = SLOPE, warm_up: int = WARM_UP) -> list[str]:
        """Return a line for each resource that grows."""
        warm = self.warm(warm_up)
        grown = [
            f"{name}: {getattr(warm[0], name)} after {warm[0].runs} runs, {getattr(warm[-1], name)} in the end"
            for name in ("files", "threads", "children")
            if getattr(warm[-1], name) > getattr(warm[0], name)
        ]
        if (measured := self.slope(warm_up)) > slope:
            grown.append(f"memory: grows by {measured:.2f} MB a run, more than {slope:g}")
        return grown

    def describe(self, warm_up: int = WARM_UP) -> str:
        first, last = (self.warm(warm_up)[place] for place in (0, -1))
        return (
            f"{last.runs} runs in one process; from run {first.runs} on: {first.megabytes:.0f} → {last.megabytes:.0f} "
            f"MB ({self.slope(warm_up):+.3f} MB a run), open files {first.files} → {last.files}, threads "
            f"{first.threads} → {last.threads}, child processes {first.children} → {last.children}"
        )


class Failure(TrainerCallback):  # type: ignore[misc]
    """Callback that fails the run named `fails`."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.run_name == "fails":
            raise RuntimeError("as it has to")


def measure(runs: int) -> Sample:
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # memory that malloc keeps varies by tens of MB from run to run
    process = psutil.Process()
    memory = process.memory_info()
    anonymous = memory.rss - getattr(memory, "shared", 0)  # the kernel maps and drops file pages at will
    return Sample(runs, anonymous / 1e6, process.num_fds(), process.num_threads(), len(process.children()))


def soak(runs: int, folder: Path, overrides: list[str] = TINY, progress: bool = False) -> Soak:
    """Make `runs` runs, each in its own directory, which is removed afterwards."""
    samples = []
    with Path(os.devnull).open("w") as nowhere:
        terminal, sys.stdout = sys.stdout, nowhere
        try:
            for number in range(1, runs + 1):
                turn = TURN[(number - 1) % len(TURN)]
                run_dir = folder / str(number)
                try:
                    run(load_conf([*overrides, *turn, f"run_dir={run_dir}"]), callbacks=[Failure()])
                    assert "run_name=fails" not in turn
                except RunError as error:
                    if "as it has to" not in str(error):
                        raise
                assert all((run_dir / name).exists() for name in RUN_FILES[: 1 + ("run_name=fails" not in turn)])
                shutil.rmtree(run_dir)
                if number % len(TURN) == 0:
                    samples.append(measure(number))
                    if progress:
                        print(samples[-1], file=terminal, flush=True)
        finally:
            sys.stdout = terminal
    return Soak(samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200, help=f"a multiple of {len(TURN)}, more than {WARM_UP}")
    parser.add_argument("--slope", type=float, default=SLOPE, help="MB a run by which memory may grow")
    parser.add_argument("--progress", action="store_true", help="print each sample")
    args = parser.parse_args()
    if args.runs % len(TURN) or args.runs < WARM_UP + 2 * len(TURN):
        parser.error(f"--runs {args.runs}: must be a multiple of {len(TURN)}, at least {WARM_UP + 2 * len(TURN)}")
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        soaked = soak(args.runs, Path(folder), progress=args.progress)
    grown = soaked.find_growth(args.slope)
    print(soaked.describe(), *grown, sep="\n")
    sys.exit(int(bool(grown)))


if __name__ == "__main__":
    main()

"""Measure training on a GPU next to `trl dpo`, and check that both compute the same results.

    python -m scripts.bench.gpu --device cpu --sizes tiny --pairs 8

Needs nothing from the hub: random weights in the shapes of known models, the default model's tokenizer from its
package, rows with the lengths of Anthropic HH. `scripts/bench/gpu.sh` checks for a GPU and runs this script. The report
is rewritten after every result, so no measurement is lost. If a side fails, the report says so and the next side runs.
After `--minutes`, the running command is killed and the report lists what is missing.
"""

import argparse
import os
import shutil
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from dpo_runner.errors import DpoRunnerError
from dpo_runner.io.files import write_text
from scripts import ROOT
from scripts.bench.inputs.random_models import SIZES, write_random_model
from scripts.bench.inputs.shapes import Rows, write_rows
from scripts.bench.measuring.card import CardMemory, read_card
from scripts.bench.measuring.flops import mean_flops, measure_peak
from scripts.bench.measuring.machine import describe_machine
from scripts.bench.measuring.process import CommandFailed, aside_within, build_environment, run
from scripts.bench.peers.exactness import PAIRS, read_results
from scripts.bench.peers.same_job import DifferentJobs, check_same_job
from scripts.bench.peers.sides import TRL_VARIANTS, Job, Measured, measure_ours, measure_trl, write_trl_dataset

SIDES = ("trl", "dpo_runner, cold store", "dpo_runner, warm store", "trl precompute")
_LARGEST_GB = 16  # disk space of the largest model
_LEAST_SECONDS = 5
"""Start nothing if less time than this is left."""


class Deadline:
    """The end of the time limit."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Return the remaining seconds.

        Raises:
            CommandFailed: too little time is left to start anything.
        """
        if (left := self._end - time.monotonic()) < _LEAST_SECONDS:
            raise CommandFailed("no time was left")
        return left


class Report:
    """The report so far, in a file that is rewritten with each new line."""

    def __init__(self, out: Path, card: str | None) -> None:
        self._out, self._card = out, card
        self._lines: list[str] = []
        self._rows: list[str] = []

    def tell(self, line: str) -> None:
        self._lines.append(f"- {line}")
        self._write(line)

    def add_row(self, size: str, side: str, *cells: str) -> None:
        self._rows.append(f"| {' | '.join([size, side, *cells, *[''] * (5 - len(cells))])} |")
        self._write(self._rows[-1])

    def _write(self, news: str) -> None:
        print(news, flush=True)
        write_text(self._out, build_report(self._card, self._lines, self._rows))


def main() -> None:
    args = parse_arguments()
    card = read_card() if args.device == "cuda" else None
    if args.device == "cuda" and card is None:
        print("error: no GPU: nvidia-smi does not answer", file=sys.stderr)
        sys.exit(2)
    deadline = Deadline(60 * args.minutes)
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    report = Report(args.out, card)
    check_exactness(args, report, deadline)
    for size in args.sizes:
        measure_size(args, report, size, deadline)
    print(args.out)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--sizes", type=read_sizes, default=[size for size in SIZES if not size.startswith("tiny")])
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "bench_gpu")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "gpu.md")
    args = parser.parse_args()
    args.work = args.work.resolve()
    return args


def read_sizes(text: str) -> list[str]:
    """Return the names in `text`, separated by semicolons because the names contain commas."""
    sizes = [name.strip() for name in text.split(";")]
    if unknown := [name for name in sizes if name not in SIZES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {'; '.join(SIZES)}")
    return sizes


def check_exactness(args: argparse.Namespace, report: Report, deadline: Deadline) -> None:
    """Compare attention and a tiny model's training on both sides; see `bench/peers/exactness.py`."""
    folder = args.work / "exactness"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    out = folder / "results.jsonl"
    failed = None
    try:
        model = aside_within(deadline.left(), write_random_model, "tiny", args.work / "models", args.device, "bfloat16")
        rows = make_rows(args, model, PAIRS, "exactness", deadline)
        write_trl_dataset(rows.path)
        environment = {**build_environment(os.cpu_count() or 1, args.work, ROOT), "DPO_RUNNER_CACHE": str(folder)}
        command = [sys.executable, "-m", "scripts.bench.peers.exactness", str(out), args.device, model, rows.path]
        run(command, environment, folder / "log", deadline.left())
    except (DpoRunnerError, CommandFailed, ValueError) as error:
        failed = str(error).splitlines()[-1]
    for line in read_results(out):
        report.tell(line)
    if failed is not None:
        report.tell(f"Exactness was not checked to its end: {failed}")


def measure_size(args: argparse.Namespace, report: Report, size: str, deadline: Deadline) -> None:
    """Measure one model on both sides; a failure becomes a row of the report."""
    try:
        if size.startswith("Mistral") and shutil.disk_usage(args.work).free < _LARGEST_GB * 1e9:
            raise CommandFailed(f"needs {_LARGEST_GB} GB of disk")
        model = aside_within(deadline.left(), write_random_model, size, args.work / "models", args.device, "bfloat16")
        rows = make_rows(args, model, args.pairs, "hh", deadline)
        write_trl_dataset(rows.path)
        job = Job(rows.path, args.pairs, rows.max_length, model, args.device, load_in_4bit=SIZES[size][2])
        tokens = job.batch * sum(map(sum, rows.lengths)) // rows.pairs
        peak = aside_within(deadline.left(), measure_peak, model, tokens, args.device, os.cpu_count() or 1)
        flops = aside_within(deadline.left(), mean_flops, model, rows.lengths)
    except (DpoRunnerError, CommandFailed, ValueError, RuntimeError) as error:
        report.add_row(size, f"not measured: {shorten(error)}")
        return
    for repeat in range(args.repeats):
        found: dict[str, dict[str, Any]] = {}
        for side in SIDES:
            try:
                with CardMemory() if args.device == "cuda" else nullcontext() as memory:
                    measured = run_side(args, side, job, size.replace(", ", "-"), deadline)
            except (DpoRunnerError, CommandFailed, OSError, ValueError, LookupError, StopIteration) as error:
                report.add_row(size, f"{side}: not measured, {shorten(error)}")
                continue
            speed = measured.pairs / measured.train_seconds
            gigabytes = memory.peak_gb if memory is not None else measured.peak_gb
            report.add_row(
                size,
                f"{side} #{repeat + 1}",
                f"{speed:.2f}",
                f"{measured.total_seconds:.1f}",
                f"{measured.first_step_seconds:.1f}",
                f"{gigabytes:.2f}",
                f"{flops * speed / peak['flops_per_second']:.1%}",
            )
            found[side] = measured.to_dict()
        for side, theirs in found.items():
            if side.startswith("trl") and SIDES[1] in found and not repeat:
                report.tell(f"{size}, {side}: {judge(found[SIDES[1]], theirs)}")


def shorten(error: Exception) -> str:
    """Return the last line of an error, formatted as a table cell."""
    return (str(error).splitlines() or [type(error).__name__])[-1][:120].replace("|", "/")


def judge(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    try:
        return check_same_job(ours, theirs)
    except DifferentJobs as error:
        return f"NOT THE SAME JOB: {error}"


def run_side(args: argparse.Namespace, side: str, job: Job, name: str, deadline: Deadline) -> Measured:
    environment = {
        **build_environment(os.cpu_count() or 1, args.work, ROOT),
        "DPO_RUNNER_CACHE": str(args.work / f"cache-{name}"),
    }
    folder = args.work / "runs" / f"{name}-{side}".replace(", ", "-").replace(" ", "_")
    shutil.rmtree(folder, ignore_errors=True)
    if side.startswith("trl"):
        return measure_trl(side, job, folder, environment, TRL_VARIANTS[side], deadline.left())
    if side.endswith("cold store"):
        shutil.rmtree(args.work / f"cache-{name}", ignore_errors=True)
    return measure_ours(side, job, folder, environment, timeout=deadline.left())


def make_rows(args: argparse.Namespace, model: str, pairs: int, name: str, deadline: Deadline) -> Rows:
    folder = args.work / "rows" / name
    folder.mkdir(parents=True, exist_ok=True)
    return aside_within(deadline.left(), write_rows, "hh", pairs, model, folder, None)


def build_report(card: str | None, lines: list[str], rows: list[str]) -> str:
    machine = describe_machine()
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "trl", "peft", "bitsandbytes"))
    where = f"{card}; {machine['cores']} cores" if card else f"no GPU: {machine['cores']} cores of {machine['cpu']}"
    return "\n".join(
        [
            "# Training on a GPU\n",
            "`scripts/bench/gpu.sh`: random weights in the shapes of known models, rows with the lengths of Anthropic "
            "HH, LoRA r=16 on all linear layers, batch 4 × 2, bf16; each side's own command in a fresh process, in "
            "turn. *Memory* is what the driver counts while a command runs, on a CPU its resident memory. *Share* is "
            "of the bf16 matmul peak measured on the model's own layers, by the formula in "
            "`scripts/bench/measuring/flops.py`. Exactness is that of a tiny model "
            "(`scripts/bench/peers/exactness.py`).\n",
            f"{where}; {versions}.\n",
            *lines,
            "",
            "| model | side | pairs/s | total, s | first step, s | memory, GB | share of the matmul peak |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    main()

"""Measure training on a GPU beside `trl dpo`, and check there that both compute the same.

    python scripts/bench_gpu.py --device cpu --sizes tiny --pairs 8

Needs nothing from a hub: random weights in the shapes of known models, the default model's tokenizer out of its
package, rows with the lengths of Anthropic HH. `scripts/bench_gpu.sh` is the whole of it on a machine with a GPU. No
run is begun after `--minutes`; what is then missing is said to be.
"""

import argparse
import os
import shutil
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from bench.flops import mean_flops, measure_peak
from bench.gpu import CardMemory, read_card
from bench.machine import describe_machine
from bench.process import CommandFailed, aside, build_environment
from bench.random_models import SIZES, write_random_model
from bench.same_job import DifferentJobs, check_same_job
from bench.shapes import Rows, write_rows
from bench.sides import TRL_VARIANTS, Job, Measured, measure_ours, measure_trl, vary, write_trl_dataset

from dpo_runner.errors import DpoRunnerError

ROOT = Path(__file__).parents[1]
EXACT = {"loss": 1e-4, "rewards/margins": 2e-4, "logps/chosen": 2e-2, "logps/rejected": 2e-2}
"""In fp32, by how much a step's metrics may differ; log-probabilities are sums over an answer's tokens."""
_LARGEST_GB = 16  # on the disk


def main() -> None:
    args = parse_arguments()
    card = read_card() if args.device == "cuda" else None
    if args.device == "cuda" and card is None:
        print("error: no GPU: nvidia-smi does not answer", file=sys.stderr)
        sys.exit(2)
    deadline = time.monotonic() + 60 * args.minutes
    args.work.mkdir(parents=True, exist_ok=True)
    try:
        lines = [check_exactness(args)]
        print(lines[0], flush=True)
        rows: list[str] = []
        for size in args.sizes:
            rows += measure_size(args, size, deadline)
    except (DpoRunnerError, CommandFailed, DifferentJobs) as error:
        sys.exit(f"error: {error}")
    args.out.write_text(build_report(card, lines, rows), encoding="utf-8")
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
    """Return the names in `text`, which are separated by semicolons, for they have commas in them."""
    sizes = [name.strip() for name in text.split(";")]
    if unknown := [name for name in sizes if name not in SIZES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {'; '.join(SIZES)}")
    return sizes


def check_exactness(args: argparse.Namespace) -> str:
    """Train a tiny model in fp32 on both sides and return how near they are, step by step.

    Raises:
        DifferentJobs: farther than fp32 rounding goes.
    """
    model = aside(write_random_model, "tiny", args.work / "models", args.device, "float32")
    job = Job("", 16, 512, model, args.device, dtype="float32", batch=2, accumulation=1)
    job = place(job, make_rows(args, model, job.pairs, "exactness"))
    ours, theirs = (run_side(args, side, job, "exactness").to_dict() for side in ("dpo_runner, cold store", "trl"))
    return f"In fp32, {ours['steps']} steps of a tiny model: {check_same_job(ours, theirs, EXACT)}."


def measure_size(args: argparse.Namespace, size: str, deadline: float) -> list[str]:
    """Measure one model on both sides and return the rows of the table."""
    if time.monotonic() > deadline:
        return [f"| {size} | not measured: no time was left | | | | | |"]
    if size.startswith("Mistral") and shutil.disk_usage(args.work).free < _LARGEST_GB * 1e9:
        return [f"| {size} | not measured: needs {_LARGEST_GB} GB of disk | | | | | |"]
    model = aside(write_random_model, size, args.work / "models", args.device, "bfloat16")
    rows = make_rows(args, model, args.pairs, "hh")
    job = place(Job("", args.pairs, rows.max_length, model, args.device, load_in_4bit=SIZES[size][2]), rows)
    name = size.replace(", ", "-")
    shutil.rmtree(args.work / f"cache-{name}", ignore_errors=True)
    peak = aside(
        measure_peak, model, job.batch * sum(map(sum, rows.lengths)) // rows.pairs, args.device, os.cpu_count() or 1
    )
    flops = aside(mean_flops, model, rows.lengths)
    table, measured = [], {}
    for repeat in range(args.repeats):
        for side in ("trl", "dpo_runner, cold store", "dpo_runner, warm store", "trl precompute"):
            if time.monotonic() > deadline:
                table.append(f"| {size} | {side}: not measured, no time was left | | | | | |")
                continue
            with CardMemory() if args.device == "cuda" else nullcontext() as memory:
                run = run_side(args, side, job, name)
            measured[side] = run.to_dict()
            speed = run.pairs / run.train_seconds
            gigabytes = memory.peak_gb if memory is not None else run.peak_gb
            share = flops * speed / peak["flops_per_second"]
            table.append(
                f"| {size} | {side} #{repeat + 1} | {speed:.2f} | {run.total_seconds:.1f} "
                f"| {run.first_step_seconds:.1f} | {gigabytes:.2f} | {share:.1%} |"
            )
            print(table[-1], flush=True)
    for side, run_dict in measured.items():
        if "trl" in side and "dpo_runner, cold store" in measured:
            table.append(f"| {size} | {side}: {judge(measured['dpo_runner, cold store'], run_dict)} | | | | | |")
    return table


def judge(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    try:
        return check_same_job(ours, theirs)
    except DifferentJobs as error:
        return f"NOT THE SAME JOB: {error}"


def run_side(args: argparse.Namespace, side: str, job: Job, name: str) -> Measured:
    environment = {
        **build_environment(os.cpu_count() or 1, args.work, ROOT),
        "DPO_RUNNER_CACHE": str(args.work / f"cache-{name}"),
    }
    folder = args.work / "runs" / f"{name}-{side}".replace(", ", "-").replace(" ", "_")
    shutil.rmtree(folder, ignore_errors=True)
    if side.startswith("trl"):
        return measure_trl(side, job, folder, environment, TRL_VARIANTS[side])
    if side.endswith("cold store"):
        shutil.rmtree(args.work / f"cache-{name}", ignore_errors=True)
    return measure_ours(side, job, folder, environment)


def make_rows(args: argparse.Namespace, model: str, pairs: int, name: str) -> Rows:
    folder = args.work / "rows" / name
    folder.mkdir(parents=True, exist_ok=True)
    return aside(write_rows, "hh", pairs, model, folder, None)


def place(job: Job, rows: Rows) -> Job:
    write_trl_dataset(rows.path)
    return vary(job, rows=rows.path)


def build_report(card: str | None, lines: list[str], rows: list[str]) -> str:
    machine = describe_machine()
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "trl", "peft", "bitsandbytes"))
    where = f"{card}; {machine['cores']} cores" if card else f"no GPU: {machine['cores']} cores of {machine['cpu']}"
    return "\n".join(
        [
            "# Training on a GPU\n",
            "`scripts/bench_gpu.sh`: random weights in the shapes of known models, rows with the lengths of Anthropic "
            "HH, LoRA r=16 on all linear layers, batch 4 × 2, bf16; each side's own command in a fresh process, in "
            "turn. *Memory* is what the driver counts while a command runs, on a CPU its resident memory. *Share* is "
            "of the bf16 matmul peak measured on the model's own layers, by the formula in `scripts/bench/flops.py`.\n",
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

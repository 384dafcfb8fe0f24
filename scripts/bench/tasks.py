"""Compare `python -m dpo_runner.evaluate` of a run's tasks with two runs of lm-evaluation-harness by itself.

    python -m scripts.bench.tasks outputs/dpo/RUN --rounds 3

Ours scores policy and reference in one process, and the held-out pairs. The harness scores the base, and the base with
the run's adapter, each in its own process. All are whole commands, in changing order, and none has scores from before.
"""

import argparse
import os
import random
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from dpo_runner.io.files import cache_dir
from dpo_runner.model.files.locations import resolve_model_path
from dpo_runner.records.reading import read_run_conf
from dpo_runner.training.answers.benchmarks.tasks import BASICS
from scripts.bench.measuring.machine import describe_machine
from scripts.bench.measuring.process import Finished, build_environment, run

OURS = "ours"


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory of a run with an adapter")
    parser.add_argument("--tasks", default="basics", help="bundled tasks, separated by commas")
    parser.add_argument("--limit", help="documents of each task")
    parser.add_argument(
        "--batch-sizes", default="16,64", help="of the harness, separated by commas; ours has its default"
    )
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    sides = [OURS, *args.batch_sizes.split(",")]
    costs: dict[str, list[tuple[float, float, float]]] = {side: [] for side in sides}
    for number in range(args.rounds):
        for side in random.Random(number).sample(sides, len(sides)):
            with tempfile.TemporaryDirectory() as work:
                done = _evaluate(args, Path(work)) if side == OURS else _run_harness(args, side, Path(work))
            seconds, cpu = (sum(getattr(one, part) for one in done) for part in ("seconds", "cpu_seconds"))
            costs[side].append((seconds, cpu, max(one.peak_gb for one in done)))
            print(f"round {number + 1}: {side}: {costs[side][-1]}", flush=True)
    print(f"\n{describe_machine()}\n")
    print("| side | s | CPU s | GB | ours / this side, of time | least | most |\n|---|---|---|---|---|---|---|")
    for side, values in costs.items():
        seconds, cpu, memory = (statistics.median(column) for column in zip(*values, strict=True))
        ratios = [ours[0] / other[0] for ours, other in zip(costs[OURS], values, strict=True)]
        shown = [f"{value:.2f}" for value in (statistics.median(ratios), min(ratios), max(ratios))]
        name = side if side == OURS else f"the harness twice, batch size {side}"
        print(f"| {name} | {seconds:.1f} | {cpu:.1f} | {memory:.2f} | {' | '.join(shown)} |")


def _evaluate(args: argparse.Namespace, work: Path) -> list[Finished]:
    """Evaluate a copy of the run, with a cache that has no scores."""
    cache = work / "cache"
    cache.mkdir()
    for entry in cache_dir().iterdir():
        if entry.name != "benchmarks":
            (cache / entry.name).symlink_to(entry)
    shutil.copytree(args.run, work / "run", ignore=shutil.ignore_patterns("checkpoints", "evaluat*"))
    overrides = [f"benchmarks.tasks=[{args.tasks}]", "samples.num_prompts=0"]
    command = [
        sys.executable,
        "-m",
        "dpo_runner.evaluate",
        str(work / "run"),
        *overrides,
        *_limit("benchmarks.limit=", args),
    ]
    return [run(command, _environment(work) | {"DPO_RUNNER_CACHE": str(cache)}, work / "log")]


def _run_harness(args: argparse.Namespace, size: str, work: Path) -> list[Finished]:
    model = f"pretrained={resolve_model_path(read_run_conf(args.run).model)},dtype=bfloat16"
    settings = ["--tasks", *args.tasks.split(","), "--include_path", str(BASICS), "--batch_size", size]
    settings += ["--apply_chat_template", "--fewshot_as_multiturn", *_limit("--limit=", args)]
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", *settings, "--model_args"]
    models = [model, f"{model},peft={args.run / 'adapter'}"]
    return [run([*command, model], _environment(work), work / "log") for model in models]


def _limit(option: str, args: argparse.Namespace) -> list[str]:
    return [f"{option}{args.limit}"] if args.limit else []


def _environment(work: Path) -> dict[str, str]:
    return build_environment(os.cpu_count() or 1, work, Path.cwd())


if __name__ == "__main__":
    main()

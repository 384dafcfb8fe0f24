"""Compare one process of two threads with two processes of one thread each, on the same job.

    python -m scripts.bench.processes

The default model trains on the bundled pairs, once in each way in turn, `--repeats` times. The third way deals out the
pairs as they come instead of by tokens, and the fourth divides the weights. Step times are the distances of the log
events; the first step is left out.
"""

import argparse
import importlib
import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from dpo_runner import RunConf, load_conf, run
from dpo_runner.records.reading import read_metrics, read_summary
from dpo_runner.training.engine import token_batches
from dpo_runner.training.ranks.group import count
from dpo_runner.training.ranks.launch import launch
from scripts.bench.measuring.machine import describe_load, describe_machine

JOB = [
    *("training.max_steps=7", "training.logging_steps=1", "training.eval_strategy=no", "training.save_strategy=no"),
    *("data.max_eval_samples=4", "samples.num_prompts=0", "wandb=disabled", "training.per_device_train_batch_size=4"),
]
WAYS: dict[str, tuple[int, bool, list[str]]] = {
    "1 process, 2 threads": (1, True, []),
    "2 processes, 1 thread each": (2, True, []),
    "the same, pairs as they come": (2, False, []),
    "the same, weights divided (fsdp2)": (2, True, ["distributed=fsdp2"]),
}


def deal_in_turn(sizes: Sequence[int]) -> list[int]:
    return [index % count() for index in range(len(sizes))]


def train(conf: RunConf, by_tokens: bool) -> None:
    """Run a configuration; unless `by_tokens`, the processes' pairs are dealt out as they come."""
    if not by_tokens:
        vars(token_batches)["deal"] = deal_in_turn
    run(conf)


def measure(processes: int, by_tokens: bool, overrides: list[str], folder: Path) -> dict[str, Any]:
    """Train once; return seconds of each step after the first, and gigabytes of the largest process."""
    accumulation = f"training.gradient_accumulation_steps={4 // processes}"
    conf = load_conf([*JOB, *overrides, accumulation, f"launch.processes={processes}", f"run_dir={folder}"])
    job = importlib.import_module("scripts.bench.processes").train  # importable in the processes, unlike __main__'s
    launch(partial(job, conf, by_tokens), processes, folder)
    times = [event["time"] for event in read_metrics(folder) if "loss" in event]
    steps = [later - earlier for earlier, later in pairwise(times)]
    return {"steps": steps, "memory": read_summary(folder)["peak_memory_gb"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write all figures to this JSON file")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "2"
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    folder = Path(tempfile.mkdtemp(prefix="processes-"))
    print(json.dumps(describe_machine()))
    for turn in range(args.repeats):
        for number, (way, settings) in enumerate(WAYS.items()):
            found[way].append(measure(*settings, folder / f"{turn}-{number}"))
            print(f"{way}: {statistics.mean(found[way][-1]['steps']):.2f} s a step, load {describe_load()}", flush=True)
    first = [statistics.mean(each["steps"]) for each in found["1 process, 2 threads"]]
    print("\n| way | s a step, median | throughput | slowest step / mean | GB a process |\n|---|---|---|---|---|")
    for way, measured in found.items():
        means = [statistics.mean(each["steps"]) for each in measured]
        ratios = [one / other for one, other in zip(first, means, strict=True)]
        slowest = [max(each["steps"]) / statistics.mean(each["steps"]) for each in measured]
        memory = max(each["memory"] for each in measured)
        print(
            f"| {way} | {statistics.median(means):.2f} | {statistics.median(ratios):.2f} | "
            f"{statistics.median(slowest):.2f} | {memory:.2f} |"
        )
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1), encoding="utf-8")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()

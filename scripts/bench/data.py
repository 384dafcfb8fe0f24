"""Measure the speed and memory of preparing preference data, compared with the bare tokenizer.

    python -m scripts.bench.data --rows 1000000 --num-proc 2 --work-dir outputs/bench_data

Writes synthetic rows (random words, about 300 tokens per row), then runs three measurements, each in a fresh process:
the bare fast tokenizer encoding prompt+chosen and prompt+rejected in batches, with the same number of processes;
`load_preferences`; and `load_preferences` again, from the cache. Memory is anonymous memory, summed over the processes;
pages of mapped files do not count because the kernel can drop them at any time.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts import ROOT

BATCH = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--num-proc", type=int, default=2)
    parser.add_argument("--work-dir", type=Path, default=Path("outputs/bench_data"))
    parser.add_argument("--part", choices=("bare", "prepare"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.work_dir = args.work_dir.resolve()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    path = args.work_dir / f"rows-{args.rows}.jsonl"
    if args.part == "bare":
        print(json.dumps(measure(lambda: encode_bare(path, args.num_proc))))
    elif args.part == "prepare":
        print(json.dumps(measure(lambda: prepare(path, args.num_proc))))
    else:
        compare(args, path)


def compare(args: argparse.Namespace, path: Path) -> None:
    """Run the measurements one after another and print the table."""
    if not path.exists():
        write_rows(path, args.rows)
    os.environ["DPO_RUNNER_CACHE"] = str(args.work_dir / f"cache-{os.getpid()}-{time.time_ns()}")
    command = [sys.executable, "-m", "scripts.bench.data", "--rows", str(args.rows), "--num-proc", str(args.num_proc)]
    command += ["--work-dir", str(args.work_dir), "--part"]
    results = {}
    for name, part in (("bare tokenizer", "bare"), ("prepared", "prepare"), ("from the cache", "prepare")):
        result = subprocess.run([*command, part], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        results[name] = json.loads(result.stdout.splitlines()[-1])
    bare = results["bare tokenizer"]["rows_per_second"]
    print(
        f"{args.rows:,} rows, {results['prepared']['tokens'] / args.rows:.0f} tokens a row, {args.num_proc} processes"
    )
    print("|  | seconds | rows/s | of the bare tokenizer | peak anonymous memory |")
    print("|---|---|---|---|---|")
    for name, result in results.items():
        share = "" if name == "from the cache" else f"{result['rows_per_second'] / bare:.0%}"
        speed = "" if name == "from the cache" else f"{result['rows_per_second']:,.0f}"
        memory = f"{result['start_anon_gb']:.2f} → {result['peak_anon_gb']:.2f} GB"
        print(f"| {name} | {result['seconds']:.1f} | {speed} | {share} | {memory} |")


def write_rows(path: Path, rows: int) -> None:
    """Write rows of random English words: prompts of about 80 words, answers of about 75."""
    rng = random.Random(0)
    source = ROOT / "dpo_runner" / "data" / "concise" / "train.jsonl"
    words = [
        word
        for line in source.read_text(encoding="utf-8").splitlines()
        for word in json.loads(line)["rejected"].split()
    ]

    def text(mean: int) -> str:
        return " ".join(rng.choices(words, k=max(3, int(rng.gauss(mean, mean / 4)))))

    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            file.write(json.dumps({"prompt": text(80), "chosen": text(75), "rejected": text(75)}) + "\n")


def load_tokenizer() -> Any:
    from transformers import AutoTokenizer

    from dpo_runner.model.files.packaged import DEFAULT_MODEL, load_default_model_path

    home = os.environ.pop("DPO_RUNNER_CACHE", None)  # the default model is in the usual cache
    tokenizer = AutoTokenizer.from_pretrained(load_default_model_path(DEFAULT_MODEL))
    if home is not None:
        os.environ["DPO_RUNNER_CACHE"] = home
    return tokenizer


def encode_bare(path: Path, num_proc: int) -> dict[str, float]:
    """Encode prompt+chosen and prompt+rejected of every row; time spent reading does not count."""
    tokenizer = load_tokenizer()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    context = multiprocessing.get_context("fork")
    queue: Any = context.Queue()

    def work(part: int) -> None:
        busy, rows = 0.0, 0
        for batch in read_batches(path, part, num_proc):
            texts = [row["prompt"] + row[answer] for row in batch for answer in ("chosen", "rejected")]
            start = time.perf_counter()
            _ = [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts)]
            busy += time.perf_counter() - start
            rows += len(batch)
        queue.put((busy, rows))

    processes = [context.Process(target=work, args=(part,)) for part in range(num_proc)]
    for process in processes:
        process.start()
    results = [queue.get() for _ in processes]
    for process in processes:
        process.join()
    seconds = max(busy for busy, _ in results)
    return {"seconds": seconds, "rows_per_second": sum(rows for _, rows in results) / seconds}


def read_batches(path: Path, part: int, parts: int) -> Iterator[list[dict[str, str]]]:
    batch: list[dict[str, str]] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file):
            if number // BATCH % parts == part:
                batch.append(json.loads(line))
            if len(batch) == BATCH:
                yield batch
                batch = []
    if batch:
        yield batch


def prepare(path: Path, num_proc: int) -> dict[str, float]:
    """Prepare the rows as a run does."""
    from dpo_runner.config.compose import load_conf
    from dpo_runner.data.preferences import load_preferences

    conf = load_conf(["data=local_file", f"data.path={path}", f"training.dataset_num_proc={num_proc}"])
    tokenizer = load_tokenizer()
    start = time.perf_counter()
    report = load_preferences(conf, tokenizer).report
    seconds = time.perf_counter() - start
    rows = sum(source.rows for source in report.sources)
    tokens = sum(lengths.total for split in report.splits.values() for lengths in split.lengths.values())
    return {"seconds": seconds, "rows_per_second": rows / seconds, "tokens": tokens}


def measure(work: Any) -> dict[str, float]:
    """Run `work` and add the anonymous memory at its start and at its peak to the result.

    Memory is that of this process and its children, in GB (1e9 bytes).
    """
    stop, peak = threading.Event(), [0.0]

    def watch() -> None:
        while not stop.wait(0.5):
            peak[0] = max(peak[0], read_anonymous_memory())

    importlib.import_module("torch")  # every run has it in memory before it loads data
    start = read_anonymous_memory()
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        result = work()
    finally:
        stop.set()
        thread.join()
    return {**result, "start_anon_gb": start, "peak_anon_gb": max(peak[0], start)}


def read_anonymous_memory() -> float:
    """Return the anonymous memory of this process and its children in GB, shared pages counted once."""
    total = 0
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    for pid in [str(os.getpid()), *children]:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        total += int(next(line for line in text.splitlines() if line.startswith("Pss_Anon")).split()[1])
    return total * 1024 / 1e9


if __name__ == "__main__":
    main()

"""The parts of the training benchmark; each runs the measurements that the record lacks, one by one."""

import json
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from scripts.bench.inputs.shapes import Rows
from scripts.bench.measuring.process import CommandFailed, run
from scripts.bench.peers.llamafactory import PEER, PEER_VARIANTS, find_peer, measure_peer
from scripts.bench.peers.same_job import DifferentJobs, check_same_job
from scripts.bench.peers.sides import (
    TRL_VARIANTS,
    Job,
    Measured,
    Variant,
    build_our_sweep,
    build_ours,
    measure_ours,
    measure_trl,
    read_history,
    vary,
)
from scripts.bench.peers.tuning import Run, best_variants, tune
from scripts.bench.report.record import Record
from scripts.bench.session import Bench

BETAS, RATES = (0.05, 0.1, 0.2), (5e-5, 1.5e-4, 5e-4)
COLD, WARM = "dpo_runner, cold store", "dpo_runner, warm store"
OF_PEER = ("demo_fit",)
"""Shapes for LLaMA-Factory alone: it truncates long rows differently from TRL, so these contain none."""
LENGTHS, SHARES, ROW_COUNTS = (256, 512, 1024, 2048, 4096), (0.1, 0.5, 0.9), (1000, 10_000, 100_000, 1_000_000)
"""Axes of the growth measurements: tokens per row, the prompt's share of them, rows per file."""
NOT_INSTALLED = "not installed"


def tune_peers(bench: Bench, name: str, rows: Rows) -> None:
    """Find the best settings of each peer on few pairs; skip LLaMA-Factory if it is not installed."""
    job = bench.job_of(rows)
    if name not in OF_PEER:
        tune(bench, name, job, TRL_VARIANTS, partial(_trl, bench))
    if find_peer(bench.peers) is not None:
        tune(bench, name, job, PEER_VARIANTS, partial(_peer, bench))


def choose_variants(tried: Mapping[str, Any], variants: Iterable[str]) -> list[str]:
    """Return the settings of a peer to measure: default, fastest training, shortest total time."""
    variants = list(variants)
    return list(dict.fromkeys([variants[0], *best_variants(tried, variants)]))


def compare_runs(bench: Bench, name: str, rows: Rows, repeats: int) -> None:
    """Run all sides in turn, `repeats` times.

    Peers run with default and best settings, dpo_runner with a cold and a warm reference store.
    """
    job = bench.job_of(rows)
    tried, refused = bench.record.part("tune", name), bench.record.part("refused", name)
    theirs: dict[str, tuple[Variant, Run]] = {}
    if name not in OF_PEER:
        theirs |= {side: (TRL_VARIANTS[side], partial(_trl, bench)) for side in choose_variants(tried, TRL_VARIANTS)}
    if find_peer(bench.peers) is not None:
        theirs |= {side: (PEER_VARIANTS[side], partial(_peer, bench)) for side in choose_variants(tried, PEER_VARIANTS)}
        if refused.get(PEER) == NOT_INSTALLED:
            del refused[PEER]
    else:
        refused[PEER] = NOT_INSTALLED
        if name in OF_PEER:
            return
    for repeat in range(repeats):
        cache = bench.work / f"cache-{name}-{repeat}"
        if len(bench.record.part("runs", name).get(COLD, [])) <= repeat:
            shutil.rmtree(cache, ignore_errors=True)
        for side, (variant, run_peer) in theirs.items():
            if side in refused or (side == PEER and repeat and _is_slower(tried)):
                continue
            try:
                bench.measure(("runs", name, side), repeat, partial(run_peer, side, variant.split(job), variant))
            except (CommandFailed, ValueError) as error:
                refused[side] = str(error).splitlines()[-1]
                bench.say(f"{name} / {side}: {error}")
        for side in (COLD, WARM):
            bench.measure(("runs", name, side), repeat, partial(_ours, side, job, bench.environment(cache), ()))
        bench.record.save()
    check_jobs(bench.record, name)


def _is_slower(tried: Mapping[str, Any]) -> bool:
    """Return whether LLaMA-Factory has better settings than its default.

    The default then runs only once, for its memory.
    """
    return PEER not in best_variants(tried, PEER_VARIANTS)


def check_jobs(record: Record, name: str) -> None:
    """Refuse each side of a shape whose job differs from dpo_runner's; record how close the others are."""
    runs, refused, same = record.part("runs", name), record.part("refused", name), record.part("same_job", name)
    mine = runs[WARM][0]
    for side, entries in list(runs.items()):
        if not entries:  # the side failed
            continue
        try:
            same[side] = [check_same_job(mine, entry) for entry in entries][-1]
            refused.pop(side, None)
        except DifferentJobs as error:
            refused[side] = str(error)
            same.pop(side, None)
    record.save()


def sweep(bench: Bench, name: str, rows: Rows) -> None:
    """Run nine points as one sweep and as nine `trl dpo` commands, with each of its best settings."""
    job = bench.job_of(rows)
    entries = bench.record.part("sweep", name)
    points = [(beta, rate) for beta in BETAS for rate in RATES]
    if "dpo_runner" not in entries:
        folder, cache = bench.work / "sweeps" / name, bench.work / f"cache-sweep-{name}"
        for path in (folder, cache):
            shutil.rmtree(path, ignore_errors=True)
        command = build_our_sweep(job, folder, BETAS, RATES, bench.threads)
        finished = run(command, bench.environment(cache), folder.with_suffix(".log"))
        finals = [path for path in folder.iterdir() if (path / "summary.json").exists()]
        if len(finals) != len(points):
            raise CommandFailed(f"{folder}: {len(finals)} of {len(points)} runs finished")
        histories = {key: read_history(path) for path in finals for key in [_point(path)]}
        entries["dpo_runner"] = {
            "total_seconds": finished.seconds,
            "peak_gb": finished.peak_gb,
            "points": [histories[point] for point in points],
        }
        bench.record.save()
        bench.say(f"sweep / {name} / dpo_runner: {finished.seconds:.1f} s")
    tried = bench.record.part("tune", name)
    for variant in reversed(
        best_variants(tried, TRL_VARIANTS) or ["trl precompute", "trl"]
    ):  # shortest total time first
        for number, (beta, rate) in enumerate(points):
            settings = TRL_VARIANTS[variant]
            point = settings.split(vary(job, beta=beta, learning_rate=rate))
            theirs = bench.measure(("sweep", name, variant), number, partial(_trl, bench, variant, point, settings))
            mine = {**theirs, "side": "dpo_runner", "history": entries["dpo_runner"]["points"][number]}
            try:
                check_same_job(mine, theirs)
            except DifferentJobs as error:
                raise DifferentJobs(f"sweep / {name}, beta {beta:g}, learning rate {rate:g}: {error}") from None


def _point(run_dir: Path) -> tuple[float, float]:
    training = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))["training"]
    return float(training["beta"]), float(training["learning_rate"])


def grow(bench: Bench, kind: str, cases: Sequence[tuple[str, Rows]]) -> None:
    """Measure two steps of one pair on both sides for each case; only the second step counts."""
    for label, rows in cases:
        job = vary(bench.job_of(rows), batch=1, accumulation=1, max_steps=2)
        for side, work in (
            ("trl", partial(_trl, bench, "trl", job, TRL_VARIANTS["trl"])),
            ("dpo_runner", partial(_ours, "dpo_runner", job, bench.environment(bench.work / "cache-growth"), ())),
        ):
            try:
                bench.measure((f"growth_{kind}", label, side), 0, work)
            except CommandFailed as error:  # for instance out of memory on the longest rows
                bench.say(f"growth_{kind} / {label} / {side}: {error}")


def grow_rows(bench: Bench, cases: Mapping[int, Path]) -> None:
    """Measure a few steps of dpo_runner on files of many rows, with an empty cache.

    The reference store is off: it would score all rows first.
    """
    for count, path in cases.items():
        job = vary(bench.job, rows=str(path), pairs=count, max_length=512, accumulation=1, max_steps=4)
        cache = bench.work / f"cache-rows-{count}"
        shutil.rmtree(cache, ignore_errors=True)
        further = ("engine.reference_store=false", f"training.dataset_num_proc={bench.threads}")
        work = partial(_ours, "dpo_runner", job, bench.environment(cache), further)
        bench.measure(("growth_rows", str(count), "dpo_runner"), 0, work)
        shutil.rmtree(cache, ignore_errors=True)


def profile(bench: Bench, name: str, rows: Rows) -> None:
    """Profile dpo_runner's training with a warm reference store, in a separate process."""
    entries = bench.record.part("profile")
    if name in entries:
        return
    job, folder = bench.job_of(rows), bench.work / "runs" / f"profile-{name}"
    environment = bench.environment(bench.work / f"cache-profile-{name}")
    for path in (folder, folder.with_suffix(".json")):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "scripts.bench.measuring.profiling", str(folder.with_suffix(".json"))]
    command += build_ours(job, folder)[3:]
    run(command, environment, folder.with_suffix(".log"))
    entries[name] = {"pairs": rows.pairs, **json.loads(folder.with_suffix(".json").read_text(encoding="utf-8"))}
    bench.record.save()
    bench.say(f"profile / {name}: {entries[name]['seconds']:.1f} s of training")


def _trl(bench: Bench, side: str, job: Job, variant: Variant, folder: Path) -> Measured:
    return measure_trl(side, job, folder, bench.environment(bench.work / "cache-trl"), variant)


def _peer(bench: Bench, side: str, job: Job, variant: Variant, folder: Path) -> Measured:
    command = find_peer(bench.peers)
    assert command is not None
    return measure_peer(side, job, folder, bench.environment(bench.work / "cache-peer"), command, variant)


def _ours(side: str, job: Job, environment: Mapping[str, str], further: Sequence[str], folder: Path) -> Measured:
    measured = measure_ours(side, job, folder, environment, further)
    check_store(side, folder.with_suffix(".log").read_text(encoding="utf-8"))
    return measured


def check_store(side: str, log: str) -> None:
    """Check that a cold store was empty and that a warm store had all pairs.

    Raises:
        CommandFailed: the store had other contents.
    """
    if side == COLD and "the store has 0 already" not in log:
        raise CommandFailed(f"{side}: the reference store was not empty")
    if side == WARM and "with the reference; the store has" in log:
        raise CommandFailed(f"{side}: the reference store lacked pairs; remove the work folder and begin anew")

"""The parts of the benchmark: each measures what the record lacks, one run after another."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from bench.llamafactory import find_peer, measure_peer
from bench.machine import describe_load
from bench.process import CommandFailed, build_environment, run
from bench.record import Entry, Record
from bench.same_job import DifferentJobs, check_same_job
from bench.shapes import Rows
from bench.sides import (
    TRL_VARIANTS,
    Job,
    Measured,
    build_our_sweep,
    measure_ours,
    measure_trl,
    read_history,
    vary,
    write_trl_dataset,
)

BETAS, RATES = (0.05, 0.1, 0.2), (5e-5, 1.5e-4, 5e-4)
COLD, WARM, PEER = "dpo_runner, cold store", "dpo_runner, warm store", "LLaMA-Factory"
_NOT_INSTALLED = "not installed"
PEER_VARIANTS = {PEER: True, f"{PEER}, no checkpointing": False}


@dataclass(frozen=True)
class Bench:
    """What all parts work with.

    Attributes:
        record: what is measured already.
        work: folder for run directories, caches and logs.
        peers: folder of the peers' environments.
        root: the checkout.
        job: what every side trains; `rows`, `pairs` and `max_length` are set for each shape.
        threads: for every side.
        say: shows a line to a person.
    """

    record: Record
    work: Path
    peers: Path
    root: Path
    job: Job
    threads: int
    say: Callable[[str], None]

    def environment(self, cache: Path) -> dict[str, str]:
        return {**build_environment(self.threads, self.work, self.root), "DPO_RUNNER_CACHE": str(cache)}

    def job_of(self, rows: Rows) -> Job:
        write_trl_dataset(rows.path)
        return vary(self.job, rows=rows.path, pairs=rows.pairs, max_length=rows.max_length)

    def measure(self, keys: tuple[str, ...], repeat: int, work: Callable[[Path], Measured]) -> Entry:
        """Measure once, in a run directory of its own, unless the record has it; say what came out."""

        def once() -> Entry:
            folder = self.work / "runs" / "-".join([*keys, str(repeat)]).replace(" ", "_").replace(",", "")
            shutil.rmtree(folder, ignore_errors=True)
            load = describe_load()
            entry = {**work(folder).to_dict(), "load_before": load}
            self.say(
                f"{' / '.join(keys)} #{repeat + 1}: {entry['pairs'] / entry['train_seconds']:.3f} pairs/s, "
                f"{entry['total_seconds']:.1f} s in all, {entry['peak_gb']:.2f} GB"
            )
            return entry

        return self.record.measure(keys, repeat, once)


def tune_trl(bench: Bench, name: str, rows: Rows) -> None:
    """Run `trl dpo` once with each of its settings, to find its best."""
    job = bench.job_of(rows)
    tried = bench.record.part("tune", name)
    for variant, further in TRL_VARIANTS.items():
        if variant in tried:
            continue
        environment = bench.environment(bench.work / "cache-trl")
        try:
            bench.measure(("tune", name, variant), 0, partial(_trl, variant, job, environment, further))
        except CommandFailed as error:
            tried[variant] = {"failed": str(error).splitlines()[-1]}
            bench.record.save()
            bench.say(f"tune / {name} / {variant}: {tried[variant]['failed']}")


def best_variants(tuned: Mapping[str, Any]) -> list[str]:
    """Return the settings of `trl dpo` that trained fastest and that ended soonest, which may be one."""
    ran = {variant: runs[0] for variant, runs in tuned.items() if isinstance(runs, list)}
    best = [min(ran, key=lambda variant: ran[variant][key]) for key in ("train_seconds", "total_seconds")]
    return list(dict.fromkeys(best))


def compare_runs(bench: Bench, name: str, rows: Rows, repeats: int) -> None:
    """Run all sides in turn, `repeats` times: `trl dpo` by default and at its best, dpo_runner cold and warm, peers."""
    job = bench.job_of(rows)
    variants = dict.fromkeys([next(iter(TRL_VARIANTS)), *best_variants(bench.record.part("tune", name))])
    refused, runs = bench.record.part("refused", name), bench.record.part("runs", name)
    command = find_peer(bench.peers)
    for side in PEER_VARIANTS:
        if command is None:
            refused[side] = _NOT_INSTALLED
        elif refused.get(side) == _NOT_INSTALLED:
            del refused[side]
    for repeat in range(repeats):
        cache = bench.work / f"cache-{name}-{repeat}"
        if len(runs.get(COLD, [])) <= repeat:
            shutil.rmtree(cache, ignore_errors=True)
        for variant in variants:
            environment = bench.environment(bench.work / "cache-trl")
            bench.measure(
                ("runs", name, variant), repeat, partial(_trl, variant, job, environment, TRL_VARIANTS[variant])
            )
        for side in (COLD, WARM):
            bench.measure(("runs", name, side), repeat, partial(_ours, side, job, bench.environment(cache), ()))
        for side in _peers_left(runs, repeat):
            if command is not None and side not in refused:
                environment = bench.environment(bench.work / "cache-peer")
                work = partial(_peer, side, job, environment, command, PEER_VARIANTS[side])
                try:
                    bench.measure(("runs", name, side), repeat, work)
                except (CommandFailed, ValueError) as error:
                    refused[side] = str(error).splitlines()[-1]
                    bench.say(f"{name} / {side}: {error}")
        bench.record.save()
    check_jobs(bench.record, name)


def _peers_left(runs: Mapping[str, Any], repeat: int) -> list[str]:
    """Return which settings of the peer are run: all of them once, then the one that trained fastest."""
    ran = [side for side in PEER_VARIANTS if runs.get(side)]
    if repeat == 0 or not ran:
        return list(PEER_VARIANTS)
    return [min(ran, key=lambda side: float(runs[side][0]["train_seconds"]))]


def check_jobs(record: Record, name: str) -> None:
    """Refuse each side of a shape whose job is not dpo_runner's, and note how near the others are."""
    runs, refused, same = record.part("runs", name), record.part("refused", name), record.part("same_job", name)
    mine = runs[WARM][0]
    for side, entries in list(runs.items()):
        if not entries:  # it failed
            continue
        try:
            same[side] = [check_same_job(mine, entry) for entry in entries][-1]
            refused.pop(side, None)
        except DifferentJobs as error:
            refused[side] = str(error)
            same.pop(side, None)
    record.save()


def sweep(bench: Bench, name: str, rows: Rows) -> None:
    """Run nine points as one sweep, as nine commands of `trl dpo`, and as nine with its precomputed reference."""
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
    for variant in ("trl", "trl precompute"):
        for number, (beta, rate) in enumerate(points):
            point = vary(job, beta=beta, learning_rate=rate)
            environment = bench.environment(bench.work / "cache-trl")
            work = partial(_trl, variant, point, environment, TRL_VARIANTS[variant])
            theirs = bench.measure(("sweep", name, variant), number, work)
            mine = {**theirs, "side": "dpo_runner", "history": entries["dpo_runner"]["points"][number]}
            try:
                check_same_job(mine, theirs)
            except DifferentJobs as error:
                raise DifferentJobs(f"sweep / {name}, beta {beta:g}, learning rate {rate:g}: {error}") from None


def _point(run_dir: Path) -> tuple[float, float]:
    training = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))["training"]
    return float(training["beta"]), float(training["learning_rate"])


def grow(bench: Bench, kind: str, cases: Sequence[tuple[str, Rows]]) -> None:
    """Measure two steps of one pair on both sides for each case; the second step counts."""
    for label, rows in cases:
        job = vary(bench.job_of(rows), batch=1, accumulation=1, max_steps=2)
        for side, work in (
            ("trl", partial(_trl, "trl", job, bench.environment(bench.work / "cache-trl"), ())),
            ("dpo_runner", partial(_ours, "dpo_runner", job, bench.environment(bench.work / "cache-growth"), ())),
        ):
            bench.measure((f"growth_{kind}", label, side), 0, work)


def grow_rows(bench: Bench, cases: Mapping[int, Path]) -> None:
    """Measure a few steps of dpo_runner on files of many rows, prepared anew.

    Without the reference store, which would first score all of them.
    """
    for count, path in cases.items():
        job = vary(bench.job, rows=str(path), pairs=count, max_length=512, accumulation=1, max_steps=4)
        cache = bench.work / f"cache-rows-{count}"
        shutil.rmtree(cache, ignore_errors=True)
        further = ("engine.reference_store=false", f"training.dataset_num_proc={bench.threads}")
        work = partial(_ours, "dpo_runner", job, bench.environment(cache), further)
        bench.measure(("growth_rows", str(count), "dpo_runner"), 0, work)
        shutil.rmtree(cache, ignore_errors=True)


def _trl(side: str, job: Job, environment: Mapping[str, str], further: Sequence[str], folder: Path) -> Measured:
    return measure_trl(side, job, folder, environment, further)


def _peer(
    side: str, job: Job, environment: Mapping[str, str], command: Path, checkpointing: bool, folder: Path
) -> Measured:
    return measure_peer(side, job, folder, environment, command, checkpointing)


def _ours(side: str, job: Job, environment: Mapping[str, str], further: Sequence[str], folder: Path) -> Measured:
    measured = measure_ours(side, job, folder, environment, further)
    check_store(side, folder.with_suffix(".log").read_text(encoding="utf-8"))
    return measured


def check_store(side: str, log: str) -> None:
    """Make sure that a cold store was empty, and that a warm one had all.

    Raises:
        CommandFailed: it was not so.
    """
    if side == COLD and "the store has 0 already" not in log:
        raise CommandFailed(f"{side}: the reference store was not empty")
    if side == WARM and "with the reference; the store has" in log:
        raise CommandFailed(f"{side}: the reference store lacked pairs; remove the work folder and begin anew")

"""The state shared by all parts of the training benchmark: record, folders, job and threads."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from scripts.bench.inputs.shapes import Rows
from scripts.bench.measuring.machine import describe_load
from scripts.bench.measuring.process import build_environment
from scripts.bench.peers.sides import Job, Measured, vary, write_trl_dataset
from scripts.bench.report.record import Entry, Record


@dataclass(frozen=True)
class Bench:
    """State shared by all parts of the training benchmark.

    Attributes:
        record: the measurements so far.
        work: folder for run directories, caches and logs.
        peers: folder of the peers' environments.
        root: the checkout.
        job: the job of every side; `rows`, `pairs` and `max_length` are set for each shape.
        threads: CPU threads of every side.
        say: prints a line for the user.
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
        """Measure once in a fresh run directory, unless the record has the result; print the result."""

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

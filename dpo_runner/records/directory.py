"""The run directory and all writes to it."""

import contextlib
import json
import os
import platform
import shutil
import threading
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import yaml

from dpo_runner.config.run_conf import RunConf, config_keys
from dpo_runner.errors import ConfigError, RunBusy, RunError, reason_of
from dpo_runner.io.files import find_fresh_folder, lock, write_json, write_lines, write_text
from dpo_runner.io.masking import mask_override, mask_secrets
from dpo_runner.records.reading import read_metrics, read_status
from dpo_runner.records.status import HEARTBEAT_SECONDS, LOCK_FILE

EVENT_KINDS = ("learning_rate", "eval_loss")
"""Keys present in every log event of training, and of an evaluation."""


def resolve_run_dir(conf: RunConf) -> Path:
    """Return the run's directory: `run_dir`, else a fresh outputs/<run_name>/<timestamp>. Creates nothing."""
    if conf.run_dir is not None:
        return Path(conf.run_dir).expanduser()
    return find_fresh_folder(Path("outputs") / conf.run_name)


class RunDirectory:
    """One run's directory; all writes to it go through this class.

    Args:
        path: the directory; created if missing.

    Raises:
        ConfigError: the directory is not writable.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"
        self.log = path / "run.log"
        self._status: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        with self._writable():
            self.checkpoints.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(f"`run_dir={self.path}`: cannot be written to; {error.strerror}") from None

    @contextmanager
    def claim(self) -> "Iterator[RunDirectory]":
        """Hold the directory's lock, if the file system has locks, so that no other process writes to it.

        Raises:
            RunBusy: another process holds the lock.
            ConfigError: the directory is not writable.
        """
        with self._writable():
            opened = (self.path / LOCK_FILE).open("a")
        with opened as file:
            if not _claims(file):
                raise RunBusy(
                    f"`run_dir={self.path}`: another process is running there; wait for it, or use another run_dir"
                )
            yield self

    def write_config(self, conf: RunConf, overrides: Iterable[str]) -> None:
        text = yaml.safe_dump(mask_secrets(config_keys(conf)), sort_keys=False, allow_unicode=True)
        with self._writable():
            write_text(self.path / "config.yaml", text)
            write_text(self.path / "overrides.yaml", yaml.safe_dump([mask_override(text) for text in overrides]))

    def write_environment(self, environment: dict[str, Any]) -> None:
        write_json(self.path / "environment.json", environment)

    def write_status(self, state: str, **details: Any) -> None:
        """Record `running`, `finished`, `failed` or `interrupted`, and details such as the error.

        A sweep's job is `pending` before it starts, and `pruned` if the search stopped it.

        Raises:
            RunError: status.json cannot be written, for instance because the disk is full.
        """
        with self._lock:
            if state == "running":
                self._status = {"started": _now()}
            else:
                self._stopped.set()  # the run has ended; stop its heartbeat
            place = {"pid": os.getpid(), "host": platform.node()}
            self._status |= {"state": state, **place, "heartbeat": _now(), **details}
            try:
                write_json(self.path / "status.json", self._status)
            except OSError as error:
                raise RunError(f"{self.path / 'status.json'}: cannot be written; {reason_of(error)}") from error

    def write_last_status(self, state: str, **details: Any) -> None:
        """Record the end of a run that did not finish; ignore write errors."""
        with contextlib.suppress(RunError):
            self.write_status(state, **details)

    def note_step(self, step: int) -> None:
        """Record the number of optimizer steps done; the next write of status.json includes it."""
        with self._lock:
            self._status["step"] = step

    def drop_checkpoints(self) -> None:
        """Delete the checkpoints of a run that will not be continued."""
        shutil.rmtree(self.checkpoints)

    def note(self, **details: Any) -> None:
        """Add details to status.json without changing the state."""
        with self._lock:
            self._status |= details
            self._renew_status()

    def _renew_status(self) -> None:  # if this write fails, the run's own writes fail too and report it
        with contextlib.suppress(OSError):
            write_json(self.path / "status.json", self._status)

    def start_heartbeat(self) -> None:
        """Renew `heartbeat` in status.json every few seconds, until the run ends or the process dies."""

        def beat() -> None:
            while not self._stopped.wait(HEARTBEAT_SECONDS):
                with self._lock:
                    self._status["heartbeat"] = _now()
                    self._renew_status()

        self._stopped.clear()
        threading.Thread(target=beat, name="heartbeat", daemon=True).start()

    def stop_heartbeat(self) -> None:
        self._stopped.set()

    def append_metrics(self, metrics: dict[str, Any]) -> None:
        """Append one log event to metrics.jsonl, as one line in one write."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({**metrics, "time": round(time.time(), 3)}) + "\n")

    def keep_metrics_until(self, step: int, logged: Collection[str]) -> None:
        """Drop the log events that a resumed run will log again.

        Args:
            step: the checkpoint's step; later events are dropped.
            logged: the `EVENT_KINDS` logged for `step` before the checkpoint was saved.
        """
        path = self.path / "metrics.jsonl"
        if path.exists():
            again = set(EVENT_KINDS).difference(logged)
            events = [event for event in read_metrics(self.path) if event["step"] <= step]
            kept = [event for event in events if event["step"] < step or not again & event.keys()]
            write_lines(path, map(json.dumps, kept))

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_json(self.path / "summary.json", summary)

    def write_data_report(self, report: dict[str, Any], dropped: Iterable[dict[str, Any]]) -> None:
        """Write the data report, and each row that was left out."""
        write_json(self.path / "data_report.json", report)
        write_lines(
            self.path / "dropped_rows.jsonl", (json.dumps(mask_secrets(row), ensure_ascii=False) for row in dropped)
        )

    def write_samples(self, samples: list[dict[str, Any]]) -> None:
        write_lines(self.path / "samples.jsonl", (json.dumps(sample, ensure_ascii=False) for sample in samples))


def _claims(file: IO[str]) -> bool:
    """Lock a file; retry once, because a status check of another process takes the lock for a moment."""
    for pause in (0.05, 0):
        if lock(file.fileno()) is not False:  # None: no locks; only the heartbeat shows another process
            return True
        time.sleep(pause)
    return False


def update_status(run_dir: Path, **changes: Any) -> None:
    """Change status.json of a run that is not running; create the file and its directory if needed."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / "status.json", {**(read_status(run_dir) or {}), **changes})


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

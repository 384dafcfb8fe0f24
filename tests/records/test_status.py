"""Liveness of a run's process; checking it does not disturb the run."""

import errno
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from dpo_runner.chat import main as chat
from dpo_runner.compare.__main__ import main as compare
from dpo_runner.errors import ConfigError
from dpo_runner.io import files
from dpo_runner.records.directory import RunDirectory, update_status
from dpo_runner.records.reading import read_status
from dpo_runner.records.resume import check_free
from dpo_runner.records.runs import read_runs
from dpo_runner.records.status import LOCK_FILE, find_death, is_process_alive
from dpo_runner.sweep.directory import read_job
from tests.support.processes import HOLD

LONG_AGO = "2020-01-01T00:00:00+00:00"


def now() -> str:
    return datetime.now(UTC).isoformat()


@pytest.fixture
def other(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that holds the run directory r like a running run."""
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def change_status(**changes: Any) -> dict[str, Any]:
    update_status(Path("r"), **changes)
    return read_status(Path("r")) or {}


def test_a_run_is_alive_as_long_as_its_process_whatever_the_clock_says(other: "subprocess.Popen[str]") -> None:
    run_dir = Path("r")
    for heartbeat in (now(), LONG_AGO, "nonsense"):
        assert find_death(run_dir, change_status(heartbeat=heartbeat)) is None
    os.kill(other.pid, signal.SIGSTOP)  # like a suspended laptop
    assert read_job(run_dir).state == "running"
    with pytest.raises(ConfigError, match=f"process {other.pid} is running there"):
        check_free(run_dir, change_status())
    os.kill(other.pid, signal.SIGCONT)

    other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # a zombie keeps its process id
    killed = f"its process, {other.pid}, was killed, or went down with the machine"
    for heartbeat in (now(), LONG_AGO):
        assert find_death(run_dir, change_status(heartbeat=heartbeat)) == killed
    check_free(run_dir, change_status())


def test_everything_that_lists_runs_says_so(other: "subprocess.Popen[str]", capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    other.kill()
    other.wait()
    job = read_job(Path("r"))
    assert job.state == "died" and str(job.error).endswith("with the machine; step 7 is the last that is known of")
    (record,), _ = read_runs([Path("r")])
    assert (record.state, record.error) == ("died", job.error)
    compare(["r", "--json", "runs.json"])
    assert "died" in capsys.readouterr().out
    (row,) = json.loads(Path("runs.json").read_text())["rows"]
    assert row["state"] == "died" and row["runs"][0]["error"] == job.error
    with pytest.raises(SystemExit) as ended:
        chat(["r", "--prompt", "Why?"])
    assert ended.value.code == 2 and "r: the run has died; the command" in capsys.readouterr().err


def test_of_another_host_the_heartbeat_alone_counts(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "r").claim():
        pass
    gone = {"state": "running", "pid": 2**22 + 1, "host": f"not-{platform.node()}"}
    assert find_death(tmp_path / "r", {**gone, "heartbeat": now()}) is None
    assert find_death(tmp_path / "r", {**gone, "heartbeat": LONG_AGO}) == f"no sign of life since {LONG_AGO}"
    here = {**gone, "host": platform.node()}
    assert "was killed" in str(find_death(tmp_path / "r", {**here, "heartbeat": now()}))
    older = {"state": "running", "pid": 2**22 + 1, "heartbeat": now()}  # written by a version that recorded no host
    assert "was killed" in str(find_death(tmp_path / "r", older))


@pytest.mark.parametrize(
    "status",
    [{}, {"pid": "1"}, {"pid": -5}, {"pid": 10**30}, {"pid": [1]}, {"heartbeat": 5}, {"heartbeat": "2020-01-01T00:00"}],
    ids=str,
)
def test_a_status_that_says_nothing_is_no_sign_of_death_and_no_error(status: dict[str, Any], tmp_path: Path) -> None:
    for host in ({}, {"host": platform.node()}, {"host": 7}):
        told = find_death(tmp_path, {"state": "running", **status, **host})
        assert told is None or "heartbeat" not in status
    assert not is_process_alive(-5)


def test_a_lock_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / LOCK_FILE)
    before = time.monotonic()
    find_death(tmp_path, {"pid": 2**22 + 1, "host": platform.node(), "heartbeat": now()})
    assert time.monotonic() - before < 5


def test_who_holds_the_lock_keeps_it_though_it_asks(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "r")
    with directory.claim():
        directory.write_status("running")
        assert find_death(directory.path, read_status(directory.path) or {}) is None
        code = "from pathlib import Path; from dpo_runner.records.directory import RunDirectory\n"
        code += "with RunDirectory(Path('r')).claim(): pass"
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "another process is running there" in second.stderr


def test_who_asks_does_not_keep_a_run_from_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check takes the lock for a moment; a claim in that moment is retried."""
    tried = []
    lockf = files.fcntl.lockf

    def taken_once(file: object, operation: int) -> None:
        tried.append(operation)
        if len(tried) == 1:
            raise BlockingIOError
        lockf(file, operation)

    monkeypatch.setattr(files.fcntl, "lockf", taken_once)
    with RunDirectory(tmp_path / "r").claim():
        assert len(tried) == 2


def test_where_no_file_can_be_locked_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems have no locks; there the heartbeat decides."""

    def refuse(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "lockf", refuse)
    directory = RunDirectory(tmp_path / "r")
    with directory.claim():
        directory.write_status("running")
    status = read_status(tmp_path / "r")
    assert status is not None and find_death(tmp_path / "r", status) is None

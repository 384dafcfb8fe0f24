"""W&B online against a fake server: whole and resumed runs, `wandb sync`, and failures."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from dpo_runner import run
from dpo_runner.config.compose import load_conf
from tests.support.common import make_tiny_run, write_pairs
from tests.support.programs import start_python
from tests.support.wandb_server import API_KEY, Fault, WandbServer

HOLD = """
import pathlib, time
from dpo_runner.training.callbacks.events import RunEvents
def hold(self, args, state, control, **kwargs):
    if state.global_step in {steps} and not pathlib.Path(f"go-{{state.global_step}}").exists():
        pathlib.Path(f"reached-{{state.global_step}}").touch()
        while not pathlib.Path(f"go-{{state.global_step}}").exists():
            time.sleep(0.02)
RunEvents.on_step_begin = hold
"""


_IMPATIENT = 4
"""Timeout in seconds for a server that does not answer, long enough for a normal start."""


class Child:
    """A command as a process.

    Args:
        code: the Python code.
        command: the code's sys.argv.
        environment: variables added to those of this process.
        terminal: the file descriptor of its terminal, if any.
    """

    def __init__(self, code: str, command: list[str], environment: dict[str, str], terminal: int | None = None) -> None:
        self._output = Path("output.txt").absolute()
        with self._output.open("w") as output:
            self._process = start_python(
                *("-c", f"import sys\nsys.argv = {command!r}\n{code}"),
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL if terminal is None else terminal,
                stdout=output if terminal is None else terminal,
                stderr=subprocess.STDOUT,
            )
        self.pid = self._process.pid

    def end(self) -> tuple[int, str]:
        """Wait for the process to end, and return its exit code and output."""
        return self._process.wait(), self._output.read_text()

    def succeed(self) -> str:
        code, printed = self.end()
        assert code == 0, printed
        return printed


class Run(Child):
    """A process with one training run, in r/.

    Args:
        overrides: the run's overrides.
        environment: variables added to those of this process.
        timeout: W&B's timeout in seconds, at the start and at the end.
        hold: step counts at which the run waits for `go`.
        terminal: the file descriptor of its terminal, if any.
    """

    def __init__(
        self,
        overrides: list[str],
        environment: dict[str, str],
        timeout: float = 60,
        hold: tuple[int, ...] = (),
        terminal: int | None = None,
    ) -> None:
        code = "import dpo_runner.__main__\nfrom dpo_runner.records import wandb_run\n"
        code += f"wandb_run._TIMEOUT_SECONDS = {timeout}\n"
        code += (HOLD.format(steps=hold) if hold else "") + "dpo_runner.__main__.main()"
        command = ["dpo_runner", *overrides, "run_dir=r"]
        super().__init__(code, command, environment, terminal)

    def reached(self, step: int) -> None:
        """Wait until `step` steps are done."""
        end = time.monotonic() + 200
        while not Path(f"reached-{step}").exists():
            assert time.monotonic() < end, self._output.read_text()
            time.sleep(0.02)

    def go(self, step: int) -> None:
        Path(f"go-{step}").touch()


def run_wandb(environment: dict[str, str], *arguments: str) -> str:
    """Run the wandb command line and return its output."""
    return Child("import wandb.cli.cli\nwandb.cli.cli.cli()", ["wandb", *arguments], environment).succeed()


@pytest.fixture
def server() -> Iterator[WandbServer]:
    server = WandbServer()
    yield server
    server.stop()


@pytest.fixture
def environment(server: WandbServer, tmp_path: Path) -> dict[str, str]:
    """Variables that point W&B to the server, shorten its HTTP timeout, and hide other API keys."""
    return {
        "HOME": str(tmp_path),
        "WANDB_BASE_URL": server.url,
        "WANDB_API_KEY": API_KEY,
        "WANDB_HTTP_TIMEOUT": "2",
    }


@pytest.fixture
def online(tiny_run: list[str]) -> list[str]:
    return [*tiny_run, "wandb=online", "wandb.project=mine"]


def read_logged() -> list[dict[str, float]]:
    """Return the numeric values of the events in metrics.jsonl."""
    lines = Path("r/metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if isinstance(value, (int, float))} for line in lines
    ]


def as_events(history: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Return W&B's train and eval rows in the form of metrics.jsonl."""
    events = []
    for row in history:
        named = {key: value for key, value in row.items() if re.match("(train|eval)/", key)}
        event = {key.replace("eval/", "eval_").removeprefix("train/"): value for key, value in named.items()}
        event["step"] = event.pop("global_step", None)
        if len(event) > 1:
            events.append(event)
    return events


def without_time(events: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in event.items() if key != "time"} for event in events]


def read_local() -> list[dict[str, float]]:
    """Return the events in the local .wandb files, oldest file first, read with W&B's own reader."""
    history = []
    for file in sorted(Path("r/wandb").glob("*run-*/*.wandb"), key=lambda file: file.parent.name.split("run-")[1]):
        printed = run_wandb({}, "leet", "inspect", "--json", str(file))
        records = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
        history += [record["history"]["item"] for record in records if record["type"] == "history"]
    return as_events(history)


def read_status() -> dict[str, Any]:
    return dict(json.loads(Path("r/status.json").read_text()))


def sync(printed: str, environment: dict[str, str]) -> None:
    """Run the last `wandb sync` command that a run printed."""
    command = shlex.split(re.findall("wandb sync .*", printed)[-1])
    run_wandb(environment, *command[1:])


def tell_warnings(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("warning:")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of the run without W&B."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run(load_conf([*make_tiny_run(write_pairs(folder)), f"run_dir={folder / 'r'}"]))
    return (folder / "r" / "adapter" / "adapter_model.safetensors").read_bytes()


def assert_untouched(undisturbed: bytes) -> None:
    """Check that the run is the same as without W&B: finished, same weights, no row lost."""
    assert Path("r/adapter/adapter_model.safetensors").read_bytes() == undisturbed
    assert read_status()["state"] == "finished"
    steps = [event["step"] for event in read_logged() if "loss" in event]
    assert steps == [1, 2, 3, 4]


def test_an_online_run_is_on_the_server_whole(
    server: WandbServer, environment: dict[str, str], online: list[str]
) -> None:
    printed = Run(online, environment).succeed()
    run = server.only_run()
    assert as_events(run.history) == without_time(read_logged()) == read_local()
    assert run.variables["project"] == "mine" and run.config["training"]["per_device_train_batch_size"] == 2
    assert run.config["data_report"]["splits"]
    assert run.summary["after/eval_loss"] == json.loads(Path("r/summary.json").read_text())["after"]["eval_loss"]
    assert (run.complete, run.exit_code) == (True, 0)
    table = next(json.loads(file) for name, file in run.files.items() if name.endswith("table.json"))
    assert table["columns"][:3] == ["prompt", "before", "after"] and len(table["data"]) == 2
    assert read_status()["wandb"].startswith(f"online at {server.url}")
    assert "wandb leet" in printed and "wandb sync" not in printed
    assert "warning" not in printed and "wandb:" not in printed  # W&B prints nothing on the terminal


def test_a_resumed_online_run_goes_on_where_it_was(
    server: WandbServer, environment: dict[str, str], online: list[str]
) -> None:
    run = Run(online, environment, hold=(3,))
    run.reached(3)
    os.kill(run.pid, signal.SIGTERM)
    run.go(3)
    assert run.end()[0] == 128 + signal.SIGTERM
    first = as_events(server.only_run().history)
    assert first and server.only_run().exit_code == 128 + signal.SIGTERM
    printed = Run(online, environment).succeed()
    stored = server.only_run()
    assert as_events(stored.history)[: len(first)] == first
    assert [event for event in without_time(read_logged()) if event not in as_events(stored.history)] == []
    steps = [row["_step"] for row in stored.history]
    assert steps == sorted(set(steps))
    assert stored.exit_code == 0 and "wandb sync" not in printed


@pytest.mark.parametrize(
    "fault",
    [
        "no answer",
        "401",
        "key unknown",
        *(pytest.param(fault, marks=pytest.mark.slow) for fault in ("500", "closed port")),
    ],
)
def test_without_a_server_at_the_start_the_run_is_recorded_offline(
    server: WandbServer, environment: dict[str, str], online: list[str], undisturbed: bytes, fault: Fault
) -> None:
    server.fail(fault)
    printed = Run(online, environment, _IMPATIENT).succeed()
    (told,) = tell_warnings(printed)
    assert re.search("W&B did not start: .+; the run is recorded offline instead", told)
    assert_untouched(undisturbed)
    assert re.match("offline: .+", read_status()["wandb"]) and read_status()["state"] == "finished"
    assert len(list(Path("r/wandb").glob("*run-*"))) == 1  # the failed start left no files
    assert without_time(read_logged()) == read_local()
    assert not server.runs
    server.recover()
    sync(printed, environment)
    assert as_events(server.only_run().history) == without_time(read_logged())
    assert server.only_run().exit_code == 0


@pytest.mark.parametrize(
    "fault",
    ["500 for rows", "answer lost", *(pytest.param(fault, marks=pytest.mark.slow) for fault in ("401", "closed port"))],
)
def test_a_server_that_is_lost_on_the_way_costs_nothing(
    server: WandbServer, environment: dict[str, str], online: list[str], undisturbed: bytes, fault: Fault
) -> None:
    # Without an answer W&B retries the samples' table for 20 seconds: one of the two cases is enough.
    samples = fault != "answer lost"
    run = Run(online if samples else [*online, "samples.num_prompts=0"], environment, _IMPATIENT, hold=(2,))
    run.reached(2)
    server.fail(fault)
    lost = time.monotonic()
    run.go(2)
    printed = run.succeed()
    assert time.monotonic() - lost < 200  # W&B would retry for a week by default
    (told,) = tell_warnings(printed)
    assert "W&B does not have all of this run" in told and "; the rest is uploaded by wandb sync " in told
    assert_untouched(undisturbed)
    assert "does not have all of it" in read_status()["wandb"] and read_status()["state"] == "finished"
    assert without_time(read_logged()) == read_local()
    server.recover()
    sync(printed, environment)
    stored = server.only_run()
    assert [event for event in without_time(read_logged()) if event not in as_events(stored.history)] == []
    assert stored.exit_code == 0 and ("samples" in stored.summary) is samples


def test_a_run_that_began_offline_and_went_on_online_is_uploaded_whole(
    server: WandbServer, environment: dict[str, str], online: list[str]
) -> None:
    server.fail("401")
    run = Run(online, environment, hold=(3,))
    run.reached(3)
    os.kill(run.pid, signal.SIGTERM)
    run.go(3)
    assert run.end()[0] == 128 + signal.SIGTERM and not server.runs
    server.recover()
    printed = Run(online, environment).succeed()
    assert read_status()["wandb"] == f"online at {server.url}/me/mine/runs/{Path('r/wandb/run_id.txt').read_text()}"
    sync(printed, environment)
    stored = server.only_run()
    assert [event for event in without_time(read_logged()) if event not in as_events(stored.history)] == []
    assert stored.exit_code == 0 and (stored.summary["state"], stored.summary["steps"]) == ("finished", 4)


def test_a_server_that_comes_back_gets_everything(
    server: WandbServer, environment: dict[str, str], online: list[str]
) -> None:
    run = Run(online, environment, timeout=20, hold=(1, 3))
    run.reached(1)
    server.fail("closed port")
    run.go(1)
    run.reached(3)
    server.recover()
    run.go(3)
    printed = run.succeed()
    assert as_events(server.only_run().history) == without_time(read_logged())
    assert server.only_run().exit_code == 0 and "wandb sync" not in printed
    assert "have all of" not in read_status()["wandb"]


def test_a_slow_server_gets_everything(server: WandbServer, environment: dict[str, str], online: list[str]) -> None:
    server.fail("slow")
    server.delay = 0.1
    printed = Run(online, environment).succeed()
    assert as_events(server.only_run().history) == without_time(read_logged())
    assert server.only_run().exit_code == 0 and "wandb sync" not in printed


@pytest.mark.parametrize("terminal", [False, True])
def test_without_a_key_the_run_is_recorded_offline(
    server: WandbServer, environment: dict[str, str], online: list[str], terminal: bool
) -> None:
    keyless = {key: value for key, value in environment.items() if key != "WANDB_API_KEY"}
    if not terminal:
        printed = Run(online, keyless).succeed()
        assert "W&B did not start: No API key configured" in printed and "recorded offline instead" in printed
    else:  # on a terminal W&B would prompt for a key and wait
        ours, theirs = os.openpty()
        run = Run(online, keyless, terminal=theirs)
        text = read_all(ours, run, theirs)
        assert "No API key configured" in text and "recorded offline instead" in text
    assert read_status()["wandb"].startswith("offline: No API key configured")
    assert without_time(read_logged()) == read_local()
    assert not server.operations


def read_all(ours: int, run: Run, theirs: int) -> str:
    """Return all output of a run on its terminal."""
    pieces: list[bytes] = []

    def read() -> None:
        try:
            while piece := os.read(ours, 1024):
                pieces.append(piece)
        except OSError:  # the other end is closed
            pass

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    impatience = threading.Timer(120, os.kill, (run.pid, signal.SIGKILL))  # for a run that waits at a prompt
    impatience.start()
    code, _ = run.end()
    impatience.cancel()
    os.close(theirs)
    reader.join(timeout=10)
    text = re.sub(r"\s+", " ", b"".join(pieces).decode())
    assert code == 0, text
    return text


@pytest.mark.parametrize("mode", [pytest.param("offline", marks=pytest.mark.slow), "online"])
def test_a_killed_run_loses_its_last_two_seconds_at_most(
    server: WandbServer, environment: dict[str, str], tiny_run: list[str], mode: str
) -> None:
    overrides = [*tiny_run, f"wandb={mode}"]
    run = Run(overrides, environment, hold=(2, 3))
    run.reached(2)
    time.sleep(5.5)  # two seconds, and time for a busy machine to write
    run.go(2)
    run.reached(3)
    killed = time.time()
    os.kill(run.pid, signal.SIGKILL)
    assert run.end()[0] == -signal.SIGKILL
    old = without_time([event for event in read_logged() if event["time"] < killed - 5])
    assert {event["step"] for event in old} >= {0, 1, 2}
    assert [event for event in old if event not in read_local()] == []
    identity = Path("r/wandb/run_id.txt").read_text()

    run = Run(overrides, environment)
    printed = run.succeed()
    assert Path("r/wandb/run_id.txt").read_text() == identity
    assert len(list(Path("r/wandb").glob("*run-*/*.wandb"))) == 2
    sync(printed, environment)
    stored = server.only_run()
    assert [event for event in without_time(read_logged()) if event not in as_events(stored.history)] == []
    assert list(server.runs) == [identity] and stored.exit_code == 0
    assert stored.summary["steps"] == 4


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_wandbs_own_process_may_be_killed(
    environment: dict[str, str], tiny_run: list[str], undisturbed: bytes, mode: str
) -> None:
    run = Run([*tiny_run, f"wandb={mode}"], environment, _IMPATIENT, hold=(2,))
    run.reached(2)
    services = [child for child in psutil.Process(run.pid).children(recursive=True) if "wandb" in child.name()]
    assert services
    for service in services:
        service.kill()
    killed = time.monotonic()
    run.go(2)
    printed = run.succeed()
    assert time.monotonic() - killed < 60
    # Online the end has its own line, which names the upload; an event before it may already have failed.
    assert 1 <= len(tell_warnings(printed)) <= (2 if mode == "online" else 1) and "Traceback" not in printed, printed
    assert_untouched(undisturbed)


def test_a_folder_of_wandbs_that_disappears_costs_nothing(
    environment: dict[str, str], tiny_run: list[str], undisturbed: bytes
) -> None:
    run = Run([*tiny_run, "wandb=offline"], environment, _IMPATIENT, hold=(2,))
    run.reached(2)
    shutil.rmtree("r/wandb")
    run.go(2)
    printed = run.succeed()
    assert len(tell_warnings(printed)) <= 1 and "Traceback" not in printed, printed
    assert_untouched(undisturbed)


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_a_folder_that_cannot_be_made_costs_nothing(
    environment: dict[str, str], tiny_run: list[str], undisturbed: bytes, mode: str
) -> None:
    Path("taken").touch()
    printed = Run([*tiny_run, f"wandb={mode}", "wandb.dir=taken/w"], environment, _IMPATIENT).succeed()
    (told,) = tell_warnings(printed)
    assert re.fullmatch("warning: W&B did not start: Not a directory .*; the run goes on without it", told)
    assert read_status()["wandb"].startswith("disabled: Not a directory")
    assert_untouched(undisturbed)

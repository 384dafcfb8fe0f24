"""W&B's own sweeps: the committed example with W&B's formatter and agent, and the run's part."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from dpo_runner.config.compose import load_conf
from dpo_runner.errors import ConfigError
from tests.support.programs import quick_python, run_python
from tests.support.wandb_server import API_KEY, WandbServer

EXAMPLE = Path(__file__).parents[2] / "scripts" / "wandb_sweep.yaml"


class SweepServer(WandbServer):
    """Server that hands out one run of a sweep, then nothing."""

    def __init__(self, sweep: dict[str, Any], values: dict[str, Any]) -> None:
        self.sweep, self.values = sweep, values
        super().__init__()

    def _query(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        if operation == "SweepWithRuns":
            return {
                "project": {
                    "sweep": {"id": "i", "name": "s1", "config": yaml.safe_dump(self.sweep), "runs": {"edges": []}}
                }
            }
        if operation == "CreateAgent":
            return {"createAgent": {"agent": {"id": "agent"}}}
        if operation == "Heartbeat":
            args = {key: {"value": value} for key, value in self.values.items()}
            command = {"type": "run", "run_id": "chosen01", "program": self.sweep["program"], "args": args}
            commands = [] if "chosen01" in json.loads(variables["runState"]) or self.runs else [command]
            return {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": json.dumps(commands)}}
        return super()._query(operation, variables)


def read_example() -> dict[str, Any]:
    example = yaml.safe_load(EXAMPLE.read_text())
    assert isinstance(example, dict)
    return example


def format_arguments(values: dict[str, Any]) -> list[str]:
    """Return the arguments that W&B's agent substitutes for `${args_no_hyphens}`."""
    formatted = create_sweep_command_args({"args": {key: {"value": value} for key, value in values.items()}})
    texts = formatted["args_no_hyphens"]
    assert isinstance(texts, list)
    return texts


def test_the_example_composes_at_both_ends_of_its_space(monkeypatch: pytest.MonkeyPatch) -> None:
    example = read_example()
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    command = create_sweep_command(list(example["command"]))
    assert command[:4] == ["${env}", "${interpreter}", "-m", "dpo_runner"] and command[-1] == "${args_no_hyphens}"
    for end in (0, -1):
        values = {
            key: space["values"][end] if "values" in space else (space["min"], space["max"])[end]
            for key, space in example["parameters"].items()
        }
        conf = load_conf([*command[4:-1], *format_arguments(values)])
        assert (conf.wandb.mode, conf.run_dir) == ("online", "outputs/wandb_sweep/abc")
        assert (conf.training.beta, conf.training.learning_rate) == (
            values["training.beta"],
            values["training.learning_rate"],
        )
        assert conf.lora is not None and conf.lora.r == values["lora.r"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training.learning_rate", 1.2345678901234567e-05),
        ("training.gradient_checkpointing", True),
        ("training.loss_type", ["sigmoid", "sft"]),
        ("lora.target_modules", ["q_proj", "v_proj"]),
        ("training.max_length", 2**10),
    ],
)
def test_values_of_every_kind_arrive_as_they_were(key: str, value: Any) -> None:
    conf: Any = load_conf(["model=tiny_random", *format_arguments({key: value})])
    section, name = key.split(".")
    assert getattr(getattr(conf, section), name) == value


def test_null_and_texts_that_are_not_plain_are_quoted_there() -> None:
    """W&B's formatter uses Python's `str`: Hydra would read `None` as a text and a comma as a list."""
    assert load_conf(["model=tiny_random", *format_arguments({"data.path": "'a, b.jsonl'"})]).data.path == "a, b.jsonl"
    assert (
        load_conf(["model=tiny_random", *format_arguments({"training.max_length": "null"})]).training.max_length is None
    )
    with pytest.raises(ConfigError, match="must be a whole number"):
        load_conf(format_arguments({"training.max_length": None}))


@pytest.fixture
def server() -> Iterator[SweepServer]:
    server = SweepServer(read_example(), {"training.beta": 0.37, "training.learning_rate": 2e-05, "lora.r": 8})
    yield server
    server.stop()


def start_agent(server: SweepServer, folder: Path, *further: str) -> subprocess.CompletedProcess[str]:
    """Run W&B's own agent, with `further` overrides that shorten its run."""
    server.sweep["command"][-1:-1] = further
    command = [sys.executable, "-m", "wandb", "agent", "--count", "1", "me/theirs/s1"]
    with quick_python() as quick:
        env = {**quick, "WANDB_BASE_URL": server.url, "WANDB_API_KEY": API_KEY}
        return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True, timeout=300)


def test_a_run_of_their_agent_is_the_run_that_their_server_has_made(
    server: SweepServer, tiny_run: list[str], tmp_path: Path
) -> None:
    short = [text for text in tiny_run if not text.startswith("wandb")]
    agent = start_agent(server, tmp_path, *short)
    run = server.runs.get("chosen01")
    assert run is not None and set(server.runs) == {"chosen01"}, agent.stderr
    assert (run.variables["project"], run.variables["entity"], run.variables["sweep"]) == ("theirs", "me", "s1")
    assert run.exit_code == 0 and run.summary["state"] == "finished"
    assert run.config["training"]["beta"] == 0.37 and run.config["lora"]["r"] == 8
    assert run.summary[server.sweep["metric"]["name"]] == run.summary["objective"]
    run_dir = tmp_path / "outputs" / "wandb_sweep" / "chosen01"
    assert (run_dir / "wandb" / "run_id.txt").read_text() == "chosen01"
    status = json.loads((run_dir / "status.json").read_text())
    assert status["state"] == "finished" and status["wandb"].startswith(f"online at {server.url}/me/theirs/")


START = """
from pathlib import Path
import dpo_runner.records.wandb_run
from dpo_runner.records.directory import RunDirectory
from dpo_runner.config.compose import load_conf
from dpo_runner.records.tracking import track

dpo_runner.records.wandb_run._TIMEOUT_SECONDS = 3
with track(load_conf(["wandb=online"]), RunDirectory(Path("r")), print) as tracker:
    tracker.log({"step": 1, "loss": 0.5})
"""


def test_a_run_that_their_server_refuses_is_recorded_under_the_id_that_it_gave(
    server: SweepServer, tmp_path: Path
) -> None:
    env = {
        **os.environ,
        **{"WANDB_BASE_URL": server.url, "WANDB_API_KEY": API_KEY, "WANDB_HTTP_TIMEOUT": "2"},
        **{"WANDB_SWEEP_ID": "s1", "WANDB_RUN_ID": "chosen01", "WANDB_PROJECT": "theirs", "WANDB_ENTITY": "me"},
    }
    server.fail("401")
    printed = run_python("-c", START, env=env).stdout
    assert printed.count("W&B did not start") == 1 and "the run is recorded offline instead" in printed
    assert json.loads((tmp_path / "r" / "status.json").read_text())["wandb"].startswith("offline: ")
    (part,) = (tmp_path / "r" / "wandb").glob("*run-*-chosen01")
    server.recover()
    assert run_python("-m", "wandb", "sync", str(part), env=env).returncode == 0
    run = server.runs["chosen01"]
    assert (set(server.runs), run.variables["sweep"], run.exit_code) == ({"chosen01"}, "s1", 0)
    assert run.history[0]["train/loss"] == 0.5 and run.summary["state"] == "finished"


def test_a_run_that_their_server_cannot_see_says_so(tiny_run: list[str], tmp_path: Path) -> None:
    code = (
        f"from dpo_runner import load_conf, run\nrun(load_conf({[*tiny_run, 'run_dir=r', 'training.max_steps=1']!r}))"
    )
    env = {**os.environ, "WANDB_SWEEP_ID": "s1", "WANDB_RUN_ID": "chosen01"}
    printed = run_python("-c", code, env=env).stdout
    assert "warning: wandb.mode=disabled: W&B's sweep sees nothing of this run; add wandb=online" in printed

"""The saved comparison view: what is posted to W&B, and errors if there is nothing to post."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

import dpo_runner.workspace
from dpo_runner.sweep.directory import SweepRecord
from dpo_runner.workspace import main, read_view
from tests.support.common import run_main
from tests.support.programs import run_python
from tests.support.run_folders import write_run
from tests.support.wandb_server import API_KEY, WandbServer


class ViewServer(WandbServer):
    """A W&B server that also accepts views."""

    def __init__(self) -> None:
        self.views: list[dict[str, Any]] = []
        super().__init__()

    def _query(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        if operation == "GetDefaultEntity":
            return {"viewer": {"id": "v", "entity": "me"}}
        if operation == "UpsertView2":
            self.views.append(variables)
            return {"upsertView": {"view": {"id": "view", "name": variables["name"]}, "inserted": True}}
        return super()._query(operation, variables)


@pytest.fixture(scope="module")
def server() -> Iterator[ViewServer]:
    server = ViewServer()
    yield server
    server.stop()


def write_sweep(path: Path, *points: dict[str, Any], objective: str = "eval_rewards/margins", **wandb: Any) -> Path:
    """Write a sweep of runs that have begun, with these settings."""
    tracked = {"mode": "offline", "project": "mine", "entity": None, "group": path.name, "dir": str(path), **wandb}
    sweep = {"search": {"objective": objective, "direction": None}}
    for index, point in enumerate(points):
        write_run(path / f"{index}-0123456{index}", wandb=tracked, sweep=sweep, **point)
    path.mkdir(exist_ok=True)
    (path / "sweep.json").write_text(json.dumps(SweepRecord(1).__dict__))
    return path


def save(sweep: Path, server: ViewServer, **environment: str) -> tuple[int, str, str]:
    """Run the command in a separate process, because W&B keeps server and key for a process's life."""
    server.views.clear()
    env = {**os.environ, "WANDB_BASE_URL": server.url, "HOME": str(sweep), **environment}
    result = run_python("-m", "dpo_runner.workspace", str(sweep), env=env)
    return result.returncode, result.stdout, result.stderr


def list_panels(spec: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    sections = spec["section"]["panelBankConfig"]["sections"]
    return [panel["config"] for section in sections for panel in section["panels"] if panel["viewType"] == kind]


def test_the_view_compares_what_differs_by_what_the_sweep_seeks(server: ViewServer, tmp_path: Path) -> None:
    points = [{"training__beta": beta, "lora__r": r, "seed": 3} for beta in (0.05, 0.5) for r in (8, 16)]
    sweep = write_sweep(tmp_path / "beta_r", *points, entity="team")
    code, out, err = save(sweep, server, WANDB_API_KEY=API_KEY)
    assert (code, err) == (0, "")
    (posted,) = server.views
    assert (posted["entityName"], posted["projectName"], posted["displayName"]) == ("team", "mine", "beta_r")
    view_id = posted["name"].removeprefix("nw-").removesuffix("-v")
    assert out == f"saved  {server.url}/team/mine?nw={view_id}\n"
    spec = json.loads(posted["spec"])

    (coordinates,) = list_panels(spec, "Parallel Coordinates Plot")
    assert coordinates["columns"] == [
        {"accessor": "config:lora.value.r", "displayName": "r"},
        {"accessor": "config:training.value.beta", "displayName": "beta", "log": True},
        {"accessor": "summary:objective", "displayName": "eval_rewards/margins"},
    ]
    assert [panel["targetKey"] for panel in list_panels(spec, "Parameter Importance")] == ["objective"]
    assert [(panel["xAxis"], panel["yAxis"]) for panel in list_panels(spec, "Scatter Plot")] == [
        ("config:lora.value.r", "summary:objective"),
        ("config:training.value.beta", "summary:objective"),
    ]
    curves = list_panels(spec, "Run History Line Plot")
    assert [curve["metrics"] for curve in curves] == [
        ["train/loss"],
        ["eval/rewards/accuracies"],
        ["eval/rewards/margins"],
    ]
    assert {curve["xAxis"] for curve in curves} == {"train/global_step"}
    assert list_panels(spec, "Run Comparer") == [{"diffOnly": True}]

    (runs,) = spec["section"]["runSets"]
    assert runs["sort"]["keys"] == [{"key": {"section": "summary", "name": "objective"}, "ascending": False}]
    assert runs["runFeed"]["columnOrder"] == [
        *("run:displayName", "config:lora.value.r", "config:training.value.beta"),
        *("summary:objective", "summary:state"),
    ]
    assert spec["section"]["settings"]["shouldAutoGeneratePanels"] is False


@pytest.mark.parametrize("group", ["plain", "lr=1e-4", "a<b>c", "it's \"quoted\" and 'more'", "schön ★"])
def test_the_view_shows_the_runs_of_its_sweep_alone(server: ViewServer, tmp_path: Path, group: str) -> None:
    sweep = write_sweep(tmp_path / "s", {"seed": 1}, {"seed": 2}, group=group, objective="eval_loss")
    code, _, err = save(sweep, server, WANDB_API_KEY=API_KEY)
    assert code == 0, err
    assert server.views[0]["entityName"] == "me"  # the account's default
    (runs,) = json.loads(server.views[0]["spec"])["section"]["runSets"]
    (only,) = runs["filters"]["filters"]
    assert (only["key"], only["op"], only["value"]) == ({"section": "run", "name": "group"}, "=", group)
    assert runs["sort"]["keys"][0]["ascending"] is True


def test_what_the_server_lacks_is_told_with_the_command_that_uploads_it(server: ViewServer, tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "s", {"seed": 1}, {"seed": 2})
    part = sweep / "wandb" / "offline-run-20260101_000000-0a0b0c0d"
    part.mkdir(parents=True)
    (part / "run-0a0b0c0d.wandb").write_bytes(b":W&B\xe1\xbe\x00 and a record")
    _, out, _ = save(sweep, server, WANDB_API_KEY=API_KEY)
    assert out.splitlines()[1] == f"runs that the server lacks appear there after  wandb sync {sweep}/wandb"
    status = sweep / "1-01234561" / "status.json"
    ended = status.read_text()
    status.write_text(json.dumps({"state": "running", "pid": os.getpid(), "heartbeat": datetime.now(UTC).isoformat()}))
    _, out, _ = save(sweep, server, WANDB_API_KEY=API_KEY)
    assert out.splitlines()[1].startswith("the sweep is still running") and "wandb sync" not in out
    status.write_text(ended)
    (part / "run-0a0b0c0d.wandb.synced").touch()
    _, out, _ = save(sweep, server, WANDB_API_KEY=API_KEY)
    assert len(out.splitlines()) == 1


def test_no_key_and_a_refused_one_are_told_in_a_line(server: ViewServer, tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "s", {"seed": 1}, {"seed": 2})
    code, out, err = save(sweep, server)
    assert (code, out) == (1, "")
    assert err == "error: W&B did not take the view: No API key configured. Use `wandb login` to log in.\n"
    server.fault = "key unknown"
    code, out, err = save(sweep, server, WANDB_API_KEY=API_KEY)
    server.fault = "none"
    assert (code, out, server.views) == (1, "", [])
    assert err.startswith("error: W&B cannot be reached, or not with this key (`wandb login`)") and err.count("\n") == 1


@pytest.mark.slow
def test_a_server_that_is_not_there_is_told_in_a_line(tmp_path: Path) -> None:
    absent = ViewServer()
    absent.stop()
    sweep = write_sweep(tmp_path / "s", {"seed": 1}, {"seed": 2})
    code, out, err = save(sweep, absent, WANDB_API_KEY=API_KEY)
    assert (code, out) == (1, "")
    assert err.startswith("error: W&B cannot be reached") and err.count("\n") == 1


def test_where_there_is_nothing_to_compare_the_command_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run")
    write_sweep(tmp_path / "same", {"seed": 1})
    write_sweep(tmp_path / "untracked", {"seed": 1}, {"seed": 2}, mode="disabled")
    write_sweep(tmp_path / "new")
    told = {
        "run": "is not a sweep's directory (no sweep.json)",
        "absent": "is not a sweep's directory",
        "same": "nothing differs between the runs that have begun, 1 of them",
        "untracked": "its runs were not recorded by W&B (wandb=disabled)",
        "new": "none of its runs has begun",
    }
    for name, words in told.items():
        assert run_main(main, str(tmp_path / name)) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {tmp_path / name}: ") and words in said and said.count("\n") == 1


def test_without_the_library_the_command_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def find(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(dpo_runner.workspace, "version", find)
    assert run_main(main, str(write_sweep(tmp_path / "s", {"seed": 1}, {"seed": 2}))) == 2
    extras = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    wanted = re.search(r'workspace = \["(.*)"\]', extras)
    assert wanted is not None and f"pip install '{wanted[1]}'" in capsys.readouterr().err


def test_a_view_is_read_without_w_and_b(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "s", {"training__learning_rate": 1e-5}, {"training__learning_rate": 3e-5})
    view = read_view(sweep)
    assert (view.settings, view.logarithmic, view.folder) == (["training.learning_rate"], set(), sweep / "wandb")
    code = "import sys, dpo_runner.workspace\nassert not {'torch', 'wandb', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

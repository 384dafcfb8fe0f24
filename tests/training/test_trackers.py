"""training.report_to: transformers' callbacks with the real packages, offline."""

import importlib.util
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo_runner import run
from dpo_runner.config.compose import load_conf
from dpo_runner.config.rules.training import list_trackers
from dpo_runner.errors import ConfigError, RunInterrupted
from dpo_runner.evaluate.settings import compose
from dpo_runner.records.reading import read_metrics
from dpo_runner.sweep.command_line import check_command_line
from dpo_runner.sweep.points import digest_config

SECRET = "hf_" + "a1B2" * 8
Points = set[tuple[str, int, float]]


def read_tensorboard(folder: Path) -> list[Points]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    return [{(tag, point.step, point.value) for tag in tags for point in events.Scalars(tag)}]


def read_mlflow(folder: Path) -> list[Points]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder.absolute()}/mlflow.db")
    runs = client.search_runs(["0"])
    assert {found.info.status for found in runs} == {"FINISHED"}
    assert all(found.data.params["beta"] == "0.1" and found.data.params["lora.r"] == "16" for found in runs)
    return [
        {
            (f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}", p.step, p.value)
            for name in found.data.metrics
            for p in client.get_metric_history(found.info.run_id, name)
        }
        for found in runs
    ]


def read_trackio(folder: Path) -> list[Points]:
    import sqlite3

    [database] = (folder / "trackio").glob("*.db")
    rows = sqlite3.connect(database).execute("SELECT run_name, metrics FROM metrics ORDER BY id").fetchall()
    runs: dict[str, Points] = {}
    for name, text in rows:
        logged = json.loads(text)
        step = logged.pop("train/global_step")
        runs.setdefault(name, set()).update((key, step, value) for key, value in logged.items())
    return list(runs.values())


READ: dict[str, Callable[[Path], list[Points]]] = {
    "tensorboard": read_tensorboard,
    "mlflow": read_mlflow,
    "trackio": read_trackio,
}


def list_points(folder: Path) -> Points:
    """Return what metrics.jsonl has, under transformers' names."""
    return {
        (f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}", event["step"], value)
        for event in read_metrics(folder)
        for key, value in event.items()
        if key not in ("step", "time") and isinstance(value, (int, float))
    }


def near(points: Points) -> Points:
    """Return the values as TensorBoard keeps them."""
    return {(name, step, float(np.float32(value))) for name, step, value in points}


@pytest.fixture(params=list(READ))
def tracker(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(request.param)
    return request.param


def test_a_tracker_has_the_events_of_metrics_jsonl_also_after_a_stop(tracker: str, tiny_run, tmp_path: Path) -> None:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    overrides = [*tiny_run, f"training.report_to=[{tracker}]", "run_dir=r", f"data.system_prompt={SECRET}"]
    environment = dict(os.environ)
    with pytest.raises(RunInterrupted):
        run(load_conf(overrides), callbacks=[Stop()])
    assert run(load_conf(overrides)) is not None
    assert dict(os.environ) == environment
    [found] = READ[tracker](tmp_path / "r")
    assert near(list_points(tmp_path / "r")) <= near(found)
    assert {step for name, step, _ in found if name == "eval/loss"} >= {0, 4}
    everything = b"".join(path.read_bytes() for path in (tmp_path / "r").rglob("*") if path.is_file())
    assert SECRET.encode() not in everything


@pytest.mark.parametrize("tracker", ["mlflow", "trackio"], indirect=True)
def test_runs_of_one_process_keep_apart_and_those_of_a_sweep_share_a_folder(tracker: str, tiny_run) -> None:
    short = [*tiny_run, f"training.report_to={tracker}", "training.max_steps=1", "samples.num_prompts=0"]
    for name in ("0-aaaaaaaa", "1-bbbbbbbb"):
        run(load_conf([*short, f"run_dir=sweep/{name}", "wandb.dir=sweep"]))
    run(load_conf([*short, "run_dir=alone"]))
    assert len(READ[tracker](Path("sweep"))) == 2
    [alone] = READ[tracker](Path("alone"))
    assert near(list_points(Path("alone"))) <= near(alone)


def test_a_tracker_that_fails_is_told_once_and_the_run_goes_on(
    tiny_run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "flush", fail)
    monkeypatch.setattr(SummaryWriter, "close", fail)
    summary = run(load_conf([*tiny_run, "training.report_to=tensorboard", "run_dir=r"]))
    assert summary is not None and summary["steps"] == 4
    printed = capsys.readouterr().out
    assert printed.count("tensorboard: ") == 1 and "No space left on device; the run goes on" in printed


def test_what_cannot_be_followed_is_one_line_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    elsewhere, find = load_conf(["training.report_to=mlflow"]), importlib.util.find_spec
    monkeypatch.setattr(
        "dpo_runner.config.rules.training.find_spec", lambda name: None if name == "mlflow" else find(name)
    )
    missing = "`training.report_to=mlflow`: is not installed; pip install mlflow-skinny sqlalchemy alembic"
    with pytest.raises(ConfigError) as error:
        load_conf(["training.report_to=[mlflow]"])
    assert error.value.mistakes == [missing]
    assert check_command_line(["-m", "training.beta=0.1,0.2", "training.report_to=[mlflow]"]) == [missing]
    assert compose(elsewhere, []).training.report_to == "none", "an evaluation needs no tracker of the run"
    [line] = check_command_line(["training.report_to=wandb"])
    assert "`wandb=online`" in line
    [_, line] = check_command_line(["training.report_to=[none,tensorbord]"])
    assert "did you mean `tensorboard`?" in line
    assert list_trackers(load_conf(["training.report_to=none"]).training) == []
    assert digest_config(elsewhere) == digest_config(load_conf([])), "a sweep goes on with other trackers"

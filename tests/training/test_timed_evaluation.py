"""Setting the system clock during a run changes neither durations nor the run's state."""

import io
import os
import re
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import TrainerCallback

from dpo_runner import run
from dpo_runner.config.compose import load_conf
from dpo_runner.errors import ConfigError
from dpo_runner.io.console import RunConsole
from dpo_runner.records import directory as artifacts
from dpo_runner.records.directory import RunDirectory
from dpo_runner.records.reading import read_metrics
from dpo_runner.records.status import find_death
from dpo_runner.training.trainer import RunTrainer

DAY = 86_400


@pytest.mark.parametrize("jump", [-DAY, DAY])
def test_durations_do_not_go_by_the_time_of_day(
    jump: int, tiny_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    offset, now = [0], time.time
    monkeypatch.setattr(time, "time", lambda: now() + offset[0])
    loop = RunTrainer.evaluation_loop

    def set_the_clock(self: Any, *args: Any, **kwargs: Any) -> Any:
        offset[0] += jump
        return loop(self, *args, **kwargs)

    class InStep(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            offset[0] += jump

    monkeypatch.setattr(RunTrainer, "evaluation_loop", set_the_clock)
    text = io.StringIO()
    overrides = [*tiny_run, "training.max_steps=2", "samples.num_prompts=0", "run_dir=r"]
    console = RunConsole(Console(file=text, width=200))
    summary = run(load_conf(overrides), console=console, callbacks=[InStep()])
    assert summary is not None and 0 < summary["train_runtime"] < 300 and summary["pairs_per_second"] > 0
    evaluations = [event for event in read_metrics(Path("r")) if "eval_loss" in event]
    assert len(evaluations) >= 2
    for event in evaluations:
        assert 0 < event["eval_runtime"] < 300
        assert event["eval_samples_per_second"] == pytest.approx(3 / event["eval_runtime"], rel=0.01)
        assert event["eval_steps_per_second"] == pytest.approx(1 / event["eval_runtime"], rel=0.01)
        assert "eval_model_preparation_time" not in event
    assert re.search(r"step 1/2 .* pairs/s  0:\d\d left", text.getvalue())
    assert not re.search(r"-\d+(\.\d+)? pairs/s|-\d+:\d\d", text.getvalue())


@pytest.mark.parametrize("days", [-1, 1])
def test_a_heartbeat_of_another_day_is_none(days: int, tmp_path: Path) -> None:
    told = datetime.now(UTC) + timedelta(days=days)
    status = {"state": "running", "pid": os.getpid(), "heartbeat": told.isoformat(timespec="seconds")}
    assert find_death(tmp_path, status) == f"no sign of life since {status['heartbeat']}"
    assert find_death(tmp_path, status | {"heartbeat": datetime.now(UTC).isoformat()}) is None


def test_the_lock_holds_whatever_the_clock_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = RunDirectory(tmp_path / "r")
    monkeypatch.setattr(artifacts, "_now", lambda: "1999-12-31T23:59:59+00:00")
    with directory.claim():
        directory.write_status("running")
        child = os.fork()
        if child == 0:
            try:
                with RunDirectory(tmp_path / "r").claim():
                    os._exit(0)
            except ConfigError:
                os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7

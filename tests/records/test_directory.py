"""Run directory: atomic writes, masked secrets, fresh directories."""

import json
import threading
import time
from pathlib import Path

import pytest
import yaml

from dpo_runner.config.compose import load_conf
from dpo_runner.io.files import write_folder
from dpo_runner.io.masking import mask_override, mask_secrets
from dpo_runner.records import directory as artifacts
from dpo_runner.records.directory import EVENT_KINDS, RunDirectory, resolve_run_dir
from dpo_runner.records.reading import read_status

TOKEN = "hf_" + "a1B2" * 8
WANDB_KEY = "0123456789abcdef" * 2 + "01234567"


@pytest.mark.parametrize(
    ("value", "masked"),
    [
        ({"api_key": "x"}, {"api_key": "***"}),
        (
            {"hub_token": "x", "max_new_tokens": 5, "token": None},
            {"hub_token": "***", "max_new_tokens": 5, "token": None},
        ),
        ({"notes": f"use {TOKEN} here"}, {"notes": "use *** here"}),
        ([WANDB_KEY, ["sk-" + "a" * 30]], ["***", ["***"]]),
        ({"path": "https://me:pass@example.com/x"}, {"path": "https://***@example.com/x"}),
        ({"revision": WANDB_KEY}, {"revision": WANDB_KEY}),  # a commit looks like a key
        ({"adapter_revision": WANDB_KEY}, {"adapter_revision": WANDB_KEY}),
        (
            {"commit": WANDB_KEY, "base": f"/hub/snapshots/{WANDB_KEY}"},
            {"commit": WANDB_KEY, "base": f"/hub/snapshots/{WANDB_KEY}"},
        ),
        ({"path": "org/task-oriented-dialogue-preferences"}, {"path": "org/task-oriented-dialogue-preferences"}),
        ({"path": "/data/" + "ab" * 10, "beta": 0.1}, {"path": "/data/" + "ab" * 10, "beta": 0.1}),
    ],
)
def test_secrets_are_masked_and_nothing_else(value: object, masked: object) -> None:
    assert mask_secrets(value) == masked


def test_overrides_are_masked() -> None:
    assert mask_override(f"wandb.notes={TOKEN}") == "wandb.notes=***"
    assert mask_override("training.beta=0.1") == "training.beta=0.1"


def test_the_written_configuration_holds_no_secret(tmp_path: Path) -> None:
    overrides = [f"wandb.notes={TOKEN}", f"wandb.tags=[{WANDB_KEY}]"]
    directory = RunDirectory(tmp_path / "r")
    directory.write_config(load_conf(overrides), overrides)
    text = "".join(path.read_text() for path in directory.path.glob("*.yaml"))
    assert TOKEN not in text and WANDB_KEY not in text and "***" in text
    assert yaml.safe_load((directory.path / "config.yaml").read_text())["training"]["beta"] == 0.1


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    artifacts.write_json(path, {"a": 1})

    def full(handle: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(artifacts.os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        artifacts.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_that_is_not_filled_leaves_the_old_one(tmp_path: Path) -> None:
    write_folder(tmp_path / "f", lambda staging: (staging / "x").write_text("old"))

    def fail(staging: Path) -> None:
        (staging / "x").write_text("new")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_folder(tmp_path / "f", fail)
    assert (tmp_path / "f" / "x").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_status_tells_how_a_run_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_status(tmp_path) is None
    monkeypatch.setattr(artifacts, "HEARTBEAT_SECONDS", 0.05)
    directory = RunDirectory(tmp_path / "r")
    directory.write_status("running")
    first = read_status(directory.path)
    assert first is not None and first["state"] == "running" and first["pid"] > 0
    monkeypatch.setattr(artifacts, "_now", lambda: "later")
    directory.start_heartbeat()
    deadline = time.monotonic() + 5
    while read_status(directory.path) == first and time.monotonic() < deadline:
        time.sleep(0.02)
    status = read_status(directory.path)
    assert status is not None and status["heartbeat"] == "later" and status["started"] == first["started"]
    directory.stop_heartbeat()
    directory.write_status("failed", error="why")
    status = read_status(directory.path)
    assert status is not None and (status["state"], status["error"]) == ("failed", "why")
    deadline = time.monotonic() + 5
    while any(thread.name == "heartbeat" for thread in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(thread.name == "heartbeat" for thread in threading.enumerate())


def test_metrics_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "r")
    for step in (1, 2, 3, 4):
        directory.append_metrics({"step": step, "loss": 0.5})
    with (directory.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "torn')
    directory.keep_metrics_until(2, EVENT_KINDS)
    steps = [json.loads(line)["step"] for line in (directory.path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]
    for loss in (0.4, 0.3):  # after training: before the interruption, and again after resuming
        directory.append_metrics({"step": 2, "eval_loss": loss})
        directory.keep_metrics_until(2, {"learning_rate"})
        assert [json.loads(line)["step"] for line in (directory.path / "metrics.jsonl").open()] == [1, 2]
    # Logged at an epoch's end, after its evaluation.
    directory.append_metrics({"step": 2, "loss": 0.5, "learning_rate": 1e-3})
    directory.keep_metrics_until(2, {"eval_loss"})
    assert [json.loads(line)["step"] for line in (directory.path / "metrics.jsonl").open()] == [1, 2]


def test_fresh_directories_never_collide(tmp_path: Path) -> None:
    conf = load_conf(["run_name=mine"])
    first = resolve_run_dir(conf)
    assert first.parent == Path("outputs/mine") and not first.exists()
    first.mkdir(parents=True)
    assert resolve_run_dir(conf) != first
    assert resolve_run_dir(load_conf(["run_dir=here"])) == Path("here")

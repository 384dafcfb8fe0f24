"""Clearing of old checkpoints: deletes only those not needed, and no other files."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dpo_runner.cache.__main__ import main
from dpo_runner.cache.old_checkpoints import find_checkpoints
from dpo_runner.errors import ConfigError
from dpo_runner.records.checkpoints import MANIFEST, find_last_checkpoint, write_sealed
from dpo_runner.records.directory import update_status
from tests.support.common import run_main
from tests.support.processes import HOLD
from tests.support.run_folders import write_run


def make_run(
    path: Path, state: str, steps: tuple[int, ...] = (2, 4, 6), best: int | None = None, **summary: Any
) -> Path:
    """Write a run with sealed checkpoints, a damaged one, and an interrupted save."""
    write_run(path, state=state)
    folder = path / "checkpoints"
    told = None if best is None else f"/elsewhere/checkpoint-{best}"

    def fill(staging: Path) -> None:
        (staging / "weights").write_bytes(bytes(1_000_000))
        (staging / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": told}))

    for step in steps:
        write_sealed(folder / f"checkpoint-{step}", fill)
    for name in ("damaged-checkpoint-3", ".saving-checkpoint-8"):
        shutil.copytree(folder / f"checkpoint-{steps[0]}", folder / name)
    (folder / ".saving-checkpoint-8" / MANIFEST).unlink()
    (folder / "notes.txt").write_text("mine")
    (path / "adapter").mkdir()
    (path / "adapter" / "adapter_model.safetensors").write_bytes(b"result")
    if state == "finished":
        results = json.loads((path / "summary.json").read_text())
        (path / "summary.json").write_text(json.dumps(results | {"weights": "last"} | summary))
    return path


def names_in(run_dir: Path) -> set[str]:
    return {path.name for path in (run_dir / "checkpoints").iterdir()}


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")


def test_they_are_listed_with_sizes_and_nothing_is_deleted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "outputs" / "a" / "1", "finished")
    make_run(tmp_path / "outputs" / "a" / "2", "failed")
    write_run(tmp_path / "outputs" / "none")
    before = sorted(tmp_path.rglob("*"))
    assert run_main(main, "checkpoints") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "outputs/a/1 │ finished │" in printed and "5.0 MB in old checkpoints; add --clear to delete them" in printed
    assert "outputs/a/2 │ failed │ │ │" in printed and "checkpoint-6, damaged-checkpoint-3: the run is not" in printed
    assert "none" not in printed
    assert sorted(tmp_path.rglob("*")) == before


def test_of_finished_runs_all_go_and_of_others_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    others = ("failed", "interrupted", "running", "pending")
    for state in ("finished", *others):
        make_run(tmp_path / "outputs" / state, state)
    left = {state: names_in(tmp_path / "outputs" / state) for state in others}
    assert run_main(main, "checkpoints", "outputs", "--clear") == 0
    assert "5.0 MB freed" in capsys.readouterr().out
    assert names_in(tmp_path / "outputs" / "finished") == {"notes.txt"}
    assert (tmp_path / "outputs" / "finished" / "adapter" / "adapter_model.safetensors").read_bytes() == b"result"
    assert {state: names_in(tmp_path / "outputs" / state) for state in others} == left
    assert run_main(main, "checkpoints", "outputs", "--clear") == 0
    assert "0.0 MB freed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("best", "weights", "kept"),
    [
        (4, "last", {"checkpoint-4"}),  # holds the only copy of the best weights
        (6, "last", set()),
        (4, "best by eval_loss: checkpoint-4", {"checkpoint-6"}),  # holds the only copy of the last weights
        (6, "best by eval_loss: checkpoint-6", set()),
        (1, "last", set()),  # no longer exists
    ],
)
def test_weights_that_the_result_is_not_of_stay(best: int, weights: str, kept: set[str], tmp_path: Path) -> None:
    make_run(tmp_path / "r", "finished", best=best, weights=weights)
    assert run_main(main, "checkpoints", "r", "--clear") == 0
    assert names_in(tmp_path / "r") == {"notes.txt", *kept}


@pytest.mark.parametrize("state", ["failed", "interrupted", "running"])
def test_of_one_that_is_named_all_go_but_the_best_and_the_one_it_continues_from(state: str, tmp_path: Path) -> None:
    """The heartbeat of the `running` one is old."""
    run_dir = make_run(tmp_path / "outputs" / "r", state, best=2)
    (run_dir / "checkpoints" / "checkpoint-6" / "weights").write_bytes(b"cut off")
    assert run_main(main, "checkpoints", str(run_dir), "--clear") == 0
    assert names_in(run_dir) == {"notes.txt", "checkpoint-2", "checkpoint-4"}
    assert find_last_checkpoint(run_dir / "checkpoints") == run_dir / "checkpoints" / "checkpoint-4"


def test_a_checkpoint_that_lacks_its_name_alone_is_continued_from_and_stays(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "r", "failed")
    folder = run_dir / "checkpoints"
    (folder / "checkpoint-6").rename(folder / ".saving-checkpoint-6")
    assert run_main(main, "checkpoints", str(run_dir), "--clear") == 0
    assert names_in(run_dir) == {"notes.txt", ".saving-checkpoint-6"}


def test_a_run_that_is_going_on_is_left_alone_though_it_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = make_run(tmp_path / "r", "interrupted")
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    before = names_in(run_dir)
    assert run_main(main, "checkpoints", "r", "--clear") == 0
    assert "the run is going on" in capsys.readouterr().out and names_in(run_dir) == before
    update_status(run_dir, state="finished")  # as read just before another process starts
    (run_dir / "summary.json").write_text('{"weights": "last"}')
    assert run_main(main, "checkpoints", "r", "--clear") == 2
    assert "another process is running there" in capsys.readouterr().err and names_in(run_dir) == before
    process.kill()
    process.communicate()


def test_what_cannot_be_judged_stays_and_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, file in (
        ("a", "summary.json"),
        ("b", "status.json"),
        ("c", "checkpoints/checkpoint-6/trainer_state.json"),
    ):
        run_dir = make_run(tmp_path / "outputs" / name, "finished")
        (run_dir / file).write_bytes((run_dir / file).read_bytes()[:-9] + b"garbage!!")
    foreign = tmp_path / "outputs" / "foreign"
    (foreign / "checkpoint-5").mkdir(parents=True)
    (foreign / "checkpoint-5" / "trainer_state.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    assert run_main(main, "checkpoints", "--clear") == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and all("cannot be read, so its checkpoints stay" in line for line in errors)
    assert [path for path in sorted(tmp_path.rglob("*")) if path.name != ".lock"] == before
    with pytest.raises(ConfigError, match="gone: no such folder"):
        find_checkpoints([Path("gone")])

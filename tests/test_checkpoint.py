"""Only complete checkpoints are continued from."""

import shutil
from pathlib import Path

import pytest

from dpo_runner import load_conf, run
from dpo_runner.checkpoint import find_last_checkpoint, read_epoch, read_step


@pytest.fixture
def checkpoints(tiny_run: list[str], tmp_path: Path) -> Path:
    run(load_conf([*tiny_run, "run_dir=r", "samples.num_prompts=0"]))
    return tmp_path / "r" / "checkpoints"


def test_the_newest_is_found_with_its_step_and_epoch(checkpoints: Path) -> None:
    newest = find_last_checkpoint(checkpoints)
    assert newest is not None and newest.name == "checkpoint-4"
    assert read_step(newest) == 4
    assert read_epoch(newest) == pytest.approx(4 * 2 / 22)


@pytest.mark.parametrize(
    "part", ["trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors"]
)
def test_one_without_all_its_parts_is_passed_over(checkpoints: Path, part: str) -> None:
    """Trap 12: transformers takes the newest and goes on without the optimizer's state."""
    (checkpoints / "checkpoint-4" / part).unlink()
    found = find_last_checkpoint(checkpoints)
    assert found is not None and found.name == "checkpoint-2"


def test_a_torn_state_is_passed_over(checkpoints: Path) -> None:
    state = checkpoints / "checkpoint-4" / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    found = find_last_checkpoint(checkpoints)
    assert found is not None and found.name == "checkpoint-2"


def test_none_is_none(checkpoints: Path, tmp_path: Path) -> None:
    shutil.rmtree(checkpoints / "checkpoint-2")
    shutil.rmtree(checkpoints / "checkpoint-4")
    (checkpoints / "checkpoint-best").mkdir()
    assert find_last_checkpoint(checkpoints) is None
    assert find_last_checkpoint(tmp_path / "absent") is None

"""Full or read-only disks and deleted files cost a run at most its time."""

import errno
import fcntl
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from dpo_runner import run
from dpo_runner.config.compose import load_conf
from dpo_runner.errors import ConfigError, RunError
from dpo_runner.records.checkpoints import find_damage, find_last_checkpoint
from dpo_runner.records.directory import RunDirectory
from dpo_runner.records.reading import read_metrics, read_status
from dpo_runner.training.trainer import RunTrainer
from tests.support.common import ROWS


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of 24 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


SMALL = [
    *("model=tiny_random", "training=smoke", "data=local_file", "wandb=disabled", "samples.max_new_tokens=4"),
    *("samples.num_prompts=1", "data.max_eval_samples=1", "training.eval_strategy=no", "training.save_steps=1"),
    *("training.max_steps=3", "training.save_total_limit=9"),
]


@pytest.fixture
def small(pairs: str) -> list[str]:
    return [*SMALL, f"data.path={pairs}"]


def fill(disk: Path, *_: Any, **__: Any) -> None:
    with (disk / "filler").open("ab", buffering=0) as file:
        for size in (2**20, 2**12, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "adapter" / "adapter_model.safetensors"))


def check_same(one: Path, other: Path) -> None:
    weights = read_weights(one), read_weights(other)
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    events = [[(e["step"], e.get("loss"), e.get("eval_loss")) for e in read_metrics(path)] for path in (one, other)]
    assert events[0] == events[1]


class At(TrainerCallback):
    """Calls a function once, at the end of a step or of training."""

    def __init__(self, step: int | None, act: Callable[[], None]) -> None:
        self.step, self.act = step, act

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.act()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.step is None:
            self.act()


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, tiny_model: str) -> Iterator[None]:
    """Stored values of other tests, such as of more threads, may differ in their last bits."""
    folder = tmp_path_factory.mktemp("own_cache")
    (folder / "random-tiny-llama-bytes").symlink_to(tiny_model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DPO_RUNNER_CACHE", str(folder))
        yield


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    run(load_conf([*SMALL, f"data.path={folder / 'pairs.jsonl'}", f"run_dir={folder / 'r'}"]))
    return folder / "r"


@pytest.mark.parametrize("when", ["before a save", "in a save", "before the samples", "before metrics"])
def test_a_disk_that_fills_up_ends_the_run_in_one_line_and_it_goes_on_later(
    when: str, disk: Path, small: list[str], expected: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    directory = disk / "r"
    overrides = [*small, f"run_dir={directory}"]
    callbacks = [At({"before a save": 2, "before the samples": None}.get(when, 99), lambda: fill(disk))]
    save, append = RunTrainer._save_optimizer_and_scheduler, RunDirectory.append_metrics
    with monkeypatch.context() as patch:
        if when == "in a save":

            def save_on_a_full_disk(self: Any, folder: str) -> None:
                if self.state.global_step == 2:
                    fill(disk)
                save(self, folder)

            patch.setattr(RunTrainer, "_save_optimizer_and_scheduler", save_on_a_full_disk)
        if when == "before metrics":

            def append_on_a_full_disk(self: Any, metrics: dict[str, Any]) -> None:
                if metrics["step"] == 2:
                    fill(disk)
                    logging.getLogger("trl").warning("much to tell " * 2000)  # fill run.log too
                    metrics = {**metrics, "note": "x" * 9000}  # does not fit into the file's last block
                append(self, metrics)

            patch.setattr(RunDirectory, "append_metrics", append_on_a_full_disk)
        with pytest.raises(RunError) as caught:
            run(load_conf(overrides), callbacks=callbacks)
    told = str(caught.value)
    assert "\n" not in told and ("o space" in told or "0 MB are free on its disk" in told), told
    assert caught.value.exit_code == 1
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err and "Logging error" not in err
    last = find_last_checkpoint(directory / "checkpoints")
    assert last is not None and find_damage(last, whole=True) is None
    assert last.name == ("checkpoint-3" if when == "before the samples" else "checkpoint-1")
    (disk / "filler").unlink()
    run(load_conf(overrides))
    check_same(directory, expected)
    assert read_status(directory)["state"] == "finished"


def test_a_disk_that_is_full_from_the_start_is_an_error_of_the_configuration(disk: Path, small: list[str]) -> None:
    fill(disk)
    with pytest.raises(ConfigError, match=r"^`run_dir=\S+/disk/r`: cannot be written to; No space left on device$"):
        run(load_conf([*small, f"run_dir={disk / 'r'}"]))
    (disk / "filler").unlink()
    assert run(load_conf([*small, f"run_dir={disk / 'r'}", "training.max_steps=1"]))["steps"] == 1


def test_a_full_cache_is_one_line(
    disk: Path, small: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from dpo_runner.model.files.packaged import load_random_model_path

    (disk / "random-tiny-llama-bytes").symlink_to(load_random_model_path())
    fill(disk)
    monkeypatch.setenv("DPO_RUNNER_CACHE", str(disk))
    with pytest.raises(RunError, match=r"the cache cannot be written; .*; DPO_RUNNER_CACHE names another folder$"):
        run(load_conf([*small, f"run_dir={tmp_path / 'r'}"]))
    assert [path.name for path in (disk / "data").iterdir()] == []


def test_only_the_reference_store_needs_a_disk_with_locks(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite would try for a minute, and then report a locked database."""

    def refuse(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    for name in ("flock", "lockf"):
        monkeypatch.setattr(fcntl, name, refuse)
    monkeypatch.setenv("DPO_RUNNER_CACHE", str(tmp_path / "cache"))
    told = (
        "its disk has no file locks; DPO_RUNNER_CACHE names another folder, engine.reference_store=false runs without"
    )
    with pytest.raises(RunError, match=rf"^\S+\.sqlite: the cache cannot be written; {told} the store$"):
        run(load_conf([*small, "run_dir=r"]))
    assert not list((tmp_path / "cache/reference").glob("*.sqlite"))
    assert run(load_conf([*small, "run_dir=r", "engine.reference_store=false"]))["steps"] == 3


@pytest.mark.parametrize("begun", [False, True])
def test_a_directory_that_may_not_be_written_to_is_an_error_at_the_start(
    begun: bool, disk: Path, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*small, f"run_dir={disk / 'r'}"]
    if begun:
        with pytest.raises(RunError):
            run(load_conf(overrides), callbacks=[At(2, lambda: 1 // 0)])
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    monkeypatch.setattr(sys.modules["dpo_runner.train"], "load_policy", None)  # nothing is loaded
    with pytest.raises(ConfigError, match=r"^`run_dir=\S+/disk/r`: cannot be written to; Read-only file system$"):
        run(load_conf(overrides))
    if begun:
        monkeypatch.undo()
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        assert find_last_checkpoint(disk / "r" / "checkpoints").name == "checkpoint-1"


def test_data_model_cache_and_checkpoints_that_go_away_are_not_missed(
    small: list[str], tiny_model: str, pairs: str, expected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "random-tiny-llama-bytes").symlink_to(tiny_model)
    monkeypatch.setenv("DPO_RUNNER_CACHE", str(tmp_path / "cache"))
    overrides = [*small, f"model.model_name_or_path={tmp_path / 'model'}", "run_dir=r"]

    def take_away() -> None:
        Path(pairs).rename(tmp_path / "elsewhere.jsonl")
        for name in ("model", "cache", "r/checkpoints"):
            shutil.rmtree(tmp_path / name)

    run(load_conf(overrides), callbacks=[At(2, take_away)])
    check_same(tmp_path / "r", expected)
    last = find_last_checkpoint(tmp_path / "r" / "checkpoints")
    assert last is not None and last.name == "checkpoint-3" and find_damage(last, whole=True) is None
    assert run(load_conf(overrides))["steps"] == 3, "a finished run needs none of it"


def test_a_run_that_is_to_go_on_says_what_is_gone(small: list[str], pairs: str, tmp_path: Path) -> None:
    with pytest.raises(RunError):
        run(load_conf([*small, "run_dir=r"]), callbacks=[At(2, lambda: 1 // 0)])
    Path(pairs).unlink()
    with pytest.raises(ConfigError, match=r"^`data\.path=\S+pairs\.jsonl`: no such file"):
        run(load_conf([*small, "run_dir=r"]))
    assert find_damage(tmp_path / "r" / "checkpoints" / "checkpoint-1", whole=True) is None


@pytest.mark.parametrize(
    ("gone", "told"),
    [
        ("r/checkpoints/checkpoint-1", "the best checkpoint is gone or was damaged"),
        ("r", "No such file or directory"),
    ],
)
def test_what_a_run_cannot_do_without_ends_it_in_one_line(
    gone: str, told: str, small: list[str], tmp_path: Path, capfd: Any
) -> None:
    best = ["training.eval_strategy=steps", "training.eval_steps=1", "training.load_best_model_at_end=true"]
    best += ["training.metric_for_best_model=rewards/margins", "training.greater_is_better=false"]  # the margin grows
    with pytest.raises(RunError) as caught:
        run(load_conf([*small, *best, "run_dir=r"]), callbacks=[At(3, lambda: shutil.rmtree(tmp_path / gone))])
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert "Traceback" not in "".join(capfd.readouterr())

"""Checkpoints: only one that is bit for bit as saved is continued from."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dpo_runner import run
from dpo_runner.config.compose import load_conf
from dpo_runner.errors import RunError
from dpo_runner.records.checkpoints import (
    MANIFEST,
    find_damage,
    find_last_checkpoint,
    list_checkpoints,
    open_last_checkpoint,
    read_step,
    seal,
    write_sealed,
)
from tests.support.common import make_tiny_run, write_pairs

FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "progress.json",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a run of four steps."""
    folder = tmp_path_factory.mktemp("trained")
    overrides = [*make_tiny_run(write_pairs(folder)), "samples.num_prompts=0", f"run_dir={folder / 'r'}"]
    run(load_conf([*overrides, "lora.lora_dropout=0.1"]))  # draws, so that rng_state differs between checkpoints
    return folder / "r" / "checkpoints"


@pytest.fixture
def checkpoints(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "checkpoints"))


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def cut_off(file: Path, other: Path) -> None:
    file.write_bytes(file.read_bytes()[:-2])


def flip(file: Path, other: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def empty(file: Path, other: Path) -> None:
    file.write_bytes(b"")


def delete(file: Path, other: Path) -> None:
    file.unlink()


def swap(file: Path, other: Path) -> None:
    content = other.read_bytes()
    assert content != file.read_bytes()
    file.write_bytes(content)


DAMAGES = [(how, name) for how in (cut_off, flip, empty, delete) for name in (*FILES, MANIFEST)] + [
    (swap, name) for name in (*FILES, MANIFEST) if name != "adapter_config.json"
]


def test_a_run_leaves_sealed_checkpoints_and_nothing_else(trained: Path) -> None:
    assert [path.name for path in list_checkpoints(trained)] == ["checkpoint-4", "checkpoint-2"]
    assert names_in(trained) == {"checkpoint-2", "checkpoint-4"}
    for path in list_checkpoints(trained):
        assert find_damage(path, whole=True) is None
        assert set(json.loads((path / MANIFEST).read_text())) == names_in(path) - {MANIFEST} >= set(FILES)


@pytest.mark.parametrize(
    ("how", "name"), DAMAGES, ids=lambda value: value if isinstance(value, str) else value.__name__
)
def test_a_damaged_one_is_put_aside_and_the_one_before_it_is_taken(
    how: Callable[[Path, Path], None], name: str, checkpoints: Path
) -> None:
    newest, before = list_checkpoints(checkpoints)
    how(newest / name, before / name)
    left = {file.name: file.read_bytes() for file in newest.iterdir()}
    told: list[str] = []
    assert open_last_checkpoint(checkpoints, told.append) == before
    (line,) = told
    assert line.startswith(f"{newest} is not continued from: ") and line.endswith("it is kept as damaged-checkpoint-4")
    assert name in line or (how, name) == (swap, MANIFEST)  # the other's manifest: the reported file is another one
    aside = checkpoints / "damaged-checkpoint-4"
    assert {file.name: file.read_bytes() for file in aside.iterdir()} == left
    assert list_checkpoints(checkpoints) == [before]
    assert open_last_checkpoint(checkpoints, told.append) == before and len(told) == 1


def test_older_ones_are_read_too_where_they_are_going_to_be_counted(checkpoints: Path) -> None:
    newest, before = list_checkpoints(checkpoints)
    flip(before / "optimizer.pt", newest / "optimizer.pt")
    told: list[str] = []
    assert open_last_checkpoint(checkpoints, told.append) == newest and not told
    assert open_last_checkpoint(checkpoints, told.append, examine_all=True) == newest
    assert told == [
        f"{before} is not continued from: optimizer.pt is not what was written; it is kept as damaged-checkpoint-2"
    ]
    assert names_in(checkpoints) == {"checkpoint-4", "damaged-checkpoint-2"}


def test_one_that_lacks_its_name_alone_is_found(checkpoints: Path) -> None:
    newest, before = list_checkpoints(checkpoints)
    unnamed = newest.rename(newest.with_name(f".saving-{newest.name}"))
    assert find_last_checkpoint(checkpoints) == unnamed and read_step(unnamed) == 4
    (unnamed / MANIFEST).unlink()
    assert find_last_checkpoint(checkpoints) == before


def write_steps(folder: Path, best: dict[int, int | None]) -> None:
    """Write checkpoints at the steps of `best`, each with the step of the best one so far."""
    for step, best_step in best.items():
        state = json.dumps({"best_global_step": best_step})
        write_sealed(folder / f"checkpoint-{step}", lambda path, state=state: fill_state(path, state))


def fill_state(path: Path, state: str) -> None:
    (path / "trainer_state.json").write_text(state)


@pytest.mark.parametrize("gone", [False, True])
def test_where_the_best_is_lost_one_before_it_is_taken(gone: bool, tmp_path: Path) -> None:
    write_steps(tmp_path, {2: None, 4: 4, 6: 4, 8: 4})
    if gone:
        shutil.rmtree(tmp_path / "checkpoint-4")
    else:
        (tmp_path / "checkpoint-4" / "trainer_state.json").write_text("damaged")
    assert open_last_checkpoint(tmp_path, pytest.fail) == tmp_path / "checkpoint-8"  # the best is not needed
    told: list[str] = []
    found = open_last_checkpoint(tmp_path, told.append, needs_best=True)
    assert told[0].startswith(f"{tmp_path / 'checkpoint-8'} is not continued from: the run is to end with the best one")
    assert "checkpoint-4, and" in told[0] and told[0].endswith("; it is kept as damaged-checkpoint-8")
    assert found == tmp_path / "checkpoint-2"
    aside = {"damaged-checkpoint-8", "damaged-checkpoint-6", *([] if gone else ["damaged-checkpoint-4"])}
    assert names_in(tmp_path) == {"checkpoint-2", *aside} and len(told) == len(aside)


def test_a_best_one_that_gave_way_to_a_newer_one_is_not_missed(tmp_path: Path) -> None:
    write_steps(tmp_path, {6: 4, 8: 8})
    (tmp_path / "checkpoint-8" / "trainer_state.json").unlink()
    told: list[str] = []
    assert open_last_checkpoint(tmp_path, told.append, needs_best=True) == tmp_path / "checkpoint-6"
    (line,) = told
    assert "trainer_state.json is missing" in line


def test_where_all_are_damaged_there_is_none(checkpoints: Path) -> None:
    for path in list_checkpoints(checkpoints):
        (path / "optimizer.pt").unlink()
    assert find_last_checkpoint(checkpoints) is None
    (checkpoints / "checkpoint-best").mkdir()
    told: list[str] = []
    assert open_last_checkpoint(checkpoints, told.append) is None and len(told) == 3
    assert told[-1] == f"{checkpoints} holds no other checkpoint: the run begins anew"
    assert open_last_checkpoint(checkpoints / "absent", told.append) is None


class Killed(BaseException):
    """Simulates a kill: a BaseException passes all error handlers."""


class Fuse:
    """Raises Killed after `limit` file operations."""

    def __init__(self, limit: int) -> None:
        self.left = limit

    def wrap(self, function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            result = function(*args, **kwargs)
            self.left -= 1
            if self.left < 0:
                raise Killed
            return result

        return call


def fill(folder: Path, text: str) -> None:
    (folder / "weights").write_text(text)
    (folder / "state.json").write_text(text)


@pytest.mark.parametrize("again", [False, True], ids=["new", "again"])
def test_a_kill_after_any_operation_of_a_save_leaves_the_last_one_or_this_one(
    again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`again`: a checkpoint of the same name exists."""
    operations = [(os, "fsync"), (os, "replace"), (os, "rename"), (os, "mkdir"), (os, "rmdir"), (os, "unlink")]
    survived = set()
    for limit in range(200):
        folder = tmp_path / str(limit)
        write_sealed(folder / "checkpoint-1", lambda path: fill(path, "first"))
        name = "checkpoint-1" if again else "checkpoint-2"
        fuse = Fuse(limit)
        with monkeypatch.context() as patch:
            for module, function in operations:
                patch.setattr(module, function, fuse.wrap(getattr(module, function)))
            try:
                write_sealed(folder / name, lambda path: fill(path, "second"))
                killed = False
            except Killed:
                killed = True
        told: list[str] = []
        found = open_last_checkpoint(folder, told.append)
        assert found is not None and not told
        text = (found / "weights").read_text()
        assert text == (found / "state.json").read_text()
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
        survived.add(text)
        if not killed:
            assert text == "second" and limit > 5
            break
    assert not killed and survived == {"first", "second"}


def test_a_disk_that_fills_up_costs_the_new_one_alone(tmp_path: Path) -> None:
    write_sealed(tmp_path / "checkpoint-1", lambda path: fill(path, "first"))

    def fail(path: Path) -> None:
        fill(path, "second")
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match=r"checkpoint-2: the checkpoint cannot be written; .*No space left on device"):
        write_sealed(tmp_path / "checkpoint-2", fail)
    assert names_in(tmp_path) == {"checkpoint-1"}
    assert find_damage(tmp_path / "checkpoint-1", whole=True) is None


def test_a_file_that_was_not_sealed_does_not_matter(checkpoints: Path) -> None:
    (checkpoints / "checkpoint-4" / "notes.txt").touch()
    assert find_damage(checkpoints / "checkpoint-4", whole=True) is None


def test_files_in_folders_are_sealed_too(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "weights").write_text("w")
    seal(tmp_path)
    (tmp_path / "inner" / "weights").write_text("v")
    assert find_damage(tmp_path, whole=False) is None
    assert find_damage(tmp_path, whole=True) == "inner/weights is not what was written"


def test_folders_that_cannot_be_flushed_are_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems cannot flush folders."""
    flush = os.fsync

    def refuse(handle: int) -> None:
        if Path(f"/proc/self/fd/{handle}").is_dir():
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    write_sealed(tmp_path / "checkpoint-1", lambda path: fill(path, "first"))
    assert find_damage(tmp_path / "checkpoint-1", whole=True) is None


def test_a_folder_that_is_sealed_again_does_not_seal_its_manifest(tmp_path: Path) -> None:
    write_sealed(tmp_path / "checkpoint-1", lambda path: fill(path, "first"))
    seal(tmp_path / "checkpoint-1")
    assert find_damage(tmp_path / "checkpoint-1", whole=True) is None
    assert "manifest.json" not in (tmp_path / "checkpoint-1" / "manifest.json").read_text()

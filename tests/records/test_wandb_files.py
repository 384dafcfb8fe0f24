"""Commands that show and upload runs, checked against the files that `wandb sync` takes."""

import os
import re
import shlex
from pathlib import Path

import pytest

from dpo_runner.records.wandb_files import find_folder, find_parts, list_commands, mark_sent
from tests.support.programs import run_python


def write_part(
    folder: Path, number: int, run_id: str, online: bool = False, sent: bool = False, record: bytes = b"x"
) -> Path:
    """Write W&B's files of a run started at the second `number`."""
    part = folder / f"{'' if online else 'offline-'}run-20260101_00000{number}-{run_id}"
    part.mkdir(parents=True)
    (part / f"run-{run_id}.wandb").write_bytes(b":W&B\xe1\xbe\x00" + record)
    (folder / "latest-run").unlink(missing_ok=True)
    (folder / "latest-run").symlink_to(part.name)
    if sent:
        mark_sent(part)
    return part


def list_taken(command: str) -> set[Path]:
    """Return the parts that a `wandb sync` command uploads, from its dry run."""
    program, *rest = shlex.split(command)
    assert program == "wandb"
    env = {**os.environ, "WANDB_SILENT": "false"}
    result = run_python("-m", "wandb", *rest, "--dry-run", env=env)
    assert result.returncode == 0, result.stderr
    return {Path(name).resolve().parent for name in re.findall(r"\S+\.wandb$", result.stdout + result.stderr, re.M)}


def test_the_folder_is_the_configured_one_or_the_default(tmp_path: Path) -> None:
    assert find_folder(None, tmp_path) == tmp_path / "wandb"
    assert find_folder("~/shared", tmp_path) == Path.home() / "shared" / "wandb"


def test_nothing_recorded_is_nothing_to_show(tmp_path: Path) -> None:
    assert list_commands(tmp_path / "absent") == {}
    assert list_commands(tmp_path) == {}


def test_runs_that_the_server_has_are_only_shown(tmp_path: Path) -> None:
    folder = tmp_path / "a b" / "wandb"
    write_part(folder, 1, "aa", sent=True)
    write_part(folder, 2, "bb", online=True, sent=True)
    assert list_commands(folder) == list_commands(folder, "aa") == {"curves": f"wandb leet '{folder}'"}
    assert find_parts(folder, "aa") == {folder / "offline-run-20260101_000001-aa"}


def test_where_nothing_was_recorded_nothing_is_uploaded(tmp_path: Path) -> None:
    """A run killed at once is skipped; the other runs are named, because W&B fails on its file."""
    empty = write_part(tmp_path, 1, "aa", record=b"")
    assert list_commands(tmp_path) == {"curves": f"wandb leet {tmp_path}"}
    part = write_part(tmp_path, 2, "aa")
    assert list_commands(tmp_path)["upload"] == f"wandb sync {part}"
    assert list_commands(tmp_path, "aa")["upload"] == f"wandb sync {part}"
    mark_sent(empty)
    assert list_commands(tmp_path)["upload"] == f"wandb sync {tmp_path}"


@pytest.mark.parametrize(
    ("others", "of_run", "flags", "whole"),
    [
        ([], [(False, False)], "", True),
        ([(False, False)], [(False, False), (False, False)], "", True),
        ([(False, True), (True, True)], [(False, True), (False, False)], "", True),
        ([(False, True)], [(True, True), (True, False)], "--include-online ", True),
        # Parts after the first missing one are uploaded too.
        ([], [(False, False), (True, True)], "--include-synced --include-online ", True),
        ([(False, True), (True, True)], [(True, True), (False, False), (False, True)], "--include-synced ", False),
    ],
)
def test_what_is_uploaded_is_what_the_server_lacks(
    tmp_path: Path, others: list[tuple[bool, bool]], of_run: list[tuple[bool, bool]], flags: str, whole: bool
) -> None:
    """Commands for one run and for the whole folder; each part is (online, sent)."""
    folder = tmp_path / "wandb"
    extra = {write_part(folder, 1, f"c{index}", *given): given[1] for index, given in enumerate(others)}
    parts = [write_part(folder, 2 + index, "aa", *given) for index, given in enumerate(of_run)]
    first = [sent for _, sent in of_run].index(False)

    leet, sync = list_commands(folder, "aa").values()
    assert leet == f"wandb leet {folder}"
    assert sync == shlex.join(["wandb", "sync", *flags.split(), *map(str, parts[first:])])
    assert list_taken(sync) == set(parts[first:])

    sync = list_commands(folder)["upload"]
    assert (sync == f"wandb sync {flags}{folder}") is whole
    assert list_taken(sync) == {*parts[first:], *(part for part, sent in extra.items() if not sent)}

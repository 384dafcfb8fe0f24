"""JSON Lines records: any text, and files cut off by a kill."""

import os
import stat
from pathlib import Path

import pytest

from dpo_runner.errors import RunError
from dpo_runner.io.files import JsonLines, write_folder, write_text


def test_lines_hold_any_text(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "x.jsonl")
    texts = ["\u2028 \x85 \ud800", "line\nbreak", ""]
    lines.append([{"text": text} for text in texts])
    assert [record["text"] for record in JsonLines(tmp_path / "x.jsonl").records] == texts


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_and_folders_have_the_modes_of_the_umask(mask: int, tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "inner").mkdir()
        (folder / "inner" / "weights").touch(0o600)

    previous = os.umask(mask)
    try:
        write_text(tmp_path / "file", "")
        write_folder(tmp_path / "folder", fill)
    finally:
        os.umask(previous)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes == {"file": 0o666 & ~mask, "folder": 0o777 & ~mask, "inner": 0o777 & ~mask, "weights": 0o666 & ~mask}


def test_a_line_that_a_kill_cut_off_is_dropped_and_any_other_fault_is_told(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"n": 1}\n{"n": 2}\n{"n"')
    assert [record["n"] for record in JsonLines(path).records] == [1, 2]
    assert path.read_text() == '{"n": 1}\n{"n": 2}\n'
    JsonLines(path).keep(1)
    assert path.read_text() == '{"n": 1}\n'
    path.write_text('{"n": 1}\n{"n"\n{"n": 3}\n')
    with pytest.raises(RunError, match=r"x\.jsonl:2: is no JSON"):
        JsonLines(path)

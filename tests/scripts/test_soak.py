"""The first few runs of `scripts/soak.py`, which has the rest."""

from pathlib import Path

import pytest

from tests.support.scripts import load_script


def test_runs_in_one_process_leave_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soak = load_script("soak")
    soaked = soak.soak(8, tmp_path)
    assert [sample.runs for sample in soaked.samples] == [4, 8]
    assert not list(tmp_path.glob("*")) and capsys.readouterr().out == ""
    assert soaked.find_growth(slope=5, warm_up=4) == []  # MB: so few runs tell of what is large
    assert soaked.describe(4).startswith("8 runs in one process; from run 4 on: ")


def test_what_grows_is_told() -> None:
    soak = load_script("soak")
    flat = [soak.Sample(runs, 500 + runs % 3, 10, 8, 1) for runs in range(20, 201, 4)]
    assert soak.Soak(flat).find_growth() == []
    leaking = [soak.Sample(each.runs, each.megabytes + each.runs, each.files, 8, 1) for each in flat]
    assert soak.Soak(leaking).find_growth() == ["memory: grows by 1.00 MB a run, more than 0.15"]
    files = [*flat[:-1], soak.Sample(200, 500, 11, 9, 2)]
    assert soak.Soak(files).find_growth() == [
        "files: 10 after 20 runs, 11 in the end",
        "threads: 8 after 20 runs, 9 in the end",
        "children: 1 after 20 runs, 2 in the end",
    ]

"""The first few runs of `scripts/torture/soak.py`, which has the rest."""

from pathlib import Path

import pytest

from scripts.torture.soak import Sample, Soak, soak


def test_runs_in_one_process_leave_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soaked = soak(8, tmp_path)
    assert [sample.runs for sample in soaked.samples] == [4, 8]
    assert not list(tmp_path.glob("*")) and capsys.readouterr().out == ""
    assert soaked.find_growth(slope=5, warm_up=4) == []  # MB: so few runs tell of what is large
    assert soaked.describe(4).startswith("8 runs in one process; from run 4 on: ")


def test_what_grows_is_told() -> None:
    flat = [Sample(runs, 500 + runs % 3, 10, 8, 1) for runs in range(20, 201, 4)]
    assert Soak(flat).find_growth() == []
    leaking = [Sample(each.runs, each.megabytes + each.runs, each.files, 8, 1) for each in flat]
    assert Soak(leaking).find_growth() == ["memory: grows by 1.00 MB a run, more than 0.15"]
    files = [*flat[:-1], Sample(200, 500, 11, 9, 2)]
    assert Soak(files).find_growth() == [
        "files: 10 after 20 runs, 11 in the end",
        "threads: 8 after 20 runs, 9 in the end",
        "children: 1 after 20 runs, 2 in the end",
    ]

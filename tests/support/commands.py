"""Command lines that are rejected before anything runs."""

import sys
from pathlib import Path

import pytest

from dpo_runner.__main__ import main


def give(arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a command that is rejected before it runs or writes anything, and return its stderr."""
    before = sorted(Path().rglob("*"))
    monkeypatch.setattr(sys, "argv", ["dpo_runner", *arguments])
    monkeypatch.setattr("dpo_runner.__main__._run_with_hydra", lambda: pytest.fail("it is not refused"))
    with pytest.raises(SystemExit) as caught:
        main()
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, ""), err
    assert sorted(Path().rglob("*")) == before
    return err

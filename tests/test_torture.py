"""The first few trials of `scripts/torture.py`, which has the rest."""

from pathlib import Path

import pytest
from test_scripts import load_script


@pytest.mark.parametrize("kind", ["kill", "send_in_turn"])
def test_a_run_that_is_disturbed_ends_as_the_undisturbed_one(kind: str, tiny_run: list[str], tmp_path: Path) -> None:
    torture = load_script("torture")
    overrides = [*tiny_run, *torture.TINY]
    outcome = torture.torture(kind, overrides, 3, getattr(torture, kind), 1, tmp_path)
    assert outcome.trials == sum(outcome.states.values()) == 3
    assert not outcome.failures

"""The first trials of `scripts/torture/kills.py`, which has the rest."""

from pathlib import Path

from scripts.torture import kills


def test_a_run_that_is_killed_ends_as_the_undisturbed_one(tiny_run: list[str], tmp_path: Path) -> None:
    overrides = [*tiny_run, *kills.TINY, "training.max_steps=8"]
    outcome = kills.torture("kill -9", overrides, 1, kills.kill, 1, tmp_path)
    assert outcome.trials == sum(outcome.states.values()) == 1
    assert not outcome.failures
    assert str(outcome).startswith("kill -9: 1 of 1 (")


def test_another_exit_code_is_a_failure(tiny_run: list[str], tmp_path: Path) -> None:
    overrides = [*tiny_run, *kills.TINY, "training.max_steps=8"]
    outcome = kills.torture("kill -9", overrides, 1, lambda *given: kills.kill(*given) + 1, 1, tmp_path)
    (failure,) = outcome.failures
    assert "exit code 137, not 138" in failure

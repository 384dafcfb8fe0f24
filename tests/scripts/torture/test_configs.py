"""The first cases of `scripts/torture/configs.py`, and faults that it must find."""

import pytest

from dpo_runner.config import compose
from dpo_runner.sweep import command_line
from scripts.torture import configs


def test_no_configuration_ends_otherwise_than_composed_or_refused() -> None:
    outcome = configs.fuzz_configs(100, 0)
    assert outcome.failures == []
    assert outcome.composed > 5 and outcome.refused > 20 and outcome.composed + outcome.refused == 100
    assert outcome.slowest < configs._SECONDS


@pytest.mark.parametrize(
    ("mistakes", "expected"), [(["two\x1b[31m lines"], None), (["x" * 5000], None), ([""], "error: "), (["a\tb"], None)]
)
def test_what_is_printed_is_looked_at(mistakes: list[str], expected: str | None) -> None:
    if expected is None:
        configs._check_refusal(mistakes)  # `report` has escaped them
    else:
        with pytest.raises(AssertionError, match=expected):
            configs._check_refusal(mistakes)


def test_an_error_that_is_none_of_ours_is_a_finding(monkeypatch) -> None:
    for module in (compose, command_line):
        monkeypatch.setattr(module, "UNCOMPOSABLE", ())
    monkeypatch.setattr(configs, "check_command_line", command_line.check_command_line)
    with pytest.raises(Exception, match="nope"):
        configs.check_case(["run_name=${nope}"], [], None)

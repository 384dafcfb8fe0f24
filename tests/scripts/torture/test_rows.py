"""The first hundred cases of `scripts/torture/rows.py`, which has thousands."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo_runner.data.layouts import messages
from dpo_runner.errors import RowError
from scripts.torture.rows import fuzz_rows


def test_rows_and_files_of_all_kinds_are_used_or_refused_in_one_line(tmp_path: Path) -> None:
    outcome = fuzz_rows(100, 3, tmp_path)
    assert outcome.cases == 100 and not outcome.failures
    assert outcome.accepted > 20 and len(outcome.refused) > 4 and outcome.refused["a file"] > 5
    assert not list(tmp_path.glob("*.jsonl"))


def raise_another(*args: Any) -> None:
    raise KeyError("content")


def raise_two_lines(*args: Any) -> None:
    error = RowError("not a text")
    error.detail = "one\ntwo"
    raise error


@pytest.mark.parametrize(("fault", "seed"), [(raise_another, 4), (raise_two_lines, 5)])  # rows not in any cache
def test_what_goes_wrong_is_found(
    fault: Callable[..., None], seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(messages, "_to_text", fault)  # used for messages, not for plain texts
    outcome = fuzz_rows(100, seed, tmp_path)
    assert outcome.failures and outcome.cases == 100

"""Helpers for tests that load preference data: rows, a configuration, and a check of the data report."""

import json
from pathlib import Path
from typing import Any

from dpo_runner.config.compose import load_conf
from dpo_runner.config.run_conf import RunConf
from dpo_runner.data.preferences import PreferenceData, load_preferences

NO_EVAL = ["data.eval_fraction=0", "training.eval_strategy=no"]


def make_rows(count: int, name: str = "q", answer: str = "good") -> list[dict[str, str]]:
    return [{"prompt": f"{name} {n}", "chosen": f"{answer} {n}", "rejected": f"not {n}"} for n in range(count)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def conf_of(*overrides: str) -> RunConf:
    return load_conf(["model=tiny_random", "data=local_file", *overrides])


def load(tokenizer: Any, path: Path, *overrides: str) -> PreferenceData:
    return load_preferences(conf_of(f"data.path={path}", *overrides), tokenizer)


def check_account(data: PreferenceData) -> None:
    """Check that the report's counts of rows and pairs add up, and that dropped() lists each dropped one."""
    report = data.report
    dropped = list(data.dropped())
    for source in report.sources:
        assert source.rows >= sum(source.bad.values()) + sum(source.left_out.values())
    for split in report.splits.values():
        assert split.pairs == split.kept + sum(split.dropped.values()) + split.unused
        assert split.kept == sum(split.by_source.values())
    bad = sum(sum(source.bad.values()) for source in report.sources)
    assert len(dropped) == bad + sum(sum(split.dropped.values()) for split in report.splits.values())

"""The full default run, as in `make demo`. Run by `make test-demo`; takes about ten minutes."""

import json
from pathlib import Path

import pytest

from dpo_runner import run
from dpo_runner.chat import Chat
from dpo_runner.config.compose import load_conf
from dpo_runner.export.__main__ import main as export
from tests.support.answers import answer_in_chat, answer_plainly

pytestmark = [pytest.mark.demo, pytest.mark.timeout(1800)]


def test_the_default_run_makes_answers_short_and_leaves_them_whole(tmp_path: Path, default_model: str) -> None:
    summary = run(load_conf(["run_dir=r"]))
    assert summary is not None
    before, after = summary["before"], summary["after"]
    assert abs(before["eval_rewards/margins"]) < 1e-2
    assert after["eval_rewards/accuracies"] >= 0.85
    assert after["response_tokens"] <= 0.65 * before["response_tokens"]
    assert after["responses_at_cap"] <= before["responses_at_cap"]
    samples = [json.loads(line) for line in (tmp_path / "r" / "samples.jsonl").read_text().splitlines()]
    whole = [s for s in samples if s["after"]["complete"] and s["after"]["text"][-1:] in (".", "!", "?")]
    assert len(whole) >= 0.7 * len(samples)

    export(["r", "--out", "adapter", "--adapter-only"])
    assert answer_plainly(default_model, "adapter") == answer_in_chat(Chat(tmp_path / "r", max_new_tokens=24))

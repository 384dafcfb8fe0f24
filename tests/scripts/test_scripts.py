"""The scripts in scripts/: an SFT adapter, concise pairs, and --help of every script."""

import json
import random
from pathlib import Path

import pytest

from scripts import ROOT
from scripts import make_concise_data as concise
from tests.support.programs import run_python

SCRIPTS = ROOT / "scripts"


def test_train_sft_adapter_makes_an_adapter_that_a_run_starts_from(tiny_model, tiny_run, pairs, tmp_path: Path) -> None:
    from dpo_runner import run
    from dpo_runner.config.compose import load_conf

    command = [str(SCRIPTS / "train_sft_adapter.py"), "--model", tiny_model, "--data", pairs]
    sizes = ["--max-steps", "2", "--per-device-train-batch-size", "2", "--output-dir", "sft"]
    result = run_python(*command, *sizes)
    assert result.returncode == 0 and "Failed to load" not in result.stderr, result.stderr
    assert json.loads((tmp_path / "sft" / "adapter_config.json").read_text())["r"] == 8
    summary = run(load_conf([*tiny_run, "model.adapter=sft", "run_dir=r"]))
    assert summary is not None and summary["steps"] == 4
    assert json.loads((tmp_path / "r" / "adapter" / "adapter_config.json").read_text())["r"] == 8


def test_concise_questions_are_seeded_and_split_by_subject() -> None:
    splits = concise.build_questions(random.Random(0))
    assert splits == concise.build_questions(random.Random(0))
    assert not set(splits["train"]) & set(splits["eval"])
    bundled = [json.loads(line) for line in (concise.OUTPUT_DIR / "train.jsonl").read_text().splitlines()]
    assert {row["prompt"] for row in bundled} <= set(splits["train"])


def test_concise_pairs_prefer_the_shortest_complete_answer(tokenizer) -> None:
    brief = [concise.Answer("Clocks tell people the time of day.", 9, True), concise.Answer("Clocks", 3, True)]
    long_text = "Clocks are old. " * 10 + "And they"
    plain = [concise.Answer(long_text, 60, False), concise.Answer("Clocks show time to people, always.", 10, True)]
    args = type("Args", (), {"min_ratio": 1.5, "max_rejected_tokens": 40})
    pair = concise.build_pair("What are clocks for?", brief, plain, tokenizer, args)
    assert pair["chosen"] == "Clocks tell people the time of day."
    assert pair["rejected"].endswith("old.") and len(tokenizer(pair["rejected"])["input_ids"]) <= 40
    assert concise.build_pair("What are clocks for?", brief, plain[1:], tokenizer, args) is None


def list_commands() -> list[str]:
    """Return the arguments of `python` for each script: a file of scripts/, or a module of its packages."""
    paths = [path.relative_to(ROOT) for path in SCRIPTS.rglob("*.py") if "ArgumentParser(" in path.read_text()]
    modules = {path: ".".join(path.with_suffix("").parts).removesuffix(".__main__") for path in paths}
    return sorted(str(path) if len(path.parts) == 2 else f"-m {name}" for path, name in modules.items())


@pytest.mark.parametrize("command", list_commands())
def test_every_script_explains_itself(command: str) -> None:
    result = run_python(*command.split(), "--help", cwd=ROOT)
    assert result.returncode == 0 and f"python {command}" in result.stdout

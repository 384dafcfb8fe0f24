"""The reward of sampled answers in a run, and as what a search improves."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpo_runner import load_conf, run
from dpo_runner.config.rules.sweep import list_objectives, read_direction
from dpo_runner.config.sections.sweep import SearchConf
from dpo_runner.errors import ConfigError, DataError
from dpo_runner.model.result import load_tuned_model, score_texts, untuned
from dpo_runner.records.reading import read_summary
from dpo_runner.training.answers import rewarded
from dpo_runner.training.answers.rewards.texts import LengthTerm
from tests.support.common import make_tiny_run, write_pairs


def test_a_run_measures_the_reward_of_its_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths, of answers that equal ones are scored once for, before and after training."""
    asked: list[list[str]] = []
    score = LengthTerm.score

    def note(self: LengthTerm, answered: list[rewarded.Answered], watch: object) -> object:
        asked.append([text for one in answered for text in one.answers])
        return score(self, answered, watch)  # type: ignore[arg-type]

    sampled: list[list[list[int]]] = []
    sample = rewarded.sample_answers

    def keep(model: Any, prompts: list[list[int]], *others: Any) -> list[list[list[int]]]:
        answers = sample(model, prompts, *others)
        sampled.append([[*prompt, *ids] for prompt, row in zip(prompts, answers, strict=True) for ids in row])
        return answers

    monkeypatch.setattr(LengthTerm, "score", note)
    monkeypatch.setattr(rewarded, "sample_answers", keep)
    several = ["samples.reward=3", "reward=length", "reward.length.weight=2", "training.learning_rate=3e-3"]
    run(load_conf([*make_tiny_run(write_pairs(tmp_path)), *several, f"run_dir={tmp_path}/r"]))
    before, after = (read_summary(tmp_path / "r")[part] for part in ("before", "after"))
    for texts, figures in zip(asked, (before, after), strict=True):
        assert len(texts) == 6  # of a random model, no two are equal
        means = [2 * sum(map(len, texts[start : start + 3])) / 3 for start in (0, 3)]
        assert figures["eval_reward"] == pytest.approx(sum(means) / 2)
        assert figures["eval_reward_ci95"] == pytest.approx(1.96 * abs(means[0] - means[1]) / 2, abs=1e-5)
    assert before["eval_reward_kl"] == pytest.approx(0, abs=1e-4) and "eval_reward_win_rate" not in before
    model, _ = load_tuned_model(tmp_path / "r")
    (_, texts) = sampled  # before and after training, both prompts at once
    tuned = sum(float(each[-4:].sum()) for each in score_texts(model, texts))
    with untuned(model):
        first = sum(float(each[-4:].sum()) for each in score_texts(model, texts))
    assert after["eval_reward_kl"] == pytest.approx((tuned - first) / 6, abs=1e-3) and tuned != first
    wins = [(len(new) > len(old)) + (len(new) == len(old)) / 2 for old, new in zip(*asked, strict=True)]
    assert after["eval_reward_win_rate"] == pytest.approx(sum(wins) / 6, abs=1e-5)


def test_kl_is_left_out_without_a_reference(tmp_path: Path) -> None:
    """Full fine-tuning keeps no reference; its stored log-probabilities are of other answers."""
    tiny = [*make_tiny_run(write_pairs(tmp_path)), "samples.reward=1", "reward=length"]
    run(load_conf([*tiny, "lora=none", f"run_dir={tmp_path}/all"]))
    figures = read_summary(tmp_path / "all")["after"]
    assert math.isfinite(figures["eval_reward"]) and "eval_reward_kl" not in figures


def test_a_reward_that_cannot_be_measured_is_refused_before_training(tmp_path: Path) -> None:
    tiny = [*make_tiny_run(write_pairs(tmp_path)), f"run_dir={tmp_path}/r"]
    for further, told in {
        ("samples.reward=2",): "`samples.reward=2`: needs what scores the answers, such as reward=length",
        ("samples.reward=2", "reward=length", "samples.num_prompts=0"): "`samples.reward=2`: needs prompts",
        ("samples.reward=-1", "reward=length"): "`samples.reward=-1`: must be",
        ("training.load_best_model_at_end=true", "training.metric_for_best_model=eval_reward"): "no evaluation has it",
        ("samples.reward=2", "reward=function", "reward.function.name=absent_module:score"): "absent_module",
    }.items():
        with pytest.raises(ConfigError, match=told):
            run(load_conf([*tiny, *further]))
    assert not (tmp_path / "r").exists()


def test_a_search_can_improve_the_reward_if_it_is_measured() -> None:
    measured = load_conf(["samples.reward=2", "reward=length"])
    assert "eval_reward" in list_objectives(measured) and "eval_reward" not in list_objectives(load_conf([]))
    assert read_direction(SearchConf(objective="eval_reward")) == "maximize"
    pruned = SearchConf(sampler="tpe", pruner="median", objective="eval_reward")
    with pytest.raises(ConfigError, match="pruner=median`: eval_reward is measured once, at the end"):
        replace(measured, sweep=replace(measured.sweep, search=pruned))


def test_the_prompts_may_be_those_of_a_file(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Why?"},
        {"messages": [{"role": "user", "content": "Who?"}]},
        {"prompt": "Why?"},
        {"prompt": "How?"},
    ]
    file = tmp_path / "asked.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny = [*make_tiny_run(write_pairs(tmp_path)), "samples.reward=1", "reward=length", "training.max_steps=1"]
    run(load_conf([*tiny, f"samples.prompts={file}", "samples.num_prompts=2", f"run_dir={tmp_path}/r"]))
    samples = [json.loads(line) for line in (tmp_path / "r/samples.jsonl").read_text().splitlines()]
    assert [sample["prompt"][-1]["content"] for sample in samples] == ["Why?", "Who?"]
    assert "eval_reward" in read_summary(tmp_path / "r")["after"]
    with pytest.raises(DataError, match=r"^`samples\.prompts=absent\.jsonl`: no such file"):
        run(load_conf([*tiny, "samples.prompts=absent.jsonl", f"run_dir={tmp_path}/s"]))
    file.write_text('{"prompt": "Why?"}\n{"prompt": ""}\n')
    with pytest.raises(DataError, match=r"asked\.jsonl:2: empty prompt"):
        run(load_conf([*tiny, f"samples.prompts={file}", "samples.num_prompts=9", f"run_dir={tmp_path}/s"]))

"""Evaluation of a finished run: agreement with the run's own figures, KL, resuming, other data, refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dpo_runner import run
from dpo_runner.config.compose import load_conf
from dpo_runner.errors import ConfigError, RunError
from dpo_runner.evaluate import evaluation as command
from dpo_runner.evaluate import scoring
from dpo_runner.evaluate import work as evaluation_work
from dpo_runner.evaluate.__main__ import main
from dpo_runner.evaluate.evaluation import evaluate
from dpo_runner.records.reading import read_summary
from dpo_runner.records.runs import read_runs
from tests.support.common import ROWS, run_main

FILES = ("pairs.jsonl", "answers.jsonl")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A trained adapter, one that has hardly moved, and a full fine-tuning run."""
    folder = tmp_path_factory.mktemp("runs")
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    overrides = [
        *("model=tiny_random", "training=smoke", "data=local_file", f"data.path={pairs}", "wandb=disabled"),
        *("samples.num_prompts=6", "samples.max_new_tokens=5", "data.eval_fraction=0.4", "training.bf16=false"),
        *("training.per_device_eval_batch_size=1", "training.warmup_steps=0", "checks.step0=false"),
    ]
    special = {
        "trained": ["training.learning_rate=1e-2"],
        "still": ["training.learning_rate=1e-30"],
        "full": ["lora=none", "training.learning_rate=1e-3"],
    }
    for name, more in special.items():
        run(load_conf([*overrides, *more, f"run_dir={folder / name}"]))
    return {name: folder / name for name in special}


@pytest.fixture
def trained(runs: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(runs["trained"], tmp_path / "run", ignore=shutil.ignore_patterns("evaluations")))


def results_of(run_dir: Path) -> Path:
    return max((run_dir / "evaluations").iterdir(), key=lambda folder: folder.stat().st_mtime)


def write_pairs(path: Path, numbers: range) -> str:
    rows = [{"prompt": f"Name {n}.", "chosen": f"Is {n}.", "rejected": f"No {n}, no."} for n in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", ["trained", "full"])
def test_it_agrees_with_the_runs_own_figures(runs: dict[str, Path], name: str) -> None:
    after = read_summary(runs[name])["after"]
    result = evaluate(runs[name])
    assert result["reward_accuracy"]["mean"] == pytest.approx(after["eval_rewards/accuracies"], abs=1e-6)
    assert result["reward_margin"]["mean"] == pytest.approx(after["eval_rewards/margins"], abs=1e-4)
    assert abs(after["eval_rewards/margins"]) > 1e-2  # otherwise any reference would pass
    assert 0.1 * result["chosen_shift"]["mean"] == pytest.approx(after["eval_rewards/chosen"], abs=1e-4)
    assert 0.1 * result["rejected_shift"]["mean"] == pytest.approx(after["eval_rewards/rejected"], abs=1e-4)
    assert result["policy_tokens"]["mean"] == pytest.approx(after["response_tokens"], abs=0.005)
    assert result["kl_per_answer"]["mean"] != 0
    for key in ("reward_accuracy", "reward_margin", "kl_per_token"):
        assert result[key]["low"] <= result[key]["mean"] <= result[key]["high"]
    folder = results_of(runs[name])
    assert json.loads((folder / "evaluation.json").read_text()) == result
    counts = [len((folder / file).read_text().splitlines()) for file in FILES]
    assert counts == [result["evaluated"]["pairs"], result["evaluated"]["prompts_answered"]]
    assert counts[0] < len(ROWS)  # only the evaluation pairs
    assert str(json.loads((folder / "pairs.jsonl").read_text().splitlines()[0])["where"]).endswith("pairs.jsonl:1")


def test_kl_is_zero_for_an_adapter_that_has_not_moved(runs: dict[str, Path]) -> None:
    result = evaluate(runs["still"], ["samples.num_prompts=8"])
    assert result["kl_per_answer"]["mean"] == pytest.approx(0, abs=1e-4)
    assert result["reward_margin"]["mean"] == pytest.approx(0, abs=1e-4)
    assert result["policy_tokens"] == result["reference_tokens"]


def test_kl_is_above_zero_for_one_that_has(runs: dict[str, Path]) -> None:
    more = ["samples.max_new_tokens=24", "training.per_device_eval_batch_size=8"]
    result = evaluate(runs["trained"], more)
    assert result["kl_per_answer"]["low"] > 0
    tokens = [json.loads(line)["sample"]["tokens"] for line in _answers(runs["trained"], 24)]
    assert result["kl_per_token"]["mean"] == pytest.approx(
        result["kl_per_answer"]["mean"] * len(tokens) / sum(tokens), rel=1e-6
    )


def test_answers_are_scored_by_a_reward(runs: dict[str, Path]) -> None:
    """By their lengths; another reward scores the answers that are there."""
    more = ["samples.max_new_tokens=24", "training.per_device_eval_batch_size=8"]
    for weight in (1, -2):
        result = evaluate(runs["trained"], [*more, "reward=length", f"reward.length.weight={weight}"])["reward"]
        records = [json.loads(line) for line in _answers(runs["trained"], 24)]
        policy, reference = ([len(record[side]["text"]) for record in records] for side in ("policy", "reference"))
        assert result["policy_reward"]["mean"] == pytest.approx(weight * sum(policy) / len(policy))
        assert result["reference_reward"]["mean"] == pytest.approx(weight * sum(reference) / len(reference))
        wins = [(a * weight > b * weight) + (a == b) / 2 for a, b in zip(policy, reference, strict=True)]
        assert result["reward_win_rate"]["mean"] == pytest.approx(sum(wins) / len(wins))
        assert result["name"]["length"]["weight"] == weight and result["left_out"] == 0
    assert read_runs([runs["trained"]])[0][0].metrics["evaluation/policy_reward"] == result["policy_reward"]["mean"]


def _answers(run_dir: Path, length: int) -> list[str]:
    for folder in (run_dir / "evaluations").iterdir():
        if json.loads((folder / "evaluation.json").read_text())["evaluated"]["max_new_tokens"] == length:
            return (folder / "answers.jsonl").read_text().splitlines()
    raise AssertionError(length)


@pytest.mark.parametrize("survivors", [5, 13])
def test_a_killed_evaluation_repeats_nothing_and_ends_the_same(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survivors: int
) -> None:
    arguments = ["data.eval_fraction=0.5", "training.per_device_eval_batch_size=2"]
    scored = 0

    def count(*args: Any) -> Any:
        nonlocal scored
        if scored == limit:
            raise KeyboardInterrupt
        scored += 1
        return scoring.score_completions(*args)

    monkeypatch.setattr(evaluation_work, "score_completions", count)
    whole, limit = Path(shutil.copytree(trained, tmp_path / "whole")), -1
    expected = evaluate(whole, arguments)
    total, scored = scored, 0

    limit = survivors
    with pytest.raises(KeyboardInterrupt):
        evaluate(trained, arguments)
    folder = results_of(trained)
    assert not (folder / "evaluation.json").exists()
    before = {file: (folder / file).read_text() for file in FILES if (folder / file).exists()}
    scored, limit = 0, -1
    assert evaluate(trained, arguments) == expected
    assert scored == total - survivors // 2 * 2  # a batch takes two calls, and is redone if a kill interrupts it
    for name in ("evaluation.json", *FILES):
        assert (folder / name).read_bytes() == (results_of(whole) / name).read_bytes()
    for file, text in before.items():
        assert (folder / file).read_text().startswith(text)

    scored = 0
    monkeypatch.setattr(command, "load_compared", None)  # a finished evaluation does not load a model
    assert evaluate(trained, arguments) == expected
    assert scored == 0


def test_a_half_written_line_and_half_a_batch_are_done_again(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["training.per_device_eval_batch_size=4"]
    expected = evaluate(trained, arguments)
    folder = results_of(trained)
    content = {file: (folder / file).read_bytes() for file in FILES}
    (folder / "evaluation.json").unlink()
    (folder / "pairs.jsonl").write_bytes(b"".join(content["pairs.jsonl"].splitlines(keepends=True)[:5]) + b'{"pai')
    (folder / "answers.jsonl").write_bytes(content["answers.jsonl"][:-3])
    assert evaluate(trained, arguments) == expected
    assert {file: (folder / file).read_bytes() for file in FILES} == content
    capsys.readouterr()
    evaluate(trained, arguments)
    shown = capsys.readouterr().out
    assert "reference (5 tokens" in shown and "policy (5 tokens" in shown
    assert "is finished" in shown and "reward margin" in shown and "KL to the reference" in shown

    (folder / "evaluation.json").unlink()
    (folder / "pairs.jsonl").write_text("nonsense\n{}\n")
    with pytest.raises(RunError, match=r"pairs\.jsonl:1: is no JSON"):
        evaluate(trained, arguments)


def test_all_pairs_of_other_data_are_evaluated_into_another_folder(trained: Path, tmp_path: Path) -> None:
    other = write_pairs(tmp_path / "other.jsonl", range(7))
    own = evaluate(trained)
    foreign = evaluate(trained, ["data=local_file", f"data.path={other}"])
    assert (foreign["evaluated"]["pairs"], foreign["evaluated"]["split"]) == (7, "all")
    assert foreign["evaluated"]["data"] == [other] and own["evaluated"]["split"] == "eval"
    assert len(list((trained / "evaluations").iterdir())) == 2
    assert evaluate(trained, [f"data.path={other}"]) == foreign  # on top of the run's own data section
    assert evaluate(trained, [f"data.path={other}", "data.max_eval_samples=3"])["evaluated"]["pairs"] == 3
    held_out = evaluate(trained, [f"data.path={other}", "data.eval_fraction=0.5"])["evaluated"]
    assert held_out["split"] == "eval" and held_out["pairs"] < 7
    several = [f"data.sources.a.path={other}", "data=local_file"]
    assert evaluate(trained, several)["evaluated"]["pairs"] == 7


def test_training_pairs_do_not_stand_in_for_evaluation(tiny_run: list[str], tmp_path: Path) -> None:
    run(load_conf([*tiny_run, "run_dir=r", "data.eval_fraction=0", "training.eval_strategy=no"]))
    with pytest.raises(ConfigError, match="held out no evaluation pairs"):
        evaluate(tmp_path / "r")
    other = write_pairs(tmp_path / "other.jsonl", range(3))
    assert evaluate(tmp_path / "r", [f"data.path={other}", "samples.num_prompts=0"])["evaluated"]["pairs"] == 3


def test_an_unfinished_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path)])
    assert caught.value.code == 2
    assert "holds no run" in capsys.readouterr().err


def test_too_little_memory_is_one_line_and_keeps_what_is_done(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any) -> None:
        raise MemoryError("Unable to allocate 2.00 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(command, "answer_prompts", fail)
        assert run_main(main, str(trained)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory in evaluation: 2.15 GB were asked for in one piece, with ")
    assert line.endswith("; try samples.max_new_tokens=2; what is done stays done")
    scored = (results_of(trained) / "pairs.jsonl").read_text()
    evaluate(trained)
    assert (results_of(trained) / "pairs.jsonl").read_text() == scored

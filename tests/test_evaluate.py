"""Evaluating a finished run: agreement with the run itself, intervals, KL, resuming, other data, refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROWS

from dpo_runner import evaluate as command
from dpo_runner import load_conf, measures, run
from dpo_runner.artifacts import read_summary
from dpo_runner.errors import ConfigError, RunError
from dpo_runner.evaluate import compose, evaluate, main
from dpo_runner.measures import (
    Compared,
    JsonLines,
    estimate_ratios,
    sample_completions,
    score_completions,
    summarize_pairs,
)
from dpo_runner.tuned import load_tuned_model, read_run_conf, untuned

FILES = ("pairs.jsonl", "answers.jsonl")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A trained adapter, one that has hardly moved, and a full fine-tuning."""
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
    assert abs(after["eval_rewards/margins"]) > 1e-2  # else any reference would have passed
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
    assert counts[0] < len(ROWS)  # the evaluation pairs alone
    assert str(json.loads((folder / "pairs.jsonl").read_text().splitlines()[0])["where"]).endswith("pairs.jsonl:1")


def test_batches_score_as_rows_do_one_by_one(runs: dict[str, Path]) -> None:
    model, tokenizer = load_tuned_model(runs["trained"])
    generator = np.random.default_rng(0)
    rows = [
        (generator.integers(3, 200, prompt).tolist(), generator.integers(3, 200, completion).tolist())
        for prompt, completion in ((5, 3), (1, 9), (12, 1), (3, 20))
    ]
    slow = []
    for prompt, completion in rows:
        total, ids = 0.0, list(prompt)
        for token in completion:
            with torch.no_grad():
                total += torch.log_softmax(model(torch.tensor([ids])).logits[0, -1].float(), -1)[token].item()
            ids.append(token)
        slow.append(total)
    assert score_completions(model, rows, tokenizer.pad_token_id) == pytest.approx(slow, abs=1e-4)
    assert len({round(value, 3) for value in slow}) == len(rows)


def test_the_reference_leaves_the_policy_as_it_was(runs: dict[str, Path]) -> None:
    model, _ = load_tuned_model(runs["trained"])
    ids = torch.tensor([[1, 2, 3, 4]])
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with torch.no_grad():
        tuned = model(ids).logits
        with untuned(model):
            expected = model(ids).logits
        for parameter, flag in zip(model.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)
        with pytest.raises(KeyError), Compared(model).reference() as reference:
            assert torch.equal(reference(ids).logits, expected)
            raise KeyError
        assert torch.equal(model(ids).logits, tuned)
    assert not torch.allclose(tuned, expected, atol=1e-3)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert not model.training


def test_samples_follow_the_models_distribution_whatever_their_batch(runs: dict[str, Path]) -> None:
    model, tokenizer = load_tuned_model(runs["trained"])
    model.generation_config.top_k, model.generation_config.repetition_penalty = 1, 5.0  # must not count
    prompts = [[5, 6, 7], [9], [10, 11]]
    together = sample_completions(model, prompts, [1, 2, 3], 6, [], tokenizer.pad_token_id)
    for prompt, seed, expected in zip(prompts, [1, 2, 3], together, strict=True):
        assert sample_completions(model, [prompt], [seed], 6, [], tokenizer.pad_token_id) == [expected]
    stop = together[0][2]
    first = together[0].index(stop)
    stopped = sample_completions(model, prompts, [1, 2, 3], 6, [stop], tokenizer.pad_token_id)
    assert stopped[0] == together[0][: first + 1]

    with torch.no_grad():
        wanted = torch.softmax(model(torch.tensor([[5, 6, 7]])).logits[0, -1].float(), -1).numpy()
    drawn = np.concatenate(
        [sample_completions(model, [[5, 6, 7]] * 500, range(i, i + 500), 1, [], 0) for i in range(0, 4000, 500)]
    )
    found = np.bincount(drawn.ravel(), minlength=len(wanted)) / len(drawn)
    assert np.abs(found - wanted).max() < 5 * np.sqrt(wanted.max() / len(drawn))
    assert (found > 0).sum() > 50


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


def _answers(run_dir: Path, length: int) -> list[str]:
    for folder in (run_dir / "evaluations").iterdir():
        if json.loads((folder / "evaluation.json").read_text())["evaluated"]["max_new_tokens"] == length:
            return (folder / "answers.jsonl").read_text().splitlines()
    raise AssertionError(length)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    generator = np.random.default_rng(3)
    hits = 0
    for trial in range(200):
        values = generator.exponential(1.0, 60).tolist()
        names = [str(number) for number in range(60)]
        interval = estimate_ratios({"x": (values, [1.0] * 60)}, names, trial, resamples=1000)["x"]
        assert interval["low"] is not None and interval["high"] is not None
        hits += interval["low"] <= 1.0 <= interval["high"]
    assert 0.89 <= hits / 200 <= 0.99


def test_rows_of_one_prompt_are_drawn_together() -> None:
    values = [0.0, 1.0] * 10
    alone = estimate_ratios({"x": (values, [1.0] * 20)}, [str(i) for i in range(20)], 0)["x"]
    # ten copies of two prompts: a quarter of resamples has the first alone, and a quarter the second
    grouped = estimate_ratios({"x": (values, [1.0] * 20)}, [str(i % 2) for i in range(20)], 0)["x"]
    assert grouped == {"mean": 0.5, "low": 0.0, "high": 1.0}
    assert alone["low"] is not None and alone["high"] is not None
    expected = 1.96 * 0.5 / np.sqrt(20)  # of a mean of 20 coin throws
    assert alone["high"] - 0.5 == pytest.approx(expected, abs=0.04) and 0.5 - alone["low"] == pytest.approx(
        expected, abs=0.04
    )
    assert estimate_ratios({"x": (values, [1.0] * 20)}, ["one"] * 20, 0)["x"]["low"] is None


def test_a_tie_is_not_right() -> None:
    same: dict[str, Any] = {"policy_logp": -2.0, "reference_logp": -3.0}
    better = {"policy_logp": -1.0, "reference_logp": -3.0}
    records = [
        {"prompt": "a", "chosen": same, "rejected": same},
        {"prompt": "b", "chosen": better, "rejected": same},
    ]
    result = summarize_pairs(records, 0.5, 0)
    assert result["reward_accuracy"]["mean"] == 0.5
    assert result["reward_margin"]["mean"] == pytest.approx(0.25)
    assert result["chosen_shift"]["mean"] == 1.5 and result["rejected_shift"]["mean"] == 1.0


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
        return measures.score_completions(*args)

    monkeypatch.setattr(command, "score_completions", count)
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
    assert scored == total - survivors // 2 * 2  # a batch takes two calls, and is done again where a kill cuts it
    for name in ("evaluation.json", *FILES):
        assert (folder / name).read_bytes() == (results_of(whole) / name).read_bytes()
    for file, text in before.items():
        assert (folder / file).read_text().startswith(text)

    scored = 0
    monkeypatch.setattr(command, "load_compared", None)  # a finished one loads no model
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
    assert "is finished" in shown and "reward margin" in shown and "KL to the reference" in shown

    (folder / "evaluation.json").unlink()
    (folder / "pairs.jsonl").write_text("nonsense\n{}\n")
    with pytest.raises(RunError, match=r"pairs\.jsonl:1: is no JSON"):
        evaluate(trained, arguments)


def test_lines_hold_any_text(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "x.jsonl")
    texts = ["\u2028 \x85 \ud800", "line\nbreak", ""]
    lines.append([{"text": text} for text in texts])
    assert [record["text"] for record in JsonLines(tmp_path / "x.jsonl").records] == texts


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


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.beta=0.2", "`training.beta=0.2`: is the run's own and cannot be changed for an evaluation"),
        ("model=smollm2", "`model=smollm2`: is the run's own"),
        ("quant=nf4", "`quant=nf4`: is the run's own"),
        ("seed=1", "`seed=1`: is the run's own"),
        ("data.pth=x", "`data.pth`: no such field; did you mean `path`?"),
        ("training.max_lenght=5", "`training.max_lenght`: no such field; did you mean `max_length`?"),
        ("dta.path=x", "`dta`: no such field; did you mean `data`?"),
        ("data=local_fil", "`data=local_fil`: no such option; did you mean `local_file`?"),
        ("samples.max_new_tokens=0", "`samples.max_new_tokens=0`: must be at least 1"),
        ("data.eval_fraction=x", "`data.eval_fraction=x`: must be a number"),
        ("judge.model=x", "`judge`: has no effect without an endpoint"),
        ("judge.base_url=http://x/v1", "`judge.model`: must be set"),
        ("judge.base_url=file:///etc/passwd", "`judge.base_url=file:///etc/passwd`: must begin with http"),
    ],
)
def test_a_wrong_override_is_refused_in_one_line(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str], override: str, words: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([str(runs["trained"]), override])
    assert caught.value.code == 2
    shown = capsys.readouterr().err
    assert f"error: {words}" in shown
    if "file:" not in override:
        assert len(shown.strip().splitlines()) == 1


def test_the_runs_own_settings_stay_beneath_the_overrides(runs: dict[str, Path]) -> None:
    for name in ("trained", "full"):
        before = read_run_conf(runs[name])
        conf = compose(before, ["samples.max_new_tokens=9", "training.max_length=99"])
        assert (conf.samples.max_new_tokens, conf.training.max_length) == (9, 99)
        assert (conf.model, conf.lora, conf.data) == (before.model, before.lora, before.data)
        assert conf.training.beta == before.training.beta


def test_the_settings_of_a_mixture_stay_too(runs: dict[str, Path], pairs: str) -> None:
    before = read_run_conf(runs["trained"])
    overrides = ["data=local_file", f"data.sources.a.path={pairs}", f"data.sources.b.path={pairs}"]
    before.data = load_conf(["model=tiny_random", *overrides, "data.sources.b.columns.q=prompt"]).data
    assert set(before.data.sources) == {"a", "b"}
    assert compose(before, []).data == before.data


def test_an_unfinished_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path)])
    assert caught.value.code == 2
    assert "holds no run" in capsys.readouterr().err


def test_the_sft_model_is_the_reference_where_the_run_began_with_one(tiny_run, sft_adapter, tmp_path) -> None:
    more = [f"model.adapter={sft_adapter}", "training.learning_rate=1e-2", "training.bf16=false"]
    run(load_conf([*tiny_run, *more, "training.per_device_eval_batch_size=1", "run_dir=r"]))
    after = read_summary(tmp_path / "r")["after"]
    assert evaluate(tmp_path / "r")["reward_margin"]["mean"] == pytest.approx(after["eval_rewards/margins"], abs=1e-4)


def test_a_run_with_another_reference_is_refused(tiny_run, sft_adapter, tmp_path) -> None:
    run(load_conf([*tiny_run, f"model.adapter={sft_adapter}", "model.reference=base", "run_dir=r"]))
    with pytest.raises(ConfigError, match=r"`model\.reference=base`: only runs whose reference"):
        evaluate(tmp_path / "r")

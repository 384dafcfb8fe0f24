"""Win rates by a judge: a fake endpoint on loopback, its faults, and the length control."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo_runner import run
from dpo_runner.config.compose import load_conf
from dpo_runner.config.sections.run import JudgeConf
from dpo_runner.errors import ConfigError, RunError
from dpo_runner.evaluate.__main__ import main
from dpo_runner.evaluate.evaluation import evaluate
from dpo_runner.evaluate.judge import (
    LENGTH_PENALTY,
    check_judge,
    fit_length_control,
    judge_answers,
    summarize_verdicts,
)
from dpo_runner.io import endpoint as module
from dpo_runner.io.files import JsonLines
from dpo_runner.training.answers.rewards.judge import parse_verdict
from tests.support.endpoints import KEY, Endpoint, serve


class JudgeEndpoint(Endpoint):
    """An endpoint that replies with `decide(first, second)`."""

    def __init__(self) -> None:
        super().__init__()
        self.decide: Callable[[str, str], str] = lambda first, second: "A"
        self.reply = lambda body: [self.decide(*split(body["messages"][-1]["content"]))]


def split(question: str) -> tuple[str, str]:
    match = re.search(r"\[Answer A\]\n(.*)\n\n\[Answer B\]\n(.*)\n\nWhich", question, re.DOTALL)
    assert match
    return match[1], match[2]


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeEndpoint]:
    with serve(monkeypatch, JudgeEndpoint) as endpoint:
        yield endpoint


def conf_of(endpoint: JudgeEndpoint, **more: Any) -> JudgeConf:
    return JudgeConf(base_url=endpoint.url, model="stand-in", api_key_env="JUDGE_KEY", **more)


def make_answers(count: int) -> list[dict[str, Any]]:
    """Return pairs of answers in which the policy's is mostly longer."""
    generator = np.random.default_rng(1)
    answers = []
    for number in range(count):
        policy, reference = generator.integers(20, 130), generator.integers(10, 100)
        answers.append(
            {
                "prompt": [{"role": "user", "content": f"Question {number}?"}],
                "policy": {"text": f"P{number} ".ljust(policy, "x")},
                "reference": {"text": f"R{number} ".ljust(reference, "x")},
            }
        )
    return answers


def judge_all(endpoint: JudgeEndpoint, answers: list[dict[str, Any]], path: Path) -> tuple[list[dict[str, Any]], Any]:
    records = judge_answers(conf_of(endpoint), answers, JsonLines(path), lambda count: None)
    return records, summarize_verdicts(records, answers, 0)


def test_both_orders_are_asked_with_the_whole_conversation(endpoint: JudgeEndpoint, tmp_path: Path) -> None:
    answers = make_answers(3)
    judge_all(endpoint, answers, tmp_path / "v.jsonl")
    asked = [split(request["messages"][-1]["content"]) for request in endpoint.requests]
    texts = [(answer["policy"]["text"], answer["reference"]["text"]) for answer in answers]
    assert asked == [order for pair in texts for order in (pair, pair[::-1])]
    first = endpoint.requests[0]
    assert (first["path"], first["model"], first["temperature"]) == ("/v1/chat/completions", "stand-in", 0)
    assert "Question 0?" in first["messages"][-1]["content"]
    assert all(headers["Authorization"] == f"Bearer {KEY}" for headers in endpoint.headers)


def test_a_judge_that_always_says_a_finds_no_winner(endpoint: JudgeEndpoint, tmp_path: Path) -> None:
    records, summary = judge_all(endpoint, make_answers(12), tmp_path / "v.jsonl")
    assert {record["verdict"] for record in records} == {0.5}
    assert summary["win_rate"]["mean"] == 0.5 and summary["ties"] == 12
    assert summary["length_controlled_win_rate"]["mean"] == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize(("favourite", "rate"), [("P", 1.0), ("R", 0.0)])
def test_a_judge_that_prefers_one_model(endpoint: JudgeEndpoint, tmp_path: Path, favourite: str, rate: float) -> None:
    endpoint.decide = lambda first, second: "A" if first.startswith(favourite) else "B"
    _, summary = judge_all(endpoint, make_answers(12), tmp_path / "v.jsonl")
    assert summary["win_rate"] == {"mean": rate, "low": rate, "high": rate}
    for value in summary["length_controlled_win_rate"].values():
        assert value == pytest.approx(rate, abs=1e-6)


def test_a_judge_that_prefers_length_wins_nothing_once_length_is_controlled(
    endpoint: JudgeEndpoint, tmp_path: Path
) -> None:
    endpoint.decide = lambda first, second: "A" if len(first) > len(second) else "B"
    _, summary = judge_all(endpoint, make_answers(150), tmp_path / "v.jsonl")
    controlled = summary["length_controlled_win_rate"]
    assert summary["win_rate"]["mean"] > 0.6
    assert controlled["mean"] == pytest.approx(0.5, abs=0.1)
    assert controlled["low"] < 0.5 < controlled["high"]


def test_the_regression_finds_what_made_the_verdicts() -> None:
    generator = np.random.default_rng(0)
    lengths = generator.normal(30, 60, 4000)
    logits = 0.4 + 1.5 * np.tanh(lengths / lengths.std())
    verdicts = (generator.random(4000) < 1 / (1 + np.exp(-logits))).astype(float)
    rate = fit_length_control(verdicts, lengths, np.ones((1, 4000)))[0]
    assert rate == pytest.approx(1 / (1 + np.exp(-0.4)), abs=0.03)
    assert verdicts.mean() > rate + 0.05
    twice = fit_length_control(np.tile(verdicts[:50], 2), np.tile(lengths[:50], 2), np.ones((1, 100)))
    weighted = fit_length_control(verdicts[:50], lengths[:50], np.full((3, 50), 2.0))
    assert weighted == pytest.approx(np.repeat(twice, 3), abs=1e-9)
    # at the optimum of the documented objective the gradient is 0
    z, y = np.tanh(lengths[:50] / lengths[:50].std()), verdicts[:50]

    def objective(theta: float) -> float:
        losses = []
        for phi in np.linspace(-1, 4, 2001):
            p = 1 / (1 + np.exp(-(theta + phi * z)))
            losses.append(-np.sum(y * np.log(p) + (1 - y) * np.log(1 - p)) + LENGTH_PENALTY / 2 * phi**2)
        return min(losses)

    best = float(fit_length_control(y, lengths[:50], np.ones((1, 50)))[0])
    theta = np.log(best / (1 - best))
    assert objective(theta) <= min(objective(theta - 0.02), objective(theta + 0.02))


def test_where_one_model_is_always_longer_nothing_is_claimed() -> None:
    answers = [{"policy": {"text": "xx"}, "reference": {"text": "x"}}] * 4
    summary = summarize_verdicts([{"verdict": 1.0}] * 4, answers, 0)
    assert summary["length_controlled_win_rate"] is None and "longer" in summary["note"]
    assert summary["win_rate"]["mean"] == 1.0
    assert summarize_verdicts([{"verdict": None}] * 4, answers, 0)["note"] == "no verdict could be read"


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("A", "A"),
        (" b.\n", "B"),
        ("**B**", "B"),
        ("Answer: A", "A"),
        ("The better answer is B.", "B"),
        ("Both have flaws. [[A]]", "A"),
        ("<think>B? No, A is short.</think>\nB", "B"),
        ("A good answer is the second", None),
        ("[[A]] or [[B]]", None),
        ("A or B", None),
        ("C", None),
        ("", None),
    ],
)
def test_only_clear_verdicts_count(reply: str, letter: str | None) -> None:
    assert parse_verdict(reply) == letter


def test_unparsable_verdicts_are_counted_and_left_out(endpoint: JudgeEndpoint, tmp_path: Path) -> None:
    endpoint.decide = lambda first, second: (
        "I cannot say" if first.startswith("R1") else "A" if first.startswith("P") else "B"
    )
    records, summary = judge_all(endpoint, make_answers(4), tmp_path / "v.jsonl")
    assert [record["verdict"] for record in records] == [1.0, None, 1.0, 1.0]
    assert (summary["judged"], summary["unparsable"], summary["win_rate"]["mean"]) == (3, 1, 1.0)


@pytest.mark.parametrize("faults", [[500, 429], ["drop", 503], ["hang"]])
def test_passing_faults_are_waited_out(endpoint: JudgeEndpoint, tmp_path: Path, faults: list[int | str]) -> None:
    endpoint.faults = list(faults)
    conf = conf_of(endpoint, timeout=0.5)
    records = judge_answers(conf, make_answers(1), JsonLines(tmp_path / "v.jsonl"), lambda count: None)
    assert records[0]["verdict"] == 0.5
    assert len(endpoint.requests) == 2 + len(faults)


@pytest.mark.parametrize(
    ("faults", "words", "requests"),
    [
        ([401], "HTTP 401 Unauthorized; the environment variable JUDGE_KEY .* holds a key that is not accepted", 1),
        ([404], "HTTP 404 Not Found; is the address right", 1),
        ([400], r"HTTP 400 Bad Request: no: Bearer \*\*\*", 1),
        ([307], "HTTP 307", 1),  # urllib would follow and send the key
        ([503] * 3, "HTTP 503 Service Unavailable, 3 times; the verdicts so far are kept", 3),
        (["drop"] * 3, "3 times; the verdicts so far are kept", 3),
        (["<html>"], r"its reply has no choices\[0\]", 1),
    ],
)
def test_lasting_faults_end_in_one_line_and_keep_what_is_done(
    endpoint: JudgeEndpoint, tmp_path: Path, faults: list[int | str], words: str, requests: int
) -> None:
    answers, path = make_answers(3), tmp_path / "v.jsonl"
    judge_all(endpoint, answers[:1], path)
    endpoint.faults = list(faults)
    endpoint.requests.clear()
    with pytest.raises(RunError, match=rf"`judge\.base_url={endpoint.url}`: .*{words}") as caught:
        judge_all(endpoint, answers, path)
    assert "\n" not in str(caught.value) and KEY not in str(caught.value)
    assert len(endpoint.requests) == requests
    assert len(JsonLines(path).records) == 1
    endpoint.requests.clear()
    records, _ = judge_all(endpoint, answers, path)
    assert len(endpoint.requests) == 4 and [record["answer"] for record in records] == [0, 1, 2]


def test_nothing_listens_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "WAITS", (0.0,))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    conf = JudgeConf(base_url="http://127.0.0.1:9/v1", model="x", api_key_env="NO_SUCH_KEY")
    with pytest.raises(RunError, match="refused"):
        judge_answers(conf, make_answers(1), JsonLines(tmp_path / "v.jsonl"), lambda count: None)


def test_a_section_that_cannot_work_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAD_KEY", "two\nlines")
    with pytest.raises(ConfigError) as caught:
        check_judge(JudgeConf(base_url="http://me:secret@", api_key_env="BAD_KEY"))
    assert len(caught.value.mistakes) == 2 and "two" not in str(caught.value)


@pytest.fixture(scope="module")
def judged_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judged")
    rows = [{"prompt": f"Say {n}.", "chosen": f"{n}!", "rejected": f"No, not {n}."} for n in range(12)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = ["model=tiny_random", "training=smoke", "data=local_file", f"data.path={folder / 'pairs.jsonl'}"]
    more = ["samples.num_prompts=2", "samples.max_new_tokens=4", "wandb=disabled", "data.eval_fraction=0.4"]
    run(load_conf([*overrides, *more, f"run_dir={folder / 'run'}", "training.max_steps=1"]))
    return folder / "run"


def test_an_evaluation_is_judged_without_its_key_being_written(
    endpoint: JudgeEndpoint, judged_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = Path(shutil.copytree(judged_run, tmp_path / "run"))
    judge = [f"judge.base_url={endpoint.url}", "judge.model=stand-in", "judge.api_key_env=JUDGE_KEY"]
    plain = evaluate(run_dir)
    assert "judge" not in plain
    endpoint.decide = lambda first, second: f"A [[A]] {KEY}"  # an endpoint that echoes the key
    endpoint.faults = [500, 429]
    result = evaluate(run_dir, judge)
    assert result["judge"]["win_rate"]["mean"] == 0.5 and result["judge"]["judged"] == 2
    assert {key: value for key, value in result.items() if key != "judge"} == plain
    assert len(endpoint.requests) == 4 + 2
    assert evaluate(run_dir, judge) == evaluate(run_dir) == result  # finished: no further requests
    assert len(endpoint.requests) == 4 + 2
    shown = capsys.readouterr()
    assert "win rate, length-controlled" in shown.out and "2 pairs of answers judged" in shown.out

    endpoint.decide = lambda first, second: "B"
    endpoint.faults = [401]
    with pytest.raises(SystemExit) as caught:
        main([str(run_dir), *judge, "judge.model=another"])
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: `judge.base_url=") and len(error.splitlines()) == 1
    again = evaluate(run_dir, [*judge, "judge.model=another"])
    assert again["judge"]["name"]["model"] == "another" and len(endpoint.requests) == 6 + 1 + 4
    everything = b"".join(path.read_bytes() for path in run_dir.rglob("*") if path.is_file())
    assert KEY.encode() not in everything
    assert KEY not in shown.out + shown.err + error

"""A generation from an endpoint: its protocol and faults, limits, and kills that repeat no paid request."""

import json
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dpo_runner.config.compose import load_conf
from dpo_runner.errors import RunError
from dpo_runner.generate.__main__ import main
from dpo_runner.generate.generation import generate
from tests.generate.test_generate import PROMPTS, read_rows
from tests.support.common import run_main
from tests.support.endpoints import KEY, Endpoint, serve
from tests.support.programs import start_python


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    with serve(monkeypatch) as endpoint:
        endpoint.reply = lambda body: [f"{body['seed']} {number}" for number in range(body["n"])]
        yield endpoint


def ask(endpoint: Endpoint, *overrides: str, prompts: list[str] = PROMPTS) -> list[str]:
    """Write prompts.jsonl, and return the overrides of a generation from the endpoint."""
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    at = [f"generate.endpoint.base_url={endpoint.url}", "generate.endpoint.api_key_env=JUDGE_KEY"]
    data = ["data=local_file", "data.path=prompts.jsonl", "reward=length", "generate.dir=out"]
    return ["generate=endpoint", "generate.models=[served]", *at, *data, *overrides]


def asked(request: dict[str, Any]) -> str:
    return request["messages"][-1]["content"]


def test_each_prompt_is_asked_for_all_its_answers(endpoint: Endpoint) -> None:
    more = ["generate.temperature=0.7", "generate.top_p=0.9", "generate.stop=[END]", "data.system_prompt=Be brief."]
    generate(load_conf(ask(endpoint, *more)))
    assert sorted(map(asked, endpoint.requests)) == sorted(PROMPTS)
    for request, headers in zip(endpoint.requests, endpoint.headers, strict=True):
        assert request["path"] == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
        assert (request["model"], request["n"], request["max_tokens"]) == ("served", 4, 256)
        assert (request["temperature"], request["top_p"], request["stop"]) == (0.7, 0.9, ["END"])
        assert request["messages"][0] == {"role": "system", "content": "Be brief."}
    assert len({request["seed"] for request in endpoint.requests}) == len(PROMPTS)
    rows = read_rows()
    assert [row["prompt"][0]["content"] for row in rows] == PROMPTS  # without the system turn, which training adds
    assert all(len(set(row["responses"])) == 4 for row in rows)
    everything = b"".join(path.read_bytes() for path in Path("out").iterdir())
    assert KEY.encode() not in everything
    endpoint.requests.clear()
    generate(load_conf(ask(endpoint, *more)))
    assert not endpoint.requests


def test_a_server_that_does_not_know_n_is_asked_again(endpoint: Endpoint) -> None:
    endpoint.reply = lambda body: [f"an answer {body['seed']}<cut>"]
    generate(load_conf(ask(endpoint, "generate.num_answers=3")))
    assert Counter(map(asked, endpoint.requests)) == dict.fromkeys(PROMPTS, 3)
    assert all(len(set(row["responses"])) == 3 and row["complete"] == [False] * 3 for row in read_rows())


@pytest.mark.parametrize("faults", [[429, 500, 503], ["drop"], ["hang"]])
def test_passing_faults_are_waited_out(endpoint: Endpoint, faults: list[int | str]) -> None:
    endpoint.faults = list(faults)
    generate(load_conf(ask(endpoint, "generate.endpoint.timeout=0.5")))
    assert len(read_rows()) == len(PROMPTS) and len(endpoint.requests) == len(PROMPTS) + len(faults)
    assert not read_rows(name="left_out.jsonl")


@pytest.mark.parametrize(
    ("status", "requests"),
    [(400, 1), (500, 3), ("hang", 3), ("<html>", 1), ('{"choices": [{"message": {"cont', 1), ('{"choices": []}', 1)],
)
def test_a_prompt_that_fails_for_good_is_named_and_left_out(endpoint: Endpoint, status: Any, requests: int) -> None:
    endpoint.refuse = lambda body: status if asked(body) == "Who?" else None
    overrides = ask(endpoint, "generate.max_bad_fraction=0.2", "generate.endpoint.timeout=0.3")
    generate(load_conf(overrides))
    assert [row["prompt"][0]["content"] for row in read_rows()] == [text for text in PROMPTS if text != "Who?"]
    [lost] = read_rows(name="left_out.jsonl")
    assert (lost["prompt"], lost["reason"]) == ("prompts.jsonl:2", "the endpoint failed")
    assert Counter(map(asked, endpoint.requests))["Who?"] == requests
    endpoint.refuse = lambda body: None
    endpoint.requests.clear()
    generate(load_conf(overrides))
    assert list(map(asked, endpoint.requests)) == ["Who?"] and len(read_rows()) == len(PROMPTS)


def test_empty_answers_are_left_out(endpoint: Endpoint) -> None:
    endpoint.reply = lambda body: ["one", " ", "three"] if asked(body) == "Who?" else ["a", "b", "c"]
    generate(load_conf(ask(endpoint, "generate.num_answers=3", "generate.max_bad_fraction=0.2")))
    assert {len(row["responses"]) for row in read_rows()} == {2, 3}
    [lost] = read_rows(name="left_out.jsonl")
    assert (lost["prompt"], lost["reason"]) == ("prompts.jsonl:2", "empty answer")


def test_too_many_failures_end_the_command_in_one_line(endpoint: Endpoint, capsys: pytest.CaptureFixture[str]) -> None:
    endpoint.refuse = lambda body: 400 if "?" in asked(body)[:5] else None  # Who? and When?
    assert run_main(main, *ask(endpoint, "generate.max_bad_fraction=0.2")) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: 8 of 24 answers are lost, more than generate.max_bad_fraction=0.2 (2 the endpoint")
    assert "the first is prompts.jsonl:" in error and "HTTP 400" in error and len(error.splitlines()) == 1


def test_an_endpoint_that_refuses_everything_ends_the_command(endpoint: Endpoint) -> None:
    endpoint.refuse = lambda body: 401
    with pytest.raises(RunError, match=r"HTTP 401 .*JUDGE_KEY .* holds a key that is not accepted"):
        generate(load_conf(ask(endpoint)))
    assert len(endpoint.requests) <= 5  # those under way


def test_a_prompt_under_way_is_not_asked_for_the_rest_of_its_answers_then(endpoint: Endpoint) -> None:
    endpoint.reply, endpoint.delay = lambda body: ["one"], 0.02
    endpoint.refuse = lambda body: 401 if asked(body) == "Who?" else None
    with pytest.raises(RunError, match="HTTP 401"):
        generate(load_conf(ask(endpoint, "generate.num_answers=50", "generate.endpoint.concurrency=2")))
    assert len(endpoint.requests) < 10


def test_requests_at_a_time_and_their_rate(endpoint: Endpoint) -> None:
    endpoint.delay = 0.1
    generate(load_conf(ask(endpoint, "generate.endpoint.concurrency=3")))
    assert endpoint.most_at_once == 3
    endpoint.times.clear()
    limited = ["generate.endpoint.requests_per_minute=600", "generate.endpoint.concurrency=6", "generate.seed=1"]
    generate(load_conf([*ask(endpoint), *limited, "generate.dir=other"]))
    assert endpoint.times[-1] - endpoint.times[0] >= 0.09 * (len(PROMPTS) - 1)


def test_kills_repeat_no_request_that_was_answered(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kill comes while the endpoint works on a request; what it has answered before is not asked again."""
    judge = [f"reward.judge.base_url={endpoint.url}", "reward.judge.model=judge", "reward.judge.api_key_env=JUDGE_KEY"]
    more = ["reward.judge.weight=100", *judge, "generate.endpoint.concurrency=1", "reward.judge.concurrency=1"]
    overrides = ask(endpoint, *more, "generate.num_answers=2")
    answered: list[tuple[str, str]] = []
    interrupted: list[tuple[str, str]] = []
    stalled, killed = threading.Event(), threading.Event()

    def reply(body: dict[str, Any]) -> list[str]:
        request = (body["model"], asked(body))
        if len(answered) == stop_at and not stalled.is_set():
            interrupted.append(request)
            stalled.set()
            killed.wait(30)
        else:
            answered.append(request)
        if body["model"] == "judge":
            return [str(1 + len(asked(body)) % 10)]
        return [f"{asked(body)} {number}" for number in range(body["n"])]

    endpoint.reply, stop_at = reply, -1
    monkeypatch.setenv("DPO_RUNNER_CACHE", str(tmp_path / "one"))
    generate(load_conf([*overrides, "generate.dir=whole"]))
    assert len(answered) == 6 + 12
    monkeypatch.setenv("DPO_RUNNER_CACHE", str(tmp_path / "other"))
    answered.clear()
    for stop_at in (3, 9, 14):  # noqa: B007  # reply reads it
        stalled.clear()
        killed.clear()
        with start_python("-m", "dpo_runner.generate", *overrides) as process:
            assert stalled.wait(120)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        killed.set()
    stop_at = -1
    generate(load_conf(overrides))
    assert len(interrupted) == 3 and Counter(answered) == dict.fromkeys(answered, 1) and len(answered) == 18
    assert Path("out/scored.jsonl").read_bytes() == Path("whole/scored.jsonl").read_bytes()

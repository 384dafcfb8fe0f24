"""Each term of the reward, their sum, and scores that are kept."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_runner.config.compose import load_conf
from dpo_runner.errors import ConfigError, RowError, RunError
from dpo_runner.training.answers.rewards.classifier import ClassifierTerm
from dpo_runner.training.answers.rewards.judge import parse_rating, read_instruction
from dpo_runner.training.answers.rewards.reward import Reward, Score, build_reward
from dpo_runner.training.answers.rewards.store import ScoreStore, scores_dir
from dpo_runner.training.answers.rewards.term import Answered
from tests.support.endpoints import Endpoint, serve

WHY, WHO = [{"role": "user", "content": "Why?"}], [{"role": "user", "content": "Who?"}]
BOTH = [Answered(WHY, ["So.", "Because it is."]), Answered(WHO, ["Me."])]


@pytest.fixture(autouse=True)
def own_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_runner.training.answers.rewards.store.cache_dir", lambda: tmp_path / "cache")


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    with serve(monkeypatch) as endpoint:
        yield endpoint


def build(*overrides: str) -> Reward:
    return build_reward(load_conf(list(overrides)).reward)


def totals(reward: Reward, answered: list[Answered] = BOTH, watched: list[Any] | None = None) -> list[list[Any]]:
    """Return the scores, or the reasons for none."""
    watched = [] if watched is None else watched
    scored = reward.score(answered, lambda number, error: watched.append((number, error and error.reason)))
    return [[one.total if isinstance(one, Score) else one.reason for one in row] for row in scored]


def test_length_and_its_distance_from_a_target() -> None:
    assert totals(build("reward=length")) == [[-3, -14], [-3]]
    assert totals(build("reward=length", "reward.length.weight=2", "reward.length.target=4")) == [[-2, -20], [-2]]


def test_terms_are_added_with_their_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text("def asks(messages, answer):\n    return len(messages[-1]['content'])\n")
    monkeypatch.syspath_prepend(tmp_path)
    reward = build("reward=function", "reward.function.name=my_rewards:asks", "reward.length.weight=0.5")
    scored = reward.score(BOTH, lambda number, error: None)
    assert scored[0][1] == Score(4 + 0.5 * 14, {"length": 14, "function": 4})


def test_what_a_function_returns_has_to_be_a_finite_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import math\ndef odd(messages, answer):\n"
        "    return {'a': 1, 'b': math.nan, 'c': 'x', 'd': 1 / (answer != 'd')}[answer]\n"
    )
    (tmp_path / "odd_rewards.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    reward, watched = build("reward=function", "reward.function.name=odd_rewards:odd"), []
    reasons = ["reward is not finite", "reward is not a number", "reward.function failed"]
    assert totals(reward, [Answered(WHY, ["a", "b", "c", "d"])], watched) == [[1, *reasons]]
    assert watched == [(0, None), *((0, reason) for reason in reasons)]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "`reward`: must be chosen"),
        (["reward=function", "reward.function.name=no_such:one"], "`reward.function.name=no_such:one`: ModuleNotFound"),
        (["reward=function", "reward.function.name=os:system"], "is in Python's standard library"),
        (["reward.judge.weight=1", "reward.judge.base_url=http://x", "reward.judge.model=m", "reward.judge.prompt=no"],
         "`reward.judge.prompt=no`: cannot be read; No such file"),
        (["reward=reward_model", "reward.reward_model.model_name_or_path=./no"], "model_name_or_path=./no`: "),
    ],
)  # fmt: skip
def test_a_reward_that_cannot_work_is_refused(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match="(?s)" + expected.replace("(", r"\(")):
        build(*overrides)


def test_sentiment_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vaderSentiment" else find(name))
    with pytest.raises(ConfigError, match="pip install vaderSentiment"):
        build("reward=sentiment")


def test_sentiment() -> None:
    pytest.importorskip("vaderSentiment")
    [[good, bad, plain]] = totals(build("reward=sentiment"), [Answered(WHY, ["I love it!", "Awful.", "It is."])])
    assert good > 0.5 and bad < -0.4 and plain == 0


@pytest.fixture
def reward_model(tiny_model: str, tmp_path: Path) -> str:
    return save_model(tiny_model, tmp_path / "rm", num_labels=1)


def save_model(tiny_model: str, folder: Path, **settings: Any) -> str:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_model, pad_token_id=tokenizer.pad_token_id, **settings
    )
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def score_alone(folder: str, messages: Any, answer: str) -> torch.Tensor:
    """Return the logits of one conversation, by transformers alone."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    text = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": answer}], tokenize=False)
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits[0]


def test_a_reward_model_scores_batches_as_rows_and_each_answer_once(
    reward_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [[score_alone(reward_model, one.messages, text).item() for text in one.answers] for one in BOTH]
    name = f"reward.reward_model.model_name_or_path={reward_model}"
    for size in (1, 16):
        [first, second] = totals(build("reward=reward_model", name, f"reward.reward_model.batch_size={size}"))
        assert first == pytest.approx(expected[0], abs=1e-5) and second == pytest.approx(expected[1], abs=1e-5)
        monkeypatch.setattr(ClassifierTerm, "_load", lambda self: pytest.fail("scored again"))
    watched: list[Any] = []
    limited = build("reward=reward_model", name, "reward.reward_model.max_length=4")
    assert totals(limited, BOTH[1:], watched) == [["too long for the reward model"]]
    assert watched == [(0, "too long for the reward model")]


def test_a_label_of_a_classifier(tiny_model: str, tmp_path: Path) -> None:
    folder = save_model(tiny_model, tmp_path / "two", id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})
    choose = ["reward=reward_model", f"reward.reward_model.model_name_or_path={folder}"]
    with pytest.raises(ConfigError, match="has the labels bad, good"):
        build(*choose)
    with pytest.raises(ConfigError, match="did you mean `good`"):
        build(*choose, "reward.reward_model.label=god")
    wanted = score_alone(folder, WHO, "Me.").softmax(-1)[1].item()
    assert totals(build(*choose, "reward.reward_model.label=good"), BOTH[1:])[0] == pytest.approx([wanted], abs=1e-6)


def test_a_model_without_a_trained_head_is_refused(tiny_model: str) -> None:
    config = json.loads((Path(tiny_model) / "config.json").read_text())
    assert "ForCausalLM" in config["architectures"][0]
    name = f"reward.reward_model.model_name_or_path={tiny_model}"
    with pytest.raises(ConfigError, match=r"lack score.weight, which transformers would draw at random"):
        totals(build("reward=reward_model", name, "reward.reward_model.label=LABEL_0"))


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        *(("7", 7), (" 10.\n", 10), ("7.5/10", 7.5), ("Rating: 3", 3), ("**8**", 8), ("8 out of 10", 8)),
        *(("Fine. [[4]]", 4), ("<think>5?</think>6", 6)),
        *(("0", None), ("11", None), ("between 3 and 4", None), ("[[3]] [[4]]", None), ("", None), ("3 answers", None)),
    ],
)
def test_only_clear_ratings_count(reply: str, rating: float | None) -> None:
    assert parse_rating(reply) == rating


def judge(endpoint: Endpoint, *more: str) -> Reward:
    at = [f"reward.judge.base_url={endpoint.url}", "reward.judge.model=stand-in", "reward.judge.api_key_env=JUDGE_KEY"]
    return build("reward=judge", *at, *more)


def test_a_judge_rates_each_answer_once(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.reply = lambda body: ["9" if "Because" in body["messages"][-1]["content"] else "2"]
    reward = judge(endpoint)
    assert reward.count_calls(BOTH) == 3
    assert totals(reward) == [[2, 9], [2]] and len(endpoint.requests) == 3
    assert endpoint.requests[0]["messages"][0]["content"] == read_instruction("score")
    again = judge(endpoint)
    assert again.count_calls(BOTH) == 0 and totals(again) == [[2, 9], [2]] and len(endpoint.requests) == 3
    (tmp_path / "mine.txt").write_text("Rate kindness.")
    mine = judge(endpoint, f"reward.judge.prompt={tmp_path / 'mine.txt'}")
    assert totals(mine) == [[2, 9], [2]] and len(endpoint.requests) == 6  # another instruction, other scores
    assert endpoint.requests[-1]["messages"][0]["content"] == "Rate kindness."


def test_a_judge_compares_each_two_answers_in_both_orders(endpoint: Endpoint) -> None:
    def decide(body: dict[str, Any]) -> list[str]:
        first, second = body["messages"][-1]["content"].split("[Answer B]")
        return ["A" if "best" in first else "B" if "best" in second else "A"]  # otherwise the first one wins

    endpoint.reply = decide
    reward = judge(endpoint, "reward.judge.mode=pairwise")
    answered = [Answered(WHY, ["best", "good", "well"])]
    assert reward.count_calls(answered) == 6
    assert totals(reward, answered) == [[1.0, 0.25, 0.25]]
    assert len(endpoint.requests) == 6
    assert totals(reward, BOTH[1:]) == [["no other answer to compare with"]]


def test_a_judge_that_fails_or_cannot_be_read_costs_that_answer_its_score(endpoint: Endpoint) -> None:
    endpoint.refuse = lambda body: 400 if "Because" in body["messages"][-1]["content"] else None
    endpoint.reply = lambda body: ["I like it" if "Me." in body["messages"][-1]["content"] else "5"]
    watched: list[Any] = []
    reasons = ["the judge failed", "the judge's reply cannot be read"]
    assert totals(judge(endpoint), BOTH, watched) == [[5, reasons[0]], [reasons[1]]]
    assert sorted(watched, key=str) == [(0, reasons[0]), (0, None), (1, reasons[1])]
    endpoint.refuse = lambda body: None
    endpoint.requests.clear()
    assert totals(judge(endpoint)) == [[5, 5], [reasons[1]]]  # only the failed request is made again
    assert len(endpoint.requests) == 1
    endpoint.faults = [401]
    with pytest.raises(RunError, match=r"`reward\.judge\.base_url=.*HTTP 401"):
        totals(judge(endpoint), [Answered(WHO, ["You."])])


def test_several_judges_replies_at_a_time(endpoint: Endpoint) -> None:
    endpoint.reply, endpoint.delay = lambda body: ["5"], 0.05
    answered = [Answered(WHY, [f"{number}." for number in range(12)])]
    assert totals(judge(endpoint, "reward.judge.concurrency=3"), answered) == [[5] * 12]
    assert endpoint.most_at_once == 3


def test_kept_scores_survive_a_line_that_a_kill_has_cut() -> None:
    store = ScoreStore("judge", 1)
    store.keep("7", WHY, "So.")
    [path] = scores_dir().iterdir()
    with path.open("ab") as file:
        file.write(b'["cut off')
    other = ScoreStore("judge", 1)
    assert other.find(WHY, "So.") == "7" and other.find(WHO, "So.") is None
    other.keep(5.0, WHO, "So.")
    assert ScoreStore("judge", 1).find(WHO, "So.") == 5.0 and ScoreStore("judge", 2).find(WHY, "So.") is None


def test_an_error_that_a_watcher_raises_ends_the_scoring(endpoint: Endpoint) -> None:
    def stop(number: int, error: RowError | None) -> None:
        raise RunError("enough")

    endpoint.delay = 0.05
    answered = [Answered(WHY, [f"{number}." for number in range(40)])]
    with pytest.raises(RunError, match="enough"):
        judge(endpoint, "reward.judge.concurrency=2").score(answered, stop)
    assert len(endpoint.requests) < 10

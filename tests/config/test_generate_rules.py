"""Rules of the sections `generate` and `reward`."""

import pytest

from dpo_runner.config.compose import load_conf
from dpo_runner.config.keys import find_ignored, find_no_op
from dpo_runner.errors import ConfigError
from dpo_runner.sweep.points import digest_config

JUDGE = ["reward=judge", "reward.judge.base_url=http://127.0.0.1:8000/v1", "reward.judge.model=m"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["generate=endpoint"], "`generate.models`: must be set with generate.endpoint.base_url"),
        (["generate.models=[a,a]"], "names a model twice"),
        (["generate.temperature=0"], "`generate.num_answers=4`: greedy answers"),
        (["generate.temperature=0", "generate.num_answers=1", "generate.top_p=0.5"], "top_p=0.5`: has no effect"),
        (["generate.temperature=-1"], "`generate.temperature=-1.0`: must be at least 0"),
        (["generate.top_p=0"], "`generate.top_p=0.0`: must be above 0 and at most 1"),
        (["generate.on_cut_off=leave"], "`generate.on_cut_off=leave`: no such choice; choose from drop, keep"),
        (["generate.endpoint.base_url=127.0.0.1", "generate.models=[a]"], "must begin with http:// or https://"),
        (["generate.endpoint.concurrency=0"], "`generate.endpoint.concurrency=0`: must be at least 1"),
        (["reward=lenght"], "`reward=lenght`: no such option; did you mean `length`?"),
        (["reward.sentiment.wieght=1"], "did you mean `weight`?"),
        (["reward=function"], "`reward.function.name`: must be set"),
        (["reward=function", "reward.function.name=mine"], "must be package.module:function"),
        (["reward=reward_model"], "`reward.reward_model.model_name_or_path`: must be set"),
        (["reward=judge", "reward.judge.model=m"], "`reward.judge.base_url`: must be set"),
        ([*JUDGE, "reward.judge.mode=both"], "`reward.judge.mode=both`: no such choice"),
        (["data.pairing=best_vs_random", "data.format=orca"], "`data.pairing=best_vs_random`: has no effect with"),
        (["data.max_similarity=2"], "`data.max_similarity=2.0`: must be at least 0 and at most 1"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_conf(overrides)
    assert expected in str(caught.value) and len(caught.value.mistakes) == 1


def test_a_key_that_holds_no_key_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "two\nlines")
    with pytest.raises(ConfigError, match=r"`reward.judge.api_key_env=OPENAI_API_KEY`: that variable holds no key"):
        load_conf(JUDGE)


def test_several_terms_have_weights() -> None:
    reward = load_conf(["reward=sentiment", "reward.length.weight=-0.01", "reward.length.target=80"]).reward
    assert (reward.sentiment.weight, reward.length.weight, reward.length.target) == (1, -0.01, 80)
    assert reward.judge.weight == 0


def test_runs_and_sweeps_do_not_change_with_these_sections() -> None:
    plain, other = load_conf([]), load_conf(["reward=length", "generate.num_answers=8"])
    assert digest_config(plain) == digest_config(other)
    assert digest_config(plain) != digest_config(load_conf(["data.max_similarity=0.9"]))
    written = ["reward=length", "generate.num_answers=8", "training.beta=0.1"]
    assert find_ignored(other, written) == [
        "generate.num_answers: is read by python -m dpo_runner.generate, and by a run with rounds=N",
        "reward: is read by python -m dpo_runner.generate, and by a run with samples.reward=4 or rounds=N",
    ]
    assert len(find_ignored(load_conf(["reward=length", "samples.reward=1"]), written)) == 1
    assert "does not change what is computed" in str(find_no_op("reward.length.weight", [plain]))

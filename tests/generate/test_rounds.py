"""Rounds of on-policy pairs: held-out prompts, the chain of policies and references, interruptions, sweeps."""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_runner import load_conf, run, run_rounds
from dpo_runner.chat import main as chat
from dpo_runner.compare.__main__ import main as compare
from dpo_runner.config.run_conf import RunConf
from dpo_runner.data.prompts import read_split_prompts
from dpo_runner.errors import ConfigError, DataError, RunError, RunInterrupted
from dpo_runner.evaluate.evaluation import evaluate
from dpo_runner.generate import rounds
from dpo_runner.records.reading import read_metrics, read_status, read_summary
from dpo_runner.sweep.points import digest_config
from tests.support.common import run_main
from tests.support.programs import run_python
from tests.support.wandb_server import API_KEY, WandbServer

WORDS = ["tea", "rain", "the moon", "a cat", "two boats", "snow", "bread", "a song", "old trees", "salt", "time", "ink"]
TINY = [
    *("model=tiny_random", "training=smoke", "wandb=disabled", "training.max_steps=2"),
    *("generate.max_new_tokens=8", "generate.max_bad_fraction=0.9", "generate.batch_size=8", "generate.num_answers=3"),
    *("samples.num_prompts=2", "samples.max_new_tokens=8", "samples.reward=2", "data.eval_fraction=0.3"),
]


@pytest.fixture(autouse=True)
def letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward that tells nearly all answers apart, and a file of prompts."""
    monkeypatch.syspath_prepend(tmp_path)
    write_reward(tmp_path, "return sum(map(ord, answer)) % 97 / 97")
    rows = [{"prompt": f"What about {word}?"} for word in WORDS]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_reward(folder: Path, body: str) -> None:
    (folder / "letters.py").write_text(f"def score(messages, answer):\n    {body}\n")
    sys.modules.pop("letters", None)
    importlib.invalidate_caches()


def ask(*overrides: str) -> list[str]:
    reward = ["reward=function", "reward.function.name=letters:score"]
    return ["rounds=2", "data=prompts", "data.path=prompts.jsonl", *reward, *TINY, *overrides]


def play(*overrides: str) -> dict[str, Any]:
    summary = run_rounds(load_conf(ask(*overrides)))
    assert summary is not None
    return summary


def read_rows(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def read_conf(path: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(Path(path, "config.yaml").read_text())
    return found


def read_outcome(folder: str) -> dict[str, Any]:
    """Return what must be the same after an interruption."""
    path = Path(folder)
    files = [*path.rglob("adapter_model.safetensors"), *path.glob("round-*/answers/*.jsonl")]
    kept = {str(file.relative_to(path)): file.read_bytes().replace(f"/{folder}/".encode(), b"") for file in files}
    summary = {key: value for key, value in read_summary(path).items() if key in ("before", "after", "best_round")}
    events = [{key: value for key, value in event.items() if key != "time"} for event in read_metrics(path)]
    return {**kept, "summary": summary, "events": events, "samples": (path / "samples.jsonl").read_text()}


def test_each_round_goes_on_from_the_policy_of_the_last_one(capsys: pytest.CaptureFixture[str]) -> None:
    summary = play("run_dir=loop", "wandb=offline")
    held_out = {row["prompt"][0]["content"] for row in read_rows("loop/held_out.jsonl")}
    trained = [row["prompt"][0]["content"] for row in read_rows("loop/prompts.jsonl")]
    assert len(held_out) >= 2 and sorted([*held_out, *trained]) == sorted(f"What about {word}?" for word in WORDS)
    for number in (1, 2):
        rows = read_rows(f"loop/round-{number}/answers/scored.jsonl")
        assert [row["prompt"][0]["content"] for row in rows] == trained and rows[0]["source"].startswith(
            "prompts.jsonl"
        )
        sampled = {sample["prompt"][0]["content"] for sample in read_rows(f"loop/round-{number}/run/samples.jsonl")}
        assert sampled <= held_out and len(sampled) == 2

    loop = Path("loop").absolute()
    second = read_conf("loop/round-2/run")
    assert rows[0]["models"][0] == str(loop / "round-1/run") and rows[0]["sampling"]["seed"] == 1
    assert second["model"]["adapter"] == str(loop / "round-1/run/adapter") and second["lora"] is None
    assert second["model"]["reference"] == "initial" and second["wandb"]["group"] == "loop"
    one, two = (read_summary(Path(f"loop/round-{number}/run")) for number in (1, 2))
    assert two["before"]["eval_reward"] == one["after"]["eval_reward"]  # the same prompts, seeds and policy
    assert two["before"]["eval_reward_kl"] == 0.0  # the reference is that policy
    assert [each["eval_reward"] for each in summary["rounds"]] == [each["after"]["eval_reward"] for each in (one, two)]

    best = summary["best_round"]
    rewards = [one["before"]["eval_reward"], *(each["eval_reward"] for each in summary["rounds"])]
    assert rewards[best] == max(rewards[1:]) and summary["after"] == (one, two)[best - 1]["after"]
    assert summary["before"] == one["before"] and summary["steps"] == 2 * best
    weights = [
        Path("loop", place, "adapter_model.safetensors").read_bytes()
        for place in ("adapter", f"round-{best}/run/adapter")
    ]
    assert weights[0] == weights[1]
    assert [(event["step"], event["round"]) for event in read_metrics(loop)] == [(0, 0), (2, 1), (4, 2)]
    check_wandb(loop, summary)
    out = capsys.readouterr().out
    assert "round 2 of 2" in out and f"{best} (best)" in out and f"dpo_runner.chat {loop}" in out

    assert play("run_dir=loop", "wandb=offline") == summary  # finished
    with pytest.raises(ConfigError, match=r"`generate.num_answers=4`: the run in \S*loop has 3"):
        play("run_dir=loop", "generate.num_answers=4")
    assert run_main(compare, "loop") == 0 and "by eval_reward" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="rounds hold out prompts, not pairs"):
        evaluate(loop)


def check_wandb(loop: Path, summary: dict[str, Any]) -> None:
    """Upload the offline runs: one group, with the run of each round and one that has curves over rounds."""
    server = WandbServer()
    try:
        env = {**os.environ, "WANDB_BASE_URL": server.url, "WANDB_API_KEY": API_KEY}
        parts = map(str, sorted(loop.glob("wandb/offline-run-*")))
        assert run_python("-m", "wandb", "sync", *parts, env=env).returncode == 0
        runs = {run.variables["displayName"]: run for run in server.runs.values()}
        assert {run.variables["groupName"] for run in runs.values()} == {"loop"}
        assert runs.keys() == {"dpo/loop", "dpo/loop round 1", "dpo/loop round 2"}
        curve = [(row["train/round"], row["eval/reward"]) for row in runs["dpo/loop"].history if "train/round" in row]
        rewards = [summary["before"]["eval_reward"], *(one["eval_reward"] for one in summary["rounds"])]
        assert curve == list(enumerate(rewards))
    finally:
        server.stop()


def test_interrupted_rounds_end_with_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    play("run_dir=undisturbed")
    for place in ("training of round 1", "sampling of round 2", "training of round 2", "end"):
        with monkeypatch.context() as broken, pytest.raises(RunInterrupted) as stopped:
            _interrupt(place, broken)
            play("run_dir=disturbed")
        assert stopped.value.exit_code == 143
        assert str(stopped.value).endswith("/disturbed")  # not a round's directory
        status = read_status(Path("disturbed"))
        assert status is not None and status["state"] == "interrupted"
    play("run_dir=disturbed")
    assert read_outcome("disturbed") == read_outcome("undisturbed")


def _interrupt(place: str, broken: pytest.MonkeyPatch) -> None:
    """Let a signal end the rounds at a place."""
    if place == "end":
        broken.setattr(rounds, "write_folder", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt(15)))
        return
    what = "generate" if "sampling" in place else "run"
    whole = getattr(rounds, what)

    def work(conf: RunConf, *given: Any) -> Any:
        if f"round-{place[-1]}" in str(conf.run_dir):
            raise RunInterrupted("interrupted", 15) if what == "run" else KeyboardInterrupt(15)
        return whole(conf, *given)

    broken.setattr(rounds, what, work)


@pytest.mark.parametrize(
    ("overrides", "references", "models"),
    [
        (["lora=none"], ["initial", "initial"], ["random:tiny-llama", "{0}/model"]),
        (
            ["lora=none", "rounds_reference=initial"],
            ["initial", "random:tiny-llama"],
            ["random:tiny-llama", "{0}/model"],
        ),
        (["rounds_reference=initial"], ["initial", "base"], ["random:tiny-llama"] * 2),
        (["model.adapter=sft", "rounds_reference=initial"], ["initial", "sft"], ["random:tiny-llama"] * 2),
        (
            ["model.adapter=sft", "model.reference=base", "rounds_reference=initial"],
            ["base"] * 2,
            ["random:tiny-llama"] * 2,
        ),
    ],
)
def test_the_reference_is_the_last_policy_or_the_first_model(
    overrides: list[str], references: list[str], models: list[str]
) -> None:
    if "model.adapter=sft" in overrides:
        run(
            load_conf(
                [
                    "run_dir=sft_run",
                    "data=concise",
                    "data.max_train_samples=4",
                    "data.max_eval_samples=2",
                    *TINY[:6],
                    "samples.num_prompts=0",
                ]
            )
        )
        Path("sft_run/adapter").rename("sft")
    play("run_dir=loop", *(["lora=none"] if "model.adapter=sft" in overrides else []), *overrides)
    confs = [read_conf(f"loop/round-{number}/run")["model"] for number in (1, 2)]
    first = str(Path("loop/round-1/run").absolute())
    assert [conf["reference"] for conf in confs] == references
    assert [conf["model_name_or_path"] for conf in confs] == [model.format(first) for model in models]
    two = read_summary(Path("loop/round-2/run"))["before"]
    if overrides[0] != "lora=none":  # else no reference is kept
        assert two["eval_reward_kl"] != 0.0  # the policy has left the reference
    kind = "model" if overrides[0] == "lora=none" else "adapter"
    assert (Path("loop") / kind).is_dir() and run_main(chat, "loop", "--prompt", "Tea?") == 0


def test_rounds_end_when_the_reward_does_not_rise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, held_out = read_split_prompts(load_conf(ask()).data)
    same = [prompt.messages[0]["content"] for prompt in held_out.prompts]
    body = f"return 1.0 if messages[0]['content'] in {same} else sum(map(ord, answer))"
    write_reward(tmp_path, body)
    summary = play("rounds=4", "rounds_patience=2", "run_dir=loop")
    assert [one["round"] for one in summary["rounds"]] == [1, 2] and summary["best_round"] == 1
    assert [event["round"] for event in read_metrics(Path("loop"))] == [0, 1, 2]
    out = capsys.readouterr().out
    assert "has not risen for 2 rounds" in out and "warning: no round has raised the held-out reward" in out

    write_reward(tmp_path, "return 1.0")
    with pytest.raises(RunError, match=r"round 1: all answers to each prompt have the same reward"):
        play("run_dir=other")


def test_a_sweep_over_rounds_shares_the_first_answers() -> None:
    reward = ["reward=function", "reward.function.name=letters:score"]  # of gibberish, sentiment tells nothing apart
    small = [*TINY, *reward, "data.max_train_samples=8", "training.beta=0.05,0.5", "sweep.dir=sweep", "sweep.workers=2"]
    command = ["experiment=sentiment_frontier", *small, "-m"]
    assert run_python("-m", "dpo_runner", *command).returncode == 0
    jobs = sorted(path for path in Path("sweep").iterdir() if (path / "summary.json").exists())
    (answers,) = Path("sweep/answers").glob("*/scored.jsonl")
    for job in jobs:
        conf = read_conf(str(job / "round-1/run"))
        assert conf["data"]["path"] == str(answers.absolute()) and conf["wandb"]["group"] == "sweep"
        assert conf["generate"]["max_new_tokens"] == 8 and conf["training"]["num_train_epochs"] == 2
    page = Path("sweep/compare.html").read_text()
    assert '"metric":"eval_reward"' in page and '"gain":"eval_reward","distance":"eval_reward_kl"' in page
    assert len(jobs) == 2 and len({read_summary(job)["after"]["eval_reward_kl"] for job in jobs}) == 2
    digests = {digest_config(load_conf(ask(*more))) for more in ([], ["generate.num_answers=2"], ["rounds_patience=1"])}
    assert len(digests) == 3
    assert digest_config(load_conf(["generate.num_answers=2"])) == digest_config(
        load_conf(["rounds_reference=initial"])
    )


def test_a_dry_run_and_refusals(capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(Path().rglob("*"))
    assert run_rounds(load_conf(ask("dry_run=true", "run_dir=loop"))) is None
    assert sorted(Path().rglob("*")) == before
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in capsys.readouterr().out.splitlines()}
    trained, held_out = (len(side.prompts) for side in read_split_prompts(load_conf(ask()).data))
    assert lines["answers"].startswith(f"{3 * trained}, 3 to each prompt")
    assert lines["rounds"] == "2, each from the policy of the last one"
    assert held_out == len(WORDS) - trained

    play("run_dir=loop", "rounds=1")
    Path("loop/status.json").write_text('{"state": "interrupted"}')
    Path("prompts.jsonl").write_text(Path("prompts.jsonl").read_text() + json.dumps({"prompt": "Another?"}) + "\n")
    with pytest.raises(ConfigError, match=r"`data`: its prompts have changed since \S*loop/\S+.jsonl was written"):
        play("run_dir=loop", "rounds=1")
    with pytest.raises(ConfigError, match=r"dpo_runner.run_rounds runs them"):
        run(load_conf([*ask(), "data=concise", "data.max_train_samples=4"]))
    Path("prompts.jsonl").write_text('{"prompt": "Alone?"}\n')
    with pytest.raises(DataError, match="at least 2 different prompts"):
        play("run_dir=other")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("generate.models=[a]", "`generate.models`: each round samples from the policy of the last one"),
        ("generate=endpoint", "`generate.endpoint.base_url`: each round samples"),
        ("generate.dir=x", "`generate.dir=x`: each round has a folder in run_dir"),
        ("generate.num_answers=1", "`generate.num_answers=1`: a pair needs two answers"),
        ("samples.num_prompts=0", "`samples.num_prompts=0`: rounds are compared by the reward of held-out prompts"),
        ("data.eval_fraction=0", "`data.eval_fraction=0`: rounds hold out prompts"),
        ("model.reference=base2", "`model.reference=base2`: needs rounds_reference=initial"),
        ("rounds_reference=last", "`rounds_reference=last`: no such choice; choose from initial, previous"),
        ("training.eval_strategy=steps", "`training.eval_strategy=steps`: rounds have held-out prompts and no pairs"),
        ("rounds=0", "`rounds=0`: must be at least 1"),
    ],
)
def test_what_rounds_refuse(override: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_conf([*ask(override)])
    assert told in str(caught.value)

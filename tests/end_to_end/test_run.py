"""End-to-end runs: directory contents, exits, and continued runs equal to uninterrupted ones."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from dpo_runner import run
from dpo_runner.chat import Chat
from dpo_runner.config.compose import load_conf
from dpo_runner.errors import ConfigError, RunError, RunInterrupted, RunPruned
from dpo_runner.export.__main__ import main as export
from dpo_runner.training.trainer import RunTrainer
from tests.support.answers import answer_in_chat, answer_plainly
from tests.support.common import make_tiny_run, real_model_dtype, write_pairs
from tests.support.programs import run_python

EVENT_FIELDS_OF_THE_MACHINE = ("time", "runtime", "per_second", "preparation_time")


def read_events(run_dir: Path) -> list[dict]:
    events = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in e.items() if not k.endswith(EVENT_FIELDS_OF_THE_MACHINE)} for e in events]


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def finished(own_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    overrides = [*make_tiny_run(write_pairs(folder)), f"run_dir={folder / 'r'}", "wandb=offline"]
    run(load_conf(overrides), overrides)
    return folder / "r"


def test_the_run_directory_holds_what_it_should(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "config.yaml", "overrides.yaml", "status.json", "metrics.jsonl", "summary.json", "samples.jsonl",
        "environment.json", "adapter", "checkpoints", "run.log", "wandb", "data_report.json", "dropped_rows.jsonl",
        ".lock",
    }  # fmt: skip
    assert yaml.safe_load((finished / "config.yaml").read_text())["training"]["max_steps"] == 4
    assert "training=smoke" in yaml.safe_load((finished / "overrides.yaml").read_text())

    status = read_json(finished / "status.json")
    assert (status["state"], status["pid"], status["adapter"]) == ("finished", os.getpid(), "last")

    summary = read_json(finished / "summary.json")
    for phase in ("before", "after"):
        keys = {"eval_loss", "eval_rewards/accuracies", "eval_rewards/margins", "response_tokens", "responses_at_cap"}
        assert keys <= summary[phase].keys()
    assert summary["before"]["eval_loss"] == pytest.approx(0.6931, abs=1e-3)
    assert summary["before"]["eval_rewards/margins"] == pytest.approx(0, abs=1e-4)  # accuracy is then rounding noise
    assert summary["steps"] == 4
    assert summary["train_runtime"] > 0 and summary["pairs_per_second"] > 0 and summary["peak_memory_gb"] > 0.1

    environment = read_json(finished / "environment.json")
    assert environment["packages"]["trl"].startswith("1.16")
    assert environment["seed"] == 42
    assert environment["commit"] is None or len(environment["commit"]) == 40
    assert environment["hardware"]["torch_threads"] == torch.get_num_threads()
    assert environment["data"]["train"]["rows"] == 21
    assert environment["model"]["fingerprint"] and environment["data"]["eval"]["fingerprint"]

    events = read_events(finished)
    assert [e["step"] for e in events if "loss" in e] == [1, 2, 3, 4]
    assert [e["step"] for e in events if "eval_loss" in e] == [0, 2, 4]
    assert "rewards/margins" in events[1]

    samples = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2 and samples[0].keys() == {"prompt", "before", "after"}
    assert samples[0]["before"]["tokens"] <= 4
    assert {path.name for path in (finished / "checkpoints").iterdir()} == {"checkpoint-2", "checkpoint-4"}
    assert not list(finished.rglob("*.tmp")) and [path.name for path in finished.glob(".*")] == [".lock"]


def test_the_account_of_the_data_is_kept_and_logged(tiny_run: list[str], tmp_path: Path) -> None:
    rows = (tmp_path / "pairs.jsonl").read_text() + 'broken\n{"prompt": "a", "chosen": "same", "rejected": "same"}\n'
    (tmp_path / "pairs.jsonl").write_text(rows)
    overrides = [*tiny_run, "run_dir=r", "wandb=offline", "training.max_steps=1", "data.max_bad_fraction=0.1"]
    run(load_conf(overrides), overrides)
    report = read_json(tmp_path / "r" / "data_report.json")
    assert report["sources"][0]["rows"] == 26
    assert report["sources"][0]["bad"] == {"broken JSON": 1, "chosen equals rejected": 1}
    assert report["splits"]["train"]["kept"] + report["splits"]["eval"]["kept"] == 24
    dropped = [json.loads(line) for line in (tmp_path / "r" / "dropped_rows.jsonl").read_text().splitlines()]
    assert [(Path(row["file"]).name, row["line"], row["reason"]) for row in dropped] == [
        ("pairs.jsonl", 25, "broken JSON"),
        ("pairs.jsonl", 26, "chosen equals rejected"),
    ]
    logged = next((tmp_path / "r" / "wandb").glob("offline-run-*/*.wandb"))
    shown = run_python("-m", "wandb", "leet", "inspect", "--json", str(logged)).stdout
    assert "data_report" in shown and "chosen equals rejected" in shown and "data/train/prompt_tokens" in shown


def test_several_sources_are_evaluated_each_and_together(tiny_run: list[str], tmp_path: Path) -> None:
    rows = [{"prompt": f"Name {n}", "chosen": f"Number {n}", "rejected": "None"} for n in range(10)]
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = [override for override in tiny_run if not override.startswith("data.path")]
    sources = ["data.sources.sums.path=pairs.jsonl", "data.sources.names.path=more.jsonl", "data.eval_fraction=0.3"]
    exact = ["training.bf16=false", "training.per_device_eval_batch_size=1"]  # TRL averages over batches
    overrides = [*base, *sources, *exact, "run_dir=r", "training.load_best_model_at_end=true"]
    run(load_conf(overrides), overrides)
    events = [event for event in read_events(tmp_path / "r") if any(key.startswith("eval_") for key in event)]
    assert all({"eval_loss", "eval_sums_loss", "eval_names_loss"} <= event.keys() for event in events)  # one event each
    counts = read_json(tmp_path / "r" / "data_report.json")["splits"]["eval"]["by_source"]
    for event in (events[0], events[-1]):
        for key in ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen"):
            mean = sum(event[f"eval_{name}_{key}"] * count for name, count in counts.items()) / sum(counts.values())
            assert event[f"eval_{key}"] == pytest.approx(mean, abs=1e-6)
    assert events[-1]["eval_sums_loss"] != events[-1]["eval_names_loss"]
    # All rows as one set give the same metrics.
    (tmp_path / "all.jsonl").write_text((tmp_path / "pairs.jsonl").read_text() + (tmp_path / "more.jsonl").read_text())
    whole = [*base, "data.path=all.jsonl", "data.eval_fraction=0.3", *exact, "run_dir=w", "training.max_steps=1"]
    summary = run(load_conf(whole), whole)
    assert summary["before"]["eval_logps/chosen"] == pytest.approx(events[0]["eval_logps/chosen"], rel=1e-5)


def test_nothing_that_data_holds_commands_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from dpo_runner.io.console import RunConsole

    answer = {"text": "\x1b[31mred\x07", "tokens": 3, "complete": True}
    prompt = [{"role": "user", "content": "\x1b]0;pwned\x07Why?"}]
    RunConsole().show_samples([{"prompt": prompt, "before": answer, "after": answer}])
    RunConsole().show_plan({"data": "\x1b[2J.jsonl"})
    shown = capsys.readouterr().out
    assert "before (3 tokens)" in shown and "after (3 tokens)" in shown
    assert "\x1b" not in shown and "\x07" not in shown and "␛" in shown and "pwned" in shown


def test_the_adapter_loads_with_plain_peft(finished: Path, tiny_model: str) -> None:
    names = {path.name for path in (finished / "adapter").iterdir()}
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "README.md",
    } <= names
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), finished / "adapter")
    assert set(model.peft_config) == {"default"}
    assert any(p.abs().sum() > 0 for name, p in model.named_parameters() if "lora_B" in name)
    assert AutoTokenizer.from_pretrained(finished / "adapter").chat_template
    card = (finished / "adapter" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft") and "`eval_rewards/margins`" in card
    assert (finished / "adapter" / "plots" / "loss.png").exists()


def test_a_finished_run_is_finished(finished: Path, tiny_run: list[str]) -> None:
    """Trap 12: transformers would train one more step each time."""
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    summary = run(load_conf([*tiny_run, f"data.path={finished.parent / 'pairs.jsonl'}", f"run_dir={finished}"]))
    assert summary == read_json(finished / "summary.json")
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_a_used_directory_is_not_overwritten(finished: Path, tiny_run: list[str], tmp_path: Path) -> None:
    same = [*tiny_run, f"data.path={finished.parent / 'pairs.jsonl'}", f"run_dir={finished}"]
    with pytest.raises(ConfigError, match=rf"`training\.beta=0\.3`: the run in {finished} has 0\.1"):
        run(load_conf([*same, "training.beta=0.3"]))
    with pytest.raises(ConfigError, match="resume=never"):
        run(load_conf([*same, "resume=never"]))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="no run of this program"):
        run(load_conf([*tiny_run, "run_dir=mine"]))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_a_directory_in_use_is_refused(tiny_run: list[str], tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    now = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    status = {"state": "running", "pid": os.getppid(), "heartbeat": now}
    (tmp_path / "r" / "status.json").write_text(json.dumps(status))
    with pytest.raises(ConfigError, match=f"process {os.getppid()} is running there"):
        run(load_conf([*tiny_run, "run_dir=r"]))


CONTINUED = [
    ["quant=nf4"],
    ["lora.lora_dropout=0.2"],
    ["sft"],
    ["sft", "model.adapter_mode=stack"],
    ["training.gradient_accumulation_steps=2", "training.per_device_train_batch_size=3"],
    ["lora=none", "training.learning_rate=1e-3"],
    ["training.logging_steps=3"],  # the interruption splits a logging interval
]


@pytest.mark.parametrize("extra", CONTINUED, ids="+".join)
def test_a_continued_run_is_bitwise_the_undisturbed_one(
    extra: list[str], tiny_run, sft_adapter, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = [f"model.adapter={sft_adapter}" if override == "sft" else override for override in extra]
    overrides = [*tiny_run, *extra, "training.max_steps=6", "training.save_steps=2", "training.eval_steps=3"]
    run(load_conf([*overrides, "run_dir=whole"]))

    step = RunTrainer.training_step

    def killed_in_step_6(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(RunTrainer, "training_step", killed_in_step_6)
    with pytest.raises(RunInterrupted):
        run(load_conf([*overrides, "run_dir=cut"]))
    assert read_json(tmp_path / "cut" / "status.json")["state"] == "interrupted"
    monkeypatch.setattr(RunTrainer, "training_step", step)
    run(load_conf([*overrides, "run_dir=cut"]))

    weights = "model/model.safetensors" if "lora=none" in extra else "adapter/adapter_model.safetensors"
    whole, cut = load_file(tmp_path / "whole" / weights), load_file(tmp_path / "cut" / weights)
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)
    assert read_events(tmp_path / "whole") == read_events(tmp_path / "cut")
    one, other = read_json(tmp_path / "whole" / "summary.json"), read_json(tmp_path / "cut" / "summary.json")
    assert (one["before"], one["after"], one["steps"]) == (other["before"], other["after"], other["steps"])


def test_a_run_stopped_after_its_last_step_trains_no_more(tiny_run, tmp_path, monkeypatch) -> None:
    """Trap 12: transformers would train a step beyond the last."""
    run(load_conf([*tiny_run, "run_dir=whole"]))

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    save = sys.modules["dpo_runner.train"].save_result
    monkeypatch.setattr(sys.modules["dpo_runner.train"], "save_result", stop)
    with pytest.raises(RunInterrupted):
        run(load_conf([*tiny_run, "run_dir=cut"]))
    monkeypatch.setattr(sys.modules["dpo_runner.train"], "save_result", save)
    run(load_conf([*tiny_run, "run_dir=cut"]))
    one, other = read_json(tmp_path / "whole" / "summary.json"), read_json(tmp_path / "cut" / "summary.json")
    assert (one["before"], one["after"], one["steps"]) == (other["before"], other["after"], other["steps"])
    weights = "adapter/adapter_model.safetensors"
    whole, cut = load_file(tmp_path / "whole" / weights), load_file(tmp_path / "cut" / weights)
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert read_events(tmp_path / "whole") == read_events(tmp_path / "cut")


def test_a_failure_is_recorded_and_shown_in_one_line(tiny_run, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self, *args, **kwargs):
        raise RuntimeError("the device is on fire\nand more")

    monkeypatch.setattr(RunTrainer, "training_step", fail)
    with pytest.raises(RunError) as caught:
        run(load_conf([*tiny_run, "run_dir=r"]))
    assert str(caught.value) == "RuntimeError: the device is on fire; the traceback is in r/run.log"
    status = read_json(tmp_path / "r" / "status.json")
    assert (status["state"], status["error"]) == ("failed", "RuntimeError: the device is on fire")
    log = (tmp_path / "r" / "run.log").read_text()
    assert "Traceback" in log and "and more" in log


def test_a_loss_that_is_no_number_stops_the_run(tiny_run, tmp_path) -> None:
    """transformers would log it as 0.0, train on, and save the broken weights."""
    overrides = ["training.learning_rate=1e30", "training.max_grad_norm=0", "training.warmup_steps=0", "run_dir=r"]
    with pytest.raises(RunError, match=r"is nan at step \d.*smaller training\.learning_rate"):
        run(load_conf([*tiny_run, *overrides]))
    assert read_json(tmp_path / "r" / "status.json")["state"] == "failed"
    assert not (tmp_path / "r" / "adapter").exists()


def test_the_best_checkpoint_can_be_the_result(tiny_run, tmp_path) -> None:
    overrides = ["training.load_best_model_at_end=true", "training.metric_for_best_model=eval_loss", "run_dir=r"]
    run(load_conf([*tiny_run, *overrides]))
    status = read_json(tmp_path / "r" / "status.json")
    assert status["adapter"].startswith("best by eval_loss: checkpoint-")


def test_full_fine_tuning_saves_a_model(tiny_run, tmp_path) -> None:
    run(load_conf([*tiny_run, "lora=none", "run_dir=r"]))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "r" / "model").num_parameters() > 0
    assert not (tmp_path / "r" / "adapter").exists()


def test_a_run_without_evaluation_rows(tiny_run, tmp_path) -> None:
    summary = run(load_conf([*tiny_run, "data.eval_fraction=0", "run_dir=r"]))
    assert summary is not None and "eval_loss" not in summary["after"] and "response_tokens" in summary["after"]


def test_a_run_dir_that_cannot_be_written_is_an_error_at_the_start(tiny_run, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"`run_dir=file/r`: cannot be written to"):
        run(load_conf([*tiny_run, "run_dir=file/r"]))


def test_a_run_that_something_ends_by_sys_exit_has_failed(tiny_run, tmp_path, monkeypatch) -> None:
    def leave(trainer: RunTrainer, *args: Any, **kwargs: Any) -> None:
        if trainer.state.global_step == 3:
            sys.exit(0)
        return step(trainer, *args, **kwargs)

    step = RunTrainer.training_step
    monkeypatch.setattr(RunTrainer, "training_step", leave)
    with pytest.raises(RunError, match=r"the run called sys\.exit\(0\); the traceback is in r/run\.log"):
        run(load_conf([*tiny_run, "run_dir=r"]))
    status = read_json(tmp_path / "r" / "status.json")
    assert (status["state"], status["error"], status["step"]) == ("failed", "the run called sys.exit(0)", 3)
    assert "SystemExit" in (tmp_path / "r" / "run.log").read_text()


def test_a_run_that_is_given_up_keeps_its_figures_and_no_checkpoints(tiny_run, tmp_path) -> None:
    class GiveUp(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs) -> None:
            if state.global_step == 3:
                assert (tmp_path / "r" / "checkpoints" / "checkpoint-2").is_dir()
                raise RunPruned(3, state.max_steps)

    with pytest.raises(RunPruned):
        run(load_conf([*tiny_run, "run_dir=r"]), callbacks=[GiveUp()])
    assert read_json(tmp_path / "r" / "status.json")["state"] == "pruned"
    assert not (tmp_path / "r" / "checkpoints").exists()
    assert [event["step"] for event in read_events(tmp_path / "r") if "loss" in event] == [1, 2, 3]


SIGNALLED = """
import os, runpy, sys
from dpo_runner.training.trainer import RunTrainer

number, times, done = (int(sys.argv.pop(1)) for _ in range(3))
step = RunTrainer.training_step

def signalled(self, *args, **kwargs):
    if self.state.global_step == done:
        for _ in range(times):
            os.kill(os.getpid(), number)
    return step(self, *args, **kwargs)

RunTrainer.training_step = signalled
runpy.run_module("dpo_runner", run_name="__main__")
"""


def test_signals_end_the_run_as_interrupted_and_the_same_command_continues(tiny_run: list[str], tmp_path: Path) -> None:
    """The process signals itself in a step, so the test does not depend on machine speed."""
    overrides = [*tiny_run, "training.max_steps=8", "training.save_steps=3", "training.eval_strategy=no", "run_dir=r"]
    signals = [  # number, times, in the step after so many, exit code, the checkpoint then
        (signal.SIGINT, 2, 4, 130, 3),
        (signal.SIGUSR1, 1, 4, 138, 5),
        (signal.SIGTERM, 2, 6, 143, 7),
    ]
    told = ""
    for number, times, done, code, checkpoint in signals:
        stopped = run_python("-c", SIGNALLED, str(int(number)), str(times), str(done), *overrides)
        assert stopped.returncode == code, stopped.stderr
        assert "continue with the same command and run_dir=r" in stopped.stderr and "Traceback" not in stopped.stderr
        assert read_json(tmp_path / "r" / "status.json")["state"] == "interrupted"
        assert told in stopped.stdout
        told = f"continuing from r/checkpoints/checkpoint-{checkpoint}\n"
    again = run_python("-m", "dpo_runner", *overrides)
    assert again.returncode == 0, again.stderr
    assert told in again.stdout
    steps = [event["step"] for event in read_events(tmp_path / "r") if "loss" in event]
    assert steps == list(range(1, 9))


@pytest.fixture(scope="module")
def real_run(own_cache: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Directory and summary of a short run of the default model."""
    folder = tmp_path_factory.mktemp("real") / "r"
    overrides = [
        f"run_dir={folder}",
        f"model.dtype={real_model_dtype()}",
        "data.max_train_samples=4",
        "data.max_eval_samples=4",
        "training.per_device_train_batch_size=1",
        "training.gradient_accumulation_steps=1",
        "training.eval_strategy=no",
        "training.warmup_steps=0",
        "training.learning_rate=4e-4",
        "samples.num_prompts=1",
        "samples.max_new_tokens=4",
        "wandb=disabled",
    ]
    summary = run(load_conf(overrides))
    assert summary is not None
    return folder, summary


@pytest.mark.real_model
def test_the_real_model_learns(real_run: tuple[Path, dict[str, Any]]) -> None:
    summary = real_run[1]
    # bf16 products of other shapes round differently on processors with AMX: about 0.05 per token, 0.04 in the margin.
    assert summary["before"]["eval_rewards/margins"] == pytest.approx(0, abs=0.08)
    assert summary["after"]["eval_rewards/accuracies"] >= 0.75
    assert summary["after"]["eval_loss"] < 0.65


@pytest.mark.real_model
def test_the_default_models_result_answers_as_chat_does(
    real_run: tuple[Path, dict[str, Any]], default_model: str
) -> None:
    chat = answer_in_chat(Chat(real_run[0], max_new_tokens=24))
    export([str(real_run[0]), "--out", "adapter", "--adapter-only"])
    assert answer_plainly(default_model, "adapter", dtype=real_model_dtype()) == chat
    export([str(real_run[0]), "--out", "merged"])  # bfloat16, the base's dtype, which rounds some of the update away
    check = json.loads(Path("merged/lineage.json").read_text())["export"]["check"]
    assert 0 < check["rounding"]["kl"] < check["merge"]["kl"]

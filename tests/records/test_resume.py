"""Resuming: progress saved in checkpoints, and folders in which a run may start."""

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from dpo_runner import run
from dpo_runner.config.compose import load_conf
from dpo_runner.errors import ConfigError, RunBusy, RunInterrupted
from dpo_runner.records.checkpoints import find_last_checkpoint, read_step
from dpo_runner.records.checkpoints import write_sealed as seal
from dpo_runner.records.directory import RunDirectory
from dpo_runner.records.reading import read_metrics, read_status
from dpo_runner.records.resume import check_continuable, check_free, check_unused, read_epoch
from dpo_runner.sweep.executor import perform
from dpo_runner.training.trainer import RunTrainer


@pytest.fixture
def checkpoints(tiny_run: list[str], tmp_path: Path) -> Path:
    run(load_conf([*tiny_run, "run_dir=r", "samples.num_prompts=0"]))
    return tmp_path / "r" / "checkpoints"


def test_the_newest_is_found_with_its_step_and_epoch(checkpoints: Path) -> None:
    newest = find_last_checkpoint(checkpoints)
    assert newest is not None and newest.name == "checkpoint-4"
    assert read_step(newest) == 4
    assert read_epoch(newest) == pytest.approx(4 * 2 / 22)


def test_what_a_run_that_was_killed_at_once_has_left_is_no_obstacle(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    (folder / "checkpoints").mkdir(parents=True)
    for name in (".lock", "run.log", ".config.yaml-abc", ".status.json-x1"):
        (folder / name).touch()
    check_unused(folder)
    (folder / "checkpoints" / "checkpoint-7").mkdir()
    with pytest.raises(ConfigError, match="holds something that is no run"):
        check_unused(folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="holds something that is no run"):
        check_unused(tmp_path / "other")


def interrupt(overrides: list[str], after: int) -> None:
    """Run until `after` steps are done."""
    step = RunTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == after:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunTrainer, "training_step", interrupted)
        with pytest.raises(RunInterrupted):
            run(load_conf(overrides))


@pytest.fixture
def stopped(tiny_run: list[str]) -> list[str]:
    """Overrides of a run interrupted after its first checkpoint."""
    overrides = [*tiny_run, "run_dir=r", "samples.num_prompts=0"]
    interrupt(overrides, after=3)
    assert find_last_checkpoint(Path("r/checkpoints")) is not None
    return overrides


def test_a_checkpoint_that_lacks_its_name_alone_is_of_a_configuration_too(stopped: list[str]) -> None:
    Path("r/checkpoints/checkpoint-2").rename("r/checkpoints/.saving-checkpoint-2")
    with pytest.raises(ConfigError, match=r"`training\.beta=0\.5`: the run in r has 0\.1"):
        run(load_conf([*stopped, "training.beta=0.5"]))
    assert Path("r/checkpoints/.saving-checkpoint-2").is_dir()


OPERATIONAL = {
    (3, 4, 5, 6): [
        *("training.save_steps=1", "training.save_total_limit=1", "training.logging_steps=3"),
        *("training.dataloader_num_workers=1", "training.dataloader_prefetch_factor=3", "training.log_level=error"),
        *("training.dataloader_pin_memory=false", "training.dataset_num_proc=1", "training.disable_tqdm=true"),
    ],
    (3, 6): [
        *("training.save_strategy=epoch", "training.logging_strategy=epoch", "training.logging_first_step=true"),
    ],
}
"""Overrides by the steps saved with them."""


def test_what_changes_no_result_may_be_another_from_now_on(
    tiny_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*tiny_run, "data.max_train_samples=6", "training.max_steps=6", "lora.lora_dropout=0.2"]
    overrides += ["samples.num_prompts=0", "training.save_total_limit=9"]
    run(load_conf([*overrides, "run_dir=undisturbed"]))
    saved: list[Path] = []
    monkeypatch.setattr(
        "dpo_runner.training.mixins.saving.write_sealed", lambda path, fill: saved.append(path) or seal(path, fill)
    )

    def read_result(folder: str) -> tuple[bytes, list[tuple[int, float]]]:
        evaluations = [event for event in read_metrics(Path(folder)) if "eval_loss" in event]
        weights = Path(folder, "adapter/adapter_model.safetensors").read_bytes()
        return weights, [(event["step"], event["eval_loss"]) for event in evaluations]

    for number, (steps, changes) in enumerate(OPERATIONAL.items()):
        interrupt([*overrides, f"run_dir=r{number}"], after=2)
        saved.clear()
        run(load_conf([*overrides, f"run_dir=r{number}", *changes]))
        assert read_result(f"r{number}") == read_result("undisturbed")
        logged = [event["step"] for event in read_metrics(Path(f"r{number}")) if "loss" in event]
        assert logged == [1, 2, 3, 6]  # the new interval applies from here
        assert tuple(map(read_step, saved)) == steps
    assert [path.name for path in Path("r0/checkpoints").iterdir()] == ["checkpoint-6"]


def test_the_rhythm_of_the_log_is_no_matter_of_taste_where_evaluation_follows_it(stopped: list[str]) -> None:
    config = Path("r/config.yaml")
    config.write_text(config.read_text().replace("eval_steps: 2.0", "eval_steps: null"))
    status = read_status(Path("r")) or {}
    overrides = [*stopped, "training.eval_steps=null"]
    check_continuable(Path("r"), status, load_conf(overrides))
    with pytest.raises(ConfigError, match=r"`training\.logging_steps=3"):
        check_continuable(Path("r"), status, load_conf([*overrides, "training.logging_steps=3"]))


def test_a_run_of_a_version_with_keys_that_were_removed_goes_on(stopped: list[str]) -> None:
    config = Path("r/config.yaml")
    engine = "engine:\n  compile_layers: false\n  keep_dequantized: null\n"
    config.write_text(config.read_text().replace("engine:\n", engine))
    summary = run(load_conf(stopped))
    assert summary is not None and summary["steps"] == 4
    assert "compile_layers" not in config.read_text()


def test_a_run_is_not_continued_on_other_data(stopped: list[str], pairs: str) -> None:
    data = Path(pairs).read_text()
    Path(pairs).write_text(data.replace("It is 2.", "It is two."))
    with pytest.raises(
        ConfigError, match=r"^r was begun with data\.train\.fingerprint=\w+, and it is \w+ now; put that back"
    ):
        run(load_conf(stopped))
    Path(pairs).write_text(data)
    summary = run(load_conf(stopped))
    assert summary is not None and summary["steps"] == 4


@pytest.mark.parametrize("key", ["model.model_name_or_path", "model.adapter", "model.reference"])
def test_a_run_is_not_continued_on_other_weights_in_the_same_place(
    key: str, tiny_run: list[str], tiny_model: str, sft_adapter: str
) -> None:
    folder = Path(shutil.copytree(tiny_model if key == "model.model_name_or_path" else sft_adapter, "folder"))
    overrides = [*tiny_run, "run_dir=r", "samples.num_prompts=0", "training.save_steps=1", f"{key}={folder}"]
    interrupt(overrides, after=1)
    (weights,) = folder.glob("*.safetensors")
    content = weights.read_bytes()
    weights.write_bytes(content[:-2] + bytes([content[-2] ^ 1, content[-1]]))  # the last weight, in its last place
    with pytest.raises(
        ConfigError, match=f"^`{re.escape(key)}`: its files have changed since r was begun; put them back"
    ):
        run(load_conf(overrides))
    weights.write_bytes(content)
    environment = json.loads(Path("r/environment.json").read_text())
    for name in ("weights", "adapter", "reference"):  # records of earlier versions
        del environment["model"][name]
    Path("r/environment.json").write_text(json.dumps(environment))
    summary = run(load_conf(overrides))
    assert summary is not None and summary["steps"] == 4


def test_other_libraries_are_told_of(stopped: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("r/environment.json")
    path.write_text(path.read_text().replace(f'"torch": "{torch.__version__}"', '"torch": "1.0"'))
    run(load_conf(stopped))
    told = " ".join(capsys.readouterr().out.split())
    assert f"begun with packages.torch=1.0, continued with {torch.__version__}: the last digits" in told


def test_two_processes_do_not_run_in_one_directory(tmp_path: Path) -> None:
    program = "import sys; from pathlib import Path; from dpo_runner.records.directory import RunDirectory\n"
    program += "with RunDirectory(Path(sys.argv[1])).claim(): pass"
    command = [sys.executable, "-c", program, str(tmp_path / "r")]
    with RunDirectory(tmp_path / "r").claim():
        second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "another process is running there; wait for it, or use another run_dir" in second.stderr
    assert subprocess.run(command, check=False).returncode == 0


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_a_run_that_another_process_has_ended_while_data_was_prepared_is_finished(
    beta: float, tiny_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*tiny_run, "run_dir=r", "samples.num_prompts=0", "training.max_steps=1"]
    module = sys.modules["dpo_runner.train"]
    load = module.load_preferences
    left = {}

    def overtaken(*args, **kwargs):
        monkeypatch.setattr(module, "load_preferences", load)
        run(load_conf(overrides))
        left.update({path: path.read_bytes() for path in Path("r").rglob("*") if path.is_file()})
        return load(*args, **kwargs)

    monkeypatch.setattr(module, "load_preferences", overtaken)
    conf = load_conf([*overrides, f"training.beta={beta}"])
    if beta == 0.1:
        summary = run(conf)
        assert summary is not None and summary["steps"] == 1
    else:
        with pytest.raises(ConfigError, match=r"`training\.beta=0\.5`: the run in r has 0\.1"):
            run(conf)
    assert left and {path: path.read_bytes() for path in Path("r").rglob("*") if path.is_file()} == left


def test_a_process_of_the_same_number_on_another_machine_is_another_one(tmp_path: Path) -> None:
    """In containers, for instance, the first process has the id 1."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    status = {"state": "running", "pid": os.getpid(), "heartbeat": now}
    check_free(tmp_path, {**status, "host": platform.node()})
    with pytest.raises(RunBusy, match=f"process {os.getpid()} is running there"):
        check_free(tmp_path, {**status, "host": f"not-{platform.node()}"})


BEST = (  # lower is better and margins grow, so the first evaluation stays the best
    *("training.load_best_model_at_end=true", "training.metric_for_best_model=eval_rewards/margins"),
    *("training.greater_is_better=false", "training.eval_steps=1", "training.save_steps=1"),
    *("training.save_total_limit=2", "samples.num_prompts=0"),
)


@pytest.fixture
def best(tiny_run: list[str]) -> bytes:
    """The weights of an uninterrupted run that ends with its best weights."""
    summary = run(load_conf([*tiny_run, *BEST, "run_dir=undisturbed"]))
    assert summary is not None and summary["weights"] == "best by eval_rewards/margins: checkpoint-1"
    return Path("undisturbed/adapter/adapter_model.safetensors").read_bytes()


def test_the_best_weights_are_found_again_under_another_spelling_of_the_directory(
    best: bytes, tiny_run: list[str], tmp_path: Path
) -> None:
    interrupt([*tiny_run, *BEST, "run_dir=r"], after=2)
    Path("r").rename("moved")
    summary = run(load_conf([*tiny_run, *BEST, f"run_dir={tmp_path / 'moved'}"]))
    assert summary is not None and summary["weights"] == "best by eval_rewards/margins: checkpoint-1"
    assert Path("moved/adapter/adapter_model.safetensors").read_bytes() == best


def test_a_run_that_is_stopped_behind_its_last_step_ends_with_its_best_weights_all_the_same(
    best: bytes, tiny_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "write_samples", interrupted)
        with pytest.raises(RunInterrupted):
            run(load_conf([*tiny_run, *BEST, "run_dir=r"]))
    assert Path("r/checkpoints/checkpoint-4").is_dir()
    summary = run(load_conf([*tiny_run, *BEST, "run_dir=r"]))
    assert summary is not None and summary["weights"] == "best by eval_rewards/margins: checkpoint-1"
    assert Path("r/adapter/adapter_model.safetensors").read_bytes() == best


def test_best_weights_that_are_damaged_are_told_of_at_once_and_made_again(
    best: bytes, tiny_run: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt([*tiny_run, *BEST, "run_dir=r"], after=3)
    weights = Path("r/checkpoints/checkpoint-1/adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    capsys.readouterr()
    summary = run(load_conf([*tiny_run, *BEST, "run_dir=r"]))
    told = " ".join(capsys.readouterr().out.split())
    assert "checkpoint-3 is not continued from: the run is to end with the best one so far, checkpoint-1, and" in told
    assert "kept as damaged-checkpoint-1" in told and "holds no other checkpoint: the run begins anew" in told
    assert summary is not None and summary["weights"] == "best by eval_rewards/margins: checkpoint-1"
    assert Path("r/adapter/adapter_model.safetensors").read_bytes() == best
    assert [event["step"] for event in read_metrics(Path("r")) if "loss" in event] == [1, 2, 3, 4]
    assert {"damaged-checkpoint-1", "damaged-checkpoint-3"} < {path.name for path in Path("r/checkpoints").iterdir()}


def test_the_best_between_two_saves_is_saved_too(tiny_run: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers only records its step, and would end with the last weights."""
    evaluate = RunTrainer.evaluate

    def pretend(self, *args, **kwargs):
        return evaluate(self, *args, **kwargs) | {"eval_rewards/margins": abs(self.state.global_step - 3)}

    monkeypatch.setattr(RunTrainer, "evaluate", pretend)
    summary = run(load_conf([*tiny_run, *BEST, "training.save_steps=2", "run_dir=r", "checks.step0=false"]))
    assert summary is not None and summary["weights"] == "best by eval_rewards/margins: checkpoint-3"


def test_one_that_is_damaged_does_not_count_and_is_not_deleted(
    tiny_run: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = RunTrainer.training_step

    def damage(self, *args, **kwargs):
        if self.state.global_step == 2:
            Path("r/checkpoints/checkpoint-2/optimizer.pt").unlink()
        return step(self, *args, **kwargs)

    monkeypatch.setattr(RunTrainer, "training_step", damage)
    run(load_conf([*tiny_run, "samples.num_prompts=0", "training.save_steps=1", "run_dir=r"]))
    left = {path.name for path in Path("r/checkpoints").iterdir()}
    assert left == {"damaged-checkpoint-2", "checkpoint-3", "checkpoint-4"}
    assert "checkpoint-2 is not continued from: optimizer.pt is missing" in " ".join(capsys.readouterr().out.split())


def test_warnings_of_a_training_that_goes_wrong_outlive_its_process(
    stopped: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is often preempted never logs enough events for a warning in one process."""
    monkeypatch.setattr("dpo_runner.training.callbacks.drift._WINDOW", 2)
    monkeypatch.setattr("dpo_runner.training.callbacks.drift._EXPLODED", 1.0)  # then any rise of half a nat counts
    path = Path("r/metrics.jsonl")
    events = [event for event in read_metrics(Path("r")) if event["step"] <= 2]
    events = [event | {"loss": 0.01} if "loss" in event else event for event in events]
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    run(load_conf(stopped))
    assert "the loss has risen from 0.01 to" in " ".join(capsys.readouterr().out.split())


EPOCHS = (  # epochs of two steps
    *("data.max_train_samples=4", "training.logging_strategy=epoch", "training.eval_strategy=epoch"),
    *("training.save_steps=1", "training.bf16=false", "samples.num_prompts=0"),
)


@pytest.mark.parametrize("strategy", ["steps", "best"])
def test_what_is_due_at_the_end_of_an_epoch_is_not_lost_with_the_process(strategy: str, tiny_run: list[str]) -> None:
    overrides = [*tiny_run, *EPOCHS, f"training.save_strategy={strategy}"]
    if strategy == "best":  # evaluates, and so saves, within an epoch's last step
        overrides += ["training.eval_strategy=steps", "training.eval_steps=1"]
        overrides += ["training.metric_for_best_model=rewards/margins", "training.greater_is_better=true"]
    run(load_conf([*overrides, "run_dir=undisturbed"]))
    interrupt([*overrides, "run_dir=r"], after=2)
    last = find_last_checkpoint(Path("r/checkpoints"))
    assert last is not None and read_step(last) == 2
    run(load_conf([*overrides, "run_dir=r"]))
    told, undisturbed = (
        [
            {key: value for key, value in event.items() if key != "time" and not key.endswith(("runtime", "second"))}
            for event in read_metrics(Path(folder))
        ]
        for folder in ("r", "undisturbed")
    )
    assert told == undisturbed
    assert [event["step"] for event in told if "loss" in event] == [2, 4]


def test_a_signal_is_heard_at_once_where_only_the_best_is_saved(
    tiny_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = RunTrainer.training_step

    def signalled(self, *args, **kwargs):
        if self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(RunTrainer, "training_step", signalled)
    with pytest.raises(RunInterrupted):
        run(load_conf([*tiny_run, *BEST, "training.save_strategy=best", "run_dir=r"]))
    last = find_last_checkpoint(Path("r/checkpoints"))
    assert last is not None and read_step(last) == 3


@pytest.mark.parametrize("says_so", [True, False])
def test_a_job_leaves_the_status_of_a_run_alone_that_another_process_has_in_hand(
    says_so: bool, stopped: list[str], tmp_path: Path
) -> None:
    says = "directory.write_status('running')" if says_so else "pass"
    program = "import sys; from pathlib import Path; from dpo_runner.records.directory import RunDirectory\n"
    program += (
        f"directory = RunDirectory(Path(sys.argv[1]))\nwith directory.claim():\n    {says}; print(flush=True); input()"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "r")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        before = read_status(tmp_path / "r")
        outcome = perform(load_conf(stopped), [])
        assert outcome["state"] == "failed" and "is running there" in outcome["error"]
        assert before is not None and read_status(tmp_path / "r") == before
        other.communicate(b"\n")

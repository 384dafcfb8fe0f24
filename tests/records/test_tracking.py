"""W&B offline: recorded data, and failures that do not stop the run. Online: test_tracking_online.py."""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_runner import run
from dpo_runner.config.compose import load_conf
from dpo_runner.errors import RunPruned
from dpo_runner.records.directory import RunDirectory
from dpo_runner.records.tracking import Tracker, track
from tests.support.programs import run_python

SECRET = "hf_" + "a1B2" * 8


def inspect(folder: Path, *arguments: str) -> str:
    """Read an offline run with wandb's own reader."""
    wandb = Path(sys.executable).parent / "wandb"
    file = next(folder.glob("offline-run-*/*.wandb"))
    return subprocess.run(
        [wandb, "leet", "inspect", "--json", *arguments, file], capture_output=True, text=True, check=True
    ).stdout


def test_an_offline_run_holds_curves_config_samples_and_no_secret(tiny_run, tmp_path: Path) -> None:
    overrides = [*tiny_run, "wandb=offline", "run_dir=r", f"wandb.notes={SECRET}", "wandb.tags=[one]", "wandb.group=g"]
    summary = run(load_conf(overrides), overrides)
    assert summary is not None
    text = inspect(tmp_path / "r" / "wandb")
    for name in ("train/loss", "train/rewards/margins", "train/rewards/accuracies", "eval/loss", "train/global_step"):
        assert name in text
    assert "samples" in text and "per_device_train_batch_size" in text and "after/eval_loss" in text
    table = json.loads(next((tmp_path / "r" / "wandb").rglob("samples*.table.json")).read_text())
    assert table["columns"] == ["prompt", "before", "after", "before_tokens", "after_tokens"]
    answers = json.loads((tmp_path / "r" / "samples.jsonl").read_text().splitlines()[0])
    assert table["data"][0][1:3] == [answers["before"]["text"], answers["after"]["text"]]
    everything = b"".join(path.read_bytes() for path in (tmp_path / "r").rglob("*") if path.is_file())
    assert SECRET.encode() not in everything


def test_the_commands_to_look_at_it_work(tiny_run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(load_conf([*tiny_run, "wandb=offline", "run_dir=r"]))
    printed = capsys.readouterr().out
    folder = next((tmp_path / "r" / "wandb").glob("offline-run-*"))
    assert f"wandb sync r/wandb/{folder.name}" in printed.replace(f"{tmp_path}/", "")
    assert "wandb leet r/wandb" in printed.replace(f"{tmp_path}/", "")


def test_disabled_means_disabled(tiny_run, tmp_path: Path) -> None:
    code = (
        "from dpo_runner import load_conf, run\n"
        f"run(load_conf({[*tiny_run, 'run_dir=r']!r}))\n"
        "import wandb\nassert wandb.run is None\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert not (tmp_path / "r" / "wandb").exists()


def test_a_run_that_a_search_gave_up_is_no_failure_and_says_so(tiny_run, tmp_path: Path) -> None:
    from transformers import TrainerCallback

    from dpo_runner.records.reading import read_status

    class GiveUp(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            if state.global_step == 3:
                raise RunPruned(3, 4)

    with pytest.raises(RunPruned, match="at step 3 of 4"):
        run(load_conf([*tiny_run, "wandb=offline", "run_dir=r"]), callbacks=[GiveUp()])
    status = read_status(tmp_path / "r")
    assert status is not None and (status["state"], status["step"]) == ("pruned", 3)
    assert '"exit_code":0' in inspect(tmp_path / "r" / "wandb")
    assert "pruned" in inspect(tmp_path / "r" / "wandb", "--summary")


@pytest.mark.parametrize(
    ("end", "state", "exit_code"),
    [
        (None, "finished", 0),
        (ValueError("x"), "failed", 1),
        (SystemExit(0), "failed", 1),  # a job that calls sys.exit has not finished, whatever its code
        (KeyboardInterrupt(), "interrupted", 130),
        (KeyboardInterrupt(15), "interrupted", 143),
        (RunPruned(3, 4), "pruned", 0),
    ],
)
def test_the_end_of_a_run_is_told_as_it_was(
    tmp_path: Path, end: BaseException | None, state: str, exit_code: int
) -> None:
    told = pytest.raises(type(end)) if end else contextlib.nullcontext()
    with told, track(load_conf(["wandb=offline"]), RunDirectory(tmp_path / "r"), print):
        if end is not None:
            raise end
    assert f'"exit_code":{exit_code}' in inspect(tmp_path / "r" / "wandb").replace(" ", "")
    assert state in inspect(tmp_path / "r" / "wandb", "--summary")


def test_the_service_of_whoever_started_this_process_is_left_alone(tiny_run, tmp_path: Path) -> None:
    """That service would keep the id of a killed run, which then could not be resumed."""
    overrides = [*tiny_run, "wandb=offline", "run_dir=r", "training.max_steps=1"]
    code = f"from dpo_runner import load_conf, run\nrun(load_conf({overrides!r}))"
    env = {**os.environ, "WANDB_SERVICE": "3-1-unix-/absent"}
    result = run_python("-c", code, env=env)
    assert result.returncode == 0 and "did not start" not in result.stdout
    assert "train/loss" in inspect(tmp_path / "r" / "wandb")


def test_a_name_made_of_a_long_run_directory_is_cut(tmp_path: Path) -> None:
    """W&B's server refuses names over 128 characters; the configuration's own are checked with its other fields."""
    long = "learning_rate=" + "1" * 200
    conf = load_conf(["wandb=offline", f"wandb.dir={tmp_path}/w", "run_name=a"])
    with track(conf, RunDirectory(tmp_path / long), print):
        pass
    text = inspect(tmp_path / "w" / "wandb")
    assert f"a/{long}"[:127] + "…" in text and f"a/{long}"[:128] not in text


def test_a_resumed_run_keeps_its_id(tiny_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dpo_runner.errors import RunInterrupted
    from dpo_runner.training.trainer import RunTrainer

    step = RunTrainer.training_step

    def interrupt(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    overrides = [*tiny_run, "wandb=offline", "run_dir=r"]
    monkeypatch.setattr(RunTrainer, "training_step", interrupt)
    with pytest.raises(RunInterrupted):
        run(load_conf(overrides))
    monkeypatch.setattr(RunTrainer, "training_step", step)
    run(load_conf(overrides))
    folders = list((tmp_path / "r" / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert len({folder.name.split("-")[3] for folder in folders}) == 1


def test_any_failure_while_logging_is_a_warning() -> None:
    class Broken:
        offline = True
        id = "abc"
        settings = type("Settings", (), {"sync_dir": "x"})

        def log(self, *args: object) -> None:
            raise RuntimeError("quota")

        finish = log
        summary = property(log)

    warnings: list[str] = []
    tracker = Tracker(Broken(), warnings.append)
    tracker.log({"step": 1, "loss": 0.5})
    tracker.log_samples([])
    tracker.finish("finished", exit_code=0)
    tracker.log({"step": 2, "loss": 0.5})  # no effect after the end
    (told,) = warnings
    assert "quota" in told and "metrics.jsonl" in told


def test_the_run_after_one_whose_wandb_was_killed_has_a_new_one(tmp_path: Path) -> None:
    import psutil

    conf, told = load_conf(["wandb=offline"]), []
    with track(conf, RunDirectory(tmp_path / "first"), told.append) as tracker:
        for child in psutil.Process().children(recursive=True):
            if "wandb" in child.name():
                child.kill()
                child.wait()
        for step in range(3):
            tracker.log({"step": step, "loss": 0.5})
    assert len(told) == 1 and "the run goes on" in told[0]
    with track(conf, RunDirectory(tmp_path / "second"), told.append) as tracker:
        tracker.log({"step": 1, "loss": 0.5})
    assert len(told) == 1 and "train/loss" in inspect(tmp_path / "second" / "wandb")


def test_no_process_of_wandb_outlives_its_job(tiny_run, tmp_path: Path) -> None:
    overrides = [*tiny_run, "wandb=offline", "training.max_steps=1"]
    code = f"""
import psutil
from dpo_runner import load_conf, run
from dpo_runner.records.wandb_run import stop_service
from transformers import TrainerCallback

class Look(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        self.seen = [child for child in psutil.Process().children(recursive=True) if "wandb" in child.name()]

stop_service()
look = Look()
run(load_conf({overrides!r}), callbacks=[look])
stop_service()
print("seen", len(look.seen), "alive", len(psutil.wait_procs(look.seen, timeout=30)[1]))
"""
    printed = run_python("-c", code).stdout
    assert re.search("seen [1-9].* alive 0", printed), printed

"""Run directories, checkpoints and sweeps of f25876f, the last commit with a flat package, still work.

`old_runs.tar.gz` holds a finished run, a run that was killed after a checkpoint, and a sweep that was killed in its
second point; its README.txt has the commands. Their configurations have keys that were removed since.
"""

import hashlib
import tarfile
from pathlib import Path

import pytest
import torch

from dpo_runner import load_conf, run
from dpo_runner.compare.__main__ import main as compare
from dpo_runner.model.result import load_tuned_model
from dpo_runner.records.reading import check_finished, read_metrics, read_run_conf, read_status, read_summary
from tests.support.common import run_main
from tests.support.programs import run_python

# The adapters that f25876f itself ended with. The random model's weights depend on the processor.
ON_AVX2_WITH_ONE_THREAD = {
    "interrupted": "19ae5e55beecba8a619ba89abd1659ee0a5957a163935a2d642d13b95fb82c41",
    "sweep/1-c6134dde": "634c33e2d0b98e48f5a6c8c6ab68fc9f252c407dcaecd658b2a640f2377b3d5b",
}
COMMON = [
    *("model=tiny_random", "training=smoke", "data=local_file", "data.path=pairs.jsonl", "data.eval_path=eval.jsonl"),
    *("lora.r=2", "lora.target_modules=[q_proj]", "samples.num_prompts=1", "samples.max_new_tokens=4"),
    "wandb=disabled",
]


@pytest.fixture(autouse=True)
def old_runs(tmp_path: Path) -> None:
    with tarfile.open(Path(__file__).with_name("old_runs.tar.gz")) as archive:
        archive.extractall(tmp_path, filter="data")


def check_adapter(run_dir: str) -> None:
    weights = (Path(run_dir) / "adapter" / "adapter_model.safetensors").read_bytes()
    if torch.backends.cpu.get_cpu_capability() == "AVX2" and torch.get_num_threads() == 1:
        assert hashlib.sha256(weights).hexdigest() == ON_AVX2_WITH_ONE_THREAD[run_dir]


def test_a_finished_run_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    finished = Path("finished")
    check_finished(finished)
    assert "compile_layers" in (finished / "config.yaml").read_text()
    assert read_run_conf(finished).lora is not None
    model, tokenizer = load_tuned_model(finished)
    assert set(model.peft_config) == {"default"} and tokenizer.chat_template
    again = [*COMMON, "training.max_steps=2", "training.save_strategy=no", "run_dir=finished"]
    assert run(load_conf(again)) == read_summary(finished)
    assert "is finished; its results are in" in capsys.readouterr().out
    assert run_main(compare, ".") == 0
    printed = capsys.readouterr().out
    assert "finished" in printed and "died" in printed


def test_a_killed_run_is_continued() -> None:
    interrupted = Path("interrupted")
    before = [event for event in read_metrics(interrupted) if event["step"] <= 4]
    further = ["training.max_steps=6", "training.save_total_limit=1", "lora.lora_dropout=0.1", "run_dir=interrupted"]
    summary = run(load_conf([*COMMON, *further]))
    assert summary is not None and summary["steps"] == 6
    events = read_metrics(interrupted)
    assert [e["loss"] for e in events if "loss" in e and e["step"] <= 4] == [e["loss"] for e in before if "loss" in e]
    assert max(event["step"] for event in events) == 6
    assert (read_status(interrupted) or {})["state"] == "finished"
    assert [path.name for path in interrupted.glob("checkpoints/*")] == ["checkpoint-6"]
    check_adapter("interrupted")


def test_a_killed_sweep_is_continued() -> None:
    kept = Path("sweep/0-805ff761/status.json").read_bytes()
    arguments = ["-m", "training.beta=0.05,0.1", *COMMON]
    arguments += ["training.save_total_limit=1", "sweep.workers=1", "sweep.dir=sweep"]
    result = run_python("-m", "dpo_runner", *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    assert sorted(path.name for path in Path("sweep").glob("*-*/")) == ["0-805ff761", "1-c6134dde"]
    assert Path("sweep/0-805ff761/status.json").read_bytes() == kept
    second = Path("sweep/1-c6134dde")
    assert (read_status(second) or {})["state"] == "finished" and read_summary(second)["steps"] == 4
    assert "continuing from" in (second / "job.log").read_text()
    check_adapter("sweep/1-c6134dde")

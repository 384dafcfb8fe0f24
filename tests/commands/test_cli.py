"""The command line: exit codes, one-line errors, speed, no files left behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.common import children_seconds
from tests.support.programs import run_python

SECRET = "hf_" + "a1B2" * 8


def run_program(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dpo_runner", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=300,
    )


def test_version_and_help() -> None:
    import dpo_runner

    assert run_program("--version").stdout.strip() == f"dpo_runner {dpo_runner.__version__}"
    text = run_program("--help").stdout
    for expected in (
        "\n  sweep.search    sampler",
        "nf4",
        "zephyr_7b_dpo_qlora",
        "python -m dpo_runner -m training.beta=",
    ):
        assert expected in text


def test_mistakes_exit_with_2_print_no_traceback_and_leave_nothing(tmp_path: Path) -> None:
    result = run_program("training.lerning_rate=1", "quant=nf5", "run_dir=here")
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "error: `training.lerning_rate`: no such field; did you mean `learning_rate`?",
        "error: `quant=nf5`: no such option; did you mean `nf4`?",
    ]
    assert list(tmp_path.iterdir()) == []


def test_flags_between_overrides_are_explained() -> None:
    result = run_program("seed=1", "-m", "training.beta=0.1,0.2")
    assert result.returncode == 2
    assert "flags go before or after all KEY=VALUE" in result.stderr and "usage:" not in result.stderr


@pytest.mark.parametrize("flag", ["--config-name=x", "--config-path=x", "--experimental-rerun=x"])
def test_flags_that_would_go_round_the_checks_are_refused(flag: str) -> None:
    result = run_program(flag)
    assert result.returncode == 2
    assert "not supported" in result.stderr


@pytest.mark.parametrize("arguments", [["--cfg", "job"], ["--help"]])
def test_asking_for_the_configuration_is_fast_and_imports_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['dpo_runner', *{arguments!r}]\n"
        "try: runpy.run_module('dpo_runner', run_name='__main__')\n"
        "except SystemExit as error: assert not error.code, error.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    times: list[float] = []
    while len(times) < 3 and not (times and times[-1] < 2):  # allow retries on a busy machine
        before = children_seconds()
        assert run_program(*arguments).returncode == 0
        times.append(children_seconds() - before)
    assert times[-1] < 2, times


def test_cfg_job_prints_the_composed_configuration() -> None:
    text = run_program("--cfg", "job", "quant=nf4", "training.beta=0.25").stdout
    assert "beta: 0.25" in text and "bnb_4bit_quant_type: nf4" in text


def test_a_missing_file_is_a_configuration_error(tmp_path: Path) -> None:
    command = ("-m", "dpo_runner", "model=tiny_random", "data=local_file", "data.path=absent.jsonl", "wandb=disabled")
    result = run_python(*command)
    assert result.returncode == 2
    assert result.stderr.strip() == "error: `data.path=absent.jsonl`: no such file"
    assert list(tmp_path.iterdir()) == []


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path, tiny_run: list[str]) -> None:
    before = set(tmp_path.iterdir())
    result = run_python("-m", "dpo_runner", *tiny_run, "dry_run=true")
    assert result.returncode == 0, result.stderr
    for expected in (
        "reference",
        "random:tiny-llama without the adapter",
        "24 rows, preference (texts), 24 pairs",
        "2 pairs a step",
        "steps",
    ):
        assert expected in result.stdout
    assert set(tmp_path.iterdir()) == before


def test_a_multirun_runs_every_point_and_reports_all_failures(tmp_path: Path, tiny_run: list[str]) -> None:
    result = run_python(
        *("-m", "dpo_runner", "-m"),
        *tiny_run,
        "training.max_steps=1",
        "data.path=pairs.jsonl,absent.jsonl",
        "seed=1,2",
        f"wandb.notes={SECRET}",
    )
    assert result.returncode == 1
    assert "2 of 4 runs of the sweep failed" in result.stderr
    assert result.stderr.count("absent.jsonl`: no such file") == 2
    assert "Traceback" not in result.stderr
    assert not [path for path in tmp_path.rglob("*.[yj]*") if path.is_file() and SECRET in path.read_text()]
    states = [
        json.loads(path.read_text())["state"] for path in sorted(tmp_path.glob("outputs/sweeps/dpo/*/*/status.json"))
    ]
    assert states == ["finished", "finished", "failed", "failed"]


def test_a_sweep_file_is_checked_and_runs(tmp_path: Path, tiny_run: list[str]) -> None:
    result = run_python("-m", "dpo_runner", "sweep=beta", *tiny_run, "training.max_steps=1")
    assert result.returncode == 0, result.stderr
    configs = sorted(tmp_path.glob("outputs/sweeps/sweep_beta/*/*/config.yaml"))
    betas = [next(line for line in path.read_text().splitlines() if line.startswith("  beta:")) for path in configs]
    assert betas == ["  beta: 0.05", "  beta: 0.1", "  beta: 0.3"]

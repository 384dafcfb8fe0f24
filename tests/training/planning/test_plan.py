"""The plan's device line, and the warning about GPUs that torch does not see."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dpo_runner import run
from dpo_runner.config.compose import load_conf
from dpo_runner.training.memory import estimate
from dpo_runner.training.planning.plan import describe_device, find_unseen_gpus
from tests.support.gpus import LISTING, put_program


@pytest.mark.parametrize(
    ("overrides", "gpus", "expected"),
    [
        ([], 0, "CPU, "),
        (["training.use_cpu=true"], 2, "(training.use_cpu=true)"),
        ([], 1, "NVIDIA T4, 16.0 GB"),
        ([], 2, "NVIDIA T4, 16.0 GB; the first of 2 GPUs, CUDA_VISIBLE_DEVICES=N selects another"),
        (["model.device_map=auto"], 2, "NVIDIA T4, 16.0 GB; 2 GPUs are there for model.device_map=auto"),
    ],
)
def test_the_device_is_told(overrides: list[str], gpus: int, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    conf = load_conf(overrides)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (8 * 10**9, 16 * 10**9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA T4")
    monkeypatch.setattr(estimate, "check_allocator", lambda: None)
    monkeypatch.setattr(estimate, "has_kernel", lambda device: False)
    use_cpu = conf.training.use_cpu or not gpus
    args: Any = SimpleNamespace(use_cpu=use_cpu, device=torch.device("cpu" if use_cpu else "cuda:0"))
    told = describe_device(conf, args)
    assert (expected in told and told.startswith("CPU, ")) if use_cpu else (told == expected)


def test_a_gpu_that_torch_does_not_see_is_told(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "bin").mkdir()
    put_program(tmp_path / "bin", "nvidia-smi", LISTING, monkeypatch)
    monkeypatch.setenv("COLUMNS", "400")
    conf = load_conf([*tiny_run, "dry_run=true"])
    run(conf)
    captured = capsys.readouterr()
    told = " ".join((captured.out + captured.err).split())
    assert "nvidia-smi lists 2 GPUs, and torch" in told and "install one with it (https://pytorch.org" in told
    assert " device CPU, " in told
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "needs a driver for CUDA 13.0" in find_unseen_gpus(conf)[0]
    assert find_unseen_gpus(load_conf(["training.use_cpu=true"])) == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    assert find_unseen_gpus(conf) == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert len(find_unseen_gpus(conf)) == 1
    put_program(tmp_path / "bin", "nvidia-smi", "", monkeypatch)
    assert find_unseen_gpus(conf) == []

"""The autocast dtype: as configured, or by hardware support."""

from pathlib import Path

import pytest
import torch

from dpo_runner.config.compose import load_conf
from dpo_runner.evaluate.work import name_autocast
from dpo_runner.training.build import build_dpo_config
from dpo_runner.training.engine import precision
from dpo_runner.training.engine.precision import autocast, choose_autocast


@pytest.mark.parametrize("hardware", [False, True])
@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], {False: None, True: "bfloat16"}),
        (["training.bf16=true"], {False: "bfloat16", True: "bfloat16"}),
        (["training.bf16=false"], {False: None, True: None}),
    ],
)
def test_the_hardware_decides_where_the_configuration_does_not(overrides, expected, hardware, monkeypatch) -> None:
    monkeypatch.setattr(precision, "has_bf16", lambda use_cpu: hardware)
    conf = load_conf(["training.use_cpu=true", *overrides])
    assert name_autocast(conf) == expected[hardware]
    assert build_dpo_config(conf, Path("x")).bf16 == (expected[hardware] is not None)  # as in the run


def test_fp16_leaves_nothing_to_the_hardware(monkeypatch) -> None:
    monkeypatch.setattr(precision, "has_bf16", lambda use_cpu: True)
    assert choose_autocast(load_conf(["training.fp16=true"]).training) == torch.float16


def test_a_run_on_the_cpu_does_not_ask_the_gpu(monkeypatch) -> None:
    own = precision.has_bf16()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: not own)
    asked = [choose_autocast(load_conf([f"training.use_cpu={use}"]).training) for use in ("true", "false")]
    assert [dtype == torch.bfloat16 for dtype in asked] == [own, not own]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_products_are_made_in_that_dtype(dtype) -> None:
    ones = torch.ones(2, 2)
    with autocast(ones.device, dtype):
        assert (ones @ ones).dtype == (dtype or torch.float32)
    assert (ones @ ones).dtype == torch.float32

"""Compiled layers train what uncompiled ones train; where they cannot be had, a run says so before it begins."""

from pathlib import Path

import pytest
import torch
from test_base_pool import Runner
from test_engine import PACKED, PLAIN, assert_same, train
from test_model import build
from torch._dynamo.utils import counters
from torch._inductor import cpp_builder

from dpo_runner.artifacts import cache_dir
from dpo_runner.base_pool import BasePool
from dpo_runner.config import load_conf
from dpo_runner.engine import compiling
from dpo_runner.engine.install import describe_engine
from dpo_runner.errors import ConfigError, RunError
from dpo_runner.model import check_model
from dpo_runner.step0 import MovementCheck

COMPILED = (*PACKED, "engine.compile_layers=true")

SETTINGS = [
    [],
    pytest.param(["training.gradient_checkpointing=true"], marks=pytest.mark.slow),
    pytest.param(["quant=nf4", "quant.bnb_4bit_compute_dtype=float32"], marks=pytest.mark.slow),
]


@pytest.fixture
def runner(tiny_run: list[str], capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner([*tiny_run, "training.max_steps=3"], capsys)


def count_compiled() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "+".join(settings) or "lora")
def test_compiled_training_is_trls(settings: list[str], tiny_run: list[str], tmp_path: Path) -> None:
    plain, weights, _ = train([*tiny_run, *settings, *PLAIN], tmp_path)
    before = count_compiled()
    compiled, other, _ = train([*tiny_run, *settings, *COMPILED], tmp_path)
    assert before < count_compiled() < before + 24, "rows of other lengths and numbers are no variants"
    assert_same(plain, compiled)
    assert (other - weights).norm() <= 1e-5 * weights.norm()


def test_layers_with_hooks_within_are_not_compiled(tiny_run: list[str], tmp_path: Path) -> None:
    """Those of the check that adapters move: each layer would be a variant of its own, and keep them for good."""
    steps = ["training.max_steps=2", "training.eval_strategy=no", "training.save_strategy=no"]
    trainer = build([*tiny_run, *COMPILED, *steps], tmp_path)
    check = MovementCheck()
    trainer.add_callback(check)
    before = count_compiled()
    trainer.train()
    assert count_compiled() == before
    assert len(check._reached) == sum(".lora_" in name for name, _ in trainer.model.named_parameters())


@pytest.mark.slow
def test_generation_and_padded_rows_are_not_compiled(tiny_run: list[str], tmp_path: Path) -> None:
    trainer = build([*tiny_run, *COMPILED], tmp_path)
    trainer.evaluate()
    before = count_compiled()
    ids = torch.tensor([[5, 6, 7]])
    trainer.model.eval()
    with torch.no_grad():
        trainer.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
        trainer.model(input_ids=ids)
    assert count_compiled() == before


@pytest.mark.slow
def test_a_run_on_a_kept_base_is_the_run_alone_and_keeps_its_reference_apart(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DPO_RUNNER_CACHE", str(tmp_path))  # that of all tests may hold the uncompiled reference already
    compiled = ["engine.compile_layers=true"]
    alone, stored = runner(compiled), set(cache_dir().glob("reference/*.sqlite"))
    bases = BasePool()
    runner(["lora.r=4", "training.beta=0.3"], bases)
    assert set(cache_dir().glob("reference/*.sqlite")) > stored, "compiled layers round differently"
    assert [runner(compiled, bases), runner(compiled, bases)] == [alone, alone]
    assert runner.kept == [False, False, True, True]


@pytest.mark.slow
def test_a_run_stops_where_torch_gives_a_layer_up(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "_VARIANTS", 1)
    trainer = build([*tiny_run, *COMPILED], tmp_path)
    with pytest.raises(RunError, match="has compiled 1 variants of LlamaDecoderLayer"):
        trainer.train()


REFUSED = [
    (["engine.shared_prefix=false"], "compiles layers for packed rows, which engine.shared_prefix=false does without"),
    (["training.torch_compile=true"], "`training.torch_compile=True`: "),
    (["training.torch_compile_mode=default"], "`training.torch_compile_mode=default`: "),
    (["lora.lora_dropout=0.1"], "this run takes TRL's forward (dropout is on, and would be drawn once for both rows"),
]


@pytest.mark.parametrize("overrides, told", REFUSED, ids=lambda value: "+".join(value) if len(value) == 1 else "")
def test_what_cannot_be_compiled_is_refused(overrides: list[str], told: str, tiny_run: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        conf = load_conf([*tiny_run, "engine.compile_layers=true", *overrides])
        describe_engine(conf, check_model(conf)[1], 100)
    assert told in str(refusal.value)
    assert "\n" not in str(refusal.value).strip()


def test_a_missing_compiler_is_told_before_the_run_begins(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cpp_builder.cpp_compiler_search.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    try:
        with pytest.raises(ConfigError, match=r"`engine.compile_layers=True`: no C\+\+ compiler is found; install g"):
            runner(["engine.compile_layers=true"])
    finally:
        cpp_builder.cpp_compiler_search.cache_clear()
    assert not Path("run-1").exists()

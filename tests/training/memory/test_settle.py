"""Gradient checkpointing is switched on only if the run would not fit without it."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import LlamaConfig, MistralConfig, TrainerCallback

from dpo_runner.config.compose import load_conf
from dpo_runner.data.splits import DataShape, PairShape
from dpo_runner.io.console import RunConsole
from dpo_runner.model.blueprint import draw_blueprint
from dpo_runner.train import run
from dpo_runner.training.build import build_dpo_config
from dpo_runner.training.memory import estimate
from dpo_runner.training.memory import settle as checkpointing
from dpo_runner.training.memory.estimate import estimate_memory
from dpo_runner.training.memory.settle import bound_memory, settle
from tests.support.trainers import build


def have_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    for module in (estimate, checkpointing):
        monkeypatch.setattr(module, "read_device", lambda args: ("a card", 10**12, free))


def explain(overrides: list[str]) -> str | None:
    """Settle a run and return why checkpointing was switched on."""
    conf = load_conf(overrides)
    settled = settle(conf, draw_blueprint(conf), DataShape(60, PairShape(20, 40, 40)), Path("checkpoints"))
    assert settled.asked is conf
    switched = settled.conf.training.gradient_checkpointing and not conf.training.gradient_checkpointing
    assert settled.args.gradient_checkpointing == settled.conf.training.gradient_checkpointing
    assert switched == bool(settled.notes)
    return settled.notes.get("checkpointing")


def test_memory_decides(tiny_run: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    have_free(monkeypatch, 10**12)
    assert explain(tiny_run) is None
    have_free(monkeypatch, 10**6)
    assert "GB without it, 0.0 GB free on a card" in str(explain(tiny_run))
    assert explain([*tiny_run, "engine.auto_gradient_checkpointing=false"]) is None
    assert explain([*tiny_run, "training.gradient_checkpointing=true"]) is None
    assert explain([*tiny_run, "training.optim=adamw_anyprecision"]) is None  # cannot be estimated


def test_the_run_does_it_and_its_plan_says_why(tiny_run: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    class Look(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(args.gradient_checkpointing and kwargs["model"].is_gradient_checkpointing)

    for free in (10**12, 10**6):
        have_free(monkeypatch, free)
        text = io.StringIO()
        conf = load_conf([*tiny_run, f"run_dir=run-{free}", "training.max_steps=1"])
        run(conf, console=RunConsole(Console(file=text, width=200)), callbacks=[Look()])
        assert ("of gradients, switched on: 0." in text.getvalue()) == (free == 10**6)
    assert seen == [False, True]


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("small", ["engine.lean_layers=false"]),
        pytest.param("small", ["training.bf16=false"], marks=pytest.mark.slow),
        ("large", ["lora=none"]),
        ("large", ["engine.shared_prefix=false"]),
        ("small", ["engine.max_tokens_per_micro_batch=0", "training.per_device_eval_batch_size=1"]),
        pytest.param("small", ["engine.max_tokens_per_micro_batch=9000"], marks=pytest.mark.slow),
        pytest.param("small", ["training.per_device_eval_batch_size=64"], marks=pytest.mark.slow),
    ],
)
def test_the_bound_is_one(kind: str, overrides: list[str], tmp_path: Path) -> None:
    shape = {"num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9}
    config = LlamaConfig(**shape, num_key_value_heads=3, vocab_size=49152) if kind == "small" else MistralConfig()
    config.dtype = "bfloat16"
    config.save_pretrained(tmp_path / kind)
    conf = load_conf([f"model.model_name_or_path={tmp_path / kind}", "training.bf16=true", *overrides])
    args = build_dpo_config(conf, Path("checkpoints"))
    given = conf, args, draw_blueprint(conf), DataShape(900, PairShape(0, 900, 900))
    assert bound_memory(*given) > estimate_memory(*given).total


def test_packed_rows_of_which_few_are_taken_at_once_need_no_estimate(
    tiny_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An estimate takes seconds, more for longer rows. Padded, these rows might not fit."""
    few = ["training.per_device_train_batch_size=8", "training.max_length=2048"]
    bounds, taken = {}, []
    monkeypatch.setattr(checkpointing, "estimate_memory", lambda *_: taken.append(1) or estimate_memory(*_))
    for shared, padded in (("true", False), ("false", True)):
        conf = load_conf([*tiny_run, *few, f"engine.shared_prefix={shared}"])
        args, blueprint = build_dpo_config(conf, Path("checkpoints")), draw_blueprint(conf)
        shape = DataShape(2048, PairShape(1000, 1000, 1000))
        bounds[padded] = bound_memory(conf, args, blueprint, shape)
        have_free(monkeypatch, int(2.1 * bounds[False]))
        settle(conf, blueprint, shape, Path("checkpoints"))
        assert len(taken) == padded
    assert bounds[True] > 2 * bounds[False]


def test_both_ways_train_the_same(tiny_run: list[str], tmp_path: Path) -> None:
    weights = []
    for overrides in (["training.gradient_checkpointing=true"], []):
        trainer = build([*tiny_run, "training.max_steps=2", "training.save_strategy=no", *overrides], tmp_path)
        trainer.train()
        weights.append([p.detach().clone() for p in trainer.model.parameters() if p.requires_grad])
    assert all(one.equal(other) for one, other in zip(*weights, strict=True))

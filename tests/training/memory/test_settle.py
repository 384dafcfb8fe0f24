"""Gradient checkpointing is switched on only if the run would not fit without it."""

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import LlamaConfig, MistralConfig, TrainerCallback

from dpo_runner.config.compose import load_conf
from dpo_runner.config.run_conf import RunConf
from dpo_runner.data.splits import DataShape, PairShape
from dpo_runner.errors import ConfigError
from dpo_runner.io.console import RunConsole
from dpo_runner.model.blueprint import Blueprint, draw_blueprint
from dpo_runner.train import run
from dpo_runner.training.build import build_dpo_config
from dpo_runner.training.engine import precision
from dpo_runner.training.memory import estimate
from dpo_runner.training.memory import settle as settling
from dpo_runner.training.memory.device import Device
from dpo_runner.training.memory.estimate import MemoryEstimate, estimate_memory
from dpo_runner.training.memory.settle import Settled, bound_memory, settle
from tests.support.trainers import build


def have_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    for module in (estimate, settling):
        monkeypatch.setattr(module, "read_device", lambda args, held=0: Device("a card", 10**12, free + held))


def settle_run(overrides: list[str]) -> Settled:
    conf = load_conf(overrides)
    return settle(conf, draw_blueprint(conf), DataShape(60, PairShape(20, 40, 40)), Path("checkpoints"))


def explain(overrides: list[str]) -> str | None:
    """Settle a run and return why checkpointing was switched on."""
    settled = settle_run(overrides)
    conf = settled.asked
    switched = settled.conf.training.gradient_checkpointing and not conf.training.gradient_checkpointing
    assert settled.args.gradient_checkpointing == settled.conf.training.gradient_checkpointing
    assert switched == ("checkpointing" in settled.notes)
    return settled.notes.get("checkpointing")


def test_memory_decides(tiny_run: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    have_free(monkeypatch, 10**12)
    assert explain(tiny_run) is None
    have_free(monkeypatch, 10**6)
    assert "GB needed without it; 0.0 GB free on a card" in str(explain(tiny_run))
    assert explain([*tiny_run, "engine.auto_gradient_checkpointing=false"]) is None
    assert explain([*tiny_run, "training.gradient_checkpointing=true"]) is None
    assert explain([*tiny_run, "training.optim=adamw_anyprecision"]) is None  # cannot be estimated


def test_a_folder_without_evaluation_rows_leaves_out_what_only_a_preset_asks_for(tiny_run: list[str]) -> None:
    """Whether a folder holds evaluation files is known only when it is read."""
    Path("rows").mkdir()
    Path("pairs.jsonl").rename("rows/train.jsonl")
    overrides = [*tiny_run, "data.path=rows", "data.eval_fraction=0", "samples.num_prompts=0"]
    text = io.StringIO()
    summary = run(load_conf(overrides), console=RunConsole(Console(file=text, width=200)))
    assert summary is not None and summary["after"] == {}
    assert re.search(r"^evaluation +none, there are no evaluation rows", text.getvalue(), re.MULTILINE)
    for asked in (
        ["training.eval_strategy=steps"],
        ["training.load_best_model_at_end=true", "training.eval_steps=2", "training.save_steps=2"],
        ["sweep.search.sampler=random"],
    ):
        with pytest.raises(ConfigError, match=f"`{asked[0].split('=')[0]}|objective.*there are no evaluation rows"):
            run(load_conf([*overrides, *asked, "dry_run=true"]))


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
        assert ("switched on (0." in text.getvalue()) == (free == 10**6)
    assert seen == [False, True]


def test_a_cpu_that_emulates_16_bits_is_named_with_the_cure(
    tiny_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (settling, precision):  # the second decides what training.bf16=null means
        monkeypatch.setattr(module, "has_bf16", lambda use_cpu: False)
    for overrides, cure in {
        (): None,
        ("model.dtype=bfloat16",): "model.dtype=float32",
        ("model.dtype=bfloat16", "training.bf16=true"): "model.dtype=float32 training.bf16=false",
        ("training.bf16=true",): "training.bf16=false",
    }.items():
        note = settle_run([*tiny_run, *overrides]).notes.get("speed")
        assert note == (cure and f"this CPU emulates 16-bit arithmetic, many times slower; use {cure}")


@pytest.mark.parametrize(
    ("free", "overrides", "expected"),
    [
        (70, [], (None, False)),
        (40, [], (3448, False)),  # 30.9 GB by the stand-in's rule, and a tenth
        (25, [], (2048, False)),
        (10, [], (None, True)),
        (25, ["engine.auto_gradient_checkpointing=false"], (None, False)),
        (25, ["training.gradient_checkpointing=true"], (None, True)),
        (25, ["engine.max_tokens_per_micro_batch=0"], (0, True)),  # in rows, as asked
        (25, ["engine.max_tokens_per_micro_batch=4000"], (2048, False)),
        (10, ["engine.max_tokens_per_micro_batch=2000"], (2000, True)),
        (25, ["engine.shared_prefix=false"], (None, True)),
    ],
)
def test_a_gpu_takes_fewer_tokens_at_a_time_before_it_checkpoints(
    free: int, overrides: list[str], expected: tuple[int | None, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the sizes of Mistral 7B in 4 bits: 5 GB, and 7.5 MB a token without checkpointing."""
    MistralConfig(dtype="bfloat16").save_pretrained(tmp_path / "mistral")
    shape = DataShape(1024, PairShape(200, 824, 700))

    def take(conf: RunConf, args: Any, blueprint: Any, shape: DataShape, device: Device) -> MemoryEstimate:
        tokens = estimate.count_tokens_at_once(conf, args, shape.largest, device) or 4 * sum(shape.largest)
        return MemoryEstimate({"all": 5 * 10**9 + 7_500_000 * tokens}, {}, "", 0, device)

    monkeypatch.setattr(settling, "estimate_memory", take)
    found = {}
    for is_gpu in (True, False):
        card = Device("a card", 10**12, free * 10**9, is_gpu)
        monkeypatch.setattr(settling, "read_device", lambda args, held=0, card=card: card)
        conf = load_conf([f"model.model_name_or_path={tmp_path / 'mistral'}", "quant=nf4", *overrides])
        settled = settle(conf, Blueprint.of_run(conf), shape, Path("checkpoints"))
        executed = settled.conf
        found[is_gpu] = (executed.engine.max_tokens_per_micro_batch, executed.training.gradient_checkpointing)
        assert settled.args.gradient_checkpointing == executed.training.gradient_checkpointing
        assert settled.asked is conf
        if is_gpu and executed.engine != conf.engine:
            assert re.fullmatch(
                rf"at most {expected[0]:,} tokens \(\d\d\.\d GB needed with more; {free}.0 GB free on a card\)",
                settled.notes["micro-batches"],
            )
    assert found[True] == expected
    assert found[False][0] == conf.engine.max_tokens_per_micro_batch, "on a CPU checkpointing alone is chosen"


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
def test_the_bound_is_one(kind: str, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "_FULL_DEPTH", 2)  # quicker than 8
    shape = {"num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9}
    config = LlamaConfig(**shape, num_key_value_heads=3, vocab_size=49152) if kind == "small" else MistralConfig()
    config.dtype = "bfloat16"
    config.save_pretrained(tmp_path / kind)
    conf = load_conf([f"model.model_name_or_path={tmp_path / kind}", "training.bf16=true", *overrides])
    args = build_dpo_config(conf, Path("checkpoints"))
    given = conf, args, draw_blueprint(conf), DataShape(300, PairShape(0, 300, 300))
    for device in (Device("CPU", 0, 0), Device("a card", 0, 0, is_gpu=True, has_varlen=True)):
        assert bound_memory(*given, device) > estimate_memory(*given, device).total


def test_packed_rows_of_which_few_are_taken_at_once_need_no_estimate(
    tiny_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An estimate takes seconds, more for longer rows. Padded, these rows might not fit."""
    few = ["training.per_device_train_batch_size=8", "training.max_length=2048"]
    bounds, taken = {}, []
    monkeypatch.setattr(settling, "estimate_memory", lambda *_: taken.append(1) or estimate_memory(*_))
    for shared, padded in (("true", False), ("false", True)):
        conf = load_conf([*tiny_run, *few, f"engine.shared_prefix={shared}"])
        args, blueprint = build_dpo_config(conf, Path("checkpoints")), draw_blueprint(conf)
        shape = DataShape(2048, PairShape(1000, 1000, 1000))
        bounds[padded] = bound_memory(conf, args, blueprint, shape, Device("CPU", 0, 0))
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

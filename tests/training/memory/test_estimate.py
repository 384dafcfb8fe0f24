"""The memory estimate: exact for weights, adapters and optimizer, ordered correctly if simulated."""

import io
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import MistralConfig

from dpo_runner.config.compose import load_conf
from dpo_runner.data.splits import DataShape, PairShape
from dpo_runner.errors import ConfigError
from dpo_runner.io.console import RunConsole
from dpo_runner.model.blueprint import Blueprint
from dpo_runner.train import run as run_conf
from dpo_runner.training.build import build_dpo_config
from dpo_runner.training.memory import device as device_memory
from dpo_runner.training.memory import estimate
from dpo_runner.training.memory.device import Device
from dpo_runner.training.memory.estimate import MemoryEstimate, estimate_memory
from dpo_runner.training.memory.fake_model import build_fake_models
from scripts.bench import memory
from tests.support.common import real_model_dtype
from tests.support.families import make_family
from tests.support.programs import run_python
from tests.support.starts import STARTS, name_paths
from tests.support.trainers import build

TINY = ["model=tiny_random", "training=smoke"]
TINY_WEIGHTS = 2 * 259 * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64) + 64
FIGURES = {"lean": 36.3, "own layers": 53.8, "fewer tokens": 20.6, "checkpointing": 8.0}
LORA_16 = 16 * 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))


CARD = Device("a card", 24 * 10**9, 23 * 10**9, is_gpu=True, has_varlen=True)


def estimate_of(
    overrides: list[str], longest: int, pair: PairShape | None = None, device: Device | None = None
) -> MemoryEstimate:
    conf = load_conf(overrides)
    shape = DataShape(longest, pair or PairShape(0, longest, longest))
    return estimate_memory(conf, build_dpo_config(conf, Path("checkpoints")), Blueprint.of_run(conf), shape, device)


def run(*overrides: str, longest: int = 64) -> MemoryEstimate:
    return estimate_of([*TINY, *overrides], longest)


def test_weights_adapters_and_optimizer_are_exact() -> None:
    rows = run().rows
    assert rows["weights"] == pytest.approx(4 * TINY_WEIGHTS, abs=256)  # plus rotary frequencies
    assert rows["adapters"] == 4 * LORA_16
    assert rows["optimizer"] == 2 * 4 * LORA_16
    assert rows["reference"] == rows["quantization state"] == 0


def test_full_fine_tuning_counts_the_reference() -> None:
    rows = run("lora=none", "engine.reference_store=false").rows
    assert rows["reference"] == rows["weights"]
    assert rows["optimizer"] == 2 * 4 * TINY_WEIGHTS
    stored = run("lora=none")
    precomputed = run("lora=none", "engine.reference_store=false", "training.precompute_ref_log_probs=true")
    assert stored.rows["reference"] == precomputed.rows["reference"] == 0


def test_packed_pairs_take_what_they_have_in_tokens() -> None:
    def activations(*overrides: str, **shape: int) -> int:
        return estimate_of([*TINY, *overrides], 200, PairShape(**shape)).phases["training"]

    shared = activations(prompt=180, chosen=20, rejected=20)  # a pair this short is one block of attention
    assert shared < 0.85 * activations(prompt=0, chosen=200, rejected=200)
    assert shared < 0.7 * activations("engine.shared_prefix=false", prompt=180, chosen=20, rejected=20)


def test_more_rows_and_longer_rows_take_more() -> None:
    few, many = (run(f"training.per_device_train_batch_size={n}").phases["training"] for n in (1, 4))
    short, long = (run(longest=n).phases["training"] for n in (32, 128))
    assert few < many and short < long
    one = ["training.per_device_train_batch_size=1", "training.per_device_eval_batch_size=1"]
    assert run("training.max_length=128", *one, longest=10**6).length == 128
    assert run("training.max_length=null", *one, longest=600).length == 600


def test_checkpointing_takes_less() -> None:
    plain, checkpointed = (
        run(f"training.gradient_checkpointing={value}", "training.per_device_eval_batch_size=1", longest=256)
        for value in ("false", "true")
    )
    assert checkpointed.total < plain.total


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_quantized_weights_are_packed(quant: str) -> None:
    rows = run(f"quant={quant}").rows
    assert rows["weights"] < 4 * TINY_WEIGHTS
    assert rows["quantization state"] > 0


def test_a_7b_folder_needs_no_weights_and_little_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "_FULL_DEPTH", 4)  # quicker than 8
    config = MistralConfig(dtype="bfloat16")
    config.save_pretrained(tmp_path / "mistral")
    start = time.process_time()
    overrides = [f"model.model_name_or_path={tmp_path / 'mistral'}", "quant=nf4", "training.max_length=256"]
    rows = estimate_of(overrides, 256).rows
    assert time.process_time() - start < 20  # 7 to 11 without avx512
    parameters = 7_241_732_096
    assert 0.5 * parameters < rows["weights"] + rows["quantization state"] < 0.6 * parameters


def test_a_gpus_estimate_takes_the_gpus_own_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistral 7B in 4 bits, four pairs of 200 + 824 + 700 tokens, on a machine without a GPU."""
    monkeypatch.setattr(estimate, "_FULL_DEPTH", 4)  # quicker than 8
    MistralConfig(dtype="bfloat16").save_pretrained(tmp_path / "mistral")
    model = [f"model.model_name_or_path={tmp_path / 'mistral'}", "quant=nf4", "training.bf16=true"]

    def take(*overrides: str, device: Device = CARD) -> MemoryEstimate:
        return estimate_of([*model, *overrides], 1024, PairShape(200, 824, 700), device)

    for name in ("cpu_attention.PairAttention", "head.FrozenHeadLogProbs"):
        monkeypatch.setattr(f"dpo_runner.training.engine.packed.{name}.apply", None)
    whole = take()
    figures = {
        "lean": whole,
        "own layers": take("engine.lean_layers=false"),
        "fewer tokens": take("engine.max_tokens_per_micro_batch=3448"),
        "checkpointing": take("training.gradient_checkpointing=true"),
    }
    found = {name: round(each.total / 1e9, 1) for name, each in figures.items()}
    assert found == pytest.approx(FIGURES, rel=0.02)
    assert whole.rows["heap gaps"] == 0
    assert whole.needed == pytest.approx(1.1 * whole.total)
    assert not whole.fits and figures["fewer tokens"].fits
    pair_by_pair = take(device=Device("an older card", 0, 0, is_gpu=True))
    assert pair_by_pair.total > whole.total


def test_a_gpu_that_almost_has_the_peak_free_has_too_little() -> None:
    peak = 10 * 10**9
    for free, is_gpu, fits in ((10.5, False, True), (10.5, True, False), (11.5, True, True)):
        found = MemoryEstimate(
            {"all": peak}, {"training": peak}, "try", 1, Device("a card", 0, int(free * 1e9), is_gpu)
        )
        assert found.fits == fits
        assert found.shortage.startswith(f"about {11 if is_gpu else 10}.0 GB are needed, {free} GB are free on a card")


def test_the_device_is_the_one_that_trains(tiny_run: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    args = build_dpo_config(load_conf(tiny_run), Path("checkpoints"))
    monkeypatch.setattr(estimate, "check_allocator", lambda: None)
    monkeypatch.setattr(estimate, "has_kernel", lambda device: True)
    monkeypatch.setattr(estimate, "read_memory", lambda of_host: ("CPU" if of_host else "a card", 100, 50))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args.use_cpu = True
    assert estimate.read_device(args, held=7) == Device("CPU", 100, 57)
    args.use_cpu = False
    assert estimate.read_device(args, held=7) == Device("a card", 100, 57, is_gpu=True, has_varlen=True)


def test_a_driver_without_growing_segments_is_named_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(error)

    monkeypatch.setattr(torch, "empty", refuse)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    error = "CUDA driver error: operation not supported"
    with pytest.raises(ConfigError, match=r"`PYTORCH_ALLOC_CONF=expandable_segments:True`.*not supported.*:False"):
        device_memory.check_allocator()
    error = "CUDA error: out of memory"
    with pytest.raises(RuntimeError, match="out of memory"):
        device_memory.check_allocator()


def test_extrapolation_over_layers_equals_the_full_simulation(
    tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = make_family("llama", tokenizer, tmp_path / "deep", num_hidden_layers=8)
    overrides = [f"model.model_name_or_path={deep}", "training.per_device_train_batch_size=2"]
    monkeypatch.setattr(estimate, "_FULL_DEPTH", 4)
    extrapolated = run(*overrides)
    monkeypatch.setattr(estimate, "_FULL_DEPTH", 8)
    full = run(*overrides)
    for name in ("weights", "adapters", "optimizer"):
        assert extrapolated.rows[name] == full.rows[name]
    assert extrapolated.total == pytest.approx(full.total, rel=0.02)


def test_what_cannot_be_estimated_is_refused() -> None:
    with pytest.raises(ConfigError, match="optim"):
        run("training.optim=adamw_anyprecision")


def test_the_advice_names_what_takes_most() -> None:
    assert "quant=nf4" in run().advice and "gradient_checkpointing" in run().advice
    full = run("lora=none", "engine.reference_store=false").advice
    assert "lora=r16" in full and "engine.reference_store=true" in full
    spared = run("quant=nf4", "training.gradient_checkpointing=true", "training.per_device_train_batch_size=1").advice
    assert spared == "try a smaller training.max_length"


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS.keys())
def test_the_fake_models_are_those_of_the_run(
    start: list[str], tiny_run: list[str], sft_adapter: str, tiny_model: str, tmp_path: Path
) -> None:
    named = name_paths(start, SFT=sft_adapter, MODEL=tiny_model)
    named.append("engine.reference_store=false")
    conf = load_conf([*tiny_run, *named])
    trainer = build([*tiny_run, *named], tmp_path)
    args = build_dpo_config(conf, tmp_path)
    policy, reference, held = build_fake_models(Blueprint.of_run(conf), args, FakeTensorMode())

    def describe(model: Any) -> dict[str, Any]:
        shapes = {}
        for name, parameter in model.named_parameters():
            quantized = getattr(parameter, "quant_state", None) is not None or parameter.dtype == torch.int8
            shapes[name] = (parameter.numel(), parameter.dtype if quantized else None, parameter.requires_grad)
        return shapes

    assert describe(policy) == describe(trainer.model)
    assert (reference is None) == (trainer.ref_model is None)
    if reference is not None:
        assert {name: row[:2] for name, row in describe(reference).items()} == {
            name: row[:2] for name, row in describe(trainer.ref_model).items()
        }
    real = sum(parameter.nbytes for parameter in trainer.model.parameters() if parameter.requires_grad)
    assert held["adapters"] >= real or conf.lora is None


def test_a_dry_run_needs_the_models_config_and_its_tokenizer_only(tmp_path: Path, tokenizer: Any) -> None:
    folder = tmp_path / "mistral"
    MistralConfig(dtype="bfloat16", num_hidden_layers=2).save_pretrained(folder)
    command = ["dry_run=true", "model=mistral", f"model.model_name_or_path={folder}", "quant=nf4"]
    refused = run_python("-m", "dpo_runner", *command)
    assert (refused.returncode, refused.stdout) == (2, "")
    (line,) = refused.stderr.splitlines()
    assert line.endswith("/mistral`: has no tokenizer that transformers can read; save the model's tokenizer there")
    tokenizer.save_pretrained(folder)
    result = run_python("-m", "dpo_runner", *command)
    assert result.returncode == 0, result.stderr
    assert re.search(r"at the peak \((training|evaluation)\) *│ *\d+\.\d\d", result.stdout)
    assert "free on CPU" in result.stdout or "free on NVIDIA" in result.stdout
    refused = run_python("-m", "dpo_runner", *command[1:])
    assert refused.returncode == 2 and "holds no weights (model.safetensors); convert" in refused.stderr


def test_a_dry_run_warns_of_what_does_not_fit(tiny_run: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def show(free: int) -> str:
        monkeypatch.setattr(estimate, "read_device", lambda args: Device("a card", 10**9, free))
        text = io.StringIO()
        assert (
            run_conf(load_conf([*tiny_run, "dry_run=true"]), console=RunConsole(Console(file=text, width=200))) is None
        )
        return text.getvalue()

    assert "warning" not in show(10**9)
    assert re.search(r"warning: about 0\.\d GB are needed, 0\.0 GB are free on a card .* try ", show(1000))


def test_of_divided_weights_a_process_has_its_part_and_two_whole_layers() -> None:
    whole = run("lora=none")
    layer = 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64)
    for way, parts in (("fsdp2", 4), ("hsdp", 2)):  # by default two nodes
        part = run("lora=none", f"distributed={way}", "launch.processes=4")
        for name in ("weights", "optimizer"):
            assert part.rows[name] == pytest.approx(whole.rows[name] / parts, abs=1)
        assert part.rows["gathered weights"] == pytest.approx(2 * layer + 4 * (2 * 259 * 64 + 64), abs=256)
        step = "optimizer step"
        gathered = part.rows["gathered weights"]
        assert part.phases[step] - gathered == pytest.approx(whole.phases[step] / parts, abs=4)


def test_a_dry_run_says_what_it_cannot_estimate(tiny_run: list[str]) -> None:
    text = io.StringIO()
    conf = load_conf([*tiny_run, "dry_run=true", "training.activation_offloading=true"])
    run_conf(conf, console=RunConsole(Console(file=text, width=200)))
    assert "is not known: `training.activation_offloading=True`: its memory cannot be estimated" in text.getvalue()


@pytest.mark.real_model
def test_the_estimate_is_near_what_the_default_model_takes() -> None:
    overrides = ["training.max_length=256", "training.per_device_train_batch_size=1", "training.max_steps=1"]
    overrides += [f"model.dtype={real_model_dtype()}", "data.max_train_samples=2", "data.max_eval_samples=1"]
    measured = memory.run_child(overrides)
    estimate = memory.estimate([*overrides, "data.path=rows.jsonl"], measured)
    assert estimate.total == pytest.approx(measured["measured"], rel=0.15)

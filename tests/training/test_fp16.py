"""A GPU without bf16: fp16 is chosen and said, and a run in fp16 trains, resumes and is used.

accelerate keeps fp16 and its loss scaler for GPUs; here they run on the CPU.
"""

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_runner import run
from dpo_runner.chat import Chat
from dpo_runner.config.compose import load_conf
from dpo_runner.errors import ConfigError, RunInterrupted
from dpo_runner.evaluate.__main__ import main as evaluate
from dpo_runner.io.console import RunConsole
from dpo_runner.model import quantization
from dpo_runner.records.reading import read_metrics
from dpo_runner.training import build as building
from dpo_runner.training.build import build_dpo_config
from dpo_runner.training.engine import precision
from dpo_runner.training.memory import settle as settling
from dpo_runner.training.trainer import RunTrainer
from tests.support.common import run_main


@pytest.fixture
def old_card(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (quantization, precision, building, settling):
        monkeypatch.setattr(module, "lacks_bf16", lambda use_cpu=False: not use_cpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")


@pytest.fixture
def fp16_here(monkeypatch: pytest.MonkeyPatch) -> None:
    begin, check = Accelerator.__init__, building._check_precision

    def begin_with_scaler(self: Accelerator, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        if self.mixed_precision == "fp16":
            self.native_amp, self.scaler = True, torch.amp.GradScaler("cpu", init_scale=2.0**24)

    monkeypatch.setattr(Accelerator, "__init__", begin_with_scaler)
    monkeypatch.setattr(building, "_check_precision", lambda conf, in_fp16, use_cpu: check(conf, in_fp16, False))


@pytest.fixture
def bf16_run(tiny_run: list[str], tiny_model: str, tmp_path: Path) -> list[str]:
    """Overrides of a run whose checkpoint is in bf16, as nearly all are."""
    folder = tmp_path / "in_bf16"
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return [*tiny_run, f"model.model_name_or_path={folder}", "model.dtype=auto"]


def test_a_card_without_bf16_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bool(including_emulation))
    assert quantization.lacks_bf16() and not quantization.lacks_bf16(use_cpu=True)
    assert quantization.choose_dtype(torch.bfloat16) == torch.float16
    assert quantization.choose_dtype(torch.float32) == torch.float32


@pytest.mark.usefixtures("old_card", "fp16_here")
def test_a_run_there_takes_fp16_says_so_and_continues_bit_by_bit(
    bf16_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first steps are skipped, until the loss scaler has found its scale."""
    overrides = [*bf16_run, "quant=nf4", "training.max_steps=18", "training.save_steps=4", "training.logging_steps=1"]
    text = io.StringIO()
    seen: dict[str, Any] = {}

    def look(self: RunTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 17 and "cut" in self.args.output_dir and not seen:
            weights = dict(self.model.named_parameters())
            layer = self.model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
            seen.update(dtypes={w.dtype for w in weights.values()}, computes=layer.compute_dtype)
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    step = RunTrainer.training_step
    monkeypatch.setattr(RunTrainer, "training_step", look)
    summary = run(load_conf([*overrides, "run_dir=whole"]), console=RunConsole(Console(file=text, width=200)))
    assert summary is not None and abs(summary["before"]["eval_loss"] - math.log(2)) < 1e-3
    assert "fp16 instead of bf16, which Tesla T4 lacks" in text.getvalue()
    assert "computes in float16" in text.getvalue()
    with pytest.raises(RunInterrupted):
        run(load_conf([*overrides, "run_dir=cut"]))
    assert seen == {"dtypes": {torch.float32, torch.float16, torch.uint8}, "computes": torch.float16}
    scaler = torch.load("cut/checkpoints/checkpoint-16/scaler.pt", weights_only=True)
    assert 1 <= scaler["scale"] < 2**24, "no step was skipped"
    run(load_conf([*overrides, "run_dir=cut"]))
    losses = [
        [(event["step"], event["loss"]) for event in read_metrics(Path(name)) if "loss" in event]
        for name in ("whole", "cut")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 18
    whole, cut = (load_file(f"{name}/adapter/adapter_model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert all(whole[name].any() for name in whole if "lora_B" in name)

    assert run_main(evaluate, "whole") == 0
    told = json.loads(next(Path("whole/evaluations").glob("*/evaluation.json")).read_text())
    assert told["evaluated"]["autocast"] == "float16"
    assert Chat(Path("whole"), max_new_tokens=2).model.dtype == torch.float16


@pytest.mark.usefixtures("old_card", "fp16_here")
def test_bf16_that_is_asked_for_there_and_skipped_steps_are_refused(tiny_run: list[str], tmp_path: Path) -> None:
    for asked, line in {
        "training.bf16=true": r"`training.bf16=True`: Tesla T4 has no bf16 arithmetic; use training.bf16=null, which",
        "checks.on_nonfinite=skip_batch": r"`checks.on_nonfinite=skip_batch`: Tesla T4 has no .* use on_nonfinite=stop",
    }.items():
        with pytest.raises(ConfigError, match=f"^{line}"):
            build_dpo_config(load_conf([*tiny_run, asked]), tmp_path)
    build_dpo_config(load_conf([*tiny_run, "training.bf16=false", "checks.on_nonfinite=skip_batch"]), tmp_path)


def test_fp16_that_a_cpu_would_ignore_is_refused(tiny_run: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^`training.fp16=True`: accelerate ignores it on a CPU"):
        build_dpo_config(load_conf([*tiny_run, "training.fp16=true", "training.use_cpu=true"]), tmp_path)

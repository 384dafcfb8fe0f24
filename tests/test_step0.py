"""The step-0 check lets sound runs pass and stops the unsound ones, with the likely cause."""

import pytest
import torch
from test_model import build

from dpo_runner.errors import RunError
from dpo_runner.step0 import MovementCheck, check_reference, check_trainable


def test_a_sound_run_passes(tiny_run, tmp_path) -> None:
    trainer = build(tiny_run, tmp_path)
    check_trainable(trainer)
    check_reference(trainer)
    trainer.add_callback(MovementCheck())
    trainer.train()


def test_a_wrong_reference_is_found(tiny_run, sft_adapter, tmp_path) -> None:
    """The bare base as the reference of an SFT model: trap 3 as other runners have it."""
    trainer = build([*tiny_run, f"model.adapter={sft_adapter}"], tmp_path)
    trainer.model.delete_adapter("ref")  # TRL then takes the reference with all adapters off
    with pytest.raises(RunError, match=r"policy and reference differ by .* per token before training"):
        check_reference(trainer)


def test_ld_alpha_does_not_confuse_the_check(tiny_run, tmp_path) -> None:
    trainer = build([*tiny_run, "training.ld_alpha=0.5"], tmp_path)
    check_reference(trainer)
    assert trainer.ld_alpha == 0.5


def test_a_frozen_adapter_is_found(tiny_run, tmp_path) -> None:
    trainer = build(tiny_run, tmp_path)
    trainer.model.requires_grad_(False)
    with pytest.raises(RunError, match="no parameter is trainable"):
        check_trainable(trainer)
    next(p for name, p in trainer.model.named_parameters() if "lora_A" in name).requires_grad_(True)
    with pytest.raises(RunError, match=r"lora_B is frozen"):
        check_trainable(trainer)


def test_an_adapter_in_bf16_is_found(tiny_run, tmp_path) -> None:
    trainer = build(tiny_run, tmp_path)
    for parameter in trainer.model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    with pytest.raises(RunError, match=r"trains in torch\.bfloat16; must be torch\.float32"):
        check_trainable(trainer)


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_an_adapter_that_gets_no_gradient_is_found(part: str, tiny_run, tmp_path) -> None:
    trainer = build([*tiny_run, "training.weight_decay=0"], tmp_path)
    trainer.add_callback(MovementCheck())
    stuck = [p for name, p in trainer.model.named_parameters() if f"{part}.default" in name]
    for parameter in stuck:
        parameter.register_hook(torch.zeros_like)
    with pytest.raises(RunError, match=rf"{len(stuck)} adapter weights have not moved .*{part}"):
        trainer.train()


def test_a_layer_that_no_token_reached_is_exempt(tiny_run, tmp_path) -> None:
    trainer = build(tiny_run, tmp_path)
    check = MovementCheck()
    trainer.add_callback(check)
    layer = trainer.model.base_model.model.model.layers[1].mlp
    layer.forward = lambda hidden: torch.zeros_like(hidden)  # an idle expert
    trainer.train()
    assert not any(".1.mlp." in name for name in check._reached)


def test_the_check_waits_for_a_learning_rate_above_0(tiny_run, tmp_path) -> None:
    """With warm-up the first step has none, and nothing moves."""
    trainer = build([*tiny_run, "training.warmup_steps=2"], tmp_path)
    trainer.add_callback(MovementCheck())
    trainer.train()
    assert trainer.state.log_history[0]["learning_rate"] == 0

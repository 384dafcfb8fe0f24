"""The step-0 check passes sound runs and stops broken ones with the likely cause."""

import pytest
import torch

from dpo_runner.errors import RunError
from dpo_runner.training import step0
from dpo_runner.training.callbacks import movement
from dpo_runner.training.callbacks.movement import MovementCheck, _fingerprint
from dpo_runner.training.step0 import check_reference, check_trainable
from tests.support.trainers import build


def test_a_sound_run_passes(tiny_run, tmp_path) -> None:
    trainer = build(tiny_run, tmp_path)
    check_trainable(trainer)
    check_reference(trainer)
    trainer.add_callback(MovementCheck())
    trainer.train()


def test_a_wrong_reference_is_found(tiny_run, sft_adapter, tmp_path) -> None:
    """The bare base as the reference of an SFT model: trap 3, as in other runners."""
    trainer = build([*tiny_run, f"model.adapter={sft_adapter}"], tmp_path)
    trainer.model.delete_adapter("ref")  # TRL then takes the reference with all adapters off
    with pytest.raises(RunError, match=r"policy and reference differ by .* per token before training"):
        check_reference(trainer)


@pytest.mark.parametrize(
    "answers, compared",
    [
        ([(40, 40), (2, 30), (16, 20), (30, 1), (20, 16), (50, 50)], [2, 4]),
        ([(3, 15), (1, 1), (2, 9)], [1, 2]),  # no row has two long answers
        ([(20, 20)], [0]),
    ],
)
def test_the_shortest_rows_whose_answers_average_rounding_out_are_compared(
    answers: list[tuple[int, int]], compared: list[int], tiny_run, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, seen, score = build(tiny_run, tmp_path), [], step0.score_both
    rows = [
        {"prompt_ids": [7], "chosen_ids": [8] * a, "rejected_ids": [9] * b, "row": i}
        for i, (a, b) in enumerate(answers)
    ]
    monkeypatch.setattr(step0, "score_both", lambda _, rows: seen.extend(rows) or score(trainer, rows))
    trainer.train_dataset = rows
    check_reference(trainer)
    assert [row["row"] for row in seen] == compared


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
    with pytest.raises(RunError, match=r"lora_B\.default\.weight is frozen"):
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
    """With warm-up the first step has learning rate 0, so nothing moves."""
    trainer = build([*tiny_run, "training.warmup_steps=2"], tmp_path)
    trainer.add_callback(MovementCheck())
    trainer.train()
    assert trainer.state.log_history[0]["learning_rate"] == 0


IA3 = ["lora.peft_type=IA3", "lora.target_modules=[k_proj,down_proj]", "lora.config.feedforward_modules=[down_proj]"]
KINDS = {
    "full": ["lora=none"],
    "IA3": IA3,
    "LOHA": ["lora.peft_type=LOHA", "lora.config.r=4"],
    "LN_TUNING": ["lora.peft_type=LN_TUNING", "lora.target_modules=[input_layernorm]"],
    "VERA": ["lora.peft_type=VERA", "lora.config.r=8"],
    "modules": ["lora.modules_to_save=[lm_head,norm]"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_trained_passes_when_it_moves(kind: str, tiny_run, tmp_path) -> None:
    trainer = build([*tiny_run, *KINDS[kind]], tmp_path)
    check_trainable(trainer)
    check = MovementCheck()
    trainer.add_callback(check)
    trainer.train()
    assert check._steps == 2 and not check._start  # the check has finished


@pytest.mark.parametrize("kind", ["full", "IA3", "modules"])
def test_what_gets_no_gradient_is_found_whatever_it_is(kind: str, tiny_run, tmp_path) -> None:
    trainer = build([*tiny_run, *KINDS[kind], "training.weight_decay=0"], tmp_path)
    trainer.add_callback(MovementCheck())
    stuck = [p for name, p in trainer.model.named_parameters() if p.requires_grad]
    which = "trainable weights"
    if kind == "modules":
        stuck = [p for name, p in trainer.model.named_parameters() if "modules_to_save.default" in name]
        which = "weights in modules_to_save"
    for parameter in stuck:
        parameter.register_hook(torch.zeros_like)
    with pytest.raises(RunError, match=rf"all {len(stuck)} {which} have not moved in 2 step\(s\)"):
        trainer.train()


@pytest.mark.parametrize("part", ["0", "1"])
def test_a_weight_that_nothing_uses_may_stay(part: str, tiny_run, tmp_path) -> None:
    """Like an idle expert in full fine-tuning."""
    trainer = build([*tiny_run, "lora=none", "training.weight_decay=0"], tmp_path)
    trainer.add_callback(MovementCheck())
    trainer.model.model.layers[int(part)].mlp.down_proj.weight.register_hook(torch.zeros_like)
    trainer.train()


def test_a_learning_rate_too_small_for_fp32_is_found(tiny_run, tmp_path) -> None:
    trainer = build([*tiny_run, *IA3, "training.learning_rate=1e-12"], tmp_path)
    trainer.add_callback(MovementCheck())
    with pytest.raises(RunError, match=r"trainable weights have not moved .*learning_rate=1e-12 is too small"):
        trainer.train()


def test_warm_up_too_small_for_factors_at_1_is_no_alarm(tiny_run, tmp_path) -> None:
    """IA3 starts at 1, where fp32 has no step below 3e-8; the check waits until a change is possible."""
    warm_up = ["training.learning_rate=1e-4", "training.warmup_steps=20000", "training.max_steps=12"]
    trainer = build([*tiny_run, *IA3, *warm_up], tmp_path)
    check = MovementCheck()
    trainer.add_callback(check)
    trainer.train()
    assert check._steps > 2 and not check._start


def test_a_frozen_module_beside_the_adapter_is_found(tiny_run, tmp_path) -> None:
    trainer = build([*tiny_run, "lora.modules_to_save=[lm_head]"], tmp_path)
    trainer.model.get_output_embeddings().modules_to_save["default"].requires_grad_(False)
    with pytest.raises(RunError, match=r"lm_head\.modules_to_save\.default\.weight is frozen"):
        check_trainable(trainer)


@pytest.mark.parametrize("kind", ["full", "IA3"])
def test_16_bits_are_found_whatever_is_trained(kind: str, tiny_run, tmp_path) -> None:
    trainer = build([*tiny_run, *KINDS[kind]], tmp_path)
    next(p for p in trainer.model.parameters() if p.requires_grad).data = torch.zeros(4, dtype=torch.bfloat16)
    with pytest.raises(RunError, match=r"trains in torch\.bfloat16; must be torch\.float32"):
        check_trainable(trainer)


def test_a_large_weight_is_fingerprinted_in_parts(monkeypatch) -> None:
    weight = torch.randn(7, 11)
    whole = _fingerprint(weight)
    monkeypatch.setattr(movement, "_AT_ONCE", 10)
    assert _fingerprint(weight) == pytest.approx(whole, rel=1e-12)
    weight[6, 10] += 1e-5
    assert _fingerprint(weight) != pytest.approx(whole, rel=1e-12)

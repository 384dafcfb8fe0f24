"""The step-0 check passes sound runs and stops broken ones with the likely cause."""

import pytest
import torch

from dpo_runner.errors import RunError
from dpo_runner.training import step0
from dpo_runner.training.callbacks import movement
from dpo_runner.training.callbacks.movement import MovementCheck, _fingerprint
from dpo_runner.training.step0 import check_before, check_head, check_reference, check_trainable
from tests.support.trainers import build


def test_a_sound_run_passes(tiny_run, tmp_path) -> None:
    trainer = build(tiny_run, tmp_path)
    check_trainable(trainer)
    check_reference(trainer)
    check_head(trainer)
    trainer.add_callback(MovementCheck())
    trainer.train()


def test_logits_that_are_not_the_heads_alone_are_found(tiny_run, tmp_path) -> None:
    """BERT, RoBERTa, RecurrentGemma and xLSTM transform or cap them, and TRL's head does not."""
    trainer = build(tiny_run, tmp_path)
    trainer.model.get_output_embeddings().register_forward_hook(lambda head, inputs, logits: logits.tanh())
    with pytest.raises(RunError, match=r"llama models do not compute their logits as TRL does.* differ by"):
        check_head(trainer)


def test_a_wrong_reference_is_found(tiny_run, sft_adapter, tmp_path) -> None:
    """The bare base as the reference of an SFT model: trap 3, as in other runners."""
    trainer = build([*tiny_run, f"model.adapter={sft_adapter}"], tmp_path)
    trainer.model.delete_adapter("ref")  # TRL then takes the reference with all adapters off
    with pytest.raises(RunError, match=r"before training policy and reference differ by .* per token"):
        check_reference(trainer)


@pytest.mark.parametrize(
    "answers, compared",
    [
        ([(40, 40), (2, 30), (16, 20), (30, 1), (20, 16), (50, 50)], [2, 5]),
        ([(3, 15), (1, 1), (2, 9)], [1, 0]),  # no row has two long answers
        ([(20, 20)], [0]),
    ],
)
def test_a_short_and_a_long_row_are_compared_in_one_batch(
    answers: list[tuple[int, int]], compared: list[int], tiny_run, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, seen, score = build(tiny_run, tmp_path), [], step0.score_batch
    rows = [{"prompt_ids": [7], "chosen_ids": [8] * a, "rejected_ids": [9] * b} for a, b in answers]
    monkeypatch.setattr(
        step0, "score_batch", lambda _, model, batch: seen.append(batch) or score(trainer, model, batch)
    )
    trainer.train_dataset = rows
    check_reference(trainer)
    assert seen == [[rows[index] for index in compared]] * 2


@pytest.mark.parametrize("autocast", [True, False])
def test_a_slightly_wrong_reference_is_found_in_fp32_weights(autocast: bool, tiny_run, tmp_path) -> None:
    """Autocast's rounding is larger than this difference, which over many tokens shifts the margin."""
    trainer = build([*tiny_run, f"training.bf16={autocast}"], tmp_path)
    assert check_reference(trainer) < 1e-5
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(1e-3)
    assert 1e-4 < check_reference(trainer, is_initial=False) < 0.05
    with pytest.raises(RunError, match=r"policy and reference differ by .* rounding in float32 explains 0\.00015"):
        check_reference(trainer)


def test_columns_of_other_rows_are_found(tiny_run, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPO_RUNNER_CACHE", str(tmp_path / "cache"))
    trainer = build(
        [*tiny_run, "engine.reference_store=true", "training.ld_alpha=0.5", "training.bf16=false"], tmp_path
    )
    check_reference(trainer)
    check_before(trainer, True, trainer.evaluate())
    for split in ("train_dataset", "eval_dataset"):
        rows = getattr(trainer, split)
        values = rows["ref_chosen_logps"]
        rows = rows.remove_columns("ref_chosen_logps").add_column("ref_chosen_logps", [*values[1:], values[0]])
        setattr(trainer, split, rows)
    with pytest.raises(RunError, match=r"`ref_chosen_logps` is -.*, but the reference gives -.* over \d+ tokens"):
        check_reference(trainer)


def test_rewards_before_training_must_be_0(tiny_run, tmp_path) -> None:
    trainer = build(tiny_run, tmp_path)
    metrics = trainer.evaluate()
    check_before(trainer, True, metrics)
    for name in ("rewards/margins", "rewards/chosen", "rewards/rejected"):
        wrong = metrics | {f"eval_{name}": -0.19}
        check_before(trainer, False, wrong)
        with pytest.raises(RunError, match=f"{name} of the evaluation rows is -0.19; rounding explains "):
            check_before(trainer, True, wrong)


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

"""Trainer traps: adapters that move, dropout as configured, rows that are not templated twice."""

import dataclasses
import types
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from transformers import training_args
from trl import DPOConfig

from dpo_runner import run
from dpo_runner.config.compose import load_conf
from dpo_runner.data.preferences import ID_COLUMNS, load_preferences
from dpo_runner.errors import ConfigError, RunError
from dpo_runner.model.blueprint import Blueprint
from dpo_runner.training.build import build_dpo_config, undo_global_settings
from dpo_runner.training.trainer import RunTrainer, count_steps
from tests.support.adapters import EXACT, close, load_by_hand
from tests.support.common import ROWS
from tests.support.trainers import build, first_rows, gradients, logps_of, score_both


@pytest.mark.parametrize("quant", ["none", "nf4", "int8"])
def test_adapters_train_in_fp32(quant: str, tiny_run, tmp_path) -> None:
    """Trap 4: TRL casts a QLoRA adapter to bf16."""
    trainer = build([*tiny_run, f"quant={quant}"], tmp_path)
    dtypes = {p.dtype for p in trainer.model.parameters() if p.requires_grad}
    assert dtypes == {torch.float32}


def test_small_updates_move_a_qlora_adapter(tiny_run, tmp_path) -> None:
    """The effect of trap 4: at this learning rate about 2 % of lora_A change in bf16, nearly all in fp32."""
    overrides = [*tiny_run, "quant=nf4", "training.learning_rate=5e-6", "training.lr_scheduler_type=constant"]
    trainer = build(
        [*overrides, "training.warmup_steps=0", "training.max_steps=20", "data.eval_fraction=0.1"], tmp_path
    )
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_A" in name}
    trainer.train()
    parameters = dict(trainer.model.named_parameters())
    moved = sum((parameters[name] != value).sum().item() for name, value in start.items())
    assert moved / sum(value.numel() for value in start.values()) > 0.99


def test_a_loaded_qlora_adapter_is_not_rounded(tiny_run, sft_adapter, tmp_path) -> None:
    """TRL rounds the policy's copy to bf16 but not the reference's, so both would differ from the start."""
    from safetensors.torch import load_file

    trainer = build([*tiny_run, "quant=nf4", f"model.adapter={sft_adapter}"], tmp_path)
    saved = load_file(Path(sft_adapter) / "adapter_model.safetensors")
    parameters = dict(trainer.model.named_parameters())
    for name, value in saved.items():
        for adapter in ("default", "ref"):
            loaded = parameters[name.replace(".weight", f".{adapter}.weight")]
            assert torch.equal(loaded, value)


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_whole_modules_do_not_move_the_reference(module, tiny_run, tiny_model, tmp_path) -> None:
    overrides = [f"lora.modules_to_save=[{module}]", "training.learning_rate=1e-2", "training.max_steps=2"]
    trainer = build([*tiny_run, *EXACT, *overrides], tmp_path)
    rows = first_rows(trainer)
    expected = logps_of(load_by_hand(tiny_model), rows)
    trainer.train()
    policy, reference, _ = score_both(trainer, rows)
    assert close(reference, expected) and not close(policy, expected)


def test_a_trained_weight_in_the_memory_of_the_reference_is_found(tiny_run, tmp_path, monkeypatch) -> None:
    def share(trainer: RunTrainer) -> None:
        head = trainer.model.get_output_embeddings()
        head.modules_to_save["default"].weight.data = head.original_module.weight.data

    monkeypatch.setattr(RunTrainer, "_cast_adapter_to_fp32", share)
    with pytest.raises(RunError, match=r"default\.weight is trained in the memory of .*original_module\.weight, so"):
        build([*tiny_run, *EXACT, "lora.modules_to_save=[lm_head]"], tmp_path)


def set_dropout(trainer) -> list[float]:
    layers = [module for name, module in trainer.model.named_modules() if name.endswith("lora_dropout.default")]
    return [getattr(layer, "p", 0.0) for layer in layers]


def test_lora_dropout_is_what_the_config_says(tiny_run, tmp_path) -> None:
    """Trap 10: TRL's default zeroes it."""
    trainer = build([*tiny_run, "lora.lora_dropout=0.3"], tmp_path)
    assert set_dropout(trainer) and set(set_dropout(trainer)) == {0.3}
    torch.manual_seed(0)
    first = gradients(trainer)
    second = gradients(trainer)
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_disable_dropout_still_works(tiny_run, tmp_path) -> None:
    trainer = build([*tiny_run, "training.disable_dropout=true"], tmp_path)
    assert set(set_dropout(trainer)) <= {0.0}


def test_the_reference_has_no_dropout(tiny_run, sft_adapter, tmp_path) -> None:
    """TRL runs the reference in training mode, where an SFT adapter's dropout would add noise."""
    trainer = build([*tiny_run, f"model.adapter={sft_adapter}"], tmp_path)
    for name, module in trainer.model.named_modules():
        if name.endswith("lora_dropout"):
            module["default"], module["ref"] = torch.nn.Dropout(0.5), torch.nn.Dropout(0.5)
    quiet = score_both(trainer, first_rows(trainer))[1]
    trainer.model.train()
    batch = trainer._prepare_inputs(trainer.data_collator(first_rows(trainer)))
    noisy = torch.cat(trainer.compute_ref_log_probs(trainer.model, batch))
    assert torch.equal(noisy, quiet)
    assert trainer.model.training  # the policy's own forward keeps its dropout
    assert any(
        module.training for name, module in trainer.model.named_modules() if name.endswith("lora_dropout.default")
    )


def test_rows_reach_the_trainer_as_they_were_tokenized(tiny_run, tmp_path, tokenizer) -> None:
    from dpo_runner.data.templates.chat_template import apply_chat_template

    trainer = build(tiny_run, tmp_path)
    expected = [apply_chat_template(row, tokenizer) for row in ROWS]
    assert all(row in expected for row in trainer.train_dataset)


def test_precomputed_references_do_not_outlive_the_settings_they_depend_on(tiny_run, tmp_path) -> None:
    """Trap 2: TRL's cache key lacks max_length, truncation_mode, ld_alpha, attention implementation."""

    def reference(*overrides: str) -> list[float]:
        trainer = build([*tiny_run, "training.precompute_ref_log_probs=true", *overrides], tmp_path)
        return list(trainer.train_dataset["ref_rejected_logps"])

    assert reference("training.ld_alpha=0.0") != reference()
    conf = load_conf(tiny_run)
    rows = load_preferences(conf, Blueprint(conf.model).tokenizer).train

    def fingerprint(*overrides: str, reference: str = "") -> str:
        fixed = ["data.on_overlong=trl", "training.bf16=false"]
        args = build_dpo_config(load_conf([*tiny_run, *fixed, *overrides]), tmp_path)
        trainer = types.SimpleNamespace(attention="sdpa", _identity=reference)
        return RunTrainer._prepare_dataset(trainer, rows, None, args, "train")._fingerprint

    changes = [
        "training.max_length=6",
        "training.truncation_mode=keep_end",
        "training.ld_alpha=0.0",
        "training.bf16=true",
    ]
    assert len({fingerprint(), *map(fingerprint, changes)}) == 1 + len(changes)
    assert fingerprint() == fingerprint("training.beta=0.7", "training.learning_rate=1e-3")
    assert fingerprint() != fingerprint(reference="another adapter")


@pytest.mark.parametrize(
    "overrides",
    [[], ["training.max_steps=-1"], ["training.max_steps=-1", "training.num_train_epochs=2.5"],
     ["training.max_steps=-1", "training.per_device_train_batch_size=4", "training.gradient_accumulation_steps=3"],
     ["training.max_steps=-1", "training.dataloader_drop_last=true", "training.per_device_train_batch_size=5"]],
)  # fmt: skip
def test_the_planned_steps_are_the_trainers(overrides: list[str], tiny_run, tmp_path) -> None:
    overrides = [*tiny_run, *overrides, "training.eval_strategy=no", "training.save_strategy=no"]
    trainer = build(overrides, tmp_path)
    trainer.train()
    assert trainer.state.max_steps == count_steps(load_conf(overrides).training, len(trainer.train_dataset))


def test_what_upstream_refuses_is_one_line(tmp_path) -> None:
    conf = load_conf(["training.optim=adafactor", "training.eval_strategy=steps"])
    conf.training.lr_scheduler_type = "no_such"
    with pytest.raises(ConfigError, match="`training`:"):
        build_dpo_config(conf, tmp_path)


def test_a_field_that_only_newer_libraries_have_is_left_out_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = dataclasses.fields
    older = tuple(field for field in fields(DPOConfig) if not field.name.startswith("activation_checkpointing"))
    monkeypatch.setattr(dataclasses, "fields", lambda of: older if of is DPOConfig else fields(of))
    assert build_dpo_config(load_conf(["training.gradient_checkpointing=true"]), tmp_path).gradient_checkpointing
    expected = rf"`training.activation_checkpointing=True`: transformers {version('transformers')} does not know it; "
    with pytest.raises(ConfigError, match=expected):
        build_dpo_config(load_conf(["training.activation_checkpointing=true"]), tmp_path)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge", "apo_zero", "[sigmoid,sft]"])
def test_losses_train(loss: str, tiny_run, tmp_path) -> None:
    trainer = build([*tiny_run, f"training.loss_type={loss}"], tmp_path)
    trainer.train()
    assert trainer.state.global_step == 4


def test_conversations_become_the_tokens_that_trl_makes_of_them(tiny_model, tokenizer, tmp_path) -> None:
    """If TRL's templating is correct, ours gives the same tokens."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOTrainer

    from dpo_runner.data.templates.chat_template import apply_chat_template

    rows = [
        {
            "prompt": [
                *([{"role": "system", "content": "Be brief."}] if number % 2 else []),
                {"role": "user", "content": f"{row['prompt']} 🙂"},
            ],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for number, row in enumerate(ROWS[:6])
    ]
    args = DPOConfig(output_dir=str(tmp_path), max_length=None, bf16=False, report_to="none")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    trainer = DPOTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    for row, made in zip(rows, trainer.train_dataset, strict=True):
        assert apply_chat_template(row, tokenizer) == {name: made[name] for name in ID_COLUMNS}


def test_one_process_takes_one_gpu(tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    conf = load_conf([*tiny_run, "training.bf16=false", "training.per_device_train_batch_size=2"])
    args = build_dpo_config(conf, tmp_path)
    assert args.n_gpu == 1 and args.train_batch_size == 2 and not args.use_cpu


def test_what_a_run_sets_for_the_whole_process_ends_with_it(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_args, "is_torch_tf32_available", lambda: True)
    before = torch.backends.fp32_precision
    for value, expected in (("true", "tf32"), ("null", before), ("false", "ieee"), ("true", "tf32"), ("null", before)):
        conf = load_conf([*tiny_run, f"training.tf32={value}"])
        with undo_global_settings():
            build_dpo_config(conf, tmp_path)
            assert torch.backends.fp32_precision == expected
    run(load_conf([*tiny_run, "training.tf32=true", "training.full_determinism=true", "dry_run=true"]))
    assert torch.backends.fp32_precision == before and not torch.are_deterministic_algorithms_enabled()


def test_an_initialization_that_runs_out_of_memory_says_so(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("dpo_runner.training.trainer.initialize_lora_eva_weights", fail)
    with pytest.raises(torch.OutOfMemoryError):
        build([*tiny_run, "lora.init_lora_weights=eva"], tmp_path)

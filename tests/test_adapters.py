"""Adapters of every kind: what they name is there, what they start from is the reference, the result is servable."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_adapter
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from test_model import build, logps_of
from transformers import AutoModelForCausalLM

from dpo_runner.adapters import build_peft_config, check_adapter
from dpo_runner.config import load_conf
from dpo_runner.errors import ConfigError
from dpo_runner.model import build_meta_model, check_model, load_model_config
from dpo_runner.quantization import build_quantization_config
from dpo_runner.run import run
from dpo_runner.stacking import combined_adapter
from dpo_runner.step0 import check_reference, completion_logps

EXACT = ["training.bf16=false", "model.dtype=float32"]


def load_by_hand(tiny_model: str, quant: str = "none"):
    config = build_quantization_config(load_conf([f"quant={quant}"]).quant)
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, quantization_config=config).eval()


def rows_of(trainer) -> list[dict]:
    return [trainer.train_dataset[i] for i in range(4)]


def close(one: torch.Tensor, other: torch.Tensor, quant: str = "none") -> bool:
    tolerance = 1e-3 if quant == "none" else 0.2  # sums of about -100; 4-bit products are made in bf16
    return torch.allclose(one.float(), other.float(), rtol=1e-5, atol=tolerance)


@pytest.fixture(scope="session")
def other_adapter(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
    return make_adapter(tiny_model, tmp_path_factory.mktemp("other"), seed=7, std=0.2, **settings)


MODES = {
    "continue": ["lora=none"],
    "stack": ["model.adapter_mode=stack"],
    "merge": ["model.adapter_mode=merge"],
}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("quant", ["none", "nf4"])
@pytest.mark.parametrize("mode", MODES)
def test_the_reference_is_the_sft_model_whatever_the_mode(
    mode, quant, checkpointing, tiny_run, tiny_model, sft_adapter, tmp_path
) -> None:
    """Against a model loaded by hand; before training, and after steps, evaluation and a generation."""
    trainer = build(
        [
            *tiny_run,
            *EXACT,
            *MODES[mode],
            f"model.adapter={sft_adapter}",
            f"quant={quant}",
            f"training.gradient_checkpointing={str(checkpointing).lower()}",
        ],
        tmp_path,
    )
    rows = rows_of(trainer)
    if mode == "merge":
        merged = PeftModel.from_pretrained(load_by_hand(tiny_model), sft_adapter).merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        expected = logps_of(load_by_hand(str(tmp_path / "merged"), quant), rows)
    else:
        expected = logps_of(PeftModel.from_pretrained(load_by_hand(tiny_model, quant), sft_adapter).eval(), rows)
    policy, reference, _ = completion_logps(trainer)
    assert close(reference, expected, quant) and close(policy, expected, quant)
    assert not close(expected, logps_of(load_by_hand(tiny_model, quant), rows), quant)  # the test can tell them apart
    assert check_reference(trainer) < 1e-2

    frozen = {name: p.clone() for name, p in trainer.model.named_parameters() if ".default." not in name}
    trainer.train()
    trainer.evaluate()
    trainer.model.generate(input_ids=torch.tensor([rows[0]["prompt_ids"]]), max_new_tokens=2)
    policy_after, reference_after, _ = completion_logps(trainer)
    assert torch.equal(reference_after, reference) and not torch.equal(policy_after, policy)
    assert all(torch.equal(p, frozen[name]) for name, p in trainer.model.named_parameters() if name in frozen)
    trainable = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert trainable and all(".default." in name for name in trainable)


@pytest.mark.parametrize("mode", MODES)
def test_the_reference_can_be_the_bare_base(mode, tiny_run, tiny_model, sft_adapter, tmp_path) -> None:
    overrides = [*tiny_run, *EXACT, *MODES[mode], f"model.adapter={sft_adapter}", "model.reference=base"]
    trainer = build(overrides, tmp_path)
    expected = logps_of(load_by_hand(tiny_model), rows_of(trainer))
    assert close(completion_logps(trainer)[1], expected)
    assert check_reference(trainer, is_initial=False) > 1e-3
    trainer.train()
    assert close(completion_logps(trainer)[1], expected)
    assert not any(p.requires_grad for name, p in trainer.model.named_parameters() if ".sft." in name)


@pytest.mark.parametrize("precompute", ["false", "true"])
@pytest.mark.parametrize("mode", [*MODES, "new", "full", "pissa"])
def test_the_reference_can_be_another_adapter(
    mode, precompute, tiny_run, tiny_model, sft_adapter, other_adapter, tmp_path
) -> None:
    """On the base as published, whatever the policy's own stands on."""
    alone = {"new": [], "full": ["lora=none"], "pissa": ["lora.init_lora_weights=pissa"]}
    start = alone[mode] if mode in alone else [*MODES[mode], f"model.adapter={sft_adapter}"]
    precomputed = [f"training.precompute_ref_log_probs={precompute}"]
    trainer = build([*tiny_run, *EXACT, *start, *precomputed, f"model.reference={other_adapter}"], tmp_path)
    rows = rows_of(trainer)
    expected = logps_of(PeftModel.from_pretrained(load_by_hand(tiny_model), other_adapter).eval(), rows)
    trainer.train()
    assert close(completion_logps(trainer)[1], expected)
    if precompute == "true":
        kept = [row["ref_chosen_logps"] for row in rows] + [row["ref_rejected_logps"] for row in rows]
        assert close(torch.tensor(kept), expected)


@pytest.mark.parametrize("lora", ["r16", "none"])
def test_the_reference_can_be_another_model(lora, tiny_run, tiny_model, sft_adapter, tmp_path) -> None:
    other = PeftModel.from_pretrained(load_by_hand(tiny_model), sft_adapter).merge_and_unload()
    other.save_pretrained(tmp_path / "other")
    trainer = build([*tiny_run, *EXACT, f"lora={lora}", f"model.reference={tmp_path / 'other'}"], tmp_path)
    rows = rows_of(trainer)
    expected = logps_of(other.eval(), rows)
    policy, reference, _ = completion_logps(trainer)
    assert close(reference, expected) and close(policy, logps_of(load_by_hand(tiny_model), rows))
    trainer.train()
    assert close(completion_logps(trainer)[1], expected)


def test_full_fine_tuning_with_a_precomputed_reference_keeps_no_copy(tiny_run, tiny_model, tmp_path) -> None:
    overrides = [*tiny_run, *EXACT, "lora=none", "training.precompute_ref_log_probs=true"]
    trainer = build([*overrides, "training.learning_rate=1e-3"], tmp_path)
    assert trainer.ref_model is None
    expected = logps_of(load_by_hand(tiny_model), rows := rows_of(trainer))
    kept = [row["ref_chosen_logps"] for row in rows] + [row["ref_rejected_logps"] for row in rows]
    assert close(torch.tensor(kept), expected)
    trainer.train()
    run(load_conf([*overrides, "run_dir=r"]))  # evaluation after training included


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "gaussian", "orthogonal", "eva"])
def test_initializations_begin_at_the_base_and_end_on_it(start, tiny_run, tiny_model, tmp_path) -> None:
    """Trap 14: PiSSA and OLoRA change the base; the reference is then a copy of the adapter as it begins."""
    overrides = [*tiny_run, *EXACT, f"lora.init_lora_weights={start}", "lora.r=4", "training.learning_rate=1e-3"]
    trainer = build(overrides, tmp_path)
    rows = rows_of(trainer)
    expected = logps_of(load_by_hand(tiny_model), rows)
    policy, reference, _ = completion_logps(trainer)
    assert close(reference, expected) and close(policy, expected)
    with trainer.model.disable_adapter():
        assert close(logps_of(trainer.model.eval(), rows), expected) == (not start.startswith(("pissa", "olora")))
    trainer.model.train()
    trainer.train()
    assert close(completion_logps(trainer)[1], expected)

    run(load_conf([*overrides, "run_dir=r"]))  # what is saved stands on the base as published
    served = PeftModel.from_pretrained(load_by_hand(tiny_model), tmp_path / "r" / "adapter").eval()
    assert close(logps_of(served, rows), completion_logps(trainer)[0])
    assert not close(logps_of(served, rows), expected)


def test_eva_takes_its_directions_from_the_data(tiny_run, tmp_path) -> None:
    eva = build([*tiny_run, *EXACT, "lora.init_lora_weights=eva", "lora.r=4"], tmp_path)
    other = [f"data.path={tmp_path / 'other.jsonl'}"]
    text = (tmp_path / "pairs.jsonl").read_text().replace("plus", "ZZZZZZZZ")
    (tmp_path / "other.jsonl").write_text(text)
    again = build([*tiny_run, *EXACT, "lora.init_lora_weights=eva", "lora.r=4", *other], tmp_path)

    def directions(trainer) -> list[torch.Tensor]:
        return [p for name, p in trainer.model.named_parameters() if "lora_A" in name]

    assert not all(torch.equal(one, two) for one, two in zip(directions(eva), directions(again), strict=True))


def test_a_stacked_result_is_one_adapter_on_the_plain_base(tiny_run, tiny_model, sft_adapter, tmp_path) -> None:
    overrides = [*tiny_run, *EXACT, *MODES["stack"], f"model.adapter={sft_adapter}", "training.learning_rate=1e-3"]
    trainer = build(overrides, tmp_path)
    trainer.train()
    policy = completion_logps(trainer)[0]
    run(load_conf([*overrides, "run_dir=r"]))
    served = PeftModel.from_pretrained(load_by_hand(tiny_model), tmp_path / "r" / "adapter").eval()
    assert served.peft_config["default"].r == 20
    assert close(logps_of(served, rows_of(trainer)), policy)
    with combined_adapter(trainer.model, {"sft": 1.0, "default": 1.0}) as name:
        assert name in trainer.model.peft_config
    assert set(trainer.model.peft_config) == {"sft", "default", "ref"}
    assert torch.equal(completion_logps(trainer)[0], policy)


METHODS = {
    "LOHA": ["lora.config.r=4"],
    "LOKR": ["lora.config.r=4"],
    "IA3": ["lora.target_modules=[k_proj,v_proj,down_proj]", "lora.config.feedforward_modules=[down_proj]"],
    "OFT": ["lora.config.oft_block_size=16", "lora.config.r=0"],
    "HRA": ["lora.config.r=4"],
    "LN_TUNING": ["lora.target_modules=[input_layernorm]"],
}


@pytest.mark.parametrize("method", METHODS)
def test_other_methods_of_peft_run(method: str, tiny_run, tmp_path) -> None:
    overrides = [*tiny_run, f"lora.peft_type={method}", *METHODS[method], "training.max_steps=2", "run_dir=r"]
    summary = run(load_conf(overrides))
    assert summary is not None and summary["before"]["eval_loss"] == pytest.approx(0.6931, abs=1e-3)
    saved = json.loads((tmp_path / "r" / "adapter" / "adapter_config.json").read_text())
    assert saved["peft_type"] == method


@pytest.mark.parametrize(
    "extra",
    [
        ["lora.use_dora=true"],
        ["lora.use_rslora=true"],
        ["lora.modules_to_save=[lm_head]"],
        ["lora.layers_to_transform=[1]", "lora.target_modules=[q_proj,v_proj]"],
        ["lora.rank_pattern.q_proj=2"],
        ["lora.use_dora=true", "quant=nf4"],
    ],
    ids=lambda extra: "+".join(extra),
)
def test_fields_of_lora_run_and_reach_peft(extra: list[str], tiny_run, tmp_path) -> None:
    summary = run(load_conf([*tiny_run, *extra, "run_dir=r"]))
    assert summary is not None and summary["before"]["eval_loss"] == pytest.approx(0.6931, abs=1e-3)
    saved = json.loads((tmp_path / "r" / "adapter" / "adapter_config.json").read_text())
    weights = load_file(tmp_path / "r" / "adapter" / "adapter_model.safetensors")
    if "dora" in extra[0]:
        assert saved["use_dora"] and any("magnitude" in name for name in weights)
    elif "rslora" in extra[0]:
        assert saved["use_rslora"]
    elif "modules" in extra[0]:
        assert any("lm_head" in name for name in weights)
    elif "layers" in extra[0]:
        assert not any(".layers.0." in name for name in weights)
    else:
        assert {weight.shape[0] for name, weight in weights.items() if "q_proj.lora_A" in name} == {2}


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["lora.target_modules=[q_proj,k_prj]"], r"has no module `k_prj`; the nearest are .*k_proj"),
        (["lora.target_modules=.*attention2.*"], "matches no module .*q_proj"),
        (["lora.modules_to_save=[head]"], r"`lora\.modules_to_save`: .* has no module `head`"),
        (
            ["lora.layers_to_transform=[2]", "lora.target_modules=[q_proj]"],
            r"`lora\.layers_to_transform=2`: .* has layers 0 to 1",
        ),
        (["lora.init_lora_weights=pissa", "quant=nf4"], "quantized base cannot give exactly"),
        (["lora.init_lora_weights=olora", "quant=int8"], "quantized base cannot give exactly"),
        (["lora.peft_type=LOHA", "lora.config.rr=4"], r"`lora\.config\.rr`: LoHaConfig has no such field"),
        (["lora.peft_type=LOHA", "lora.config.r=four"], r"`lora\.config\.r=four`: must be int"),
        (["lora.peft_type=LOHAA"], "no such method in PEFT; did you mean `LOHA`"),
        (["lora.peft_type=PROMPT_TUNING", "lora.config.num_virtual_tokens=4"], "learns virtual tokens"),
        (["lora.config.r=4"], r"`lora\.config\.r`: has a key of its own; set lora\.r=4"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused_before_weights_are_loaded(overrides, match, tiny_run) -> None:
    with pytest.raises(ConfigError, match=match):
        check_model(load_conf([*tiny_run, *overrides]))


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["lora.init_lora_weights=false"], "begins with a random B"),
        (["lora.init_lora_weights=loftq"], "no published model and no reference stands"),
        (["lora.init_lora_weights=pisa"], "did you mean `pissa`"),
        (["lora.peft_type=LOHA", "lora.r=3"], r"`lora\.r=3`: is LoRA's; LOHA takes"),
        (["lora.use_dora=true", "lora.init_lora_weights=pissa"], "cannot be converted"),
        (["model.adapter=x", "model.adapter_mode=stack", "lora=none"], "trains a new adapter on top"),
        (["model.adapter=x", "model.adapter_mode=stack", "lora.use_dora=true"], "must be plain LoRA"),
        (["model.adapter_mode=stack"], "needs model.adapter"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)
def test_contradictions_are_found_without_torch(overrides, match, tiny_run) -> None:
    with pytest.raises(ConfigError, match=match):
        load_conf([*tiny_run, *overrides])


def change(sft_adapter: str, tmp_path: Path, edit) -> Path:
    folder = tmp_path / "edited"
    shutil.copytree(sft_adapter, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(edit(tensors), folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda t: {k: v * ("lora_B" not in k) for k, v in t.items()}, "all of its lora_B weights are 0"),
        (lambda t: {k.replace("layers.1", "layers.7"): v for k, v in t.items()}, r"has no module model\.layers\.7"),
        (
            lambda t: {k: torch.cat([v, v], 1) if "q_proj.lora_A" in k else v for k, v in t.items()},
            r"lora_A of model\.layers\.0\.self_attn\.q_proj has 128 inputs, that layer of .* has 64",
        ),
    ],
    ids=["zero", "names", "shapes"],
)
def test_an_adapter_that_does_not_fit_is_refused(edit, match, tiny_run, sft_adapter, tmp_path) -> None:
    folder = change(sft_adapter, tmp_path, edit)
    with pytest.raises(ConfigError, match=match):
        run(load_conf([*tiny_run, f"model.adapter={folder}", "run_dir=r"]))
    assert not (tmp_path / "r").exists()


def test_a_pickled_adapter_needs_permission(tiny_run, sft_adapter, tmp_path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(sft_adapter, folder)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    conf = load_conf([*tiny_run, f"model.adapter={folder}"])
    with pytest.raises(ConfigError, match=r"only a pickle.*model\.use_safetensors=false"):
        check_model(conf)
    check_model(load_conf([*tiny_run, f"model.adapter={folder}", "model.use_safetensors=false"]))
    (folder / "adapter_model.bin").unlink()
    meta = build_meta_model(load_model_config(conf.model), conf.model)
    with pytest.raises(ConfigError, match=r"holds no adapter_model\.safetensors$"):
        check_adapter(folder, meta, "x", True)


def test_an_adapter_in_the_models_place_is_taken_for_what_it_is(tiny_run, tiny_model, sft_adapter, tmp_path) -> None:
    """Trap 3: transformers would put its layers into the model, where no reference can be told from them."""
    overrides = [o for o in tiny_run if not o.startswith("model=")]
    conf = load_conf([*overrides, f"model.model_name_or_path={sft_adapter}", *EXACT])
    assert (conf.model.model_name_or_path, conf.model.adapter, conf.lora) == (tiny_model, sft_adapter, None)
    trainer = build([*overrides, f"model.model_name_or_path={sft_adapter}", *EXACT], tmp_path)
    expected = logps_of(PeftModel.from_pretrained(load_by_hand(tiny_model), sft_adapter).eval(), rows_of(trainer))
    assert close(completion_logps(trainer)[1], expected)
    with pytest.raises(ConfigError, match=r"is an adapter, and model\.adapter names another one"):
        load_conf([*overrides, f"model.model_name_or_path={sft_adapter}", f"model.adapter={sft_adapter}"])


def test_config_fields_pass_through_to_lora() -> None:
    config = build_peft_config(load_conf(["lora.config.lora_bias=true"]).lora)
    assert isinstance(config, LoraConfig) and config.lora_bias

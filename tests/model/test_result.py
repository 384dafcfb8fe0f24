"""The saved result is the measured policy: joined exactly, loaded again by plain PEFT and compared."""

import json
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from dpo_runner.config.compose import load_conf
from dpo_runner.errors import ConfigError, RunError
from dpo_runner.model.files.fit import check_result
from dpo_runner.model.stacking import combined_adapter
from dpo_runner.records.reading import read_status
from dpo_runner.train import run
from tests.support.adapters import EXACT, MODES, close, load_by_hand
from tests.support.common import make_adapter
from tests.support.trainers import build, first_rows, logps_of

RSLORA = {"use_rslora": True}
PATTERNS = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}}


@pytest.mark.parametrize(
    ("sft", "new"),
    [
        (RSLORA, []),
        ({}, ["lora.use_rslora=true"]),
        (RSLORA | PATTERNS, ["lora.use_rslora=true", "lora.rank_pattern.q_proj=3", "lora.alpha_pattern.v_proj=5"]),
        ({"layers_to_transform": [0]}, ["lora.target_modules=[o_proj]"]),
        ({}, ["lora.target_modules=[o_proj]", "lora.layers_to_transform=[1]"]),
        ({"exclude_modules": [r"layers.1.self_attn.v_proj"]}, ["lora.exclude_modules=[q_proj]"]),
    ],
    ids=["sft rslora", "new rslora", "patterns", "sft layers", "new layers", "excluded"],
)
def test_a_stack_is_saved_as_plain_peft_stacks_it(sft, new, tiny_run, tiny_model, tmp_path) -> None:
    """PEFT joins adapters under the settings of the first one."""
    folder = make_adapter(tiny_model, tmp_path / "sft", 1, 0.1, r=4, target_modules=["q_proj", "v_proj"], **sft)
    trainer = build([*tiny_run, *EXACT, *MODES["stack"], f"model.adapter={folder}", *new], tmp_path)
    randomize(trainer.model)
    trainer.model.save_pretrained(tmp_path, selected_adapters=["default"])
    stacked = PeftModel.from_pretrained(load_by_hand(tiny_model), folder)
    stacked.load_adapter(str(tmp_path), "new")
    stacked.base_model.set_adapter(["default", "new"])
    expected = logps_of(stacked.eval(), first_rows(trainer))
    check_joined(trainer, {"sft": 1.0, "default": 1.0}, expected, tiny_model, tmp_path)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_changed_base_is_undone_in_the_saved_adapter(start, tiny_run, tiny_model, tmp_path) -> None:
    extra = [f"lora.init_lora_weights={start}", "lora.use_rslora=true", "lora.r=4", "lora.rank_pattern.q_proj=2"]
    trainer = build([*tiny_run, *EXACT, *extra], tmp_path)
    randomize(trainer.model)
    expected = logps_of(trainer.model.eval(), first_rows(trainer))
    check_joined(trainer, {"default": 1.0, "ref": -1.0}, expected, tiny_model, tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("adapter_config.json", "{", "adapter_config.json: cannot be read as an adapter's config"),
        ("adapter_config.json", "[]", "`peft_type=None`: no such method in PEFT"),
        ("adapter_config.json", None, "adapter_config.json: cannot be read; No such file"),
        ("adapter_model.safetensors", "x", "adapter_model.safetensors: cannot be read; Error while deserializing"),
        ("adapter_model.safetensors", None, "holds no adapter_model.safetensors"),
    ],
)
def test_a_damaged_result_is_one_line(name, content, told, tiny_model, tmp_path) -> None:
    folder = Path(make_adapter(tiny_model, tmp_path / "made", 1, 0.1, r=4, target_modules=["q_proj"]))
    check_result(folder)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(ConfigError) as caught:
        check_result(folder)
    (line,) = caught.value.mistakes
    assert told in line and "\n" not in line


def randomize(model: torch.nn.Module) -> None:
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B.default" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)


def check_joined(trainer, parts: dict[str, float], expected: torch.Tensor, tiny_model: str, tmp_path: Path) -> None:
    with combined_adapter(trainer.model, parts) as name:
        trainer.model.save_pretrained(tmp_path, selected_adapters=[name])
    served = PeftModel.from_pretrained(load_by_hand(tiny_model), tmp_path / name).eval()
    rows = first_rows(trainer)
    assert close(logps_of(served, rows), expected)
    assert not close(logps_of(load_by_hand(tiny_model), rows), expected)  # the test is sensitive


@pytest.mark.parametrize("precision", [EXACT, ["training.bf16=true", "model.dtype=bfloat16"]], ids=["fp32", "bf16"])
@pytest.mark.parametrize("wrong", ["part", "scale", "unloadable"])
def test_a_result_that_is_not_the_policy_is_refused(
    wrong, precision, tiny_run, sft_adapter, tmp_path, monkeypatch
) -> None:
    result = sys.modules["dpo_runner.model.result"]
    check = result.check_saved

    @contextmanager
    def keep_one(model, parts):
        yield "default"

    def check_edited(folder, *rest) -> None:
        config = json.loads((folder / "adapter_config.json").read_text())
        edit = {"use_rslora": True} if wrong == "scale" else {"peft_type": "IA3", "feedforward_modules": ["down"]}
        (folder / "adapter_config.json").write_text(json.dumps(config | edit))
        check(folder, *rest)

    if wrong == "part":
        monkeypatch.setattr(result, "combined_adapter", keep_one)
    else:
        monkeypatch.setattr(result, "check_saved", check_edited)
    overrides = [*tiny_run, *precision, *MODES["stack"], f"model.adapter={sft_adapter}", "samples.num_prompts=0"]
    match = "PEFT cannot load the saved adapter" if wrong == "unloadable" else "is not the trained policy: .*differ by"
    with pytest.raises(RunError, match=match) as caught:
        run(load_conf([*overrides, "training.max_steps=1", "run_dir=r"]))
    assert "\n" not in str(caught.value)
    assert read_status(tmp_path / "r")["state"] == "failed" and not (tmp_path / "r" / "adapter").exists()

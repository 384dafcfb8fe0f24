"""Adapters that do not fit the base, or cannot be used as asked, are refused before weights are loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoHaConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dpo_runner.config.compose import load_conf
from dpo_runner.errors import ConfigError
from dpo_runner.model.blueprint import draw_blueprint
from dpo_runner.train import run
from tests.support.adapters import MODES
from tests.support.common import make_adapter


@pytest.fixture
def edited(sft_adapter: str, tmp_path: Path) -> Callable[..., Path]:
    """Copy the SFT adapter with other weights, and other fields in its config; None drops a field."""

    def edit(weights: Any = None, folder: str = sft_adapter, **fields: Any) -> Path:
        copy = tmp_path / "edited"
        shutil.copytree(folder, copy)
        if weights is not None:
            file = copy / "adapter_model.safetensors"
            save_file(weights(load_file(file)), file)
        config = json.loads((copy / "adapter_config.json").read_text()) | fields
        kept = {name: value for name, value in config.items() if name not in fields or value is not None}
        (copy / "adapter_config.json").write_text(json.dumps(kept))
        return copy

    return edit


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda t: {k: v * ("lora_B" not in k) for k, v in t.items()}, "all of its lora_B weights are 0"),
        (lambda t: {k.replace("layers.1", "layers.7"): v for k, v in t.items()}, r"has no module model\.layers\.7"),
        (
            lambda t: {k: torch.cat([v, v], 1) if "q_proj.lora_A" in k else v for k, v in t.items()},
            r"lora_A of model\.layers\.0\.self_attn\.q_proj has 128 inputs, that layer of .* has 64",
        ),
        (
            lambda t: {k: v for k, v in t.items() if "layers.1." not in k},
            r"lacks 14 weights of .* such as model\.layers\.1\.\S+\.lora_A\.weight",
        ),
        (
            lambda t: {**t, "base_model.model.lm_head.lora_A.weight": torch.ones(4, 64)},
            r"1 weights of layers that .* does not name, such as lm_head\.lora_A",
        ),
        (
            lambda t: {k.replace("model.model", "model._orig_mod.model"): v for k, v in t.items()},
            r"compiled by torch\.compile.* remove `_orig_mod\.` from the names in adapter_model\.safetensors",
        ),
    ],
    ids=["zero", "names", "shapes", "half", "more", "compiled"],
)
@pytest.mark.parametrize("key", ["model.adapter", "model.reference"])
def test_an_adapter_that_does_not_fit_is_refused(key, edit, match, tiny_run, edited, tmp_path) -> None:
    folder = edited(edit)
    with pytest.raises(ConfigError, match=rf"^`{key}={folder}`: .*{match}"):
        run(load_conf([*tiny_run, f"{key}={folder}", "run_dir=r"]))
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"peft_type": None}, 'adapter_config.json: `peft_type=None`: no such method in PEFT; add .* such as "LORA"$'),
        ({"peft_type": "LORRA"}, "no such method in PEFT; did you mean `LORA`"),
        ({"use_supermagic": True, "peft_version": "9.9.9"}, r"`use_supermagic=True`: PEFT .* saved it \(9\.9\.9\)$"),
        ({"magic_layers": {"0": 1}}, "`magic_layers="),
        ({"task_type": "SEQ_CLS"}, r"is a classifier's, .* \(task_type=SEQ_CLS\)"),
        ({"modules_to_save": ["lm_head"]}, r"its file lacks 'base_model\.model\.lm_head\.weight', which"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused(fields, match, tiny_run, edited) -> None:
    with pytest.raises(ConfigError, match=match):
        draw_blueprint(load_conf([*tiny_run, f"model.adapter={edited(**fields)}"]))


def test_a_damaged_file_is_named(tiny_run, edited) -> None:
    file = (folder := edited()) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=rf"^`model.adapter={folder}`: .*damaged, cut off or only a Git LFS pointer"):
        draw_blueprint(load_conf([*tiny_run, f"model.adapter={folder}"]))


def test_unknown_fields_that_are_off_do_no_harm(tiny_run, edited) -> None:
    off = {"use_supermagic": False, "enable_lora": None, "magic_size": 16, "magic_layers": []}
    draw_blueprint(load_conf([*tiny_run, f"model.adapter={edited(**off)}"]))


def other_method(tiny_model: str, folder: Path, config: Any) -> str:
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("settings", "modes"),
    [
        ({"bias": "all"}, {"continue": r"bias=all", "stack": "bias=all", "reference": "bias=all"}),
        ({"init_lora_weights": "pissa"}, {"continue": "changes the base", "stack": "changes", "reference": "changes"}),
        ({"use_dora": True}, {"continue": None, "stack": "has use_dora=True", "reference": None}),
        (
            {"lora_bias": True},
            {"continue": None, "stack": "has lora_bias=True", "merge": "cannot be merged", "reference": None},
        ),
        ({"modules_to_save": ["norm"]}, {"continue": None, "stack": r"its own copy of model\.\S*norm"}),
        ({"use_rslora": True, "rank_pattern": {"v_proj": 2}}, {"continue": None, "stack": None, "reference": None}),
        (LoHaConfig(r=4, target_modules=["q_proj"]), {"continue": None, "stack": "has peft_type=LOHA"}),
        (IA3Config(target_modules=["v_proj"], feedforward_modules=[]), {"continue": None, "stack": "peft_type=IA3"}),
    ],
    ids=["bias", "pissa", "dora", "lora_bias", "whole", "rslora", "loha", "ia3"],
)
def test_what_an_adapter_cannot_be_used_for_is_refused_with_what_works(
    settings, modes, tiny_run, tiny_model, tmp_path
) -> None:
    if isinstance(settings, dict):
        sft = make_adapter(tiny_model, tmp_path / "sft", 1, 0.1, r=4, target_modules=["q_proj", "v_proj"], **settings)
    else:
        sft = other_method(tiny_model, tmp_path / "sft", settings)
    for mode, match in {"merge": None, **modes}.items():
        used = [f"model.reference={sft}"] if mode == "reference" else [*MODES[mode], f"model.adapter={sft}"]
        conf = load_conf([*tiny_run, *used, "dry_run=true"])
        if match is None:
            draw_blueprint(conf)
            continue
        instead = (
            "merge it into its base"
            if mode == "reference"
            else r"use model\.adapter_mode=(continue|merge)( or merge)?$"
        )
        with pytest.raises(ConfigError, match=rf"{match}.*; {instead}"):
            draw_blueprint(conf)


@pytest.mark.parametrize(
    ("field", "extra", "instead"),
    [
        ("lora_bias=True", ["model.adapter=SFT", "model.adapter_mode=stack"], "use model.adapter_mode=merge"),
        ("alora_invocation_tokens=[5]", ["lora.init_lora_weights=pissa"], "use lora.init_lora_weights=true"),
    ],
    ids=["stack", "pissa"],
)
def test_a_new_adapter_that_cannot_be_joined_is_refused(field, extra, instead, tiny_run, sft_adapter) -> None:
    extra = [text.replace("SFT", sft_adapter) for text in extra]
    with pytest.raises(ConfigError) as caught:
        draw_blueprint(load_conf([*tiny_run, *extra, f"lora.config.{field}"]))
    assert str(caught.value).startswith(f"`lora.config.{field}`: ") and str(caught.value).endswith(instead)

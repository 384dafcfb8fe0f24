"""The device of weights: in training, in the commands that load a result, and with `training.use_cpu=true`."""

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_runner import run
from dpo_runner.config.compose import load_conf
from dpo_runner.config.sections.model import ModelConf
from dpo_runner.evaluate.work import load_compared
from dpo_runner.model import base, policy
from dpo_runner.model.base import load_base_model, load_weights, place
from dpo_runner.model.blueprint import Blueprint
from dpo_runner.model.policy import load_policy
from dpo_runner.model.quantization import linear4bit_modules
from dpo_runner.model.result import load_tuned_model
from dpo_runner.model.vocabulary import count_rows, resize_embeddings
from dpo_runner.records.reading import read_run_conf
from dpo_runner.sweep.base_pool import BasePool


class ProductsOf(TorchDispatchMode):
    """Notes the batched products with a matrix of this many columns."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.shapes = columns, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.bmm.default and args[1].shape[-1] == self.columns:
            self.shapes.append(tuple(args[1].shape))
        return func(*args, **(kwargs or {}))


def test_a_frozen_head_is_not_repeated_for_each_prompt(tiny_model: str) -> None:
    """With 49,152 tokens and 64 prompts torch would copy 3.6 GB of weights."""
    conf = ModelConf(model_name_or_path=tiny_model)
    ids, found = torch.arange(12).reshape(3, 4), {}
    for name, model in (
        ("plain", load_weights(conf, tiny_model, None)),
        ("ours", load_base_model(Blueprint(conf))[0]),
    ):
        head = model.requires_grad_(False).get_output_embeddings()
        with torch.no_grad(), ProductsOf(head.out_features) as products:
            logits = [model(rows, logits_to_keep=1).logits for rows in (ids, ids[:1])]
        found[name] = products.shapes
        torch.testing.assert_close(logits[0], model(ids).logits[:, -1:])
    assert [rows for rows, _, _ in found["plain"]] == [3, 1], "torch no longer does so: the hook can go"
    assert found["ours"] == []


class Stop(Exception):
    """Ends a load after what a test looks at."""


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the meta device stand in for a GPU."""
    places = {"cpu": "cpu", None: "meta"}
    monkeypatch.setattr(base, "find_device", lambda conf: torch.device(places[conf.device_map]))


def devices_of(*models: nn.Module | None) -> set[str]:
    return {weight.device.type for model in models if model is not None for weight in model.parameters()}


def test_the_device_is_a_gpu_unless_the_cpu_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(*overrides: str) -> str:
        return str(base.find_device(Blueprint.of_run(load_conf(["model=tiny_random", *overrides])).conf))

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for is_there, expected in ((True, "cuda:0"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda is_there=is_there: is_there)
        assert find() == find("model.device_map=auto") == expected
        assert find("training.use_cpu=true") == find("training.use_cpu=true", "lora=none") == "cpu"


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
@pytest.mark.parametrize("start", [[], ["lora=none"]], ids=["adapter", "full"])
def test_commands_place_what_they_load(
    start: list[str], tiny_run: list[str], tiny_model: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    other = shutil.copytree(tiny_model, tmp_path / "other")
    reference = [] if start else [f"model.reference={other}"]
    run_dir = tmp_path / "r"
    run(load_conf([*tiny_run, *start, *reference, "training.max_steps=1", f"run_dir={run_dir}"]))
    request.getfixturevalue("stand_in")
    for use_cpu, expected in (("false", "meta"), ("true", "cpu")):
        config = (run_dir / "config.yaml").read_text()
        (run_dir / "config.yaml").write_text(config.replace("use_cpu: false", f"use_cpu: {use_cpu}"))
        assert devices_of(load_tuned_model(run_dir)[0]) == {expected}  # as for chat
        compared = load_compared(run_dir, read_run_conf(run_dir))
        assert compared.own is not None and devices_of(compared.policy, compared.own) == {expected}


@pytest.mark.usefixtures("stand_in")
def test_a_model_over_several_devices_stays(tiny_run: list[str]) -> None:
    blueprint = Blueprint.of_run(load_conf(tiny_run))
    model = load_base_model(blueprint)[0]
    model.hf_device_map = {"model": 0, "lm_head": 1}
    assert place(model, blueprint.conf) is model and devices_of(model) == {"cpu"}
    del model.hf_device_map
    assert place(model, blueprint.conf) is model and devices_of(model) == {"meta"}


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    "start",
    [
        ["lora.init_lora_weights=pissa"],
        ["lora.init_lora_weights=olora"],
        ["lora.use_dora=true"],
        ["model.adapter=SFT", "model.adapter_mode=stack", "lora.init_lora_weights=orthogonal"],
    ],
    ids=lambda start: start[-1],
)
def test_peft_computes_on_the_device(
    start: list[str], tiny_run: list[str], sft_adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = []

    def stop(model: nn.Module, *args: Any) -> None:
        began.append(devices_of(model))
        raise Stop

    for name in ("get_peft_model", "stack_adapter"):
        monkeypatch.setattr(policy, name, stop)
    conf = load_conf([*tiny_run, *(text.replace("SFT", sft_adapter) for text in start)])
    with suppress(Stop):
        stop(load_policy(Blueprint.of_run(conf)).model)  # to which TRL will add the adapter
    assert began == [{"meta"}]


@pytest.mark.usefixtures("stand_in")
def test_a_kept_base_comes_back_from_the_device(tiny_run: list[str]) -> None:
    blueprint, bases, said = Blueprint.of_run(load_conf(tiny_run)), BasePool(), []
    kept, _ = bases.load(blueprint, said.append)
    assert devices_of(place(kept, blueprint.conf)) == {"meta"}
    assert bases.load(blueprint, said.append)[0] is kept and devices_of(kept) == {"cpu"}
    assert said == ["the base model is kept from the run before"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["quant=nf4"], "cuda:0"),
        (["quant=int8"], "cuda:0"),
        (["quant=nf4", "model.device_map=auto"], "auto"),
        (["quant=nf4", "training.use_cpu=true"], "cpu"),
        (["training.use_cpu=true"], "cpu"),  # or transformers would take the GPU for a checkpoint that is quantized
        ([], None),
    ],
)
def test_weights_are_quantized_on_the_device(
    overrides: list[str], expected: str | None, tiny_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(*args: Any, device_map: str | None, **kwargs: Any) -> None:
        assert device_map == expected
        raise Stop

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(base.AutoModelForCausalLM, "from_pretrained", look)
    blueprint = Blueprint.of_run(load_conf([*tiny_run, *overrides]))
    with pytest.raises(Stop):
        load_weights(blueprint.conf, blueprint.base, blueprint.quantization)


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_a_quantized_model_can_train_on_the_cpu_beside_a_gpu(
    quant: str, tiny_run: list[str], sft_adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*tiny_run, f"quant={quant}", "training.use_cpu=true", f"model.adapter={sft_adapter}"]
    blueprint = Blueprint.of_run(load_conf(overrides))
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "current_device", lambda: pytest.fail("the GPU was asked"))
        model = load_policy(blueprint).model
    assert devices_of(model) == {"cpu"} and not hasattr(model, "hf_device_map")
    assert quant == "int8" or list(linear4bit_modules(model))


def test_no_gpu_is_initialized_for_its_random_numbers(
    tiny_run: list[str], sft_adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DPO_RUNNER_CACHE", str(tmp_path / "cache"))
    conf = load_conf([*tiny_run, f"model.adapter={sft_adapter}", "model.adapter_mode=merge"])
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *_: pytest.fail("a GPU was initialized"))
    state = torch.get_rng_state()
    model = load_base_model(Blueprint.of_run(conf))[0]
    resize_embeddings(model, count_rows(model) + 8)
    assert torch.equal(torch.get_rng_state(), state)

"""A LoRA layer as one function gives PEFT's results, and PEFT's own layer is used in all other cases."""

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from dpo_runner.training.engine.layers.lean import make_lean
from dpo_runner.training.engine.layers.lora import LoraProduct, is_plain, multiply
from tests.support.layers import adapt


class Layers(torch.nn.Module):
    """Two linear layers, one of them with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = torch.nn.Linear(48, 40, bias=False)
        self.biased = torch.nn.Linear(40, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.biased(torch.nn.functional.silu(self.plain(x)))


def build(dtype: torch.dtype, **settings: object) -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=3, target_modules=["plain", "biased"], **settings)
    model = get_peft_model(Layers().to(dtype), config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def differentiate(model: PeftModel, x: torch.Tensor, autocast: bool) -> list[torch.Tensor]:
    """Return the output and the gradients of the input and of all trained weights, in fp64."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(x)
    output.float().square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [tensor.detach().double() for tensor in (output, x.grad, *gradients)]


def count_products(monkeypatch: pytest.MonkeyPatch, call: Callable[[], object]) -> int:
    count = 0
    apply = LoraProduct.apply

    def counting(*args: object) -> object:
        nonlocal count
        count += 1
        return apply(*args)

    with monkeypatch.context() as patch:
        patch.setattr(LoraProduct, "apply", counting)
        call()
    return count


def test_in_fp32_outputs_and_gradients_are_pefts(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = (build(torch.float32) for _ in range(2))
    make_lean(ours, use_cpu=True)
    x = torch.randn(3, 17, 48)
    for expected, found in zip(*(differentiate(model, x, False) for model in (theirs, ours)), strict=True):
        assert found.shape == expected.shape
        assert (found - expected).norm() <= 1e-6 * expected.norm()
    assert count_products(monkeypatch, lambda: differentiate(ours, x, False)) == 2
    make_lean(fresh := build(torch.float32), use_cpu=True)
    empty = differentiate(fresh, torch.zeros(0, 7, 48), False)  # like an expert without tokens
    assert [tensor.shape for tensor in empty[:2]] == [(0, 7, 24), (0, 7, 48)] and not any(map(torch.any, empty[2:]))


def test_under_autocast_they_are_as_near_to_the_truth_as_pefts(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, theirs, ours = build(torch.bfloat16).double(), build(torch.bfloat16), build(torch.bfloat16)
    make_lean(ours, use_cpu=True)
    x = torch.randn(5, 200, 48).bfloat16()
    truth = differentiate(exact, x.double(), False)
    results = (differentiate(model, x, True) for model in (theirs, ours))
    for true, other, found in zip(truth, *results, strict=True):
        assert (found - true).norm() <= 1.1 * (other - true).norm() + 1e-6 * true.norm()
    assert count_products(monkeypatch, lambda: differentiate(ours, x, True)) == 2


def test_generation_and_inputs_of_another_dtype_are_left_to_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(torch.bfloat16)
    make_lean(model, use_cpu=True)
    x = torch.randn(2, 48)
    with torch.no_grad():
        assert count_products(monkeypatch, lambda: model(x.bfloat16())) == 0
        with torch.autocast("cpu", torch.bfloat16):
            assert count_products(monkeypatch, lambda: model(x.bfloat16())) == 2  # evaluation
    assert count_products(monkeypatch, lambda: model(x.bfloat16())) == 0  # fp32 adapters, no autocast
    with torch.autocast("cpu", torch.bfloat16):
        assert count_products(monkeypatch, lambda: model(x)) == 1  # the second layer's input is 16-bit
        with model.disable_adapter():
            assert count_products(monkeypatch, lambda: model(x.bfloat16())) == 0


def test_merged_and_several_adapters_are_left_to_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(torch.float32)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["plain", "biased"]))
    make_lean(model, use_cpu=True)
    x = torch.randn(2, 48)
    model.base_model.set_adapter(["default", "other"])
    assert count_products(monkeypatch, lambda: model(x)) == 0
    model.set_adapter("default")
    assert count_products(monkeypatch, lambda: model(x)) == 2
    expected = model(x)
    model.merge_adapter()
    assert count_products(monkeypatch, lambda: model(x)) == 0
    assert torch.allclose(model(x), expected, atol=1e-5)


@pytest.mark.parametrize(
    "settings", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}, {"bias": "lora_only"}], ids=str
)
def test_what_is_more_than_lora_is_left_to_peft(settings: dict[str, object]) -> None:
    model = build(torch.float32, **settings)
    layers = [model.base_model.model.plain, model.base_model.model.biased]
    plain = [is_plain(layer) for layer in layers]
    assert plain == ([True, False] if "bias" in settings else [False, False])
    make_lean(model, use_cpu=True)
    assert [getattr(layer.forward, "__func__", None) is multiply for layer in layers] == plain


def test_on_a_gpu_lora_stays_pefts(tiny_model: str) -> None:
    model = adapt(tiny_model)
    make_lean(model, use_cpu=False)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert layers and not any("forward" in vars(layer) for layer in layers)

"""Lean layers give the results of the layers that they replace, and save less for the backward pass."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from dpo_runner.training.engine.layers import lean
from dpo_runner.training.engine.layers.lean import GatedSiLU, RMSNorm, make_lean
from tests.support.engines import PACKED, assert_same, train
from tests.support.families import FAMILIES, make_family
from tests.support.layers import adapt

NORM_AND_MLP = {"llama", "mistral", "qwen2", "qwen3"}
"""Families whose norm and MLP are both Llama's; others have their own."""


def differentiate(model: PeftModel, autocast: bool) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return logits, the adapter's gradient (flat), and the bytes saved for the backward pass."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.arange(3, 99).view(2, 48)
    torch.manual_seed(5)  # some families have dropout
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(input_ids=ids, use_cache=False).logits
        loss = logits.float().square().mean()
    loss.backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return logits.detach(), torch.cat(gradients), sum(kept.values())


@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "whole"])
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")], ids=str)
def test_the_norm_is_llamas(dtypes: tuple[str, str], whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks, as on a CPU, and as a whole, as on a GPU."""
    if whole:
        monkeypatch.setattr(lean, "_blocks", lambda rows: [slice(None)])
    of_input, of_weight = (getattr(torch, name) for name in dtypes)
    torch.manual_seed(1)
    norm = LlamaRMSNorm(300, eps=1e-5).to(of_weight).requires_grad_(False)
    norm.weight.copy_(torch.randn(300))
    x = torch.randn(2, 700, 300).to(of_input)  # more rows than one block

    def run(forward, x, outer):
        x = x.clone().requires_grad_()
        output = forward(x)
        output.backward(outer.to(output.dtype))
        return output.detach(), x.grad

    outer = torch.randn(2, 700, 300)
    expected, theirs = run(norm, x, outer)
    found, ours = run(lambda x: RMSNorm.apply(x, norm.weight, norm.variance_epsilon), x, outer)
    assert found.dtype == expected.dtype and torch.equal(found, expected)
    # compare the gradient with autograd's of the written-out formula in fp64
    exact = x.double().requires_grad_()
    weight = norm.weight.double()
    (weight * exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-5)).backward(
        outer.to(found.dtype).double()
    )
    assert ours.dtype == theirs.dtype
    assert (ours - exact.grad).norm() <= 1.02 * (theirs - exact.grad).norm() + 1e-7 * exact.grad.norm()


def test_on_a_gpu_norms_and_mlps_are_lean_too_and_take_whole_tensors(tiny_model: str) -> None:
    models = [adapt(tiny_model) for _ in range(2)]
    make_lean(models[1], use_cpu=False)
    replaced = {type(each).__name__ for each in models[1].modules() if "forward" in vars(each)}
    assert replaced == {"LlamaRMSNorm", "LlamaMLP"}, "LoRA's own product is for CPUs"
    (logits, gradient, kept), (same, alike, less) = (differentiate(model, autocast=True) for model in models)
    assert torch.equal(same, logits) and less < 0.8 * kept
    assert (alike - gradient).norm() <= 0.02 * gradient.norm()  # in bf16, with sums in another order

    class OnGPU(torch.Tensor):
        """A tensor that reports a GPU as its device."""

        device = torch.device("cuda", 0)

    rows = torch.empty(4096, 4096)
    assert lean._blocks(rows.as_subclass(OnGPU)) == [slice(None)]
    assert len(lean._blocks(rows)) == 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gated_activation_is_llamas_to_the_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    gate, up, outer = torch.randn(3, 2, 33, 65).to(dtype)
    results = []
    for function in (lambda gate, up: torch.nn.functional.silu(gate) * up, GatedSiLU.apply):
        inputs = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
        output = function(*inputs)
        output.backward(outer)
        results.append([output.detach(), *(tensor.grad for tensor in inputs)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_the_same_and_only_copies_of_llamas_layers_are_replaced(
    family: str, tokenizer, tmp_path: Path
) -> None:
    path = make_family(family, tokenizer, tmp_path / family)
    models = [adapt(path, torch.float32) for _ in range(2)]
    make_lean(models[1], use_cpu=True)
    own = [module for module in models[1].modules() if "forward" in vars(module) and not isinstance(module, LoraLayer)]
    replaced = {type(module).__name__ for module in own}
    assert {name[-3:] for name in replaced} >= ({"orm", "MLP"} if family in NORM_AND_MLP else set())
    if family in ("gemma2", "gemma3", "gpt_neox", "falcon", "gpt2"):
        assert not replaced
    (logits, gradient, kept), (same, alike, less) = (differentiate(model, autocast=False) for model in models)
    assert (same - logits).norm() <= 1e-6 * logits.norm()
    assert (alike - gradient).norm() <= 1e-6 * gradient.norm()
    has_mlp = any(name.endswith("MLP") for name in replaced)
    assert less < kept if has_mlp else less <= kept  # in fp32 a norm saves no copies


def test_lora_keeps_its_input_as_it_is_under_autocast(tiny_model: str) -> None:
    models = [adapt(tiny_model) for _ in range(2)]
    for module in models[1].modules():
        if isinstance(module, LoraLayer):
            make_lean(module, use_cpu=False)
    (logits, gradient, kept), (same, alike, less) = (differentiate(model, autocast=True) for model in models)
    assert torch.equal(same, logits) and torch.equal(alike, gradient)
    assert less < 0.95 * kept
    with torch.no_grad():  # generation runs without autocast, so that fp32 weights need an fp32 input
        ids = torch.arange(3, 51).view(1, 48)
        assert torch.equal(models[1](input_ids=ids).logits, models[0](input_ids=ids).logits)


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.1}, {"use_dora": True}], ids=str)
def test_dropout_and_variants_keep_pefts_casts(settings: dict[str, object], tiny_model: str) -> None:
    model = adapt(tiny_model, **settings)
    make_lean(model, use_cpu=True)
    assert not any("_cast_input_dtype" in vars(module) for module in model.modules())


def test_a_trained_norm_and_one_that_is_replaced_already_are_left_alone(tiny_model: str) -> None:
    model = adapt(tiny_model)
    norms = [module for module in model.modules() if isinstance(module, LlamaRMSNorm)]
    norms[0].weight.requires_grad_()
    norms[1].forward = own = norms[1].forward
    make_lean(model, use_cpu=True)
    assert "forward" not in vars(norms[0])
    assert norms[1].forward is own
    assert all("forward" in vars(norm) for norm in norms[2:])


def test_a_norm_with_other_instructions_is_no_copy() -> None:
    class Stack(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = GemmaRMSNorm(8).requires_grad_(False)

    make_lean(stack := Stack(), use_cpu=True)
    assert "forward" not in vars(stack.norm)


@pytest.mark.parametrize("overrides", [[], ["training.gradient_checkpointing=true"], ["lora=none"]], ids=str)
def test_a_training_is_the_same_with_lean_layers(overrides: list[str], tiny_run: list[str], tmp_path: Path) -> None:
    runs = [
        train([*tiny_run, *PACKED, *overrides, f"engine.lean_layers={switch}"], tmp_path / switch, steps=4)
        for switch in ("false", "true")
    ]
    (logged, adapter, plain), (same, alike, lean) = runs
    assert_same(logged, same)
    assert (alike - adapter).norm() <= 1e-5 * adapter.norm()
    count = [sum("forward" in vars(module) for module in each.model.modules()) for each in (plain, lean)]
    assert count[1] > count[0]

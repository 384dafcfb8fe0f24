"""Weights that stay dequantized give the bits that weights dequantized at each use give, are made once, and leave."""

import gc
import io
import weakref
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from families import make_family
from rich.console import Console
from test_base_pool import Runner
from test_engine import _TIMES, PACKED, PLAIN, STORED
from test_model import build
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from dpo_runner import dequantizing
from dpo_runner.base_pool import BasePool
from dpo_runner.config import load_conf
from dpo_runner.console import RunConsole
from dpo_runner.dequantizing import settle_dequantized
from dpo_runner.engine.dequantized import keep_dequantized
from dpo_runner.engine.identity import identify_reference
from dpo_runner.errors import ConfigError
from dpo_runner.estimate import KEPT, estimate_memory
from dpo_runner.model import check_model
from dpo_runner.quantization import linear4bit_modules
from dpo_runner.run import run
from dpo_runner.trainer import build_dpo_config

KEEP, DROP = "engine.keep_dequantized=true", "engine.keep_dequantized=false"
BF16 = ("model.dtype=bfloat16", "training.bf16=true")
"""As real checkpoints are: what the weights were quantized from is what they are multiplied in."""

runner = pytest.fixture(lambda tiny_run, capsys: Runner([*tiny_run, "quant=nf4"], capsys), name="runner")


class Count(TorchDispatchMode):
    """Counts dequantizations while it is active: by themselves, and inside of bitsandbytes' product."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        ops = torch.ops.bitsandbytes
        self.calls += func in (ops.dequantize_4bit.default, ops.gemm_4bit.default, ops.gemv_4bit.default)
        return func(*args, **(kwargs or {}))


def is_kept(layer: Any) -> bool:
    return "kept" in vars(layer)


def make_layer(dtype: torch.dtype, device: str, bias: bool = False, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(96, 160, bias=bias, **kwargs).to(dtype)
    layer.support_avx512bf16_for_cpu = False  # as `close_4bit_trap` has it
    return layer.to(device).requires_grad_(False)


def products(layer: Any, rows: int, dtype: torch.dtype, autocast: bool) -> list[torch.Tensor]:
    """Return what a layer makes forward and backward, in training and in evaluation."""
    device = layer.weight.device.type
    torch.manual_seed(1)
    x = torch.randn(3, rows, 96, dtype=dtype, device=device, requires_grad=True)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
        trained = layer(x)
        with torch.no_grad():
            evaluated = layer.eval()(x[:, :1])
    layer.train()
    trained.backward(torch.randn_like(trained))
    return [trained, evaluated, x.grad]


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]

LAYERS = {
    "nf4": {"quant_type": "nf4"},
    "fp4": {"quant_type": "fp4"},
    "not nested": {"quant_type": "nf4", "compress_statistics": False},
    "bias": {"quant_type": "nf4", "bias": True},
    "packed as bf16": {"quant_type": "nf4", "quant_storage": torch.bfloat16},
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("computed", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kwargs", LAYERS.values(), ids=LAYERS)
def test_a_layer_makes_the_same_bits(
    kwargs: dict[str, Any], stored: torch.dtype, computed: torch.dtype, device: str
) -> None:
    for autocast in (True, False):
        for dtype in (torch.bfloat16, torch.float32):
            for rows in (1, 7, 700):
                plain, kept = (make_layer(stored, device, compute_dtype=computed, **kwargs) for _ in range(2))
                (matrix,) = keep_dequantized(kept)
                assert type(matrix) is torch.Tensor
                assert (matrix.shape, matrix.dtype) == ((160, 96), computed)
                pairs = zip(*(products(layer, rows, dtype, autocast) for layer in (plain, kept)), strict=True)
                for one, other in pairs:
                    assert one.dtype == other.dtype and one.isfinite().all() and one.abs().sum() > 0
                    assert one.view(torch.uint8).equal(other.view(torch.uint8)), (autocast, dtype, rows)


def test_a_bias_that_is_trained_has_bitsandbytes_own_gradient() -> None:
    grads = []
    for keep in (False, True):
        layer = make_layer(torch.bfloat16, "cpu", bias=True, compute_dtype=torch.bfloat16)
        assert not keep or keep_dequantized(layer)
        layer.bias.requires_grad_(True)
        layer(torch.ones(5, 96, dtype=torch.bfloat16)).sum().backward()
        grads.append(layer.bias.grad)
    assert grads[0].equal(grads[1]) and grads[0].abs().sum() > 0


def train(overrides: list[str], folder: Path) -> tuple[list[dict[str, float]], list[torch.Tensor], Any, int]:
    """Return what a short training logs, the adapter after it, the trainer, and how often it dequantized."""
    settings = [
        "training.max_steps=4",
        "training.logging_steps=1",
        "training.learning_rate=1e-3",
        "training.warmup_steps=0",
        "training.save_strategy=no",
        "seed=7",
    ]
    trainer = build([*settings, *overrides], folder)
    with Count() as count:
        trainer.train()
        trainer.evaluate()
    log = [
        {key: value for key, value in entry.items() if not key.endswith(_TIMES)} for entry in trainer.state.log_history
    ]
    return log, [p.detach() for p in trainer.model.parameters() if p.requires_grad], trainer, count.calls


WAYS = {
    "nf4": ["quant=nf4", *BF16, *PLAIN],
    "nf4, engine": ["quant=nf4", *BF16, *PACKED],
    "nf4, reference stored": ["quant=nf4", *BF16, *STORED],
    "not nested": ["quant=nf4", "quant.bnb_4bit_use_double_quant=false", *BF16, *PACKED],
    "fp4": ["quant=fp4", *BF16, *PACKED],
    "fp32": ["quant=nf4", "quant.bnb_4bit_compute_dtype=float32", "training.bf16=false", *PLAIN],
    "checkpointed": ["quant=nf4", *BF16, *PACKED, "training.gradient_checkpointing=true"],
    "checkpointed, reentrant": [
        *("quant=nf4", *BF16, *PLAIN, "training.gradient_checkpointing=true"),
        "training.gradient_checkpointing_kwargs={use_reentrant:true}",
    ],
    "accumulated": ["quant=nf4", *BF16, *PACKED, "training.gradient_accumulation_steps=2"],
    "dropout": ["quant=nf4", *BF16, "training.disable_dropout=false", "lora.lora_dropout=0.3", *PLAIN],
    "dora": ["quant=nf4", *BF16, *PACKED, "lora.use_dora=true"],
    "stacked": ["quant=nf4", *BF16, *PACKED, "model.adapter=SFT", "model.adapter_mode=stack"],
    "continued": ["quant=nf4", *BF16, *PACKED, "model.adapter=SFT", "model.adapter_mode=continue"],
    "modules to save": ["quant=nf4", *BF16, *PACKED, "lora.modules_to_save=[lm_head]"],
    "rounded twice": ["quant=nf4", "training.bf16=true", *PACKED],  # from fp32 weights
}
DEQUANTIZES = {"dora", "rounded twice"}
"""PEFT's norm of the weights; backward, another rounding than forward."""


@pytest.mark.parametrize("way", WAYS)
def test_training_is_the_same_to_the_last_bit(way: str, tiny_run: list[str], tmp_path: Path, sft_adapter: str) -> None:
    overrides = [*tiny_run, *(text.replace("SFT", sft_adapter) for text in WAYS[way])]
    log, weights, _, often = train([*overrides, DROP], tmp_path)
    again, others, trainer, rarely = train([*overrides, KEEP], tmp_path)
    layers = list(linear4bit_modules(trainer.model))
    assert len(layers) == 14 and all(map(is_kept, layers))
    assert again == log and len(log) > 4
    assert all(one.equal(other) for one, other in zip(weights, others, strict=True))
    assert any(one.abs().sum() for one in weights)
    assert rarely < often if way in DEQUANTIZES else rarely == 0
    assert often > 14 * 8


def test_a_layer_is_dequantized_once(tiny_run: list[str], tmp_path: Path) -> None:
    base = build([*tiny_run, "quant=nf4", *BF16, DROP], tmp_path).model
    with Count() as count:
        matrices = keep_dequantized(base)
    assert count.calls == len(matrices) == 14
    assert keep_dequantized(base) == []  # they are kept already


def test_another_reference_keeps_its_own(tiny_run: list[str], tmp_path: Path, tokenizer: Any) -> None:
    other = make_family("llama", tokenizer, tmp_path / "other")
    overrides = [*tiny_run, "quant=nf4", *BF16, *PLAIN, f"model.reference={other}"]
    log, weights, _, _ = train([*overrides, DROP], tmp_path)
    again, others, trainer, count = train([*overrides, KEEP], tmp_path)
    assert all(map(is_kept, linear4bit_modules(trainer.ref_model))) and count == 0
    assert again == log and all(one.equal(other) for one, other in zip(weights, others, strict=True))


def test_no_state_dict_has_it_and_the_reference_is_filed_as_before(tiny_run: list[str], tmp_path: Path) -> None:
    model = build([*tiny_run, "quant=nf4", *BF16, DROP], tmp_path).model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    filed = identify_reference(model, None, "packed")
    keep_dequantized(model)
    assert identify_reference(model, None, "packed") == filed
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(tensor.equal(after[name]) for name, tensor in before.items())
    assert not any("kept" in name for name, _ in [*model.named_parameters(), *model.named_buffers()])


def test_a_weight_that_was_merged_is_the_one_that_counts(tiny_run: list[str], tmp_path: Path) -> None:
    outputs = []
    for keep in (DROP, KEEP):
        trainer = build([*tiny_run, "quant=nf4", *BF16, "training.max_steps=2", keep], tmp_path)
        ids = torch.arange(12)[None]
        torch.manual_seed(3)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        with torch.no_grad():
            with trainer.model.disable_adapter():
                bare = trainer.model(ids).logits
            trainer.model.merge_adapter()
            outputs.append(trainer.model(ids).logits)
    assert outputs[0].equal(outputs[1])
    assert not outputs[0].equal(bare)


def settle(overrides: list[str], short: bool = False) -> tuple[bool | None, str | None]:
    conf = load_conf(["model=tiny_random", "training=smoke", *overrides])
    config, model = check_model(conf)
    args, own = build_dpo_config(conf, Path("checkpoints")), getattr(config, "quantization_config", None)
    engine, told = settle_dequantized(conf, args, model, own, short, 60, None)
    return engine.keep_dequantized, told


def test_where_there_is_room_they_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def have_free(free: float) -> None:
        monkeypatch.setattr(dequantizing, "read_device", lambda args: ("CPU", 10**12, free))

    total = estimate_memory(load_conf(["model=tiny_random", "training=smoke", "quant=nf4", KEEP]), 60).total
    for free, kept in ((1e12, True), (2.1 * total, True), (1.9 * total, False), (0, False)):
        have_free(free)
        keeps, told = settle(["quant=nf4"])
        assert keeps is kept
        assert str(told).startswith("dequantized once and kept, 0.0 GB" if kept else "dequantized at each use; kept,")
        assert settle(["quant=nf4", KEEP])[0] is True
        assert settle(["quant=nf4", DROP]) == (False, "dequantized at each use; engine.keep_dequantized=false")
        assert settle([]) == settle(["quant=int8"]) == (False, None)
    have_free(1e12)
    assert settle(["quant=nf4"], short=True) == (False, "dequantized at each use; memory is short")
    have_free(0)
    unknown = settle(["quant=nf4", "training.optim=adamw_anyprecision"])
    assert unknown[0] is False and "it is not known how much memory that leaves" in str(unknown[1])
    monkeypatch.setattr(dequantizing, "uses_cpu", lambda args: False)
    have_free(1e12)
    assert settle(["quant=nf4"])[0] is False and settle(["quant=nf4", KEEP])[0] is True


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ([], "no 4-bit weights"),
        (["quant=int8"], "no 4-bit weights"),
        (
            ["quant=nf4", "training.torch_compile=true", "engine.shared_prefix=false"],
            "not with training.fsdp, deepspeed or torch_compile",
        ),
    ],
)
def test_where_they_cannot_be_kept_the_key_is_refused(overrides: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=f"`engine.keep_dequantized=true`: .*{reason}"):
        settle([*overrides, KEEP])


def test_a_checkpoint_that_is_quantized_already_is_known(tiny_run: list[str], tmp_path: Path) -> None:
    model = build([*tiny_run, "quant=nf4", *BF16], tmp_path).model.unload()
    model.save_pretrained(tmp_path / "quantized")
    own = [f"model.model_name_or_path={tmp_path / 'quantized'}", "quant=none"]
    assert settle(own) == settle(["quant=nf4"])
    assert settle(own)[0] is True


@pytest.mark.parametrize("compute", ["bfloat16", "float32"])
def test_the_estimate_counts_them(compute: str, tiny_run: list[str], tmp_path: Path) -> None:
    overrides = [*tiny_run, "quant=nf4", *BF16, f"quant.bnb_4bit_compute_dtype={compute}"]
    estimates = {keep: estimate_memory(load_conf([*overrides, keep]), 64) for keep in (KEEP, DROP)}
    matrices = keep_dequantized(build([*overrides, DROP], tmp_path).model)
    size = sum(matrix.nbytes for matrix in matrices)
    assert estimates[DROP].rows[KEPT] == 0
    assert estimates[KEEP].rows[KEPT] == size > 0
    conf = load_conf(overrides)
    assert dequantizing.count_matrices(conf, check_model(conf)[1], None) == size
    difference = estimates[KEEP].total - estimates[DROP].total
    assert 0 < difference <= size  # what one layer's product takes for a moment is gone
    assert "engine.keep_dequantized=false" in estimates[KEEP].advice
    assert "keep_dequantized" not in estimates[DROP].advice


def test_a_run_does_what_its_plan_says(tiny_run: list[str]) -> None:
    seen: list[bool] = []

    class Look(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(all(map(is_kept, linear4bit_modules(kwargs["model"]))))

    told = {KEEP: "dequantized once and kept", DROP: "dequantized at each use", "seed=1": "dequantized once and kept"}
    for number, (override, words) in enumerate(told.items()):
        text = io.StringIO()
        conf = load_conf([*tiny_run, "quant=nf4", override, f"run_dir=run-{number}", "training.max_steps=1"])
        run(conf, console=RunConsole(Console(file=text, width=200)), callbacks=[Look()])
        assert words in text.getvalue()
    assert seen == [True, False, True]


def test_all_results_of_a_run_are_the_same_and_nothing_is_left_on_a_base_that_is_kept(runner: Runner) -> None:
    alone = runner([DROP, *BF16])
    assert runner([KEEP, *BF16]) == alone
    bases = BasePool()
    assert runner([KEEP, *BF16], bases) == alone
    assert bases._kept is not None
    layers = list(linear4bit_modules(bases._kept.model))
    alive = [weakref.ref(layer.kept.matrix) for layer in layers]
    assert len(alive) == 14
    bases.put_back()
    gc.collect()
    assert [each() for each in alive] == [None] * 14
    assert not any(map(is_kept, layers)) and all(type(layer) is bnb.nn.Linear4bit for layer in layers)
    assert runner([DROP, *BF16], bases) == alone
    assert runner([KEEP, *BF16], bases) == alone
    assert runner.kept == [False, False, False, True, True]

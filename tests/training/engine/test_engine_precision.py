"""The engine in 16 bits and on a quantized base is no less exact than TRL's own forward, for any rows.

At two padding widths, TRL's forward computes the same products and nearly all sums in the same order, so that most
bits agree. The engine's attention sums in blocks that begin elsewhere, and its head and the prefix's gradients round
at other points; with PyTorch's unblocked attention log-probabilities are bitwise the same. Otherwise the tests compare
the distance of both from the same model in fp32.
"""

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from trl.trainer.dpo_trainer import DataCollatorForPreference

from dpo_runner.training.engine.packed.attention import attend_pairs
from dpo_runner.training.engine.packed.cpu_attention import PairAttention
from tests.support.common import ROWS
from tests.support.engines import _TIMES, PACKED, PLAIN, batches, is_packed, train
from tests.support.trainers import build

BATCHES, SIZE = 6, 4

WIDTHS = (None, 48, 160)
"""TRL's padding: to the longest row (None), or to a multiple of this many tokens."""


class Measured(NamedTuple):
    """Results of a model on some batches."""

    logps: torch.Tensor
    """One per completion token."""
    losses: torch.Tensor
    """One per batch."""
    gradients: torch.Tensor
    """One per batch and trained weight."""


@pytest.fixture
def rows(tmp_path: Path) -> list[str]:
    """Overrides of a run on pairs of many lengths."""
    draw = random.Random(0)

    def some(most: int) -> str:  # one letter is one token
        return "".join(draw.choice("aeinrst ") for _ in range(draw.randint(1, most)))

    pairs = [{"prompt": some(90), "chosen": some(60), "rejected": some(60)} for _ in range(2 * BATCHES * SIZE)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return ["model=tiny_random", "training=smoke", "data=local_file", "data.path=rows.jsonl", "data.max_eval_samples=2"]


def build_moved(overrides: list[str], folder: Path) -> Any:
    """Return a trainer with changed adapter weights, the same for every call with the same settings."""
    trainer = build(overrides, folder)
    torch.manual_seed(3)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return trainer


def score(trainer: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return log p of all completion tokens, [N], fp32."""
    scored = inputs["completion_mask"].bool()
    labels = inputs["input_ids"].masked_fill(~scored, -100)
    tokens = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with trainer.accelerator.autocast():
        logps = trainer.model(**tokens, labels=labels, use_cache=False, fused_lm_head=True).log_probs
    return logps[scored[:, 1:]].float()


def measure(trainer: Any, width: int | None = None) -> Measured:
    """Score and train on the first batches, padded to a multiple of `width`."""
    trainer.model.train()
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    trainer.data_collator.pad_to_multiple_of = width
    logps, losses, gradients = [], [], []
    for start in range(0, BATCHES * SIZE, SIZE):
        batch = [trainer.train_dataset[index] for index in range(start, start + SIZE)]
        with torch.no_grad():
            logps.append(score(trainer, trainer.data_collator(batch)))
        with trainer.accelerator.autocast():
            loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(trainer.data_collator(batch)))
        losses.append(loss.detach().float())
        gradients += [gradient.flatten() for gradient in torch.autograd.grad(loss, trained)]
    return Measured(torch.cat(logps), torch.stack(losses), torch.cat(gradients))


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the mean absolute difference; the largest one would be a single 16-bit rounding of any token."""
    return (one - other).abs().mean().item()


KINDS = {
    "bf16": (["training.bf16=true"], ["training.bf16=false"]),
    "nf4": (
        ["quant=nf4", "training.bf16=true"],
        ["quant=nf4", "training.bf16=false", "quant.bnb_4bit_compute_dtype=float32"],
    ),
}
"""By name, overrides of a precision, and of the same weights in fp32."""


def assert_as_exact(engine: torch.Tensor, trl: list[torch.Tensor], exact: torch.Tensor) -> None:
    """Assert that the engine is as close to fp32 as TRL at its worst width, within a tenth.

    Its distance from TRL at any width must not exceed that distance.
    """
    rounding = max(distance(width, exact) for width in trl)
    assert 0 < distance(engine, exact) <= 1.1 * rounding
    assert max(distance(engine, width) for width in trl) <= rounding


@pytest.mark.parametrize("kind", KINDS)
def test_in_16_bits_the_engine_is_as_exact_as_trl(kind: str, rows: list[str], tmp_path: Path) -> None:
    rounded, full = KINDS[kind]
    exact = measure(build_moved([*rows, *full, *PLAIN], tmp_path))
    trainer = build_moved([*rows, *rounded, *PLAIN], tmp_path)
    plain = [measure(trainer, width) for width in WIDTHS]
    packing = build_moved([*rows, *rounded, *PACKED], tmp_path)
    assert is_packed(packing)
    packed = measure(packing)
    for name in ("logps", "gradients"):  # too few losses for a mean difference
        assert_as_exact(getattr(packed, name), [getattr(one, name) for one in plain], getattr(exact, name))


@pytest.mark.parametrize("kind", KINDS)
def test_where_attention_has_one_order_of_sums_the_engine_differs_no_more_than_two_widths(
    kind: str, rows: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only difference is that blocks of attention depend on the positions of rows."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *layout: Any) -> torch.Tensor:
        return attend_pairs(q[None], k[None], v[None], *layout)[0]

    monkeypatch.setattr(PairAttention, "apply", attend)
    rounded, _ = KINDS[kind]
    with sdpa_kernel(SDPBackend.MATH):
        trainer = build_moved([*rows, *rounded, *PLAIN], tmp_path)
        plain, *wider = (measure(trainer, width) for width in WIDTHS)
        packed = measure(build_moved([*rows, *rounded, *PACKED], tmp_path))
    for name in ("logps", "losses"):
        own = max((getattr(plain, name) - getattr(other, name)).abs().max().item() for other in wider)
        torch.testing.assert_close(getattr(packed, name), getattr(plain, name), rtol=0, atol=own + 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_in_16_bits_the_engine_trains_as_trl_does(kind: str, rows: list[str], tmp_path: Path) -> None:
    rounded, full = KINDS[kind]

    def trained(*overrides: str) -> tuple[torch.Tensor, torch.Tensor]:
        logged, weights, _ = train([*rows, *overrides], tmp_path, steps=4)
        left_out = (*_TIMES, "total_flos")  # total_flos counts padding
        metrics = [value for entry in logged for key, value in sorted(entry.items()) if not key.endswith(left_out)]
        return torch.tensor(metrics), weights

    exact = trained(*full, *PLAIN)
    widths = [f"training.pad_to_multiple_of={width or 'null'}" for width in WIDTHS]
    plain = [trained(*rounded, *PLAIN, width) for width in widths]
    packed = trained(*rounded, *PACKED)
    for index in range(2):
        assert_as_exact(packed[index], [one[index] for one in plain], exact[index])


@pytest.fixture(scope="module")
def trainers(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Trainers with TRL's forward and with the engine's, with the same weights in fp32."""
    folder = tmp_path_factory.mktemp("trainers")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    overrides = ["model=tiny_random", "training=smoke", "data=local_file", f"data.path={folder / 'rows.jsonl'}"]
    return tuple(
        build_moved([*overrides, "training.bf16=false", "training.eval_strategy=no", *engine], folder)
        for engine in (PLAIN, PACKED)
    )


def assert_as_trl(trainers: tuple[Any, Any], rows: list[dict[str, list[int]]], limit: int | None, mode: str) -> None:
    """Assert that each token has TRL's log-probability and gradient."""
    found = []
    for trainer in trainers:
        inputs = DataCollatorForPreference(0, limit, mode)(rows)
        logps = score(trainer, inputs)
        trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        weights = torch.linspace(1, 2, len(logps))  # distinct, so that swapped tokens are noticed
        gradients = torch.autograd.grad((logps * weights).sum(), trained, materialize_grads=True)
        found.append((logps.detach(), torch.cat([gradient.flatten() for gradient in gradients])))
    (plain, wanted), (packed, gradient) = found
    assert len(plain) == len(packed)
    torch.testing.assert_close(packed, plain, rtol=0, atol=2e-5)
    assert (gradient - wanted).norm() <= 1e-5 * (1 + wanted.norm())


@given(batches(most=24))
def test_whatever_the_rows_are_each_token_has_the_log_probability_and_gradient_that_trl_gives_it(
    trainers: tuple[Any, Any], batch: tuple[list[dict[str, list[int]]], int | None, str]
) -> None:
    assert_as_trl(trainers, *batch)


LONGEST = 4096
"""The tiny model's `max_position_embeddings`."""


@st.composite
def long_pairs(draw: st.DrawFn) -> list[dict[str, list[int]]]:
    """Draw one or two pairs, each part a single token or up to 300."""
    tokens = random.Random(draw(st.integers(0, 99)))
    rows = []
    for _ in range(draw(st.integers(1, 2))):
        lengths = {key: draw(st.integers(1, 300) | st.just(1)) for key in ("prompt_ids", "chosen_ids", "rejected_ids")}
        row = {key: tokens.choices(range(1, 250), k=length) for key, length in lengths.items()}
        same = draw(st.sampled_from([0, 1, 300]))  # length of the answers' common prefix, if they are that long
        row["rejected_ids"][:same] = row["chosen_ids"][: min(same, len(row["rejected_ids"]))]
        rows.append(row)
    return rows


@settings(max_examples=10, deadline=None)
@example([{"prompt_ids": [7], "chosen_ids": [7], "rejected_ids": [8]}], None, "keep_start")
@example([{"prompt_ids": [7], "chosen_ids": [7] * (LONGEST - 1), "rejected_ids": [8] * 300}], None, "keep_start")
@given(long_pairs(), st.none() | st.sampled_from([1, 2, 129, 300]), st.sampled_from(["keep_start", "keep_end"]))
def test_whatever_the_lengths_are_from_one_token_to_all_that_the_model_takes(
    trainers: tuple[Any, Any], rows: list[dict[str, list[int]]], limit: int | None, mode: str
) -> None:
    """Attention uses blocks of 128 queries; these rows have many."""
    assert trainers[0].model.config.max_position_embeddings == LONGEST
    assert_as_trl(trainers, rows, limit, mode)

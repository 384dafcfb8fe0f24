"""Short trainings and random pairs for comparing the engine with TRL's own forward."""

from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from dpo_runner.training.engine.packed import forward as packed_forward
from tests.support.trainers import build

PLAIN = ("engine.shared_prefix=false", "engine.reference_store=false", "engine.lean_layers=false")
PACKED = ("engine.shared_prefix=true", "engine.reference_store=false")
STORED = ("engine.shared_prefix=true", "engine.reference_store=true")

_TIMES = ("runtime", "per_second", "preparation_time")


def train(overrides: list[str], folder: Path, steps: int = 6) -> tuple[list[dict[str, float]], torch.Tensor, Any]:
    """Return the logs of a short training, its trained weights (flat), and the trainer."""
    settings = [
        "training.bf16=false",
        f"training.max_steps={steps}",
        "training.logging_steps=1",
        "training.learning_rate=3e-4",
        "training.adam_epsilon=1e-6",  # a smaller one lets Adam amplify rounding of gradients near 0
        "training.warmup_steps=0",
        "training.save_strategy=no",
        "training.eval_strategy=no",
        "seed=7",
    ]
    trainer = build([*settings, *overrides], folder)
    trainer.train()
    trainer.evaluate()
    weights = [p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad]
    return trainer.state.log_history, torch.cat(weights), trainer


def assert_same(plain: list[dict[str, float]], other: list[dict[str, float]], within: float = 1e-5) -> None:
    """Assert that both logs have the same names and values, within a relative tolerance above 1."""
    assert len(plain) == len(other) > 1
    for expected, found in zip(plain, other, strict=True):
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            if not key.endswith(_TIMES):
                assert abs(found[key] - value) <= within * max(1, abs(value)), (
                    key,
                    value,
                    found[key],
                    expected["step"],
                )


def is_packed(trainer: Any) -> bool:
    model = trainer.model.get_base_model() if hasattr(trainer.model, "peft_config") else trainer.model
    return bool(model.forward.__func__.__code__.co_filename == packed_forward.__file__)


@st.composite
def batches(draw: st.DrawFn, most: int = 6) -> tuple[list[dict[str, list[int]]], int | None, str]:
    """Draw tokenized pairs, TRL's `max_length` and its `truncation_mode`.

    There are few distinct tokens, so that answers often share a prefix, one is a prefix of the other, or both are
    equal; if rows are cut at their beginning, a pair may have no common prefix.
    """
    tokens = st.lists(st.integers(1, 3), min_size=1, max_size=most)
    pair = st.fixed_dictionaries({"prompt_ids": tokens, "chosen_ids": tokens, "rejected_ids": tokens})
    rows = draw(st.lists(pair, min_size=1, max_size=4))
    for row in rows:
        if draw(st.booleans()):
            row["rejected_ids"] = row["chosen_ids"][: draw(st.integers(1, most))]
    return rows, draw(st.none() | st.integers(1, 2 * most)), draw(st.sampled_from(["keep_start", "keep_end"]))

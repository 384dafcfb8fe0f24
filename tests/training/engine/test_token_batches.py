"""Micro-batches of any size give the gradient and the logged values of TRL's step."""

import random
from pathlib import Path
from typing import Any

import pytest

from dpo_runner.config.compose import load_conf
from dpo_runner.config.sections.run import EngineConf
from dpo_runner.model.blueprint import draw_blueprint
from dpo_runner.training.engine.install import describe_engine
from dpo_runner.training.engine.token_batches import choose_budget, group_pairs
from tests.support.engines import PACKED, PLAIN, STORED, assert_same, train
from tests.support.trainers import build

SETTINGS = [
    ["engine.max_tokens_per_micro_batch=1"],  # each pair alone
    ["engine.max_tokens_per_micro_batch=100"],
    ["engine.max_tokens_per_micro_batch=1", "training.gradient_accumulation_steps=4"],
    ["engine.max_tokens_per_micro_batch=150", "training.gradient_accumulation_steps=4"],
    ["engine.max_tokens_per_micro_batch=100000", "training.gradient_accumulation_steps=4"],
    # 3 does not divide the number of pairs, so that an epoch ends with a smaller batch and a smaller step
    *(
        [
            f"engine.max_tokens_per_micro_batch={tokens}",
            "training.per_device_train_batch_size=3",
            "training.gradient_accumulation_steps=3",
            "data.max_train_samples=16",
        ]
        for tokens in (90, 100000)
    ),
    ["engine.max_tokens_per_micro_batch=100", "training.gradient_checkpointing=true"],
    ["engine.max_tokens_per_micro_batch=100", "training.use_weighting=true"],
    ["engine.max_tokens_per_micro_batch=100", "training.ld_alpha=0.5", "training.logging_steps=3"],
    ["engine.max_tokens_per_micro_batch=100", "lora=none"],
    ["engine.max_tokens_per_micro_batch=100", "training.loss_type=[sigmoid,bco_pair]"],
    ["engine.max_tokens_per_micro_batch=100", "data.on_overlong=trl", "training.max_length=48"],
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "+".join(settings))
def test_any_grouping_is_trls_step(settings: list[str], tiny_run: list[str], tmp_path: Path) -> None:
    stored = SETTINGS.index(settings) % 2 == 1  # grouping does not depend on the reference's origin
    plain, weights, _ = train([*tiny_run, *settings, *PLAIN], tmp_path, steps=6)
    grouped, other, trainer = train([*tiny_run, *settings, *(STORED if stored else PACKED)], tmp_path, steps=6)
    assert trainer.max_tokens == int(settings[0].split("=")[1])
    if stored:  # rounding decides the ties before the first step
        for events in (plain, grouped):
            events[0].pop("rewards/accuracies")
    assert_same(plain, grouped)
    assert (other - weights).norm() <= 1e-5 * weights.norm()


@pytest.mark.parametrize("loss", ["aot", "aot_unpaired", "sft", "[sigmoid,sft]"])
def test_losses_that_are_no_sums_keep_trls_batches(loss: str, tiny_run: list[str], tmp_path: Path) -> None:
    overrides = [*tiny_run, f"training.loss_type={loss}", "engine.max_tokens_per_micro_batch=1"]
    assert build([*overrides, *PACKED], tmp_path).max_tokens is None
    conf = load_conf(overrides)
    assert "micro-batches by rows (training.loss_type=" in describe_engine(conf, draw_blueprint(conf), 100)


def test_zero_keeps_trls_batches(tiny_run: list[str], tmp_path: Path) -> None:
    assert build([*tiny_run, "engine.max_tokens_per_micro_batch=0", *PACKED], tmp_path).max_tokens is None


@pytest.mark.parametrize(
    "setting, use_cpu, budget", [(None, False, 4800), (None, True, 1024), (70, True, 70), (0, True, None)]
)
def test_the_budget_chosen(setting: int | None, use_cpu: bool, budget: int | None) -> None:
    conf = EngineConf(max_tokens_per_micro_batch=setting)
    assert choose_budget(conf, batch_size=4, largest=1200, use_cpu=use_cpu) == budget


def test_a_small_batch_is_the_budget_on_a_cpu_too() -> None:
    assert choose_budget(EngineConf(), batch_size=2, largest=100, use_cpu=True) == 200


@pytest.mark.parametrize("seed", range(50))
def test_groups_hold_each_pair_once_within_the_budget_and_count_it_as_trl_does(seed: int) -> None:
    rng = random.Random(seed)
    batch_size, budget = rng.randint(1, 6), rng.randint(1, 400)
    sizes = [[rng.randint(2, 300) for _ in range(batch_size)] for _ in range(rng.randint(1, 5))]
    sizes[-1] = sizes[-1][: rng.randint(1, batch_size)]
    weight: dict[Any, float] = {}
    for group in group_pairs(sizes, budget):
        tokens = [sizes[place.batch][place.row] for place in group.places]
        assert sum(tokens) <= budget or len(tokens) == 1
        assert not weight.keys() & set(group.places)
        weight |= dict.fromkeys(group.places, 1 / group.divisor / len(group.places))
    expected = {
        (batch, row): 1 / len(sizes) / len(rows) for batch, rows in enumerate(sizes) for row in range(len(rows))
    }
    assert weight == pytest.approx(expected)


def test_groups_are_few() -> None:
    assert len(group_pairs([[60, 40], [50, 50], [30, 70]], 100)) == 3

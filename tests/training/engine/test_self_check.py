"""The self-check finds what no rule about configs covers, and leaves the run's random state unchanged."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_runner.config.compose import load_conf
from dpo_runner.data.preferences import load_preferences
from dpo_runner.model.blueprint import Blueprint, draw_blueprint
from dpo_runner.model.policy import load_policy
from dpo_runner.sweep.base_pool import BasePool
from dpo_runner.training.build import build_dpo_config, build_trainer
from dpo_runner.training.engine.install import describe_engine
from dpo_runner.training.engine.packed import self_check
from dpo_runner.training.engine.packed.self_check import find_difference
from tests.support.engines import PACKED, PLAIN, assert_same, is_packed, train
from tests.support.families import make_family
from tests.support.trainers import build


def name_family(family: str, tiny_run: list[str], tokenizer: Any, folder: Path, **changes: Any) -> list[str]:
    path = make_family(family, tokenizer, folder / family, **changes)
    return [*tiny_run, f"model.model_name_or_path={path}", "data.on_overlong=trl", "training.max_length=96"]


def test_dropout_that_is_no_module_is_found_and_training_is_what_it_was(
    tiny_run: list[str], tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """TRL's `disable_dropout` reaches only modules; OPT calls a function, and packed pairs share a mask."""
    overrides = [*name_family("opt", tiny_run, tokenizer, tmp_path), "training.disable_dropout=true"]
    plain, weights, _ = train([*overrides, *PLAIN], tmp_path, steps=2)
    with caplog.at_level("INFO"):
        packed, other, trainer = train([*overrides, *PACKED, "engine.lean_layers=false"], tmp_path, steps=2)
    assert not is_packed(trainer)
    assert any("draws dropout where training.disable_dropout does not reach" in text for text in caplog.messages)
    assert_same(plain, packed, within=0)
    assert torch.equal(weights, other), "other numbers were drawn"


def test_numbers_that_nothing_depends_on_are_no_dropout(tiny_run: list[str], tokenizer: Any, tmp_path: Path) -> None:
    overrides = name_family("opt", tiny_run, tokenizer, tmp_path, dropout=0.0)
    assert is_packed(build([*overrides, *PACKED], tmp_path))
    trainer, drawn = build([*overrides, *PLAIN], tmp_path), []
    trainer.model.register_forward_pre_hook(lambda model, _: drawn.extend(torch.rand(int(model.training))))
    state = torch.get_rng_state()
    assert find_difference(trainer, trains_head=False) is None
    assert drawn and torch.equal(torch.get_rng_state(), state) and trainer.model.training


def test_a_model_that_only_its_forward_tells_of_is_refused_and_the_plan_does_not_promise(
    tiny_run: list[str], tokenizer: Any, tmp_path: Path
) -> None:
    overrides = [*name_family("nemotron", tiny_run, tokenizer, tmp_path), *PACKED]
    conf = load_conf(overrides)
    assert describe_engine(conf, draw_blueprint(conf), 96).startswith(
        "shared prefixes if both forwards agree, micro-batches by tokens, "
    )
    assert not is_packed(build(overrides, tmp_path))


@pytest.mark.parametrize("disable", ["false", "true"])
def test_the_plan_knows_dropout_that_is_no_module(
    disable: str, tiny_run: list[str], tokenizer: Any, tmp_path: Path
) -> None:
    for family, changes in (("opt", {}), ("llama", {"attention_dropout": 0.1})):
        overrides = name_family(family, tiny_run, tokenizer, tmp_path, **changes)
        conf = load_conf([*overrides, f"training.disable_dropout={disable}"])
        told = {"false": "TRL's forward (dropout is on, ", "true": "shared prefixes if both forwards agree, "}[disable]
        assert describe_engine(conf, draw_blueprint(conf), 96).startswith(told)


def test_rows_that_have_the_references_figures_already_are_checked_too(tiny_run: list[str], tmp_path: Path) -> None:
    overrides = [*tiny_run, "engine.shared_prefix=true", "engine.reference_store=false"]
    trainer = build([*overrides, "training.precompute_ref_log_probs=true"], tmp_path)
    assert is_packed(trainer) and "ref_chosen_logps" in trainer.train_dataset.column_names


def test_runs_with_one_base_model_share_the_comparison(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bases, scored = BasePool(), []
    score = self_check._score
    monkeypatch.setattr(self_check, "_score", lambda *args, **kwargs: scored.append(1) or score(*args, **kwargs))

    def count(pool: BasePool, *overrides: str) -> int:
        conf = load_conf([*tiny_run, *PACKED, *overrides])
        blueprint = Blueprint.of_run(conf)
        data = load_preferences(conf, blueprint.tokenizer)
        policy = load_policy(blueprint, pool.load)
        scored.clear()
        trainer = build_trainer(conf, build_dpo_config(conf, tmp_path), blueprint, policy, data)
        assert is_packed(trainer)
        return len(scored)

    whole = count(bases)
    assert whole >= 4  # two sets of rows, padded and packed
    assert [count(bases), count(bases, "lora.r=4", "training.beta=0.3", "seed=7")] == [0, 0]
    for changed in ("lora.use_dora=true", "data.max_train_samples=1", "engine.lean_layers=false"):
        assert count(bases, changed) == whole, changed
    assert count(BasePool()) == whole  # another model


def test_only_the_models_own_refusals_are_taken_for_such(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, score = build([*tiny_run, *PLAIN], tmp_path), self_check._score
    failure: Exception = RuntimeError("The size of tensor a must match")

    def fail_if_packed(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        if is_packed(trainer):
            raise failure
        return score(trainer, *args, **kwargs)

    monkeypatch.setattr(self_check, "_score", fail_if_packed)
    told = find_difference(trainer, trains_head=False)
    assert told == "the model does not take packed rows (RuntimeError: The size of tensor a must match)"
    for kind, message in (
        (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 1.50 GiB."),
        (RuntimeError, "CUDA error: an illegal memory access was encountered"),
        (RuntimeError, "Triton Error [CUDA]: device kernel image is invalid"),
        (type("OutOfResources", (ValueError,), {"__module__": "triton.runtime.errors"}), "shared memory"),
    ):
        failure = kind(message)
        with pytest.raises(kind, match=re.escape(message)):
            find_difference(trainer, trains_head=False)
    assert not is_packed(trainer)


def test_a_model_that_does_not_agree_is_compared_again(tiny_run: list[str], tmp_path: Path) -> None:
    trainer = build([*tiny_run, *PLAIN], tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(self_check, "_SHARE", -1.0)
        for _ in range(2):
            assert find_difference(trainer, trains_head=False)
    assert find_difference(trainer, trains_head=False) is None

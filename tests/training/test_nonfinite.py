"""A step with a non-finite loss or gradient ends the run or is skipped, and never damages the weights."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dpo_runner import run
from dpo_runner.config.compose import load_conf
from dpo_runner.errors import RunError
from dpo_runner.records.reading import read_metrics
from dpo_runner.training.engine.token_batches import TokenBatches

WAYS = ["engine.max_tokens_per_micro_batch=null", "engine.max_tokens_per_micro_batch=0", "engine.shared_prefix=false"]


@pytest.fixture
def bad(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make the loss NaN for batches with a certain token sequence."""

    def spoil(ids: list[int] | None, steps: tuple[int, ...] = ()) -> None:
        compute = TokenBatches.compute_loss

        def spoiled(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = compute(self, model, inputs, *args, **kwargs)
            rows = [
                row[mask.bool()].tolist()
                for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
            ]
            if ids in rows or (self.state.global_step in steps and model.training):
                return loss * float("nan")
            return loss

        monkeypatch.setattr(TokenBatches, "compute_loss", spoiled)

    return spoil


@pytest.fixture
def tiny(tiny_run: list[str]) -> list[str]:
    return [*tiny_run, "samples.num_prompts=0", "training.eval_strategy=no", "data.max_eval_samples=1", "run_dir=r"]


def ids_of_row(overrides: list[str], row: int) -> list[int]:
    from tests.support.trainers import build

    made = build(overrides, Path("elsewhere")).train_dataset[row]
    return [*made["prompt_ids"], *made["chosen_ids"]]


@pytest.mark.parametrize("way", WAYS)
def test_the_run_stops_and_names_the_row(way: str, tiny: list[str], bad: Callable[..., None], pairs: str) -> None:
    bad(ids_of_row(tiny, 7))
    with pytest.raises(
        RunError, match=r"^loss is nan at step (\d+), with \S*pairs\.jsonl:(\d+); its pairs are in r/nonfinite/"
    ):
        run(load_conf([*tiny, way, "training.max_steps=-1", "training.num_train_epochs=1"]))
    (path,) = Path("r/nonfinite").iterdir()
    dump = json.loads(path.read_text())
    assert dump["loss"] == "nan" and path.name == f"step-{dump['step']}.json"
    (wrong,) = [pair for pair in dump["pairs"] if not pair["finite"]]
    assert wrong["row"] == 7 and wrong["loss"] == "nan"
    number = int(wrong["source"].rpartition(":")[2])
    row = json.loads(Path(pairs).read_text().splitlines()[number - 1])
    assert row["chosen"] in wrong["chosen"] and row["rejected"] in wrong["rejected"]
    assert all(event["step"] < dump["step"] for event in read_metrics(Path("r")))
    assert json.loads(Path("r/status.json").read_text())["state"] == "failed"


def test_weights_past_saving_are_told_from_a_bad_row(tiny: list[str], bad: Callable[..., None]) -> None:
    bad(None, steps=(2,))
    with pytest.raises(
        RunError, match=r"^loss is nan at step 3, with each of its pairs; .*smaller training.learning_rate"
    ):
        run(load_conf(tiny))


@pytest.mark.parametrize("way", WAYS)
def test_a_step_is_skipped_and_counted_and_the_weights_are_what_they_were(
    way: str, tiny: list[str], bad: Callable[..., None]
) -> None:
    bad(None, steps=(1, 2))
    logging = [
        "training.logging_steps=2",
        "training.max_steps=4",
        "training.save_steps=1",
        "training.save_total_limit=9",
    ]
    run(load_conf([*tiny, *logging, way, "checks.on_nonfinite=skip_batch"]))
    weights = [load_file(f"r/checkpoints/checkpoint-{step}/adapter_model.safetensors") for step in (1, 2, 3, 4)]
    same = [all(torch.equal(one[name], other[name]) for name in one) for one, other in pairwise(weights)]
    assert same == [True, True, False]
    events = [event for event in read_metrics(Path("r")) if "learning_rate" in event]
    assert [event["skipped_batches"] for event in events] == [1, 2]
    assert all(0.1 < event["loss"] < 1 and event["rewards/margins"] == event["rewards/margins"] for event in events)


def test_skipping_is_bounded(tiny: list[str], bad: Callable[..., None]) -> None:
    bad(None, steps=(0, 1, 2))
    with pytest.raises(RunError, match=r"at step 3.*2 steps were skipped before, as many as checks\.max_skipped"):
        run(load_conf([*tiny, "checks.on_nonfinite=skip_batch", "checks.max_skipped_batches=2"]))


def test_an_interval_of_skipped_steps_alone_has_no_loss(tiny: list[str], bad: Callable[..., None]) -> None:
    bad(None, steps=(1,))
    run(load_conf([*tiny, "checks.on_nonfinite=skip_batch"]))
    events = [event for event in read_metrics(Path("r")) if "learning_rate" in event]
    assert [("loss" in event, event.get("skipped_batches")) for event in events] == [
        (True, None),
        (False, 1),
        (True, 1),
        (True, 1),
    ]


def test_what_hides_the_pairs_does_not_hide_what_was_wrong(
    tiny: list[str], bad: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad(None, steps=(2,))

    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dpo_runner.training.mixins.nonfinite.write_json", fail)
    with pytest.raises(RunError, match=r"^loss is nan at step 3; its pairs cannot be looked at: .*No space left"):
        run(load_conf(tiny))

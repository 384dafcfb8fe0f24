"""Same configuration, bitwise the same adapter, for any number of dataloader processes."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dpo_runner import run
from dpo_runner.config.compose import load_conf


@pytest.fixture
def small(tiny_run: list[str]) -> list[str]:
    kept = [
        "samples.num_prompts=0",
        "data.max_eval_samples=1",
        "training.eval_strategy=no",
        "training.save_strategy=no",
    ]
    return [*tiny_run, *kept, "training.per_device_train_batch_size=4", "lora.lora_dropout=0.1", "training.max_steps=2"]


def digest(overrides: list[str], name: str) -> str:
    run(load_conf([*overrides, f"run_dir={name}"]))
    return hashlib.sha256(Path(name, "adapter", "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "threads", [1, pytest.param(2, marks=pytest.mark.slow)], indirect=True
)  # two threads share busy cores
def test_the_same_configuration_twice_gives_the_same_adapter(threads: int, small: list[str]) -> None:
    assert torch.get_num_threads() == threads
    one, other = digest(small, "a"), digest(small, "b")
    assert one == other
    if threads == 1:
        assert digest([*small, "seed=2"], "c") != one


@pytest.mark.parametrize("counts", [(0, 2), pytest.param((0, 1, 2, 4), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("threads", [1], indirect=True)
def test_workers_that_load_the_data_change_nothing(threads: int, counts: tuple[int, ...], small: list[str]) -> None:
    digests = {digest([*small, f"training.dataloader_num_workers={count}"], f"w{count}") for count in counts}
    assert len(digests) == 1

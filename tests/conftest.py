"""Shared fixtures: tiny generated models, small data, no network."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.common import make_adapter, make_tiny_run, write_pairs
from tests.support.programs import speed_up_libraries

settings.register_profile("repeatable", derandomize=True, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

speed_up_libraries()

os.environ["HF_HUB_OFFLINE"] = "1"
for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_", "TENSORBOARD_"))]:
    del os.environ[name]  # the configuration decides, not the developer's shell


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test in a temporary folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """Remove what transformers puts into the environment for accelerate, for example with training.fsdp."""
    yield
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]


@pytest.fixture(autouse=True)
def no_curves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip a model card's plots, a third of a tiny run's time, except in tests that check them."""
    if request.path.name not in ("test_card.py", "test_plots.py"):
        monkeypatch.setattr("dpo_runner.model.card.card.write_plots", lambda folder, events: [])


@pytest.fixture(scope="session", autouse=True)
def own_cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep data tokenized by tests out of the user's cache; converted models are shared with it."""
    from dpo_runner.io.files import cache_dir
    from dpo_runner.model.files.packaged import load_default_model_path, load_random_model_path

    own = tmp_path_factory.mktemp("cache")
    if any(item.get_closest_marker("real_model") for item in request.session.items):
        load_default_model_path()
    for folder in (load_random_model_path(), *cache_dir().glob("smollm2-*")):
        (own / folder.name).symlink_to(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DPO_RUNNER_CACHE", str(own))
        yield


@pytest.fixture(scope="session")
def default_model() -> str:
    from dpo_runner.model.files.packaged import load_default_model_path

    return str(load_default_model_path())


@pytest.fixture(scope="session")
def tiny_model() -> str:
    """A two-layer random Llama with the default model's tokenizer and chat template."""
    from dpo_runner.model.files.packaged import load_random_model_path

    return str(load_random_model_path())


@pytest.fixture(scope="session")
def tokenizer(tiny_model: str):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="session")
def sft_adapter(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A LoRA adapter on the tiny model; its weights, B included, are far from 0."""
    return make_adapter(tiny_model, tmp_path_factory.mktemp("sft"), seed=1, std=0.1, r=4, target_modules="all-linear")


_LONGEST_FIRST = (
    *("test_processes.py", "test_run.py", "test_search.py", "test_sweep.py", "test_base_pool.py", "test_docs.py"),
    *("test_tracking_online.py", "test_adapters.py", "test_sweep_wandb.py", "test_sharding.py", "test_estimate.py"),
    *("test_gpu.py", "test_engine.py", "test_quantized.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first, so that none occupies a single core at the end."""
    rank = {name: place for place, name in enumerate(_LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))
    for item in items:
        if item.get_closest_marker("real_model"):  # ten times slower on processors without bf16
            item.add_marker(pytest.mark.timeout(3600))
    gc.collect()
    gc.freeze()  # accelerate collects garbage in each training: a quarter of a tiny run, if it traverses all modules


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    """A JSONL file of 24 short preference pairs."""
    return write_pairs(tmp_path)


@pytest.fixture
def tiny_run(pairs: str) -> list[str]:
    """Overrides of a run that takes a second or two."""
    return make_tiny_run(pairs)

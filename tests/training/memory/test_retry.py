"""A run out of memory names settings that take less, or equals one with smaller batches throughout."""

import json
import re
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensor
from transformers.models.llama.modeling_llama import LlamaModel

from dpo_runner import run
from dpo_runner.config.compose import load_conf
from dpo_runner.errors import ConfigError, RunError, RunInterrupted
from dpo_runner.records.directory import update_status
from dpo_runner.records.reading import read_metrics, read_status
from dpo_runner.training.engine.packed import self_check
from dpo_runner.training.memory import device as device_memory
from dpo_runner.training.memory.device import (
    ANSWERING,
    EVALUATION,
    LOADING,
    TRAINING,
    OutOfMemory,
    is_out_of_memory,
    read_memory,
    watch_memory,
)
from dpo_runner.training.memory.settle import with_settings
from dpo_runner.training.memory.smaller import find_smaller, list_ways
from dpo_runner.training.trainer import RunTrainer
from tests.support.programs import run_python

OF_THE_MACHINE = re.compile(r"^time$|(runtime|per_second)$")
RETRY = "checks.on_out_of_memory=smaller_batch"
BY_TOKENS: list[str] = []
BY_ROWS = ["engine.max_tokens_per_micro_batch=0"]
PADDED = ["engine.shared_prefix=false"]


@pytest.fixture
def four(tiny_run: list[str]) -> list[str]:
    """Overrides with four pairs per micro-batch, in fp32, so that batching affects only the last digits."""
    small = ["samples.num_prompts=0", "data.max_eval_samples=3", "training.max_steps=3"]
    return [*tiny_run, *small, "training.per_device_train_batch_size=4", "training.bf16=false"]


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[int, ...]]]:
    """Make the forward run out of memory beyond a number of rows or tokens; return its input shapes."""
    monkeypatch.setattr(self_check, "_draws_dropout", lambda *_: False)  # it has gradients, but is not training

    def limit(
        rows: int = sys.maxsize, tokens: int = sys.maxsize, where: Callable[[], bool] = torch.is_grad_enabled
    ) -> list[tuple[int, ...]]:
        forward, seen = LlamaModel.forward, []

        def limited(self: Any, input_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
            given = input_ids if input_ids is not None else kwargs["inputs_embeds"]
            if where() and not isinstance(given, FakeTensor):  # the estimate's
                seen.append(tuple(given.shape[:2]))
                if given.shape[0] > rows or given.shape[0] * given.shape[1] > tokens:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has …")
            return forward(self, input_ids, *args, **kwargs)

        monkeypatch.setattr(LlamaModel, "forward", limited)
        return seen

    return limit


def read_events(folder: str) -> list[dict[str, Any]]:
    return [{k: v for k, v in event.items() if not OF_THE_MACHINE.search(k)} for event in read_metrics(Path(folder))]


def read_weights(folder: str) -> dict[str, torch.Tensor]:
    return dict(load_file(f"{folder}/adapter/adapter_model.safetensors"))


def largest_pair(overrides: list[str]) -> int:
    from transformers import AutoTokenizer

    from dpo_runner.data.preferences import load_preferences
    from dpo_runner.model.files.packaged import load_random_model_path

    data = load_preferences(load_conf(overrides), AutoTokenizer.from_pretrained(load_random_model_path()))
    return sum(data.shape().largest)


@pytest.mark.parametrize("way", [BY_TOKENS, pytest.param(PADDED, marks=pytest.mark.slow)], ids=["tokens", "padded"])
def test_a_run_that_is_tried_again_is_the_run_that_had_smaller_batches(
    way: list[str], four: list[str], limit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    load, models = sys.modules["dpo_runner.train"].load_policy, []

    def load_alone(*args: Any, **kwargs: Any) -> Any:
        assert len(models) != 1 or models[0]() is None, "what an attempt held is let go of before the next"
        policy = load(*args, **kwargs)
        models.append(weakref.ref(policy.model))
        return policy

    monkeypatch.setattr(sys.modules["dpo_runner.train"], "load_policy", load_alone)
    most = largest_pair(four)
    seen = limit(rows=4) if way == PADDED else limit(tokens=2 * most)
    overrides = [*four, *way, *(["wandb=offline"] if way == BY_TOKENS else [])]
    summary = run(load_conf([*overrides, RETRY, "run_dir=again"]))
    (record,) = summary["out_of_memory"]
    given = [f"{key}={value}" for key, value in record["settings"].items()]
    if way == BY_TOKENS:
        assert given == [f"engine.max_tokens_per_micro_batch={2 * most}"]
    else:
        assert given == ["training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=2"]
    assert record["part"] == TRAINING and record["sizes"].startswith("1.61 GB were asked for in one piece, with ")
    assert read_status(Path("again"))["out_of_memory"] == summary["out_of_memory"]
    assert "memory ran out" in (log := Path("again/run.log").read_text()) and "Tried to allocate 1.50 GiB" in log
    assert len(seen) == 1 + 3 * 2, "the first of three steps was tried once, and each then done in two parts"

    assert len(models) == 2
    expected = run(load_conf([*four, *way, *given, "run_dir=smaller"]))
    one, other = read_weights("again"), read_weights("smaller")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert read_events("again") == read_events("smaller")
    assert (summary["before"], summary["after"]) == (expected["before"], expected["after"])
    assert "out_of_memory" not in expected and "out_of_memory" not in read_status(Path("smaller"))

    if way == BY_TOKENS:
        (logged,) = Path("again/wandb").glob("offline-run-*/*.wandb")
        assert "out_of_memory" in run_python("-m", "wandb", "leet", "inspect", "--json", str(logged)).stdout


def test_it_goes_on_from_the_last_checkpoint(
    four: list[str], limit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    step = RunTrainer.training_step

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        steps.append(self.state.global_step)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(RunTrainer, "training_step", noted)
    most = largest_pair(four)
    limit(tokens=2 * most, where=lambda: torch.is_grad_enabled() and steps[-1] == 2)
    with pytest.raises(OutOfMemory, match=r"checks\.on_out_of_memory=smaller_batch tries"):
        run(load_conf([*four, "run_dir=again"]))
    summary = run(load_conf([*four, RETRY, "run_dir=again"]))
    assert steps == [0, 1, 2, 2, 2] and len(summary["out_of_memory"]) == 1
    run(load_conf([*four, f"engine.max_tokens_per_micro_batch={2 * most}", "run_dir=smaller"]))
    one, other = read_weights("again"), read_weights("smaller")
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-6)
    assert [event["step"] for event in read_events("again") if "loss" in event] == [1, 2, 3]


@pytest.mark.parametrize("way", [BY_TOKENS, pytest.param(BY_ROWS, marks=pytest.mark.slow)], ids=["tokens", "rows"])
def test_there_is_an_end_to_it(way: list[str], four: list[str], limit: Callable[..., Any]) -> None:
    limit(rows=0)
    with pytest.raises(OutOfMemory) as caught:
        run(load_conf([*four, *way, RETRY, "run_dir=r"]))
    told = str(caught.value)
    assert told.startswith("out of memory in training: 1.61 GB were asked for in one piece, with ")
    assert "by the estimate the run takes " in told and "training.gradient_checkpointing=true" in told
    assert "per_device_train_batch_size" not in told and "micro_batch=" not in told and "checks." not in told
    status = read_status(Path("r"))
    assert status["state"] == "failed" and len(status["out_of_memory"]) == 2
    settings = {key: value for record in status["out_of_memory"] for key, value in record["settings"].items()}
    if way == BY_TOKENS:
        assert settings == {"engine.max_tokens_per_micro_batch": largest_pair(four)}
    else:
        assert settings["training.per_device_train_batch_size"] == 1
        assert settings["training.gradient_accumulation_steps"] == 4


def test_without_being_told_to_a_run_ends_and_says_what_to_do(four: list[str], limit: Callable[..., Any]) -> None:
    limit(rows=0)
    with pytest.raises(OutOfMemory) as caught:
        run(load_conf([*four, "run_dir=r"]))
    told = str(caught.value)
    assert caught.value.exit_code == 1 and "\n" not in told
    ways = told.partition("; try ")[2].partition("; checks.on_out_of_memory=smaller_batch tries")[0].split(", or ")
    assert ways[0].startswith("engine.max_tokens_per_micro_batch=")
    assert "training.gradient_checkpointing=true" in ways and "quant=nf4" in ways
    for way in ways:
        assert load_conf(way.partition(" (")[0].split()) != load_conf()
    assert len(read_status(Path("r"))["error"].splitlines()) == 1


def test_a_run_that_was_killed_goes_on_with_smaller_batches(
    four: list[str], limit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    most = largest_pair(four)
    seen = limit(tokens=2 * most)
    step = RunTrainer.training_step

    def killed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2 and self.max_tokens == 2 * most:
            raise SystemExit(9)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(RunTrainer, "training_step", killed)
    overrides = [*four, RETRY, "run_dir=r"]
    with pytest.raises(RunError):
        run(load_conf(overrides))
    monkeypatch.setattr(RunTrainer, "training_step", step)
    seen.clear()
    summary = run(load_conf(overrides))
    assert max(rows * width for rows, width in seen) <= 2 * most, "nothing is tried twice"
    assert len(summary["out_of_memory"]) == 1


def test_evaluation_has_batches_of_its_own(four: list[str], limit: Callable[..., Any]) -> None:
    evaluates: list[bool] = []
    loop = RunTrainer.evaluation_loop

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        evaluates.append(True)
        try:
            return loop(self, *args, **kwargs)
        finally:
            evaluates.clear()

    overrides = [*four, "training.max_steps=1", "engine.shared_prefix=false", "run_dir=r"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunTrainer, "evaluation_loop", watched)
        limit(rows=4, where=lambda: bool(evaluates))
        with pytest.raises(OutOfMemory, match=r"^out of memory in evaluation: .*try training.per_device_eval_batch_s"):
            run(load_conf(overrides))
        summary = run(load_conf([*overrides, RETRY]))
    assert [record["settings"] for record in summary["out_of_memory"]] == [{"training.per_device_eval_batch_size": 2}]


CODE = """
import resource, sys
import psutil
from transformers import TrainerCallback
from dpo_runner import load_conf
from dpo_runner.io.console import RunConsole
from dpo_runner.io.exits import honest_exit
from dpo_runner.train import run

class Short(TrainerCallback):
    def on_train_begin(self, *args, **kwargs):
        now = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (now + 20_000_000, resource.RLIM_INFINITY))

with honest_exit("interrupted"):
    run(load_conf(sys.argv[1:]), callbacks=[Short()])
"""


def test_memory_that_is_really_too_little_is_told_in_one_line(tiny_run: list[str]) -> None:
    rows = [{"prompt": "Why? " * 300, "chosen": f"So {n}. " * 90, "rejected": f"No {n}. " * 90} for n in range(12)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    big = [
        "training.bf16=false",
        "training.max_length=4000",
        "engine.max_tokens_per_micro_batch=8000",
        "training.eval_strategy=no",
    ]
    big += ["training.per_device_train_batch_size=4", "samples.num_prompts=0", "data.eval_fraction=0", "run_dir=r"]
    result = run_python("-c", CODE, *tiny_run, *big)
    assert result.returncode == 1, result.stderr
    (line,) = result.stderr.splitlines()
    asked = r"([\d.]+ MB were asked for in one piece, with [\d.]+ MB free|[\d.]+ MB were free) on CPU"  # torch, Python
    assert re.match(f"error: out of memory in training: {asked}; ", line)
    assert "; by the estimate the run takes " in line and "; try engine.max_tokens_per_micro_batch=" in line
    log = Path("r/run.log").read_text()
    assert "Traceback" in log and (" asked for " not in line or "can't allocate memory" in log)
    assert read_status(Path("r"))["state"] == "failed"


class OutOfMemoryError(RuntimeError):
    """Has the name of torch's error."""


def test_memory_that_ran_out_is_recognised_wherever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        try:
            raise OutOfMemoryError("CUDA out of memory")
        except RuntimeError as error:
            raise RunError("the run failed") from error
    except RunError as error:
        assert is_out_of_memory(error)
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert is_out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"))
    assert not is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"))
    several_causes = [
        RuntimeError("could not create a primitive"),
        SystemError("error return without exception set"),
        SystemError("<built-in method mm> returned NULL without setting an exception"),
    ]
    assert not any(map(is_out_of_memory, several_causes))
    monkeypatch.setattr(device_memory, "read_memory", lambda of_host: ("CPU", 10**10, 10**7))
    assert all(map(is_out_of_memory, several_causes))
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize(
    ("told", "of_host"),
    [
        ("CUDA error: out of memory", False),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", False),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes", True),
    ],
)
def test_what_is_free_is_told_of_the_device_that_has_too_little(
    told: str, of_host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = {True: ("CPU", 10**10, 10**9), False: ("a GPU", 10**11, 5 * 10**9)}
    monkeypatch.setattr(device_memory, "read_memory", lambda of_host: free[of_host])
    expected = "free on CPU|were free on CPU" if of_host else "were free on a GPU"
    with pytest.raises(OutOfMemory, match=expected), watch_memory(TRAINING):
        raise RuntimeError(told)


def test_what_was_learnt_of_memory_is_on_record_from_a_runs_first_moment(
    tiny_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [{"part": "training", "sizes": "much", "settings": {"engine.max_tokens_per_micro_batch": 100}}]

    def killed(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunTrainer, "train", killed)
        with pytest.raises(RunInterrupted):
            run(load_conf([*tiny_run, RETRY, "run_dir=r"]))
    update_status(Path("r"), out_of_memory=records)
    with monkeypatch.context() as patch:
        patch.setattr(
            "dpo_runner.records.directory.RunDirectory.note", killed
        )  # the run is killed before the next step
        with pytest.raises(RunInterrupted):
            run(load_conf([*tiny_run, RETRY, "run_dir=r"]))
    status = read_status(Path("r"))
    assert status is not None and status["out_of_memory"] == records


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2000000000 bytes."),
            "2.00 GB",
        ),
        (MemoryError("Unable to allocate 512. MiB for an array with shape (1,)"), "536.9 MB"),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 KiB. GPU 0"), "0.0 MB"),
        (MemoryError(), None),
    ],
)
def test_the_inner_part_and_the_sizes_are_told(error: Exception, asked: str | None) -> None:
    with pytest.raises(OutOfMemory) as caught, watch_memory(TRAINING, 7), watch_memory(EVALUATION):
        raise error
    wanted = f"{asked} were asked for in one piece, with " if asked else ""
    assert re.match(rf"out of memory in evaluation: {wanted}[\d.,]+ [GM]B (were )?free on ", str(caught.value))
    assert caught.value.__cause__ is error and caught.value.tokens is None
    with pytest.raises(ValueError, match="other"), watch_memory(TRAINING):
        raise ValueError("other")


def test_smaller_batches_take_as_many_pairs_to_a_step() -> None:
    conf = load_conf(["training.per_device_train_batch_size=9", "training.gradient_accumulation_steps=2"])
    rows = [conf]
    while settings := find_smaller(rows[-1], TRAINING, None, 100):
        rows.append(with_settings(rows[-1], settings))
    sizes = [(c.training.per_device_train_batch_size, c.training.gradient_accumulation_steps) for c in rows]
    assert sizes == [(9, 2), (3, 6), (1, 18)]
    assert find_smaller(load_conf(["training.dataloader_drop_last=true"]), TRAINING, None, 100) == {}
    # 18 pairs of at most 100 tokens are 1800, so that a larger budget has no effect
    assert find_smaller(conf, TRAINING, 10**6, 100) == {"engine.max_tokens_per_micro_batch": 900}
    assert find_smaller(conf, TRAINING, 150, 100) == {"engine.max_tokens_per_micro_batch": 100}
    assert find_smaller(conf, TRAINING, 100, 100) == {}
    assert find_smaller(conf, ANSWERING, 100, 100) == {"training.per_device_eval_batch_size": 2}
    assert find_smaller(conf, LOADING, 100, 100) == {}
    assert list_ways(conf, LOADING, {}) == ["quant=nf4", "training.max_length=512 (longer pairs are then left out)"]
    assert "samples.max_new_tokens=128" in list_ways(conf, ANSWERING, {})


@pytest.mark.parametrize("loss", ["aot", "sft"])
def test_losses_of_whole_batches_are_not_tried_again(loss: str) -> None:
    with pytest.raises(ConfigError, match=rf"^`checks\.on_out_of_memory=smaller_batch`: loss_type={loss} is no sum"):
        load_conf([RETRY, f"training.loss_type={loss}"])
    with pytest.raises(ConfigError, match=r"on_out_of_memory=smaller_batch`: goes on from a checkpoint"):
        load_conf([RETRY, "training.sync_ref_model=true"])


def test_what_a_process_may_take_counts_as_free() -> None:
    code = """
import resource, psutil
from dpo_runner.training.memory.device import read_memory
plain = read_memory(True)[1:]
resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 50_000_000, -1))
print(plain[0] > 10**9, read_memory(True)[2] <= 50_000_000 < plain[1])
"""
    assert run_python("-c", code).stdout == "True True\n"
    assert read_memory(True)[0] == "CPU"

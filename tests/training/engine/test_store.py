"""Reference log-probabilities are computed once, and found again only for the same reference and pair."""

import json
import math
import re
import shutil
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.autograd import _functions
from bitsandbytes.nn import Linear8bitLt
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from dpo_runner import run
from dpo_runner.config.compose import load_conf
from dpo_runner.errors import ConfigError, RunError
from dpo_runner.model import quantization
from dpo_runner.training.engine.packed import forward as packed_forward
from dpo_runner.training.engine.reference.columns import REF_COLUMNS, evaluating, score_batch, score_pairs
from dpo_runner.training.engine.reference.store import PairLogps, ReferenceStore, list_references, make_room, store_dir
from dpo_runner.training.step0 import check_reference
from tests.support.common import make_adapter, make_tiny_run, write_pairs
from tests.support.engines import PACKED, STORED, is_packed, train
from tests.support.programs import start_python
from tests.support.starts import STARTS, name_paths
from tests.support.trainers import build, logps_of

FP32, BF16 = ("training.bf16=false",), ("training.bf16=true",)


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DPO_RUNNER_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def filled_by_a_run(own_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of a run in fp32 that has stored its reference."""
    folder = tmp_path_factory.mktemp("filled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DPO_RUNNER_CACHE", str(folder / "cache"))
        build([*make_tiny_run(write_pairs(folder)), *FP32, *STORED], folder)
    return folder / "cache"


@pytest.fixture
def filled(filled_by_a_run: Path, tmp_path: Path) -> None:
    """A copy of that cache as the own one."""
    shutil.copytree(filled_by_a_run, tmp_path / "cache")


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of pairs that each call scored with the reference."""
    from dpo_runner.training.engine.reference import columns as reference

    counts: list[int] = []

    def count(trainer: Any, rows: Any) -> Any:
        counts.append(len(rows))
        return score_pairs(trainer, rows)

    monkeypatch.setattr(reference, "score_pairs", count)
    return counts


def reference_of(trainer: Any) -> torch.Tensor:
    """Return the reference columns of the training rows, [2, rows]."""
    return torch.tensor([trainer.train_dataset[name] for name in REF_COLUMNS])


def by_hand(trainer: Any) -> torch.Tensor:
    """Return the same, [2, rows], each row scored alone from the logits of the model without its adapter."""
    with trainer.model.disable_adapter():
        return logps_of(trainer.model, list(trainer.train_dataset)).view(2, -1)


def score_anew(trainer: Any) -> torch.Tensor:
    """Return the same, [2, rows], as the engine scores the live reference."""
    fresh = score_pairs(trainer, list(trainer.train_dataset))
    return torch.tensor([[float(values.sum(dtype=np.float64)) for values in pair] for pair in fresh]).T


def test_it_holds_what_the_reference_gives(tiny_run: list[str], tmp_path: Path) -> None:
    trainer = build([*tiny_run, *FP32, *STORED], tmp_path)
    assert trainer.precompute_ref_logps
    torch.testing.assert_close(reference_of(trainer), by_hand(trainer), atol=1e-4, rtol=0)


def test_a_second_run_is_the_first_one_to_the_last_bit_wherever_its_reference_came_from(
    tiny_run: list[str], tmp_path: Path, scored: list[int]
) -> None:
    build([*tiny_run, *FP32, *STORED, "data.max_train_samples=5"], tmp_path)  # stores some of the pairs
    some, *_ = train([*tiny_run, *STORED], tmp_path, steps=4)
    scored.clear()
    all_there, weights, _ = train([*tiny_run, *STORED], tmp_path, steps=4)
    assert max(scored) <= 3, "only the sample that is checked"
    for path in store_dir().glob("*.sqlite"):
        path.unlink()
    _, others, trainer = train([*tiny_run, *STORED], tmp_path, steps=4)
    assert max(scored) > 3
    assert torch.equal(weights, others)
    for one, other in zip(some, all_there, strict=True):
        assert {k: v for k, v in one.items() if "runtime" not in k and "per_second" not in k} == {
            k: v for k, v in other.items() if "runtime" not in k and "per_second" not in k
        }
    assert is_packed(trainer)


def test_training_with_it_is_training_without(tiny_run: list[str], tmp_path: Path) -> None:
    live, weights, _ = train([*tiny_run, *PACKED], tmp_path)
    stored, others, _ = train([*tiny_run, *STORED], tmp_path)
    for expected, found in zip(live, stored, strict=True):
        for key in expected.keys() - {"train_runtime"}:
            # before the first step every pair is a tie that rounding decides
            if (
                "runtime" not in key
                and "per_second" not in key
                and not (key.endswith("accuracies") and expected["step"] == 1)
            ):
                assert abs(found[key] - expected[key]) <= 1e-5 * max(1, abs(expected[key])), (key, expected["step"])
    assert (others - weights).norm() <= 1e-5 * weights.norm()


def test_adapters_are_turned_off_once_for_many_pairs(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each switch in PEFT visits all modules, which takes as long as a small pair's forward."""
    trainer = build([*tiny_run, *FP32, *STORED], tmp_path)
    turned_off = []
    turn_off = PeftModel.disable_adapter
    monkeypatch.setattr(PeftModel, "disable_adapter", lambda self: turned_off.append(1) or turn_off(self))
    assert len(score_pairs(trainer, list(trainer.train_dataset))) == len(trainer.train_dataset) > 1 == len(turned_off)


MISSES = [  # changes to the reference or its input rows
    ["training.max_length=40", "data.on_overlong=trl"],
    ["training.max_length=40", "data.on_overlong=trl", "training.truncation_mode=keep_end"],
    ["model.dtype=bfloat16"],
    ["quant=nf4"],
    ["model.attn_implementation=eager"],
    ["engine.shared_prefix=false"],
    ["lora=none"],  # trains the head, which then uses another kernel
]

HITS = [
    ["training.beta=0.5"],
    ["training.learning_rate=1e-3"],
    ["training.loss_type=ipo"],
    ["seed=5"],
    ["lora.r=4"],
    ["lora.target_modules=[q_proj]"],
    ["data.max_train_samples=7"],
    ["training.per_device_train_batch_size=1"],
    ["training.ld_alpha=0.5"],
    ["training.gradient_checkpointing=true"],
    ["data.eval_fraction=0.4"],
    ["seed=5", "data.eval_fraction=0.3", "data.max_train_samples=9"],
]


@pytest.mark.parametrize("changes", MISSES, ids="+".join)
def test_another_reference_is_another_one(
    changes: list[str], tiny_run: list[str], tmp_path: Path, scored: list[int], filled: None
) -> None:
    """For truncated rows TRL's own cache returns the values of the first run to the second."""
    trainer = build([*tiny_run, *FP32, *STORED, *changes], tmp_path)
    assert sum(scored) >= len(trainer.train_dataset)
    assert torch.equal(reference_of(trainer), score_anew(trainer))


@pytest.mark.parametrize("changes", HITS, ids="+".join)
def test_what_leaves_the_reference_alone_finds_it(
    changes: list[str], tiny_run: list[str], tmp_path: Path, scored: list[int], filled: None
) -> None:
    trainer = build([*tiny_run, *FP32, *STORED, *changes], tmp_path)
    assert max(scored) <= 3, "only the sample that is checked"
    if "training.ld_alpha=0.5" not in changes:
        torch.testing.assert_close(reference_of(trainer), by_hand(trainer), atol=1e-4, rtol=0)


def test_an_untrained_adapter_on_an_sft_adapter_is_no_part_of_the_reference(
    tiny_run: list[str], sft_adapter: str, tmp_path: Path, scored: list[int]
) -> None:
    """TRL's `ref` beside the SFT adapter has another random lora_A with each seed and rank, and a lora_B of 0."""
    stack = [*tiny_run, *FP32, *STORED, f"model.adapter={sft_adapter}", "model.adapter_mode=stack", "lora=r16"]
    stack.append("lora.target_modules=[q_proj,embed_tokens]")  # of an embedding lora_B is random and lora_A 0
    build(stack, tmp_path)
    scored.clear()
    trainer = build([*stack, "seed=7", "lora.r=8"], tmp_path)
    assert max(scored) <= 3, "only the sample that is checked"
    assert torch.equal(reference_of(trainer), score_anew(trainer))


REFERENCES = {  # overrides, and the adapter that the reference has
    "new": ([], None),
    "continue": (["model.adapter=SFT"], "SFT"),
    "stack": (["model.adapter=SFT", "model.adapter_mode=stack", "lora=r16"], "SFT"),
    "merge": (["model.adapter=SFT", "model.adapter_mode=merge", "lora=r16"], "SFT"),
    "another adapter": (["model.reference=SFT"], "SFT"),
    "continue, against the base": (["model.adapter=SFT", "model.reference=base"], None),
    "stack, against the base": (
        ["model.adapter=SFT", "model.adapter_mode=stack", "lora=r16", "model.reference=base"],
        None,
    ),
    "stack, against an adapter": (
        ["model.adapter=SFT", "model.adapter_mode=stack", "lora=r16", "model.reference=REF"],
        "REF",
    ),
}


def test_each_start_finds_its_own_reference_in_a_store_that_all_others_have_filled(
    tiny_run: list[str], tiny_model: str, tmp_path: Path
) -> None:
    """Plain PEFT gives the expected values; the two SFT adapters differ in nothing but their weights or their scale."""
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    first, scaled = (
        make_adapter(tiny_model, tmp_path / n, 1, 0.1, use_rslora=n == "scaled", **settings)
        for n in ("first", "scaled")
    )
    second = make_adapter(tiny_model, tmp_path / "second", seed=2, std=0.1, **settings)
    expected: dict[str | None, torch.Tensor] = {}
    for sft, ref in ((first, second), (second, scaled), (scaled, first)):
        for overrides, adapter in REFERENCES.values():
            trainer = build(
                [*tiny_run, *FP32, *STORED, "data.max_train_samples=4", *name_paths(overrides, SFT=sft, REF=ref)],
                tmp_path,
            )
            folder = {"SFT": sft, "REF": ref, None: None}[adapter]
            if folder not in expected:
                base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
                plain = PeftModel.from_pretrained(base, folder) if folder else base
                expected[folder] = logps_of(plain, list(trainer.train_dataset)).view(2, -1)
            torch.testing.assert_close(reference_of(trainer), expected[folder], atol=2e-3, rtol=0)
    values = torch.stack([*expected.values()])
    assert (values[:, None] - values[None]).abs().amax((2, 3)).add(torch.eye(4)).min() > 0.05


def test_rows_that_depend_on_their_batch_are_not_stored(tiny_run: list[str], tiny_model: str, tmp_path: Path) -> None:
    """With dynamic RoPE the longest row sets the frequencies of all; policy and reference score the same batches."""
    folder = tmp_path / "dynamic"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    rope = {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 10_000.0}
    config |= {"max_position_embeddings": 40, "rope_parameters": rope}
    (folder / "config.json").write_text(json.dumps(config))
    long = {"prompt": "Count. " * 9, "chosen": "One, two, three. " * 4, "rejected": "No. " * 9}
    with Path("pairs.jsonl").open("a") as file:
        file.writelines(json.dumps({**long, "prompt": f"{n} {long['prompt']}"}) + "\n" for n in range(12))
    overrides = [*tiny_run, f"model.model_name_or_path={folder}", *FP32, *STORED, "data.eval_fraction=0.4"]
    overrides += ["training.per_device_eval_batch_size=4"]
    trainer = build(overrides, tmp_path)
    assert not is_packed(trainer) and REF_COLUMNS[0] not in trainer.train_dataset.column_names
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics["eval_rewards/margins"] == pytest.approx(0, abs=1e-5)
    short = [*overrides, "training.max_length=40", "data.on_overlong=trl"]
    assert REF_COLUMNS[0] in build(short, tmp_path).train_dataset.column_names
    with pytest.raises(ConfigError, match=r"precompute_ref_log_probs=True`: the model's dynamic RoPE depends on"):
        run(load_conf([*overrides, "training.precompute_ref_log_probs=true", "dry_run=true"]))


@pytest.fixture
def int8_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """LLM.int8 in full, in training too: bitsandbytes has the same algorithm for all devices."""
    monkeypatch.setattr(_functions, "MatMul8bitFp", _functions.MatMul8bitLt)
    for module in (quantization, packed_forward):
        monkeypatch.setattr(module, "rounds_inputs", lambda use_cpu: True)


INT8 = ("quant=int8", "quant.llm_int8_threshold=0.5", "training.max_steps=1")


def score_first(trainer: Any, rows: int) -> torch.Tensor:
    """Return the policy's log p of the first row's chosen answer, [tokens], scored in a batch of so many rows."""
    with evaluating(trainer), torch.no_grad():
        pairs = score_batch(trainer, trainer.model, [trainer.train_dataset[index] for index in range(rows)])
    return torch.from_numpy(pairs[0].chosen)


@pytest.mark.usefixtures("int8_as_on_a_gpu")
@pytest.mark.parametrize("own", [False, True], ids=["quant", "checkpoint"])
def test_on_a_gpu_outliers_of_int8_keep_the_reference_in_the_policys_batches(
    own: bool, tiny_run: list[str], tiny_model: str, tmp_path: Path
) -> None:
    """LLM.int8 leaves a column out for all rows."""
    int8 = [*tiny_run, *FP32, *STORED, *INT8]
    if own:
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.5)
        AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=config).save_pretrained("int8")
        AutoTokenizer.from_pretrained(tiny_model).save_pretrained("int8")
        int8 = [*tiny_run, *FP32, *STORED, "model.model_name_or_path=./int8", "training.max_steps=1"]
    trainer = build(int8, tmp_path)
    assert not is_packed(trainer) and REF_COLUMNS[0] not in trainer.train_dataset.column_names
    assert check_reference(trainer) == 0
    layer = next(layer for layer in trainer.model.modules() if isinstance(layer, Linear8bitLt))
    inputs = torch.randn(2, 3, layer.in_features) * torch.tensor([0.1, 1.0]).view(2, 1, 1)
    assert not torch.equal(layer(inputs[:1])[0], layer(inputs)[0]), "the stand-in is none"
    trainer.train()
    losses = [event["loss"] for event in trainer.state.log_history if "loss" in event]
    assert losses == [pytest.approx(math.log(2), abs=1e-6)]
    with pytest.raises(ConfigError, match=r"precompute_ref_log_probs=True`: LLM.int8 computes a column in 16 bits"):
        run(load_conf([*int8, "training.precompute_ref_log_probs=true", "dry_run=true"]))


def test_on_a_cpu_int8_computes_in_evaluation_what_it_trains_and_rows_do_not_mix(
    tiny_run: list[str], tmp_path: Path
) -> None:
    trainer = build([*tiny_run, *FP32, *STORED, *INT8], tmp_path)
    assert is_packed(trainer) and REF_COLUMNS[0] in trainer.train_dataset.column_names
    layer = next(layer for layer in trainer.model.modules() if isinstance(layer, Linear8bitLt))
    inputs = torch.randn(2, 3, layer.in_features) * torch.tensor([1.0, 9.0]).view(2, 1, 1)
    trained, evaluated = (layer.train(mode)(inputs) for mode in (True, False))
    assert torch.equal(trained, evaluated)
    torch.testing.assert_close(layer(inputs[:1])[0], evaluated[0])
    torch.testing.assert_close(score_first(trainer, 1), score_first(trainer, 4), atol=1e-4, rtol=0)
    assert check_reference(trainer) < 1e-5
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    losses = [event["loss"] for event in trainer.state.log_history if "loss" in event]
    assert [before, *losses] == [pytest.approx(math.log(2), abs=1e-5)] * 2


def test_another_order_finds_it(tiny_run: list[str], pairs: str, tmp_path: Path, scored: list[int]) -> None:
    before = build([*tiny_run, *FP32, *STORED], tmp_path)
    lines = Path(pairs).read_text().splitlines(keepends=True)
    Path(pairs).write_text("".join(lines[::-1]))
    scored.clear()
    after = build([*tiny_run, *FP32, *STORED], tmp_path)
    assert list(after.train_dataset["prompt_ids"]) != list(before.train_dataset["prompt_ids"])
    assert max(scored) <= 3, "only the sample that is checked"
    torch.testing.assert_close(reference_of(after), by_hand(after), atol=1e-4, rtol=0)


def test_other_precision_of_fp32_products_is_another_reference(
    tiny_run: list[str], tmp_path: Path, scored: list[int], filled: None
) -> None:
    """`training.tf32` sets it on a GPU."""
    products = torch.backends.mkldnn.matmul
    before, products.fp32_precision = products.fp32_precision, "ieee"
    try:
        trainer = build([*tiny_run, *FP32, *STORED], tmp_path)
    finally:
        products.fp32_precision = before
    assert sum(scored) >= len(trainer.train_dataset)


def test_ld_alpha_is_applied_to_what_is_stored(tiny_run: list[str], tmp_path: Path, filled: None) -> None:
    """TRL's own cache wrongly returns the values of None for 0.0."""
    for alpha in (0.0, 0.5):
        trainer = build([*tiny_run, *FP32, *STORED, f"training.ld_alpha={alpha}"], tmp_path)
        batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
        stored = torch.stack([batch.pop(name) for name in REF_COLUMNS])
        live = torch.stack(trainer.compute_ref_log_probs(trainer.model, batch))
        torch.testing.assert_close(stored, live, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "precision, shift, spike, is_refused",
    [
        (FP32, 0.0, 5e-4, False),  # in one token
        (FP32, 1e-3, 0.0, True),
        (BF16, 0.0, 0.3, False),
        (BF16, 0.05, 0.0, True),  # below the rounding of single tokens, but in all of them
        (BF16, 0.0, 3.0, True),
    ],
)
def test_values_that_the_reference_does_not_give_are_refused(
    precision: list[str], shift: float, spike: float, is_refused: bool, tiny_run: list[str], tmp_path: Path
) -> None:
    build([*tiny_run, *precision, *STORED], tmp_path)
    (path,) = store_dir().glob("*.sqlite")
    with sqlite3.connect(path) as database:
        for key, *answers in database.execute("SELECT key, chosen, rejected FROM pairs").fetchall():
            wrong = [np.frombuffer(values, np.float32) + np.float32(shift) for values in answers]
            wrong[0][3] += np.float32(spike)
            values = [values.tobytes() for values in wrong]
            database.execute("UPDATE pairs SET chosen = ?, rejected = ? WHERE key = ?", [*values, key])
    if not is_refused:
        build([*tiny_run, *precision, *STORED], tmp_path)
        return
    with pytest.raises(RunError, match=r"does not give: 3 pairs .*differ by .*dpo_runner.cache clear reference"):
        build([*tiny_run, *precision, *STORED], tmp_path)


def test_a_damaged_file_is_named(tiny_run: list[str], tmp_path: Path, filled: None) -> None:
    (path,) = store_dir().glob("*.sqlite")
    path.write_bytes(b"SQLite format 3\0" + b"\x17" * 5000)
    with pytest.raises(RunError, match=f"{path.name}.*clear reference"):
        build([*tiny_run, *FP32, *STORED], tmp_path)
    assert list_references()[0].pairs is None


def test_processes_share_the_work_and_the_file(tmp_path: Path) -> None:
    program = """
        import sys, random
        import numpy as np
        from dpo_runner.training.engine.reference.store import PairLogps, ReferenceStore
        with ReferenceStore("shared", {}, 10**9) as store:
            for start in range(0, 400, 20):
                keys = [bytes([k // 256, k % 256]) for k in range(start, start + 20)]
                known = store.find(keys)
                rows = {k: PairLogps(*[np.full(3, int.from_bytes(k), np.float32)] * 2) for k in keys}
                store.add({k: logps for k, logps in rows.items() if k not in known})
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    with ReferenceStore("shared", {}, 10**9) as store:
        keys = [bytes([k // 256, k % 256]) for k in range(400)]
        found = store.find([*keys, b"not there"])
        assert set(found) == set(keys)
        assert all(found[key].chosen.tolist() == [int.from_bytes(key)] * 3 for key in keys)


def test_runs_at_once_fill_one_store_and_each_is_the_run_alone(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    betas = (0.1, 0.2, 0.3)

    def start(beta: float, folder: str) -> Any:
        quick = ["training.max_steps=2", "training.eval_strategy=no", "samples.num_prompts=0", f"training.beta={beta}"]
        command = ["-m", "dpo_runner", *tiny_run, *quick, f"run_dir={folder}"]
        return start_python(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def read(folder: str) -> bytes:
        return (tmp_path / folder / "adapter" / "adapter_model.safetensors").read_bytes()

    running = [start(beta, f"at_once_{beta}") for beta in betas]
    for process in running:
        assert process.wait() == 0, process.communicate()[0]
    (found,) = list_references()
    monkeypatch.setenv("DPO_RUNNER_CACHE", str(tmp_path / "other"))
    alone = start(betas[1], "alone")
    assert alone.wait() == 0, alone.communicate()[0]
    assert list_references()[0].pairs == found.pairs
    assert read("alone") == read(f"at_once_{betas[1]}") != read(f"at_once_{betas[0]}")


def test_a_file_of_another_user_is_one_line_and_stays() -> None:
    put("mine")
    (store_dir() / "mine.lock").unlink()
    (store_dir() / "mine.lock").mkdir()  # cannot be opened
    with pytest.raises(
        RunError, match=r"mine\.sqlite: the cache cannot be written; .*; DPO_RUNNER_CACHE names another"
    ):
        put("mine")
    assert make_room(0) == [] and [path.name for path in store_dir().glob("*.sqlite")] == ["mine.sqlite"]


def put(digest: str, limit: int = 10**9, pairs: int = 20) -> int:
    """Fill a reference's file with 16 kB per pair, and return how many pairs had no room."""
    with ReferenceStore(digest, {"model": digest}, limit) as store:
        for k in range(pairs):
            store.add({bytes([k]): PairLogps(*[np.full(2000, k, np.float32)] * 2)})
        assert store.path.stat().st_size <= limit
        kept = store.find([bytes([k]) for k in range(pairs)])
        assert all((logps.chosen == key[0]).all() for key, logps in kept.items())
        assert len(kept) == pairs - store.left_out
        return store.left_out


def size_of_all() -> int:
    return sum(found.size for found in list_references())


def test_the_least_recently_used_make_room_and_nothing_in_use_does() -> None:
    for digest in ("a", "b", "c"):
        put(digest)
    size = list_references()[0].size
    with ReferenceStore("a", {}, 10**9):  # the oldest one is in use again
        assert [path.stem for path in make_room(int(1.5 * size))] == ["b", "c"]
    assert [(found.path.stem, found.pairs, found.description) for found in list_references()] == [
        ("a", 20, {"model": "a"})
    ]


def test_the_file_in_use_stays_within_the_limit_too() -> None:
    put("old")
    size = size_of_all()
    assert put("new", limit=size) == 0, "the other one has made room"
    assert [found.path.stem for found in list_references()] == ["new"] and size_of_all() == size
    assert put("more", limit=size, pairs=30) == 10
    assert size_of_all() <= size
    with ReferenceStore("more", {}, size // 2) as store:
        assert len(store.find([bytes([k]) for k in range(30)])) == 20
    assert not list_references(), "filled under another limit"


def test_what_is_in_use_leaves_less_room_and_is_not_deleted() -> None:
    put("used")
    size = size_of_all()
    with ReferenceStore("used", {}, 10**9):
        left_out = put("new", limit=int(1.5 * size))
        assert 8 <= left_out <= 12 and size < size_of_all() <= 1.5 * size


def test_several_processes_keep_the_limit_together(tmp_path: Path) -> None:
    limit = 200_000
    program = """
        import sys
        import numpy as np
        from dpo_runner.training.engine.reference.store import PairLogps, ReferenceStore, _stat_files, _writing
        name, limit = sys.argv[1], int(sys.argv[2])
        with ReferenceStore(name, {}, limit) as store:
            for k in range(60):
                store.add({bytes([k, len(name)]): PairLogps(*[np.zeros(500, np.float32)] * 2)})
                with _writing():  # else a file may be deleted, and another grow, between two looks
                    assert sum(stat.st_size for _, stat in _stat_files()) <= limit + 2 * 12288  # made empty
            assert store.left_out
    """
    names = ("one", "one", "other")
    processes = [start_python("-c", textwrap.dedent(program), name, str(limit)) for name in names]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert 0 < size_of_all() <= limit  # the last process may have deleted the files of the others, which had ended


def test_a_run_says_how_many_pairs_it_does_not_keep(
    tiny_run: list[str], tmp_path: Path, scored: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        scored.clear()
        caplog.clear()
        with caplog.at_level("INFO"):
            trainer = build([*tiny_run, *FP32, *STORED, "engine.reference_store_gb=12e-6"], tmp_path)
        assert sum(scored) >= len(trainer.train_dataset)
        (told,) = [text for text in caplog.messages if "reference_store_gb" in text]
        assert re.match(r"engine\.reference_store_gb=1\.2e-05: the store is full; 24 pairs were scored and not", told)
        assert not list_references()
    torch.testing.assert_close(reference_of(trainer), by_hand(trainer), atol=1e-4, rtol=0)


@pytest.mark.parametrize("start", STARTS)
def test_whatever_the_reference_is_the_store_has_what_it_gives(
    start: str, tiny_run: list[str], sft_adapter: str, tiny_model: str, tmp_path: Path
) -> None:
    named = name_paths(STARTS[start], SFT=sft_adapter, MODEL=tiny_model)
    live = build([*tiny_run, *FP32, *named], tmp_path)
    stored = build([*tiny_run, *FP32, *named, *STORED], tmp_path)
    rows = [live.train_dataset[index] for index in range(len(live.train_dataset))]
    batch = live.data_collator(rows)
    if "ref_chosen_logps" in batch:  # TRL's own precomputed values
        expected = torch.stack([batch.pop(name) for name in REF_COLUMNS])
    else:
        expected = torch.stack(live.compute_ref_log_probs(live.ref_model or live.model, batch))
    torch.testing.assert_close(reference_of(stored), expected, atol=2e-4, rtol=0)
    assert stored.ref_model is None


def test_weights_that_cannot_be_told_apart_are_not_stored(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from dpo_runner.training.engine.reference import identity

    monkeypatch.setattr(identity, "_TENSORS", ())
    with caplog.at_level("INFO"):
        trainer = build([*tiny_run, *FP32, *STORED], tmp_path)
    assert not trainer.precompute_ref_logps and not list(store_dir().glob("*.sqlite"))
    assert any("the reference is computed in every step" in record.message for record in caplog.records)

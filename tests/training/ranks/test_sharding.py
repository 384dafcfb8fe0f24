"""Weights that are divided between processes: the results, files and checkpoints of one process."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dpo_runner import RunConf, load_conf
from dpo_runner.config.compose import load_conf as compose
from dpo_runner.errors import ConfigError
from dpo_runner.model.blueprint import draw_blueprint
from dpo_runner.model.files.pickles import refuse_pickled_code
from dpo_runner.records.reading import read_metrics, read_summary
from dpo_runner.training.engine.token_batches import TokenBatches
from dpo_runner.training.ranks.launch import launch
from tests.support.common import write_pairs
from tests.support.ranks import train
from tests.support.trainers import build
from tests.training.ranks.test_processes import figures_of, overrides_of

SHARDED = ("distributed=fsdp2", "launch.processes=2")
VARIANTS = {
    # few tokens: the processes have 3 and 2 micro-batches in some steps; rows that do not divide
    "lora": ["engine.max_tokens_per_micro_batch=150"],
    "full": ["lora=none", "training.learning_rate=1e-5", "training.load_best_model_at_end=true"],
    "batches": ["engine.shared_prefix=false", "training.loss_type=[sigmoid,sft]", "engine.reference_store=false"],
    "pissa": ["lora.init_lora_weights=pissa", "training.max_grad_norm=0"],
    "bad": ["checks.on_nonfinite=skip_batch", "checks.max_skipped_batches=9"],  # the first process looks for the row
    "nf4": ["quant=nf4", "quant.bnb_4bit_quant_storage=bfloat16", "training.bf16=true", "engine.reference_store=false"],
}


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / "adapter/adapter_model.safetensors"
    return load_file(path if path.exists() else folder / "model/model.safetensors")


def distance(one: Path, other: Path) -> float:
    a, b = load_weights(one), load_weights(other)
    assert a.keys() == b.keys()
    difference = sum(float((a[name] - b[name]).double().square().sum()) for name in a)
    return (difference / sum(float(weight.double().square().sum()) for weight in a.values())) ** 0.5


def cut_short(folder: Path) -> None:
    """Turn a finished run into one that was interrupted after its checkpoint at step 2."""
    for path in (folder / name for name in ("summary.json", "adapter", "checkpoints/checkpoint-4")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    status = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps({**status, "state": "interrupted"}))


@pytest.fixture(scope="module")
def confs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], RunConf]:
    """Runs by variant and number of processes; those of two have their weights divided."""
    folder = tmp_path_factory.mktemp("sharded")
    steps = ["training.max_steps=4", "training.save_steps=2", "training.eval_steps=2", "samples.num_prompts=3"]
    common = [*overrides_of(write_pairs(folder)), *steps]
    return {
        (name, count): load_conf(
            [
                *(*common, *more, f"run_dir={folder}/{name}-{count}", *(SHARDED if count == 2 else ())),
                f"training.gradient_accumulation_steps={6 // count}",
            ]
        )
        for name, more in VARIANTS.items()
        for count in (1, 2)
    }


@pytest.fixture(scope="module")
def folder(confs: dict[tuple[str, int], RunConf]) -> Path:
    """The folder of all runs, done."""
    folder = Path(str(confs["lora", 1].run_dir)).parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
        row = build([*overrides_of(str(folder / "pairs.jsonl"))], folder / "unused").train_dataset[7]
        bad_row = [*row["prompt_ids"], *row["chosen_ids"]]
        launch(partial(train, [confs[name, 2] for name in VARIANTS], bad_row=bad_row), 2, folder)
        patch.setattr(TokenBatches, "compute_loss", TokenBatches.compute_loss)  # undone at the end
        train([confs[name, 1] for name in VARIANTS], bad_row=bad_row)
        shutil.copytree(folder / "lora-2", folder / "kept-2")
        shutil.copytree(folder / "lora-2", folder / "kept-1")
        cut_short(folder / "lora-2")
        launch(partial(train, [confs["lora", 2]]), 2, folder)
    return folder


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "nf4"])
def test_divided_weights_train_as_whole_ones(folder: Path, name: str) -> None:
    one, two = folder / f"{name}-1", folder / f"{name}-2"
    assert distance(one, two) < 1e-6
    for event, expected in zip(figures_of(two), figures_of(one), strict=True):
        assert event == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert (one / "samples.jsonl").read_text() == (two / "samples.jsonl").read_text()
    for part in ("before", "after"):
        assert read_summary(two)[part] == pytest.approx(read_summary(one)[part], rel=1e-5, abs=1e-5)


def test_a_bad_row_is_found_with_divided_weights(folder: Path) -> None:
    dump = json.loads(next((folder / "bad-2/nonfinite").iterdir()).read_text())
    assert [pair["row"] for pair in dump["pairs"] if not pair["finite"]] == [7]


def test_4_bit_weights_are_divided_and_log_probabilities_keep_their_digits(folder: Path) -> None:
    first = [next(event for event in read_metrics(folder / f"nf4-{count}") if "loss" in event) for count in (1, 2)]
    assert first[1]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert first[1]["logps/chosen"] == pytest.approx(first[0]["logps/chosen"], rel=1e-4)  # 16 bits have 3 digits
    assert distance(folder / "nf4-1", folder / "nf4-2") < 1e-2
    whole = sum(weight.nbytes for weight in draw_blueprint(compose(["model=tiny_random"])).meta.parameters())
    assert sum(read_parts(folder / "nf4-2")[0]) < whole


def read_parts(run: Path) -> tuple[list[int], list[int]]:
    weights, states = zip(*(json.loads((run / f"parts-{rank}.json").read_text()) for rank in (0, 1)), strict=True)
    return list(weights), list(states)


def test_each_process_has_half_of_the_weights_and_of_the_optimizer(folder: Path) -> None:
    for name in ("lora", "full"):
        whole = json.loads((folder / f"{name}-1/parts-0.json").read_text())
        for total, parts in zip(whole, read_parts(folder / f"{name}-2"), strict=True):
            assert total and sum(parts) == pytest.approx(total, rel=0.02)
            assert max(parts) < 0.55 * total


def test_checkpoints_are_those_of_one_process_and_either_continues_them(
    confs: dict[tuple[str, int], RunConf], folder: Path
) -> None:
    for name in ("adapter/adapter_model.safetensors", "samples.jsonl"):  # continued by two in the fixture
        assert (folder / "lora-2" / name).read_bytes() == (folder / "kept-2" / name).read_bytes()
    for name in ("lora", "full"):
        checkpoints = [folder / f"{name}-{count}/checkpoints/checkpoint-2" for count in (1, 2)]
        refuse_pickled_code(checkpoints[1])
        files = [{path.relative_to(each) for path in each.rglob("*")} for each in checkpoints]
        assert files[0] == files[1]
        states = [torch.load(each / "optimizer.pt", weights_only=True)["state"] for each in checkpoints]
        for index, values in states[0].items():
            assert values["exp_avg"].shape == states[1][index]["exp_avg"].shape
    shutil.rmtree(folder / "lora-1")
    shutil.copytree(folder / "kept-1", folder / "lora-1")
    cut_short(folder / "lora-1")
    train([confs["lora", 1]])
    assert distance(folder / "lora-1", folder / "kept-1") < 1e-6


def test_settings_that_do_not_go_with_divided_weights_are_refused(tmp_path: Path) -> None:
    several = ["model=tiny_random", *SHARDED]
    for further, told in {
        ("quant=int8",): "`quant`: training.fsdp=True cannot divide int8 weights; use quant=nf4",
        ("training.optim=adafactor",): r"`training\.optim=adafactor`: with .* which only some optimizers allow: adamw",
        ("training.fp16=true", "training.bf16=false"): r"`training\.fp16=True`: does not go with training\.fsdp=True",
        ("model.reference=x",): r"`model\.reference=x`: training\.fsdp=True keeps no second model",
        ("lora=none", "engine.reference_store=false"): r"`engine\.reference_store=False`: .* use engine\.reference",
        ("training.fsdp_config={version: 1}",): r"`training\.fsdp_config\.version=1`: must be 2",
        ("training.fsdp_config={offload: true}",): r"`training\.fsdp_config\.offload`: is not supported; there are",
        ("training.fsdp_config=a.json",): r"`training\.fsdp_config=a\.json`: must be a map",
        ("training.parallelism_config={dp_replicate_size: 3}",): r"must be the number of processes, 2",
        ("training.parallelism_config={tp_size: 2}",): r"`training\.parallelism_config\.tp_size`: is not supported",
        ("training.parallelism_config={dp_shard_size: 0}",): r"dp_shard_size=0`: must be a whole number, at least 1",
        ("training.fsdp=false", "distributed=hsdp"): r"`training\.parallelism_config=.*`: needs training\.fsdp=true",
        ("training.deepspeed={a: 1}",): r"`training\.deepspeed`: its checkpoints hold pickles",
        ("distributed=zero3",): r"`distributed=zero3`: no such option; DeepSpeed writes pickles",
    }.items():
        with pytest.raises(ConfigError, match=told):
            load_conf([*several, *further])
    alone = load_conf(["model=tiny_random", "distributed=fsdp2", f"run_dir={tmp_path}/r", "training.use_cpu=true"])
    with pytest.raises(ConfigError, match=r"`training\.fsdp=True`: divides .* there is one; use launch\.processes=N"):
        train([alone])

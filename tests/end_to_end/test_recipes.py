"""Published recipes on stand-ins: all are planned, one reproduces a trajectory of TRL's, figures are compared."""

import io
import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from transformers import TrainerCallback

from dpo_runner import run
from dpo_runner.compare.comparison import DEFAULT_OBJECTIVE, Objective, compare_runs
from dpo_runner.compare.page import build_page
from dpo_runner.config.compose import load_conf
from dpo_runner.config.yaml_files import CONF_DIR
from dpo_runner.errors import RunInterrupted
from dpo_runner.io.console import RunConsole
from dpo_runner.records.differences import find_changes
from dpo_runner.records.reading import read_run_conf
from dpo_runner.records.runs import read_runs
from tests.support.families import make_family

RECIPES = sorted(path.stem for path in (CONF_DIR / "experiment").glob("*.yaml") if "\nexpected:" in path.read_text())
LOCAL = ["data=local_file", "data.split=train", "data.eval_split=null", "data.subset=null", "model.revision=null"]


def run_shown(overrides: list[str], config_dir: Path | None = None, callbacks: Sequence[TrainerCallback] = ()) -> str:
    """Run, and return what the terminal showed, also if the run is interrupted."""
    text = io.StringIO()
    conf = load_conf(overrides, None if config_dir is None else str(config_dir))
    try:
        run(conf, overrides, RunConsole(Console(file=text, width=500)), callbacks)
    except RunInterrupted:
        assert callbacks
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_planned_on_stand_ins(recipe: str, tiny_model: str, sft_adapter: str, pairs: str) -> None:
    overrides = [f"experiment={recipe}", f"model.model_name_or_path={tiny_model}", *LOCAL, f"data.path={pairs}"]
    conf = load_conf([f"experiment={recipe}"])
    if conf.model.adapter is not None:
        overrides.append(f"model.adapter={sft_adapter}")
    shown = run_shown([*overrides, "dry_run=true"])
    training = conf.training
    pairs_a_step = training.per_device_train_batch_size * training.gradient_accumulation_steps
    assert f"{pairs_a_step} pairs a step" in shown and f"beta {training.beta:g}" in shown
    assert "figures (expected) beside this run's, which is set otherwise: model." in shown


def write_recipe(folder: Path, **lines: Any) -> Path:
    """Write a user's experiment `mine`, and return the folder to look it up in."""
    (folder / "experiment").mkdir(parents=True)
    (folder / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{yaml.safe_dump(lines, sort_keys=False)}")
    return folder


def read_expected(run_dir: str) -> dict[str, Any]:
    record = json.loads(Path(run_dir, "summary.json").read_text())["expected"]
    assert isinstance(record, dict)
    return record


def test_the_shape_of_trl_invariant_gives_trls_own_trajectory(tokenizer: Any, tmp_path: Path) -> None:
    """Tiny weights and a learning rate that moves them; prompts within the conversations, some pairs too long."""
    from datasets import load_dataset
    from trl import DPOConfig, DPOTrainer

    model = make_family("qwen2", tokenizer, tmp_path / "model")
    rows = []
    for number in range(44):
        prompt = {"role": "user", "content": f"What is {number} plus {number}? " * (1 + 12 * (number % 11 == 0))}
        answers = {"chosen": f"It is {2 * number}. " * (1 + number % 5), "rejected": f"I would say {number}, or so."}
        row = {name: [prompt, {"role": "assistant", "content": text}] for name, text in answers.items()}
        rows.append(json.dumps(row | {"score_chosen": 8.0, "score_rejected": 5.0}))
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows) + "\n")

    args = DPOConfig(
        output_dir=str(tmp_path / "trl"),
        model_init_kwargs={"attn_implementation": "eager", "dtype": "float32"},
        learning_rate=1e-3,
        max_steps=50,
        max_length=256,
        logging_steps=1,
        report_to="none",
        seed=42,
        data_seed=42,
        bf16=False,
        save_strategy="no",
    )
    dataset = load_dataset("json", data_files=str(tmp_path / "pairs.jsonl"), split="train", cache_dir=str(tmp_path))
    trainer = DPOTrainer(model=model, args=args, train_dataset=dataset)
    trainer.train()
    steps = [event for event in trainer.state.log_history if "loss" in event]
    figures = {name: [event[name] for event in steps] for name in ("loss", "grad_norm")}
    assert len(steps) == 50 and min(figures["loss"]) < 0.3 < 0.69 < figures["loss"][0]

    entries = [
        {"metric": name, "step": 1, "values": values, "tolerance": tolerance, "source": "trl"}
        for (name, values), tolerance in zip(figures.items(), (1e-5, 1e-4), strict=True)
    ]
    folder = write_recipe(
        tmp_path / "mine",
        defaults=["trl_invariant", {"override /wandb": "disabled"}, "_self_"],
        model={"model_name_or_path": model, "revision": None},
        data={"path": str(tmp_path / "pairs.jsonl")},
        training={"learning_rate": 1e-3, "max_length": 256, "full_determinism": False},
        expected=entries,
    )
    shown = run_shown(["experiment=mine", "run_dir=run"], folder)
    record = read_expected("run")
    assert record["told"] == ["published figures: 100 inside"]
    assert shown.count(": inside; grad_norm") == 50
    assert f"step 50: loss {record['figures'][49]['value']:.6g}, published " in shown


class StopAt(TrainerCallback):  # type: ignore[misc]
    """Interrupts the run after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            signal.raise_signal(signal.SIGTERM)


GROUPS = {"model": "tiny_random", "training": "smoke", "data": "local_file", "wandb": "disabled"}


@pytest.fixture
def mine(pairs: str, tmp_path: Path) -> Path:
    """A recipe of four steps that evaluates at steps 2 and 4, with figures inside, outside and not reached."""
    return write_recipe(
        tmp_path / "mine",
        defaults=[{f"override /{group}": option} for group, option in GROUPS.items()],
        data={"path": pairs},
        samples={"num_prompts": 0},
        training={"learning_rate": 1e-3},
        expected=[
            {"metric": "loss", "step": 1, "values": [0.6931, 0.7], "tolerance": 1e-3, "source": "a paper"},
            {"metric": "eval_loss", "step": 2, "low": 0.6, "high": 0.69, "source": "a card"},
            {"metric": "eval_loss", "step": 3, "low": 0.6, "high": 0.69, "source": "a card"},
            {"metric": "eval_loss", "high": 0.69, "source": "a card"},
        ],
    )


VERDICTS = {("loss", 1): "inside", ("loss", 2): "outside", ("eval_loss", 2): "inside"}
VERDICTS |= {("eval_loss", 3): "not reached", ("eval_loss", "end"): "inside"}
COUNTS = "published figures: 3 inside, 1 outside (loss at step 2), 1 not reached (eval_loss at step 3)"


def test_published_figures_are_shown_at_their_steps_and_recorded(mine: Path) -> None:
    shown = run_shown(["experiment=mine", "run_dir=whole"], mine)
    record = read_expected("whole")
    assert {(each["metric"], each["step"]): each["verdict"] for each in record["figures"]} == VERDICTS
    events = [json.loads(line) for line in Path("whole/metrics.jsonl").read_text().splitlines()]
    [at_two] = [event["eval_loss"] for event in events if event["step"] == 2 and "eval_loss" in event]
    assert record["figures"][2] == {
        **{"metric": "eval_loss", "step": 2, "low": 0.6, "high": 0.69, "source": "a card"},
        **{"value": at_two, "verdict": "inside"},
    }
    lines = shown.splitlines()
    assert lines.count("step 1: loss 0.693147, published 0.6921 to 0.6941: inside") == 1
    assert lines.count(f"step 2: eval_loss {at_two:.6g}, published 0.6 to 0.69: inside") == 1
    places = [next(i for i, line in enumerate(lines) if line.startswith(text)) for text in ("step 1: ", "step 4/4")]
    assert places == sorted(places) and lines.index(COUNTS) > places[1]
    assert "published        5 figures (expected) beside this run's\n" in shown
    card = Path("whole/adapter/README.md").read_text()
    assert "## Published figures" in card and "otherwise" not in card
    assert f"| 2 | `eval_loss` | 0.6 to 0.69 | {at_two:.4g} | inside | a card |" in card
    assert "| 3 | `eval_loss` | 0.6 to 0.69 |  | not reached | a card |" in card

    stopped = run_shown(["experiment=mine", "run_dir=resumed"], mine, [StopAt(3)])
    assert "step 1: loss" in stopped and "published figures" not in stopped
    rest = run_shown(["experiment=mine", "run_dir=resumed"], mine)
    assert "step 1: loss" not in rest and COUNTS in rest.splitlines()
    assert read_expected("resumed") == record  # figures from before the interruption count too

    assert read_run_conf(Path("whole")).expected == load_conf(["experiment=mine"], str(mine)).expected
    runs, _ = read_runs([Path("whole"), Path("resumed")])
    comparison = compare_runs(runs, Objective(DEFAULT_OBJECTIVE, minimize=False))
    assert {f"{name}: {COUNTS}" for name in ("whole", "resumed")} <= set(comparison.notes)
    assert not any(key.startswith("expected") for key in comparison.settings)
    assert f"whole: {COUNTS}" in build_page(comparison)


def test_a_run_that_is_set_otherwise_than_its_recipe_is_not_judged(mine: Path) -> None:
    shown = run_shown(["experiment=mine", "run_dir=other", "training.beta=0.2", "data.max_train_samples=9"], mine)
    record = read_expected("other")
    assert record["changes"] == {"data.max_train_samples": [9, None], "training.beta": [0.2, 0.1]}
    assert {each["verdict"] for each in record["figures"]} == {"at other settings", "not reached"}
    changes = "data.max_train_samples=9 (recipe None), training.beta=0.2 (recipe 0.1)"
    assert f"5 figures (expected) beside this run's, which is set otherwise: {changes}\n" in shown
    assert f"1 not reached (eval_loss at step 3); {changes}" in shown
    assert f"set otherwise than the published one: {changes}." in Path("other/adapter/README.md").read_text()


@pytest.mark.parametrize(
    ("overrides", "changes"),
    [
        (["training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=2"], []),
        (["training.per_device_train_batch_size=1"], ["pairs per step"]),
        (["engine.shared_prefix=false", "training.eval_steps=1", "checks.step0=false", "training.use_cpu=true"], []),
        (["training.logging_steps=2", "seed=1", "lora=none"], ["lora", "seed", "training.logging_steps"]),
        (["data.path=/elsewhere/pairs.jsonl", "run_name=x", "training.gradient_checkpointing=true"], []),
        (["data.path=/elsewhere/others.jsonl"], ["data.path"]),
    ],
)
def test_what_counts_as_set_otherwise(mine: Path, overrides: list[str], changes: list[str]) -> None:
    """Not how the same batch is divided, nor what is measured; nor where a copy of the same files is."""
    conf = load_conf(["experiment=mine", *overrides], str(mine))
    assert sorted(find_changes(conf, 1)) == changes
    assert find_changes(load_conf(["experiment=mine", "training.gradient_accumulation_steps=3"], str(mine)), 2)[
        "pairs per step"
    ] == [12, 2]

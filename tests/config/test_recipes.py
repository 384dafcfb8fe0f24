"""Published recipes: their hyperparameters are those of their sources, and their published figures are well-formed."""

import re
from pathlib import Path
from typing import Any

import pytest

from dpo_runner.config.compose import compose_point, load_conf
from dpo_runner.config.schema import find_value_mistakes
from dpo_runner.config.sections.expected import ExpectedConf
from dpo_runner.config.yaml_files import CONF_DIR, ConfigFiles
from dpo_runner.errors import ConfigError
from dpo_runner.records.differences import find_changes
from dpo_runner.records.figures import describe_band, list_figures
from dpo_runner.sweep.command_line import check_command_line
from dpo_runner.sweep.points import digest_config

RECIPES = sorted(path.stem for path in (CONF_DIR / "experiment").glob("*.yaml") if "\nexpected:" in path.read_text())
HANDBOOK = {"lr_scheduler_type": "cosine", "warmup_steps": 0.1, "max_length": 1024, "bf16": True, "eval_steps": 100}
HANDBOOK |= {"loss_type": "sigmoid", "optim": "adamw_torch", "gradient_checkpointing": True, "logging_steps": 10}
PREFS = ("HuggingFaceH4/ultrafeedback_binarized", "train_prefs", "test_prefs")
SCAN: dict[str, Any] = HANDBOOK | {"beta": 0.01, "learning_rate": 5e-7, "num_train_epochs": 1}
SOURCES: dict[str, tuple[str, tuple[str, str, str | None], int, int, dict[str, Any]]] = {
    # model, data, pairs a step, seed, fields of training
    "smollm2_135m_dpo": (
        "HuggingFaceTB/smollm2-135M-8k-lc100k-mix1-ep2",
        PREFS,
        128,
        42,
        HANDBOOK | {"beta": 0.5, "learning_rate": 1e-6, "num_train_epochs": 2},
    ),
    "tulu3_8b_dpo": (
        "allenai/Llama-3.1-Tulu-3-8B-SFT",
        ("allenai/llama-3.1-tulu-3-8b-preference-mixture", "train", None),
        128,
        8,
        {"beta": 5, "loss_type": "sigmoid_norm", "learning_rate": 5e-7, "lr_scheduler_type": "linear"}
        | {"warmup_steps": 0.1, "weight_decay": 0, "num_train_epochs": 1, "max_length": 2048, "logging_steps": 1},
    ),
    "simpo_tables_dpo_mistral_base": ("alignment-handbook/zephyr-7b-sft-full", PREFS, 128, 42, SCAN),
    "simpo_tables_dpo_llama3_instruct": (
        "meta-llama/Meta-Llama-3-8B-Instruct",
        ("princeton-nlp/llama3-ultrafeedback", "train", "test"),
        128,
        42,
        SCAN | {"learning_rate": 7e-7, "max_length": 2048, "eval_steps": 400, "logging_steps": 5},
    ),
    "trl_invariant": (
        "Qwen/Qwen2.5-0.5B-Instruct",
        ("trl-lib/ultrafeedback_binarized", "train", None),
        8,
        42,
        {"beta": 0.1, "loss_type": "sigmoid", "learning_rate": 1e-6, "lr_scheduler_type": "linear", "bf16": False}
        | {"warmup_steps": 0, "max_steps": 50, "max_length": 512, "logging_steps": 1, "data_seed": 42}
        | {"full_determinism": True, "weight_decay": 0, "max_grad_norm": 1, "adam_beta2": 0.999},
    ),
    "nemo_rl_llama32_1b": (
        "meta-llama/Llama-3.2-1B-Instruct",
        ("nvidia/HelpSteer3", "train", "validation"),
        128,
        42,
        {"beta": 0.05, "learning_rate": 5e-6, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 20}
        | {"max_steps": 150, "weight_decay": 0.1, "adam_beta1": 0.9, "adam_beta2": 0.98, "adam_epsilon": 1e-5}
        | {"max_grad_norm": 1, "max_length": 1024, "eval_steps": 25, "logging_steps": 1},
    ),
    "dpo_paper_hh_pythia": (
        "lomahony/eleuther-pythia70m-hh-sft",
        ("Anthropic/hh-rlhf", "train", "test"),
        32,
        0,
        {"beta": 0.1, "learning_rate": 1e-6, "optim": "rmsprop", "warmup_steps": 150, "max_grad_norm": 10}
        | {"max_length": 512, "num_train_epochs": 1, "bf16": False, "eval_steps": 20_000 / 32},
    ),
    "pref_align_zephyr": ("alignment-handbook/zephyr-7b-sft-full", PREFS, 128, 42, SCAN),
    "pref_align_openhermes": (
        "teknium/OpenHermes-2.5-Mistral-7B",
        ("HuggingFaceH4/orca_dpo_pairs", "train_prefs", "test_prefs"),
        128,
        42,
        SCAN,
    ),
}


@pytest.mark.parametrize("recipe", sorted(SOURCES))
def test_a_recipe_has_the_hyperparameters_of_its_source(recipe: str) -> None:
    model, data, pairs, seed, fields = SOURCES[recipe]
    conf = load_conf([f"experiment={recipe}"])
    training = conf.training
    assert (conf.model.model_name_or_path, (conf.data.path, conf.data.split, conf.data.eval_split)) == (model, data)
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == pairs
    assert conf.seed == seed and conf.lora is None and conf.quant is None and conf.data.max_train_samples is None
    masks_long_pairs = recipe == "nemo_rl_llama32_1b"  # all others cut them, and dropping would change the steps
    assert (conf.data.on_overlong == "drop") == masks_long_pairs
    assert {name: getattr(training, name) for name in fields} == fields


def test_every_recipe_has_figures_with_a_source() -> None:
    assert set(RECIPES) == {*SOURCES, "zephyr_7b_dpo_qlora"}
    assert all(load_conf([f"experiment={recipe}"]).expected for recipe in RECIPES)
    zephyr = {
        (each.metric, each.step): (each.low, each.high) for each in load_conf([f"experiment={RECIPES[-1]}"]).expected
    }
    assert zephyr["eval_loss", 100] == (0.6807, 0.6878) and zephyr["eval_rewards/margins", "end"] == (1.0879, 1.2972)
    [loss, norm] = load_conf(["experiment=trl_invariant"]).expected
    assert len(loss.values) == len(norm.values) == 50 and loss.values[:3] == [0.693147, 0.687875, 0.659355]
    assert (loss.tolerance, norm.tolerance, norm.values[-1]) == (1e-4, 1e-2, 159.087)


def test_the_published_sweep_has_its_axes() -> None:
    axes = dict(text.split("=", 1) for text in ConfigFiles.over(None).load_sweep_axes("pref_align_scan"))
    assert axes == {
        "experiment": "pref_align_zephyr,pref_align_openhermes",
        "training.loss_type": "sigmoid,ipo",
        "training.beta": "0.01,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9",
    }
    assert check_command_line(["sweep=pref_align_scan", "training.beta=0.01,0.9"]) == []
    point = ("sweep=pref_align_scan", "experiment=pref_align_zephyr", "training.loss_type=ipo", "training.beta=0.9")
    assert find_changes(compose_point(point, None), 1) == {
        "training.beta": [0.9, 0.01],
        "training.loss_type": ["ipo", "sigmoid"],
    }


def entry(**fields: Any) -> str:
    fields = {"metric": "loss", "step": 1, "low": 0.5, "source": "x"} | fields
    given = ",".join(f"{key}:{'null' if value is None else value}" for key, value in fields.items())
    return f"expected=[{{{given}}}]"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([entry(metric="evl_loss")], r"metric=evl_loss`: no such metric at step=1; did you mean `eval_loss`\?"),
        ([entry(step="end")], "metric=loss`: no such metric at step=end, which only a step has"),
        ([entry(metric="response_tokens")], "measured before and after training alone"),
        ([entry(step=0)], r"expected\[0\]\.step=0`: must be a step, at least 1, or `end`"),
        ([entry(low="nan")], r"`expected\[0\]`: must have finite numbers"),
        ([entry(high=0.4)], r"expected\[0\]\.low=0\.5`: must be at most high=0\.4"),
        ([entry(low=None)], "must have low, high or both, or values and tolerance"),
        ([entry(values=[0.1])], "values`: takes the place of low and high"),
        ([entry(metric="eval_loss", step="end", low=None, values=[0.1])], "set step to the first one"),
        ([entry(tolerance=0.1)], "tolerance=0.1`: must be 0 or above, and is of `values` alone"),
        ([entry(source='""')], r"expected\[0\]\.source`: must be set"),
        ([entry(step=5), "training.max_steps=4"], r"step=5`: training\.max_steps=4 is the last step; expected=\[\]"),
        ([entry(step=3, low=None, values=[1, 2, 3]), "training.max_steps=4"], "step=5`: training.max_steps=4"),
        ([entry(metrik="loss")], r"`expected\.\*\.metrik`: no such field; did you mean `metric`\?"),
        ([entry(low="much")], "low=much`: must be a number"),
        ([entry(), "rounds=2", "reward=length"], "`rounds=2`: `expected` is of one run on published pairs"),
        (["expected.0.low=0.1"], r"a list is set as a whole, such as expected=\[\]"),
        (["expected=3"], "must be a list"),
    ],
)
def test_mistakes_in_published_figures_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_conf(overrides)
    assert len(caught.value.mistakes) == 1


def test_published_figures_are_no_part_of_what_a_run_is() -> None:
    plain, marked = load_conf([]), load_conf([entry()])
    assert digest_config(plain) == digest_config(marked)
    assert find_value_mistakes("expected", []) == []


def test_a_recipe_is_remembered_where_the_command_line_says_more() -> None:
    recipe = load_conf(["experiment=smollm2_135m_dpo", "seed=1"]).recipe
    assert recipe is not None and recipe["seed"] == 42
    for own in (["experiment=smollm2_135m_dpo"], ["experiment=smollm2_135m_dpo", entry()], [entry(), "seed=1"]):
        assert load_conf(own).recipe is None


def test_the_page_has_each_recipe_and_its_figures(tmp_path: Path) -> None:
    page = (CONF_DIR.parent / "docs" / "recipes.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([a-z0-9_]+)` \|.*\| ([^|]*) \|$", page.partition("##")[0], flags=re.MULTILINE))
    assert rows == {
        recipe: "; ".join(map(describe, load_conf([f"experiment={recipe}"]).expected)) for recipe in RECIPES
    }
    [example] = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(example)
    assert len(list_figures(load_conf(["experiment=mine"], str(tmp_path)))) == 3


def describe(entry: ExpectedConf) -> str:
    """Return an entry as a cell of the page has it."""
    if entry.values:
        last = int(entry.step) + len(entry.values) - 1
        return f"steps {entry.step} to {last}: `{entry.metric}` ± {entry.tolerance:g}"
    place = "end" if entry.step == "end" else f"step {entry.step}"
    return f"{place}: `{entry.metric}` {describe_band({'low': entry.low, 'high': entry.high})}"

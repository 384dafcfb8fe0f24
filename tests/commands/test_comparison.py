"""Comparison of runs: differing settings, joined seeds, ranking."""

import json
import math
from pathlib import Path

import pytest

from dpo_runner.compare.comparison import (
    DEFAULT_OBJECTIVE,
    MARGIN,
    Comparison,
    Objective,
    choose_objective,
    compare_runs,
)
from dpo_runner.config.schema import shorten_keys
from dpo_runner.errors import ConfigError
from dpo_runner.records.runs import RunRecord, read_runs
from tests.support.run_folders import write_run

ACCURACY = Objective(DEFAULT_OBJECTIVE, minimize=False)


def compare(folder: Path, objective: Objective = ACCURACY, **options: bool) -> Comparison:
    return compare_runs(read_runs([folder])[0], objective, **options)


def test_only_settings_that_differ_are_shown_and_the_best_comes_first(tmp_path: Path) -> None:
    for index, beta in enumerate((0.3, 0.05, 0.1)):
        write_run(tmp_path / f"{index}", training__beta=beta, accuracy=0.5 + beta)
    comparison = compare(tmp_path)
    assert comparison.settings == ["training.beta"]
    assert [row.settings["training.beta"] for row in comparison.rows] == [0.3, 0.1, 0.05]
    assert [row.best for row in comparison.rows] == [True, False, False]
    assert comparison.find_best_run().path.name == "0"
    worst = compare(tmp_path, Objective(DEFAULT_OBJECTIVE, minimize=True))
    assert worst.find_best_run().path.name == "1"


def test_seeds_are_joined_with_mean_and_standard_error(tmp_path: Path) -> None:
    for seed, accuracy in ((1, 0.5), (2, 0.6), (3, 0.9)):
        write_run(tmp_path / f"s{seed}", seed=seed, accuracy=accuracy)
    write_run(tmp_path / "other", seed=1, accuracy=0.65, training__beta=0.5)
    comparison = compare(tmp_path)
    assert comparison.settings == ["training.beta"] and len(comparison.rows) == 2
    best = comparison.best
    assert best.name == "s1 (+2)"
    estimate = best.metrics[DEFAULT_OBJECTIVE]
    assert estimate.n == 3 and estimate.mean == pytest.approx(2 / 3)
    assert estimate.error == pytest.approx(
        math.sqrt(((0.5 - 2 / 3) ** 2 + (0.6 - 2 / 3) ** 2 + (0.9 - 2 / 3) ** 2) / 6)
    )
    assert comparison.rows[1].metrics[DEFAULT_OBJECTIVE].error is None
    assert comparison.find_best_run().path.name == "s3"
    singly = compare(tmp_path, per_seed=True)
    assert len(singly.rows) == 4 and "seed" in singly.settings


def test_a_lucky_seed_does_not_win_over_a_better_configuration(tmp_path: Path) -> None:
    for seed, accuracy in ((1, 0.95), (2, 0.1)):
        write_run(tmp_path / f"lucky{seed}", seed=seed, accuracy=accuracy)
        write_run(tmp_path / f"good{seed}", seed=seed, accuracy=0.8, training__beta=0.5)
    assert compare(tmp_path).find_best_run().path.name.startswith("good")
    assert compare(tmp_path, per_seed=True).find_best_run().path.name == "lucky1"


def test_the_same_run_twice_is_no_further_evidence(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, seed=1, accuracy=0.5)
    comparison = compare(tmp_path)
    assert comparison.rows[0].metrics[DEFAULT_OBJECTIVE].n == 1
    assert comparison.notes == ["b: has the configuration and seed of a, and is not counted again"]


def test_figures_of_half_a_run_are_not_averaged_with_finished_ones_and_never_best(tmp_path: Path) -> None:
    write_run(tmp_path / "done", seed=1, accuracy=0.5)
    write_run(tmp_path / "half", seed=2, accuracy=0.9, state="interrupted")
    write_run(tmp_path / "alone", seed=1, accuracy=0.99, state="failed", training__beta=0.5)
    comparison = compare(tmp_path)
    assert [row.state for row in comparison.rows] == ["failed", "1 finished, 1 interrupted"]
    assert comparison.best.metrics[DEFAULT_OBJECTIVE].mean == 0.5
    assert comparison.find_best_run().path.name == "done"
    assert not comparison.rows[0].on_front


def test_without_a_finished_run_there_is_no_best(tmp_path: Path) -> None:
    write_run(tmp_path / "half", state="interrupted")
    assert compare(tmp_path).find_best_run() is None


def test_values_that_are_no_numbers_are_never_best(tmp_path: Path) -> None:
    write_run(tmp_path / "a", accuracy=float("nan"))
    write_run(tmp_path / "b", training__beta=0.5, accuracy=0.2)
    write_run(tmp_path / "c", training__beta=0.7, accuracy=float("inf"))
    comparison = compare(tmp_path)
    assert comparison.find_best_run().path.name == "b" and comparison.rows[0].name == "b"


def test_of_equally_good_runs_the_one_that_moved_least_is_best(tmp_path: Path) -> None:
    for name, chosen in (("a", -0.5), ("b", -0.1), ("c", 0.3)):
        write_run(tmp_path / name, accuracy=1.0, chosen=chosen, training__loss_type=name)
    comparison = compare(tmp_path)
    assert comparison.find_best_run().path.name == "b"
    assert comparison.notes == [
        f"3 are equally good by {DEFAULT_OBJECTIVE}; the one marked as best moved least from its reference; "
        "samples.reward=4 reward=NAME in the runs, and --objective eval_reward, may tell them apart"
    ]


def test_the_front_holds_what_none_beats_in_both(tmp_path: Path) -> None:
    points = {"a": (1.0, -0.1), "b": (2.0, -0.3), "c": (0.9, -0.2), "d": (2.0, 0.4), "e": (0.5, 0.05)}
    for name, (margin, chosen) in points.items():
        write_run(tmp_path / name, margin=margin, chosen=chosen, training__loss_type=name)
    write_run(tmp_path / "f", margin=9.0, chosen=0.0, training__loss_type="f", state="failed")
    comparison = compare(tmp_path)
    assert comparison.distance == "drift"
    assert {row.name for row in comparison.rows if row.on_front} == {"a", "b", "e"}


def test_the_front_is_over_the_measured_kl_where_all_have_it(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path / name, margin=margin, training__loss_type=name) for name, margin in (("a", 1), ("b", 2))
    ]
    for path, kl in zip(paths, (5.0, 3.0), strict=True):
        assert compare(tmp_path).distance == "drift"
        (path / "evaluations" / "x").mkdir(parents=True)
        value = {"kl_per_answer": {"mean": kl}, "evaluated": {"data": ["a"], "pairs": 5}}
        (path / "evaluations" / "x" / "evaluation.json").write_text(json.dumps(value))
    comparison = compare(tmp_path)
    assert comparison.distance == "evaluation/kl_per_answer"
    assert [row.name for row in comparison.rows if row.on_front] == ["b"]


def test_the_front_is_over_the_kl_of_sampled_answers_where_all_have_it(tmp_path: Path) -> None:
    for name, kl in (("a", 5.0), ("b", 3.0)):
        path = write_run(tmp_path / name, margin=kl, training__loss_type=name) / "summary.json"
        summary = json.loads(path.read_text())
        path.write_text(json.dumps({**summary, "after": {**summary["after"], "eval_reward_kl": kl}}))
    comparison = compare(tmp_path)
    assert comparison.distance == "eval_reward_kl"
    assert [row.name for row in comparison.rows if row.on_front] == ["a", "b"]


def test_evaluations_on_other_data_are_not_compared(tmp_path: Path) -> None:
    for name, pairs in (("a", 5), ("b", 6)):
        folder = write_run(tmp_path / name, training__loss_type=name) / "evaluations" / "x"
        folder.mkdir(parents=True)
        value = {"kl_per_answer": {"mean": 1.0}, "evaluated": {"data": ["a"], "pairs": pairs}}
        (folder / "evaluation.json").write_text(json.dumps(value))
    comparison = compare(tmp_path)
    assert comparison.distance == "drift" and "cannot be compared" in comparison.notes[0]


def make(name: str, **config: object) -> RunRecord:
    return RunRecord(Path(name), name, "finished", config={"seed": 1, **config}, metrics={DEFAULT_OBJECTIVE: 0.5})


def differing(*runs: RunRecord) -> list[str]:
    return compare_runs(runs, ACCURACY).settings


def test_names_outputs_and_wandb_say_nothing() -> None:
    ignored = ("run_dir", "run_name", "resume", "dry_run", "wandb.mode", "sweep.workers", "training.output_dir")
    runs = [make(name, **dict.fromkeys(ignored, name)) for name in "ab"]
    assert differing(*runs) == []
    assert len(compare_runs(runs, ACCURACY).rows) == 1


def test_a_section_that_is_null_in_one_run_is_one_setting() -> None:
    runs = make("a", quant=None), make("b", **{"quant.load_in_4bit": True, "quant.bnb_4bit_quant_type": "nf4"})
    assert differing(*runs) == ["quant"]
    rows = compare_runs(runs, ACCURACY).rows
    assert {row.name: row.settings["quant"] for row in rows} == {"a": None, "b": "set"}
    more = make("c", **{"quant.load_in_4bit": True, "quant.bnb_4bit_quant_type": "fp4"})
    assert differing(*runs, more) == ["quant", "quant.bnb_4bit_quant_type"]


def test_a_key_that_one_version_lacks_counts_only_where_nothing_else_differs() -> None:
    old, new = make("a", **{"training.beta": 0.1}), make("b", **{"training.beta": 0.2, "training.new": 1})
    assert differing(old, new) == ["training.beta"]
    assert differing(make("a", **{"training.beta": 0.1}), make("b", **{"training.beta": 0.1, "training.new": 1})) == [
        "training.new"
    ]


def test_the_same_files_at_another_place_are_the_same() -> None:
    def moved(name: str, file: str, fingerprint: str | None) -> RunRecord:
        run = make(name, **{"data.path": f"/home/{name}/{file}", "training.beta": 0.1})
        if fingerprint is not None:
            run.fingerprints = {"data": fingerprint}
        return run

    assert differing(moved("a", "x.jsonl", "f"), moved("b", "x.jsonl", "f")) == []
    assert differing(moved("a", "x.jsonl", "f"), moved("b", "x.jsonl", "g")) == ["data.path"]
    assert differing(moved("a", "x.jsonl", "f"), moved("b", "y.jsonl", "f")) == ["data.path"]
    assert differing(moved("a", "x.jsonl", None), moved("b", "x.jsonl", None)) == ["data.path"]


def test_runs_of_unknown_settings_are_like_no_other_and_add_no_columns() -> None:
    unknown = [RunRecord(Path(name), name, "unknown") for name in "xy"]
    comparison = compare_runs([*unknown, make("a", **{"training.beta": 0.1})], ACCURACY)
    assert len(comparison.rows) == 3 and comparison.settings == []


def test_keys_are_as_short_as_can_be_told_apart() -> None:
    keys = ["training.beta", "lora.r", "data.sources.a.path", "data.sources.b.path", "path"]
    assert list(shorten_keys(keys).values()) == ["beta", "r", "a.path", "b.path", "path"]


@pytest.mark.parametrize(
    ("metric", "minimize"),
    [
        ("eval_rewards/accuracies", False), ("eval_chat_rewards/margins", False), ("eval_loss", True),
        ("eval_chat_loss", True), ("evaluation/kl_per_answer", True), ("evaluation/win_rate", False), ("drift", True),
    ],
)  # fmt: skip
def test_directions_are_known_and_can_be_turned(metric: str, minimize: bool) -> None:
    run = RunRecord(Path("a"), metrics={metric: 1.0})
    assert choose_objective(metric, None, [run]) == Objective(metric, minimize)
    assert choose_objective(metric, not minimize, [run]).minimize is not minimize


def test_objectives_that_no_run_has_or_of_unknown_direction_are_errors() -> None:
    run = RunRecord(Path("a"), metrics={MARGIN: 1.0, "eval_entropy": 1.0})
    with pytest.raises(ConfigError, match="no run has it; did you mean `eval_rewards/margins`"):
        choose_objective("rewards/margin", None, [run])
    with pytest.raises(ConfigError, match="add --minimize or --maximize"):
        choose_objective("eval_entropy", None, [run])
    assert choose_objective(DEFAULT_OBJECTIVE, None, [run]).metric == DEFAULT_OBJECTIVE
    assert f"no run has {DEFAULT_OBJECTIVE} yet" in compare_runs([run], ACCURACY).notes[0]

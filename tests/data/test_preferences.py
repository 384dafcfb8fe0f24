"""Tests of the splits of a run: holding out, cutting, dropping, drawing, mixing, and the data report."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from dpo_runner.config.compose import load_conf
from dpo_runner.data.preferences import PreferenceData, load_preferences
from dpo_runner.data.splits import select_rows
from dpo_runner.data.templates.chat_template import apply_chat_template
from dpo_runner.errors import DataError
from dpo_runner.io.upstream import find_fingerprint
from tests.support.data import NO_EVAL, check_account, conf_of, load, make_rows, write


def prompts(rows: Any) -> list[str]:
    return [json.loads(prompt)[-1]["content"] for prompt in rows["prompt"]]


def test_token_ids_are_int32_and_those_of_apply_chat_template(tmp_path: Path, tokenizer: Any) -> None:
    rows = make_rows(5)
    data = load(tokenizer, write(tmp_path / "a.jsonl", rows), *NO_EVAL)
    for row, made in zip(rows, data.train, strict=True):
        assert {key: made[key] for key in ("prompt_ids", "chosen_ids", "rejected_ids")} == apply_chat_template(
            row, tokenizer
        )
    assert data.train.features["prompt_ids"].feature.dtype == "int32"
    assert data.eval is None and data.eval_by_source == {}
    check_account(data)


def test_rows_of_one_answer_each_are_the_same_pairs(tmp_path: Path, tokenizer: Any) -> None:
    rows = make_rows(600)  # more than a batch
    answers = [
        {"Prompt": row["prompt"], "completion": row[side], "label": side == "chosen", "id": number}
        for number, row in enumerate(rows)
        for side in ("rejected", "chosen")
    ]
    data = load(tokenizer, write(tmp_path / "kto.jsonl", answers), *NO_EVAL)
    expected = load(tokenizer, write(tmp_path / "pairs.jsonl", rows), *NO_EVAL)
    assert data.fingerprint("train") == expected.fingerprint("train") and len(data.train) == 600
    [source] = data.report.sources
    assert str(source) == "600 rows, kto; reads Prompt as prompt, 600 pairs, columns not used: id"


def test_bundled_data_is_there_in_size_and_shape(tokenizer: Any) -> None:
    conf = load_conf(["model=tiny_random", "data.max_train_samples=null", "data.max_eval_samples=null"])
    data = load_preferences(conf, tokenizer)
    assert len(data.train) >= 400 and len(data.eval) >= 100 and not data.report.warnings
    for row in [*data.train, *data.eval]:
        assert len(row["rejected_ids"]) > len(row["chosen_ids"])
        assert tokenizer.decode(row["chosen_ids"]).endswith((".<|im_end|>\n", "!<|im_end|>\n"))


def test_a_prompt_that_is_cut_is_counted_with_its_tokens(tmp_path: Path, tokenizer: Any) -> None:
    import copy

    thinking = copy.deepcopy(tokenizer)
    thinking.chat_template = tokenizer.chat_template.replace("assistant\\n'", "assistant\\n<think>'")
    assert thinking.chat_template != tokenizer.chat_template
    path = write(tmp_path / "a.jsonl", make_rows(4))
    with pytest.raises(DataError, match=r"a\.jsonl:1: the prompt is tokenized differently.*'<think>' became 'good"):
        load(thinking, path, *NO_EVAL)
    data = load(thinking, path, *NO_EVAL, "data.on_template_mismatch=longest_common_prefix")
    source = data.report.sources[0]
    assert source.mismatched == 4 and source.first_mismatch.startswith(f"{path}:1: from token 22 on, '<think>' became")
    assert str(source).count("4 with the prompt cut to its common prefix") == 1
    with pytest.raises(DataError, match="the prompt is tokenized differently"):  # refused from the cache too
        load(thinking, path, *NO_EVAL)


# --- evaluation rows


def test_held_out_prompts_depend_on_the_prompt_alone(tmp_path: Path, tokenizer: Any) -> None:
    rows = [row | {"chosen": f"yes {n}"} for n in range(2) for row in make_rows(100)]  # each prompt twice
    first = load(tokenizer, write(tmp_path / "a.jsonl", rows), "data.eval_fraction=0.2")
    held_out = set(prompts(first.eval))
    assert not held_out & set(prompts(first.train))
    assert 20 <= len(first.eval) <= 60 and len(first.train) + len(first.eval) == 200
    more = load(tokenizer, write(tmp_path / "b.jsonl", make_rows(150)[::-1]), "data.eval_fraction=0.2", "seed=7")
    assert set(prompts(more.eval)) & {f"q {n}" for n in range(100)} == held_out


def test_the_split_is_this_one_on_every_machine(tmp_path: Path, tokenizer: Any) -> None:
    data = load(tokenizer, write(tmp_path / "a.jsonl", make_rows(20)), "data.eval_fraction=0.2")
    assert prompts(data.eval) == ["q 0", "q 5", "q 9", "q 13"]


def test_each_side_gets_a_prompt(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "a.jsonl", make_rows(2))
    for fraction in ("0.001", "0.999"):
        data = load(tokenizer, path, f"data.eval_fraction={fraction}")
        assert (len(data.train), len(data.eval)) == (1, 1)
    path = write(tmp_path / "b.jsonl", [*make_rows(1), make_rows(1)[0] | {"chosen": "other"}])
    with pytest.raises(DataError, match=r"data\.eval_fraction=0\.1`: needs rows with at least 2 different prompts"):
        load(tokenizer, path)


def test_given_evaluation_rows_and_a_warning_of_shared_prompts(tmp_path: Path, tokenizer: Any) -> None:
    train = write(tmp_path / "train.jsonl", make_rows(10))
    evaluation = write(tmp_path / "eval.jsonl", [*make_rows(2), *make_rows(2, "other")])
    data = load(tokenizer, train, f"data.eval_path={evaluation}")
    assert (len(data.train), len(data.eval)) == (10, 4)
    assert data.report.warnings == [
        "2 training pairs have a prompt that is in evaluation too, which makes evaluation look too good; "
        "data.decontaminate=[eval] leaves them out"
    ]
    folder = load(tokenizer, tmp_path)  # the same splits, by file name
    assert (len(folder.train), len(folder.eval)) == (10, 4)


def test_first_rows_are_taken_of_one_source(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "a.jsonl", make_rows(10))
    data = load(tokenizer, path, *NO_EVAL, "data.max_train_samples=3")
    assert prompts(data.train) == ["q 0", "q 1", "q 2"]
    assert data.report.splits["train"].unused == 7
    assert data.locate("train", 2) == f"{path}:3"
    check_account(data)


# --- duplicates and contamination


def test_exact_duplicates_are_counted_and_on_request_dropped(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "a.jsonl", [*make_rows(5), *make_rows(2)])
    data = load(tokenizer, path, *NO_EVAL)
    assert (len(data.train), data.report.splits["train"].duplicates) == (7, 2)
    assert "2 exact duplicates kept (data.deduplicate=exact drops them)" in str(data.report.splits["train"])
    data = load(tokenizer, path, *NO_EVAL, "data.deduplicate=exact")
    assert data.report.splits["train"].dropped == {"exact duplicate": 2}
    assert [row["line"] for row in data.dropped()] == [6, 7]
    check_account(data)


def test_near_duplicates_are_dropped_on_request(tmp_path: Path, tokenizer: Any) -> None:
    text = "The quick brown fox jumps over the lazy dog while the other dogs look on in silence. " * 3
    rows = [*make_rows(3), *({"prompt": f"Tell {n}", "chosen": text, "rejected": text[:-30]} for n in range(2))]
    data = load(tokenizer, write(tmp_path / "a.jsonl", rows), *NO_EVAL, "data.deduplicate=near")
    assert data.report.splits["train"].dropped == {"near-duplicate": 1}
    assert [row["line"] for row in data.dropped()] == [5]
    check_account(data)


def test_training_keeps_clear_of_evaluation_and_of_named_texts(tmp_path: Path, tokenizer: Any) -> None:
    train = write(tmp_path / "a.jsonl", [*make_rows(6, "Please tell me about number"), *make_rows(4)])
    evaluation = write(tmp_path / "b.jsonl", make_rows(2, "Please tell me about number"))
    texts = tmp_path / "benchmark.txt"
    texts.write_text("Please tell me about number 5\n")
    with_eval = f"data.eval_path={evaluation}"
    data = load(tokenizer, train, with_eval, f"data.decontaminate=[eval,{texts}]")
    assert data.report.splits["train"].dropped == {"shares text with data.decontaminate": 3}
    assert [row["line"] for row in data.dropped()] == [1, 2, 6]
    assert data.report.warnings == []
    check_account(data)


# --- mixtures


def mix(tmp_path: Path, tokenizer: Any, *overrides: str) -> PreferenceData:
    write(tmp_path / "a.jsonl", make_rows(40, "a"))
    write(tmp_path / "b.jsonl", make_rows(100, "b"))
    sources = [f"data.sources.{name}.path={tmp_path / name}.jsonl" for name in ("a", "b")]
    return load_preferences(conf_of(*sources, *overrides), tokenizer)


def test_a_mixture_takes_all_rows_evenly_mixed(tmp_path: Path, tokenizer: Any) -> None:
    data = mix(tmp_path, tokenizer, *NO_EVAL, "data.max_train_samples=70")
    assert data.report.splits["train"].by_source == {"a": 20, "b": 50}
    assert data.locate("train", 0).startswith(("a: ", "b: "))
    check_account(data)


def test_weights_are_shares_and_no_row_is_repeated(tmp_path: Path, tokenizer: Any) -> None:
    weights = ["data.sources.a.weight=1", "data.sources.b.weight=2"]
    data = mix(tmp_path, tokenizer, *NO_EVAL, *weights)
    assert data.report.splits["train"].by_source == {"a": 40, "b": 80}
    assert len(set(prompts(data.train))) == 120
    other = mix(tmp_path, tokenizer, *NO_EVAL, *weights, "data.sources.b.seed=1")
    assert set(prompts(other.train)) != set(prompts(data.train))
    again = mix(tmp_path, tokenizer, *NO_EVAL, *weights, "seed=5")
    assert prompts(again.train) == prompts(data.train)  # independent of the run's seed
    check_account(data)


def test_row_counts_and_evaluation_by_source(tmp_path: Path, tokenizer: Any) -> None:
    counts = ["data.sources.b.max_train_samples=10", "data.sources.b.max_eval_samples=4", "data.eval_fraction=0.3"]
    data = mix(tmp_path, tokenizer, *counts)
    assert data.report.splits["train"].by_source["b"] == 10
    assert list(data.eval_by_source) == ["a", "b"] and len(data.eval_by_source["b"]) == 4
    assert {prompt[0] for prompt in prompts(data.eval_by_source["a"])} == {"a"}
    assert len(data.eval) == sum(map(len, data.eval_by_source.values()))
    check_account(data)


def test_sources_are_read_each_in_its_own_way(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path / "a.jsonl", make_rows(4))
    write(tmp_path / "b.jsonl", [{"frage": "b 1", "gut": "ja", "schlecht": "nein"}])
    columns = [f"data.sources.b.columns.{theirs}" for theirs in ("frage=prompt", "gut=chosen", "schlecht=rejected")]
    paths = [f"data.sources.{name}.path={tmp_path / name}.jsonl" for name in ("a", "b")]
    data = load_preferences(conf_of(*paths, *columns, *NO_EVAL), tokenizer)
    assert sorted(prompts(data.train)) == ["b 1", "q 0", "q 1", "q 2", "q 3"]


# --- the report


def test_lengths_and_length_bias_are_those_of_the_rows(tmp_path: Path, tokenizer: Any) -> None:
    rows = [*make_rows(3), {"prompt": "p", "chosen": "a much longer answer than the other", "rejected": "no"}]
    data = load(tokenizer, write(tmp_path / "a.jsonl", rows), *NO_EVAL)
    chosen, rejected = (np.array([len(row[f"{part}_ids"]) for row in data.train]) for part in ("chosen", "rejected"))
    bias, lengths = data.report.splits["train"].length_bias, data.report.splits["train"].lengths["chosen"]
    assert bias.chosen_longer == (chosen > rejected).mean() and bias.rejected_longer == (chosen < rejected).mean()
    assert bias.mean_difference == pytest.approx((chosen - rejected).mean(), abs=0.01)
    assert (lengths.total, lengths.max, sum(lengths.counts)) == (chosen.sum(), chosen.max(), 4)


def test_a_selection_of_rows_takes_no_python_object_for_each() -> None:
    """`Dataset.select` takes 40 bytes a row, in each process."""
    rows = Dataset.from_dict({"number": np.arange(50_000)})
    mixed = np.random.default_rng(0).permutation(len(rows))[:30_000]
    tracemalloc.start()
    found = select_rows(rows, mixed)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 * len(mixed)
    assert found["number"][:] == mixed.tolist()
    assert select_rows(rows, mixed[:1])["number"][:] == mixed[:1].tolist()
    neighbours = select_rows(rows, np.arange(7, 40))
    assert neighbours["number"][:] == list(range(7, 40)) and len(neighbours.data) == 33, "a slice needs no indices"
    prints = [find_fingerprint(select_rows(rows, indices)) for indices in (mixed, mixed.copy(), mixed[::-1])]
    assert prints[0] == prints[1] != prints[2]

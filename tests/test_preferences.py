"""From sources to splits: what is held out, cut, dropped, drawn and mixed, and that each row is accounted for."""

import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo_runner.config import RunConf, load_conf
from dpo_runner.data import PreferenceData, apply_chat_template, load_preferences
from dpo_runner.errors import DataError

NO_EVAL = ["data.eval_fraction=0", "training.eval_strategy=no"]


def make_rows(count: int, name: str = "q", answer: str = "good") -> list[dict[str, str]]:
    return [{"prompt": f"{name} {n}", "chosen": f"{answer} {n}", "rejected": f"not {n}"} for n in range(count)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def conf_of(*overrides: str) -> RunConf:
    return load_conf(["model=tiny_random", "data=local_file", *overrides])


def load(tokenizer: Any, path: Path, *overrides: str) -> PreferenceData:
    return load_preferences(conf_of(f"data.path={path}", *overrides), tokenizer)


def prompts(rows: Any) -> list[str]:
    return [json.loads(prompt)[-1]["content"] for prompt in rows["prompt"]]


def check_account(data: PreferenceData) -> None:
    """Every row is a pair, bad or left out; every pair is kept, dropped or not drawn; and dropped() names each."""
    report = data.report
    dropped = list(data.dropped())
    for source in report.sources:
        assert source.rows >= sum(source.bad.values()) + sum(source.left_out.values())
    for split in report.splits.values():
        assert split.pairs == split.kept + sum(split.dropped.values()) + split.unused
        assert split.kept == sum(split.by_source.values())
    bad = sum(sum(source.bad.values()) for source in report.sources)
    assert len(dropped) == bad + sum(sum(split.dropped.values()) for split in report.splits.values())


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
    with pytest.raises(DataError, match=r"a\.jsonl:1: the prompt becomes other tokens.*'<think>' became 'good"):
        load(thinking, path, *NO_EVAL)
    data = load(thinking, path, *NO_EVAL, "data.on_template_mismatch=longest_common_prefix")
    source = data.report.sources[0]
    assert source.mismatched == 4 and source.first_mismatch.startswith(f"{path}:1: from token 22 on, '<think>' became")
    assert str(source).count("4 with the prompt cut to its common prefix") == 1
    with pytest.raises(DataError, match="the prompt becomes other tokens"):  # found in the cache, and refused the same
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
    folder = load(tokenizer, tmp_path)  # the same, by the files' names
    assert (len(folder.train), len(folder.eval)) == (10, 4)


def test_first_rows_are_taken_of_one_source(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "a.jsonl", make_rows(10))
    data = load(tokenizer, path, *NO_EVAL, "data.max_train_samples=3")
    assert prompts(data.train) == ["q 0", "q 1", "q 2"]
    assert data.report.splits["train"].unused == 7
    assert data.locate("train", 2) == f"{path}:3"
    check_account(data)


# --- over-long rows


def overlong_rows() -> list[dict[str, str]]:
    return [
        {"prompt": "short", "chosen": "yes", "rejected": "no"},
        {"prompt": "long " * 40, "chosen": "yes", "rejected": "no"},
        {"prompt": "short", "chosen": "yes " * 40, "rejected": "no"},
        {"prompt": "short", "chosen": "yes " * 40 + "a", "rejected": "yes " * 40 + "b"},
    ]


@pytest.mark.parametrize(
    ("overrides", "kept", "dropped", "truncated"),
    [
        (["drop"], 1, {"longer than training.max_length=64": 3}, {}),
        (
            ["truncate_prompt_left"],
            2,
            {"an answer alone fills training.max_length": 2},
            {"lose the prompt's beginning to training.max_length": 1},
        ),
        (
            ["truncate_completion"],
            2,
            {
                "the prompt alone fills training.max_length": 1,
                "chosen equals rejected once cut to training.max_length": 1,
            },
            {"lose an answer's end to training.max_length (EOS lost)": 2},
        ),
        (
            ["trl"],
            3,
            {"the prompt alone fills training.max_length": 1},
            {"lose an answer's end to training.max_length (EOS lost)": 2},
        ),
        (
            ["trl", "training.truncation_mode=keep_end"],
            4,
            {},
            {"lose the prompt's beginning to training.max_length": 3},
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_overlong_rows(
    tmp_path: Path, tokenizer: Any, overrides: list[str], kept: int, dropped: Any, truncated: Any
) -> None:
    path = write(tmp_path / "a.jsonl", overlong_rows())
    limit = ["training.max_length=64", f"data.on_overlong={overrides[0]}", *overrides[1:]]
    data = load(tokenizer, path, *NO_EVAL, *limit, "data.max_bad_fraction=0")  # they are not bad rows
    report = data.report.splits["train"]
    assert (report.kept, report.dropped, report.truncated) == (kept, dropped, truncated)
    if overrides[0] != "trl":
        assert all(len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) <= 64 for r in data.train)
    for part in ("prompt", "chosen", "rejected"):
        assert report.lengths[part].total == sum(map(len, data.train[f"{part}_ids"]))
    check_account(data)


def test_cut_prompts_keep_their_end_and_cut_answers_their_beginning(tmp_path: Path, tokenizer: Any) -> None:
    whole = [apply_chat_template(row, tokenizer) for row in overlong_rows()]
    path = write(tmp_path / "a.jsonl", overlong_rows())
    limit = [*NO_EVAL, "training.max_length=64"]
    left = load(tokenizer, path, *limit, "data.on_overlong=truncate_prompt_left").train[1]
    assert left["chosen_ids"] == whole[1]["chosen_ids"]
    assert left["prompt_ids"] == whole[1]["prompt_ids"][-(64 - len(whole[1]["chosen_ids"])) :]
    right = load(tokenizer, path, *limit, "data.on_overlong=truncate_completion").train[1]
    assert right["prompt_ids"] == whole[2]["prompt_ids"]
    assert right["chosen_ids"] == whole[2]["chosen_ids"][: 64 - len(whole[2]["prompt_ids"])]
    assert right["rejected_ids"] == whole[2]["rejected_ids"]


def test_no_limit_keeps_all(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "a.jsonl", overlong_rows())
    assert len(load(tokenizer, path, *NO_EVAL, "training.max_length=null").train) == 4


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
    assert prompts(again.train) == prompts(data.train)  # the run's own seed has no say in it
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


# --- the cache, and processes


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts batches as they are tokenized."""
    from dpo_runner.data import workers

    calls: list[int] = []
    process = workers.process_batch
    monkeypatch.setattr(workers, "process_batch", lambda *args: (calls.append(1), process(*args))[1])
    return calls


def test_the_same_rows_are_tokenized_once(tmp_path: Path, tokenizer: Any, counted: list[int]) -> None:
    first = load(tokenizer, write(tmp_path / "a.jsonl", make_rows(20, "once")))
    assert len(counted) == 1
    copy = write(tmp_path / "copy.jsonl", make_rows(20, "once"))
    settings = ["training.beta=0.5", "training.learning_rate=1e-6", "training.max_length=512", "seed=3", "run_name=x"]
    second = load(tokenizer, copy, *settings, "data.eval_fraction=0.3")
    assert len(counted) == 1
    assert second.locate("train", 0).startswith(str(copy))
    assert first.train._fingerprint != second.train._fingerprint
    assert first.train._fingerprint == load(tokenizer, tmp_path / "a.jsonl").train._fingerprint


@pytest.mark.parametrize("override", ["data.system_prompt=Hi.", "data.min_score_gap=1", "data.pairing=all_pairs"])
def test_what_changes_the_tokens_changes_the_key(
    tmp_path: Path, tokenizer: Any, counted: list[int], override: str
) -> None:
    path = write(tmp_path / "a.jsonl", make_rows(20, override))
    load(tokenizer, path)
    load(tokenizer, path, override)
    assert len(counted) == 2


def test_another_row_template_or_formatter_changes_the_key(
    tmp_path: Path, tokenizer: Any, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    import copy
    import importlib

    path = write(tmp_path / "a.jsonl", make_rows(20, "key"))
    load(tokenizer, path)
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{# another #}" + tokenizer.chat_template
    load(other, path)
    write(path, [*make_rows(20, "key"), *make_rows(1, "more")])
    load(tokenizer, path)
    assert len(counted) == 3
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "my_formats.py"
    for number, text in enumerate(("def same(row):\n    return row\n", "def same(row):\n    return dict(row)\n")):
        module.write_text(text)
        importlib.invalidate_caches()
        sys.modules.pop("my_formats", None)
        load(tokenizer, path, "data.formatter=my_formats:same")
        assert len(counted) == 4 + number


def test_several_processes_give_the_same_rows_in_the_same_order(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpo_runner.data import prepare, workers

    monkeypatch.setattr(workers, "BATCHES_BEFORE_WORKERS", 2)
    monkeypatch.setattr(prepare, "ROWS_PER_BATCH", 7)
    rows = make_rows(200, "many")
    rows[60] = {"prompt": "", "chosen": "a", "rejected": "b"}
    results = []
    for processes in (1, 3):
        monkeypatch.setenv("DPO_RUNNER_CACHE", str(tmp_path / f"cache{processes}"))
        path = write(tmp_path / "a.jsonl", rows)
        results.append(load(tokenizer, path, f"training.dataset_num_proc={processes}"))
    alone, together = results
    assert list(alone.train) == list(together.train) and list(alone.eval) == list(together.eval)
    assert alone.report == together.report
    assert list(alone.dropped()) == list(together.dropped())
    assert [row["line"] for row in together.dropped()] == [61]


def test_a_process_that_dies_is_an_error_and_leaves_no_half_cache(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpo_runner.data import prepare, workers

    module = tmp_path / "deadly.py"
    module.write_text(
        "import os\nPARENT = os.getpid()\ndef f(row):\n    os.getpid() == PARENT or os._exit(9)\n    return row\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(workers, "BATCHES_BEFORE_WORKERS", 1)
    monkeypatch.setattr(prepare, "ROWS_PER_BATCH", 5)
    monkeypatch.setenv("DPO_RUNNER_CACHE", str(tmp_path / "cache"))
    path = write(tmp_path / "a.jsonl", make_rows(40))
    with pytest.raises(Exception, match=r"process that prepares the data died.*training\.dataset_num_proc=1"):
        load(tokenizer, path, "data.formatter=deadly:f", "training.dataset_num_proc=2")
    assert list((tmp_path / "cache" / "data").iterdir()) == []


def test_two_runs_may_prepare_the_same_rows_at_once(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "a.jsonl", make_rows(1000, "at once"))
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()

    def work() -> None:
        barrier.wait()
        results.put(load(tokenizer, path).fingerprint("train"))

    processes = [context.Process(target=work) for _ in range(3)]
    for process in processes:
        process.start()
    assert len({results.get(timeout=60) for _ in processes}) == 1
    for process in processes:
        process.join()
        assert process.exitcode == 0


def test_lengths_and_length_bias_are_those_of_the_rows(tmp_path: Path, tokenizer: Any) -> None:
    rows = [*make_rows(3), {"prompt": "p", "chosen": "a much longer answer than the other", "rejected": "no"}]
    data = load(tokenizer, write(tmp_path / "a.jsonl", rows), *NO_EVAL)
    chosen, rejected = (np.array([len(row[f"{part}_ids"]) for row in data.train]) for part in ("chosen", "rejected"))
    bias, lengths = data.report.splits["train"].length_bias, data.report.splits["train"].lengths["chosen"]
    assert bias.chosen_longer == (chosen > rejected).mean() and bias.rejected_longer == (chosen < rejected).mean()
    assert bias.mean_difference == pytest.approx((chosen - rejected).mean(), abs=0.01)
    assert (lengths.total, lengths.max, sum(lengths.counts)) == (chosen.sum(), chosen.max(), 4)

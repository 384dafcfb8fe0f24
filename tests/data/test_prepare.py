"""Tests of the token cache: keyed by content, the same from several processes, never half-written."""

import multiprocessing
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.data import load, make_rows, write


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by one with each batch tokenized."""
    from dpo_runner.data.prepare import workers

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
    from dpo_runner.data.prepare import cache as prepare
    from dpo_runner.data.prepare import workers

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
    from dpo_runner.data.prepare import cache as prepare
    from dpo_runner.data.prepare import workers

    module = tmp_path / "deadly.py"
    module.write_text(
        "import os\nPARENT = os.getpid()\ndef f(row):\n    os.getpid() == PARENT or os._exit(9)\n    return row\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(workers, "BATCHES_BEFORE_WORKERS", 1)
    monkeypatch.setattr(prepare, "ROWS_PER_BATCH", 5)
    monkeypatch.setenv("DPO_RUNNER_CACHE", str(tmp_path / "cache"))
    path = write(tmp_path / "a.jsonl", make_rows(40))
    with pytest.raises(Exception, match=r"worker process died while preparing the data.*training\.dataset_num_proc=1"):
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


@pytest.mark.parametrize("name", ["rows.arrow", "facts.json"])
def test_a_damaged_entry_is_made_anew(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("DPO_RUNNER_CACHE", str(tmp_path / "cache"))
    path = write(tmp_path / "a.jsonl", make_rows(20, name))
    before = list(load(tokenizer, path).train)
    (entry,) = (tmp_path / "cache" / "data").iterdir()
    (entry / name).write_bytes((entry / name).read_bytes()[:-300])
    assert list(load(tokenizer, path).train) == before

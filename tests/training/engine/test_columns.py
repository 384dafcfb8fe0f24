"""Keys of pairs in the store, and the reference's values as columns: right, and no rows are copied."""

import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import xxhash
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from dpo_runner.training.engine.reference import columns
from dpo_runner.training.engine.reference.columns import REF_COLUMNS, attach_columns
from dpo_runner.training.engine.reference.keys import read_keys
from dpo_runner.training.engine.reference.store import ReferenceStore, store_dir
from tests.support.engines import STORED, batches
from tests.support.trainers import build


def key_of(row: dict[str, list[int]], max_length: int | None, mode: str) -> bytes:
    """Return the key of a pair in the files that all versions have written: of the two rows as TRL cuts them."""
    whole = b""
    for answer in ("chosen_ids", "rejected_ids"):
        ids = [*((token, 0) for token in row["prompt_ids"]), *((token, 1) for token in row[answer])]
        if max_length is not None:
            ids = ids[:max_length] if mode == "keep_start" else ids[-max_length:]
        whole += struct.pack("<qq", len(ids), sum(scored for _, scored in ids))
        whole += struct.pack(f"<{len(ids)}q", *(token for token, _ in ids))
    return xxhash.xxh3_128(whole).digest()


@given(batches(), st.randoms())
def test_keys_are_those_of_the_files_that_exist(drawn: Any, random: Any) -> None:
    rows, max_length, mode = drawn
    collator = SimpleNamespace(max_length=max_length, truncation_mode=mode)
    order = random.choices(range(len(rows)), k=3)
    for dataset in (Dataset.from_list(rows), Dataset.from_list(rows).select(order)):
        keys, tokens = read_keys(dataset, collator)
        assert keys == [key_of(row, max_length, mode) for row in dataset]
        assert tokens == [sum(map(len, row.values())) for row in dataset]


@pytest.mark.parametrize("count", [2, 3, 40])
def test_each_process_computes_the_keys_of_its_share(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 23 rows, also where there are more processes than rows."""
    rows = Dataset.from_list(
        [{name: [n + 1] for name in ("prompt_ids", "chosen_ids", "rejected_ids")} for n in range(23)]
    )
    collator = SimpleNamespace(max_length=None, truncation_mode="keep_start")
    whole = columns.Slice.read(rows, collator)
    parts: list[Any] = []
    monkeypatch.setattr(columns, "count", lambda: count)
    monkeypatch.setattr(columns, "gather", lambda part: parts.append(part) or [part])
    for rank in range(count):
        monkeypatch.setattr(columns, "rank", lambda rank=rank: rank)
        columns.Slice.read(rows, collator)
    assert [key for keys, _ in parts for key in keys] == whole.keys == read_keys(rows, collator)[0]
    assert max(len(keys) for keys, _ in parts) == -(-23 // count)


@pytest.fixture
def table(tmp_path: Path) -> Dataset:
    """Memory-mapped rows."""
    Dataset.from_dict({"prompt_ids": [[n, n + 1] for n in range(50)]}).to_parquet(tmp_path / "rows.parquet")
    return Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize("order", [range(50), range(10, 30), [7, 3, 41, 0], [5]], ids=["all", "some", "mixed", "one"])
def test_rows_get_values_without_being_written_again(
    order: Any, table: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`Dataset.add_column` copies a selection of rows to the cache, gigabytes for a million rows."""
    rows = table.select(order)
    monkeypatch.setattr(Dataset, "map", lambda *_, **__: pytest.fail("rows are written"))
    values = {
        name: np.array([1 / (n + sign) for n in order]) for sign, name in zip((1, -0.5), REF_COLUMNS, strict=True)
    }
    found = attach_columns(rows, values)
    assert found.column_names == ["prompt_ids", *REF_COLUMNS]
    assert [found[place] for place in range(len(rows))] == [
        {"prompt_ids": [n, n + 1], **{name: float(values[name][place]) for name in REF_COLUMNS}}
        for place, n in enumerate(order)
    ]


def test_a_few_rows_of_many_take_no_values_for_all(table: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "_SPARSE", 10)
    rows = table.select([41, 7, 3, 8])
    found = attach_columns(rows, {name: np.arange(4.0) for name in REF_COLUMNS})
    assert len(found.data) == 4 and found["prompt_ids"][:] == rows["prompt_ids"][:]
    assert found[REF_COLUMNS[0]][:] == [0, 1, 2, 3]


@pytest.mark.parametrize("seconds, writes", [(60.0, 1), (-1.0, 4)])
def test_scored_pairs_are_written_at_most_once_a_second(
    seconds: float, writes: int, tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write takes 20 ms on a disk, as long as the forward of many pairs; what waits longer than a second is kept."""
    monkeypatch.setenv("DPO_RUNNER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(columns, "_CHUNK", 6)
    monkeypatch.setattr(columns, "_UNWRITTEN_SECONDS", seconds)
    added: list[int] = []
    add = ReferenceStore.add
    monkeypatch.setattr(ReferenceStore, "add", lambda self, pairs: added.append(len(pairs)) or add(self, pairs))
    trainer = build([*tiny_run, *STORED, "data.eval_fraction=0"], tmp_path)
    assert len(added) == writes and sum(added) == len(trainer.train_dataset)
    (path,) = store_dir().glob("*.sqlite")
    with ReferenceStore(path.stem, {}, 10**9) as store:
        keys, _ = read_keys(trainer.train_dataset, trainer.data_collator)
        assert len(store.find(keys)) == len(trainer.train_dataset)

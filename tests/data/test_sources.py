"""Tests of sources (bundled, files, folders, globs, hub datasets): the rows read, and one-line errors."""

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_runner.config.sections.data import SourceFields
from dpo_runner.data.rows.sources import open_sources
from dpo_runner.errors import DataError
from tests.support.common import ROWS
from tests.support.files import (
    LINES,
    LIST,
    TABLE,
    TRICKY,
    WRITERS,
    error_of,
    pack,
    read,
    read_path,
    rows_of,
    to_lines,
    to_table,
    write,
    write_arrow,
)

# --- files that cannot be read ---------------------------------------------------------------------------------------


PACKINGS = ["gz", "bz2", "xz", "zst"]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_a_packed_file_that_is_cut_short_is_never_taken_as_whole(suffix: str, packing: str) -> None:
    name = f"a.{suffix}.{packing}"
    whole = pack(name, {"jsonl": to_lines(ROWS), "json": json.dumps(ROWS), "csv": to_table(ROWS)}[suffix].encode())
    for length in [*range(1, 30), *range(30, len(whole) - 12, 17), *range(len(whole) - 12, len(whole))]:
        Path(name).write_bytes(whole[:length])
        assert error_of(name).startswith(f"`data.path={name}`: cannot be read; "), length


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(
    "harm", [lambda data: data + b"garbage!", lambda data: data[:90] + b"\0\1\2\3" + data[94:], lambda data: b"{}\n"]
)
def test_a_packed_file_that_is_damaged_is_refused(packing: str, harm: Callable[[bytes], bytes]) -> None:
    name = f"a.jsonl.{packing}"
    Path(name).write_bytes(harm(pack(name, to_lines(ROWS).encode())))
    assert error_of(name).startswith(f"`data.path={name}`: cannot be read; ")


@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_files_may_be_joined(packing: str) -> None:
    name = f"a.jsonl.{packing}"
    Path(name).write_bytes(pack(name, to_lines(ROWS).encode()) * 2 + bytes(8 * (packing == "xz")))  # xz may be padded
    assert [row for _, row in read_path(name)] == ROWS * 2


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_packed_file_without_its_suffix_is_known(packing: str) -> None:
    Path("a.jsonl").write_bytes(pack(f"a.{packing}", to_lines(ROWS).encode()))
    assert error_of("a.jsonl").endswith(f"; add .{packing} to its name")


@pytest.mark.parametrize("name", ["pairs.parquet", "groups.parquet", "stream_batches.arrow", "file_batches.arrow"])
def test_a_corrupt_arrow_file_is_refused(name: str) -> None:
    WRITERS[name](name)
    whole = Path(name).read_bytes()
    for damaged in (whole[:-20], whole[: len(whole) // 2], whole[:20], b"PAR1" * 9, b"no arrow file at all"):
        Path(name).write_bytes(damaged)
        if name == "stream_batches.arrow" and damaged == whole[:-20]:
            continue  # a stream may lack its end-of-stream marker
        assert error_of(name).startswith(f"`data.path={name}`: cannot be read; ")


def test_a_parquet_page_that_changed_is_found() -> None:
    pq.write_table(TABLE, "a.parquet", compression="none", use_dictionary=False, write_page_checksum=True)
    whole = Path("a.parquet").read_bytes()
    Path("a.parquet").write_bytes(whole.replace(b"It is 24.", b"It is 42.", 1))
    assert "crc checksum" in error_of("a.parquet").lower()


@pytest.mark.parametrize("new", [pa.ipc.new_stream, pa.ipc.new_file])
def test_a_wrong_offset_is_found_before_it_ends_the_process(new: Callable[..., Any]) -> None:
    write_arrow("a.arrow", pa.table({"a": ["one", "four", "eleven!"]}), new)
    offsets = [struct.pack("<4i", *numbers) for numbers in ((0, 3, 7, 14), (0, 1 << 30, 7, 14))]
    whole = Path("a.arrow").read_bytes()
    assert offsets[0] in whole
    Path("a.arrow").write_bytes(whole.replace(*offsets))
    assert "offset" in error_of("a.arrow")


def test_a_column_name_that_is_no_text_is_refused() -> None:
    write_arrow("a.arrow", pa.table({"abcdefgh": ["one"]}))
    Path("a.arrow").write_bytes(Path("a.arrow").read_bytes().replace(b"abcdefgh", b"abcd\xfffgh"))
    assert error_of("a.arrow").startswith("`data.path=a.arrow`: cannot be read; 'utf-8' codec can't decode byte 0xff")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_columns_of_one_name_are_refused(name: str) -> None:
    table = pa.table([pa.array(["x"]), pa.array(["y"])], ["a", "a"])
    pq.write_table(table, name) if name == "a.parquet" else write_arrow(name, table)
    assert error_of(name) == f"`data.path={name}`: cannot be read; column `a` appears twice"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_utf_16_is_called_by_its_name(name: str, encoding: str) -> None:
    text = "\ufeff" * (encoding == "utf-16-le") + to_lines(ROWS)
    assert error_of(write(name, text.encode(encoding))) == (
        f"`data.path={name}`: cannot be read; it is UTF-16; save it as UTF-8"
    )


NO_ROWS = {"a.jsonl": "\n \n", "a.json": "[]", "b.json": " \n", "c.json": " [ ] ", "a.csv": "a,b\n", "b.csv": "\n"}


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", NO_ROWS)
def test_a_source_without_rows_is_refused(name: str, packing: str) -> None:
    name, text = name + packing, NO_ROWS[name]
    assert error_of(write(name, text)) == f"`data.path={name}`: holds no rows"


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_an_arrow_file_without_rows_is_refused(name: str) -> None:
    for table in (pa.table({"a": pa.array([], pa.string())}), pa.table({})):
        pq.write_table(table, name) if name == "a.parquet" else write_arrow(name, table)
        assert error_of(name) == f"`data.path={name}`: holds no rows"


def test_one_of_several_files_may_be_without_rows() -> None:
    write("rows/a.jsonl", "\n")
    write("rows/b.jsonl", to_lines(ROWS))
    assert [row for _, row in read_path("rows")] == ROWS


@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz", "a.csv.zst", "a.parquet", "a.arrow"])
def test_an_empty_file_is_refused(name: str) -> None:
    Path(name).touch()
    assert error_of(name) == f"`data.path={name}`: the file is empty"


FORMATS = ".json, .jsonl, .ndjson, .csv, .tsv (each also with .gz, .bz2, .xz, .zst), .parquet or .arrow"


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("a.txt", ".txt"),
        ("a.pkl", ".pkl"),
        ("a.gz", ".gz"),
        ("a.parquet.gz", ".parquet.gz"),
        ("a.parquet.bz2", ".parquet.bz2"),
        ("a.jsonl.zip", ".zip"),
        ("a", ""),
        (".jsonl", ""),
    ],
)
def test_an_unknown_format_is_refused(name: str, suffix: str) -> None:
    Path(name).write_text("text")
    what = f"no such format `{suffix}`" if suffix else "its name has no suffix"
    assert error_of(name) == f"`data.path={name}`: {what}; use {FORMATS}"


@pytest.mark.parametrize("name", ["pairs", "pairs.txt"])
@pytest.mark.parametrize(
    ("content", "advice"),
    [
        (LINES, "it looks like JSON Lines; rename it to end in .jsonl"),
        (LIST, "it looks like a JSON list; rename it to end in .json"),
        (json.dumps({"data": TRICKY}, indent=1), "it looks like JSON; rename it to end in .json, or in .jsonl if each"),
        (to_table(TRICKY), "it looks like a table; rename it to end in .csv"),
        (to_table(TRICKY, "\t"), "it looks like a table; rename it to end in .tsv"),
        (b"PAR1" + bytes(9), "it is Parquet; rename it to end in .parquet"),
        (pack("a.xz", LINES.encode()), "it is compressed with xz; add .xz to its name"),
        ("Dear all,\n\nthis is prose.", f"use {FORMATS}"),
    ],
)
def test_a_file_of_an_unknown_format_is_told_its_suffix(name: str, content: str | bytes, advice: str) -> None:
    write(name, content)
    assert advice in error_of(name)


@pytest.mark.parametrize(
    "path", ["pears.jsonl", "./pears.jsonl", "here/pairs", "~/pears.jsonl", "/nowhere/pears.jsonl"]
)
def test_a_missing_file_is_missed_with_the_nearest_name(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(Path.cwd()))
    for folder in (".", "here"):
        write(f"{folder}/pairs.jsonl", LINES)
    near = "" if "nowhere" in path else "; did you mean `pairs.jsonl`?"
    assert error_of(path) == f"`data.path={path}`: no such file{near}"
    assert error_of("pairs.jsonl", eval_path=path) == f"`data.eval_path={path}`: no such file{near}"


@pytest.mark.parametrize("path", ["a.jsonl", "./a", "/a/b", "~nobody-of-this-name/a.jsonl", "a/b/c", "a b", "x" * 300])
def test_what_can_be_no_hub_dataset_is_a_missing_file(path: str) -> None:
    message = error_of(path)
    assert message.startswith(f"`data.path={path}`: ") and "hub" not in message


def test_the_home_folder_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(Path.cwd() / "home"))
    write("home/pairs.jsonl", LINES)
    for path in ("~/pairs.jsonl", "~", "~/*.jsonl"):
        assert [row for _, row in read_path(path)] == TRICKY
    assert open_sources(SourceFields(path="~/pairs.jsonl"), "data")[0].files == ("~/pairs.jsonl",)


@pytest.mark.parametrize("path", ["a.jsonl", "folder", "*.jsonl"])
def test_a_file_that_may_not_be_read_is_refused(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.jsonl", "folder/a.jsonl"):
        write(name, LINES)

    def refuse(file: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(Path, "open", refuse)  # file permissions would not stop root
    message = error_of(path)
    assert message.startswith(f"`data.path={path}`: cannot be read; Permission denied (") and "a.jsonl" in message


def test_a_folder_that_may_not_be_read_is_not_taken_for_an_empty_one(monkeypatch: pytest.MonkeyPatch) -> None:
    write("folder/a.jsonl", LINES)

    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", refuse)
    assert error_of("folder") == "`data.path=folder`: cannot be read; Permission denied (folder)"


def test_a_file_that_vanishes_is_one_line() -> None:
    source, _ = open_sources(SourceFields(path=write("a.jsonl", LINES)), "data.sources.math")
    Path("a.jsonl").unlink()
    for use in (source.digest, lambda: list(source.batches(1))):
        with pytest.raises(DataError) as caught:
            use()
        assert str(caught.value) == (
            "`data.sources.math.path=a.jsonl`: cannot be read; No such file or directory (a.jsonl)"
        )


def test_the_source_of_a_mixture_is_named() -> None:
    assert error_of("a.jsonl", "data.sources.math") == "`data.sources.math.path=a.jsonl`: no such file"


def test_a_source_without_a_path_is_refused() -> None:
    with pytest.raises(DataError, match=r"^`data\.path`: must be set"):
        open_sources(SourceFields(), "data")


# --- bundled, folders, globs -----------------------------------------------------------------------------------------


def test_bundled_pairs_bring_evaluation_rows() -> None:
    train, evaluation = open_sources(SourceFields(path="bundled:concise"), "data")
    assert evaluation is not None
    assert (train.files, evaluation.files) == (("bundled:concise/train.jsonl",), ("bundled:concise/eval.jsonl",))
    assert train.locate(0, 3) == "bundled:concise/train.jsonl:3"
    assert len(rows_of(train)) > len(rows_of(evaluation)) > 50


@pytest.mark.parametrize("name", ["concies", "", "../data"])
def test_unknown_bundled_pairs_are_refused(name: str) -> None:
    message = error_of(f"bundled:{name}")
    assert message.startswith(f"`data.path=bundled:{name}`: no such bundled data; ") and "concise" in message


def test_bundled_pairs_give_way_to_named_evaluation_rows() -> None:
    conf = SourceFields(path="bundled:concise", eval_path=write("mine.jsonl", LINES))
    assert rows_of(open_sources(conf, "data")[1]) == TRICKY


def open_names(path: str, **fields: Any) -> tuple[list[str], list[str] | None]:
    train, evaluation = open_sources(SourceFields(path=path, **fields), "data")
    return list(train.files), list(evaluation.files) if evaluation else None


@pytest.mark.parametrize(
    ("names", "train", "evaluation"),
    [
        (["a.jsonl", "b.csv.gz"], ["a.jsonl", "b.csv.gz"], []),
        (["train.jsonl", "test.jsonl"], ["train.jsonl"], ["test.jsonl"]),
        (["train-00000-of-00002.parquet", "validation-00000-of-00001.parquet"], [0], [1]),
        (["x_eval.json", "x.json"], ["x.json"], ["x_eval.json"]),
        (["dev.tsv", "math.valid.tsv", "Evaluation2.tsv", "pairs.tsv"], ["pairs.tsv"], [2, 0, 1]),
        (["contest.jsonl", "device.jsonl", "latest.jsonl", "evaluate.jsonl", "eval.jsonl"], [0, 1, 3, 2], [4]),
        (["train_test_split.jsonl", "val.jsonl"], ["train_test_split.jsonl"], ["val.jsonl"]),
        (["test/0.jsonl", "train/0.jsonl", "train/dev.jsonl", "z/train.jsonl"], [1, 3], [0, 2]),
        (["b/2.jsonl", "a/1.jsonl", "c.jsonl"], [1, 0, 2], []),
        ([".hidden.jsonl", ".git/a.jsonl", "README.md", "a.txt", "dataset_infos.json", "a.jsonl"], ["a.jsonl"], []),
        (["state.json", "a.jsonl"], ["a.jsonl"], []),
    ],
)
@pytest.mark.parametrize("root", ["rows", "rows/", "./rows", "test", "absolute"])
def test_the_files_of_a_folder_are_told_apart_by_words(
    names: list[str], train: list[Any], evaluation: list[Any], root: str
) -> None:
    root = str(Path.cwd() / "rows") if root == "absolute" else root
    for name in names:
        write(f"{root}/{name}", "x")
    shown = [[str(Path(root) / (names[n] if isinstance(n, int) else n)) for n in part] for part in (train, evaluation)]
    assert open_names(root) == (shown[0], shown[1] or None)
    write("other/named.jsonl", "x")
    assert open_names(root, eval_path="other/named.jsonl") == (shown[0], ["other/named.jsonl"])


def test_rows_of_a_folder_say_their_file() -> None:
    write("rows/b.jsonl", to_lines(ROWS[2:]))
    write("rows/a.csv", to_table(ROWS[:2]))
    source, _ = open_sources(SourceFields(path="rows"), "data")
    assert rows_of(source) == ROWS
    assert source.locate(1, 5) == "rows/b.jsonl:5"
    write("rows/b.json", "[")
    assert error_of("rows") == "`data.path=rows`: rows/b.json: cannot be read; line 1, column 2: the list never closes"


@pytest.mark.parametrize("names", [[], ["README.md"], [".a.jsonl"], ["dataset_info.json"]])
def test_a_folder_without_rows_is_refused(names: list[str]) -> None:
    Path("rows").mkdir()
    for name in names:
        write(f"rows/{name}", "x")
    message = f"the folder holds no file of a known format; use {FORMATS}"
    assert error_of("rows") == f"`data.path=rows`: {message}"
    assert error_of("bundled:concise", eval_path="rows") == f"`data.eval_path=rows`: {message}"


def test_a_folder_of_evaluation_files_alone_is_refused() -> None:
    write("rows/test.jsonl", LINES)
    message = "`data.path=rows`: holds evaluation files only; rename one of them to train.jsonl or similar"
    assert error_of("rows") == message


def test_an_empty_file_of_a_folder_is_named() -> None:
    write("rows/a.jsonl", LINES)
    Path("rows/b.jsonl").touch()
    assert error_of("rows") == "`data.path=rows`: rows/b.jsonl: the file is empty"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("rows/*.jsonl", ["rows/a.jsonl", "rows/test.jsonl"]),
        ("rows/?.*", ["rows/a.jsonl", "rows/b.csv"]),
        ("rows/[ab].*", ["rows/a.jsonl", "rows/b.csv"]),
        ("rows/**/*.jsonl", ["rows/a.jsonl", "rows/sub/c.jsonl", "rows/test.jsonl"]),
        ("*/sub/*", ["rows/sub/c.jsonl"]),
    ],
)
def test_a_glob_takes_what_it_matches_as_it_is(pattern: str, expected: list[str]) -> None:
    for name in ("a.jsonl", "b.csv", "test.jsonl", ".hidden.jsonl", "sub/c.jsonl"):
        write(f"rows/{name}", "x")
    assert open_names(pattern) == (expected, None)
    assert open_names("rows/b.csv", eval_path=pattern) == (["rows/b.csv"], expected)


def test_a_glob_of_absolute_paths() -> None:
    write("rows/a.jsonl", LINES)
    assert open_names(f"{Path.cwd()}/rows/*") == ([f"{Path.cwd()}/rows/a.jsonl"], None)


def test_a_file_may_be_called_like_a_glob() -> None:
    write("pairs[1].jsonl", LINES)
    write("pairs1.jsonl", "x")
    assert open_names("pairs[1].jsonl") == (["pairs[1].jsonl"], None)


@pytest.mark.parametrize("pattern", ["rows/*.csv", "*.jsonl", "nowhere/*", "row?"])
def test_a_glob_without_a_match_is_refused(pattern: str) -> None:
    write("rows/a.jsonl", LINES)
    assert error_of(pattern) == f"`data.path={pattern}`: no file matches"


def test_a_glob_that_matches_an_unknown_format_is_refused() -> None:
    write("rows/a.jsonl", LINES)
    write("rows/b.txt", "x")
    assert error_of("rows/*") == f"`data.path=rows/*`: rows/b.txt: no such format `.txt`; use {FORMATS}"


@pytest.mark.parametrize("path", ["rows", "rows/*", "rows/**"])
@pytest.mark.parametrize("eval_path", ["rows/b.jsonl", "rows/[b].jsonl", "../{here}/rows/b.jsonl"])
def test_what_is_named_for_evaluation_is_not_trained_on(path: str, eval_path: str) -> None:
    for name in "abc":
        write(f"rows/{name}.jsonl", "x")
    eval_path = eval_path.format(here=Path.cwd().name)
    assert open_names(path, eval_path=eval_path) == (["rows/a.jsonl", "rows/c.jsonl"], [eval_path.replace("[b]", "b")])


@pytest.mark.parametrize("path", ["rows", "rows/*"])
def test_naming_all_files_for_evaluation_leaves_none_to_train_on(path: str) -> None:
    write("rows/a.jsonl", LINES)
    assert "holds evaluation files only" in error_of(path, eval_path="rows/a.jsonl")


def test_one_file_may_be_named_for_both() -> None:
    write("a.jsonl", LINES)
    assert open_names("a.jsonl", eval_path="a.jsonl") == (["a.jsonl"], ["a.jsonl"])


@pytest.mark.parametrize("path", ["a.jsonl", "rows", "rows/*", "bundled:concise"])
@pytest.mark.parametrize(
    ("field", "value", "cure"),
    [
        (
            "subset",
            "main",
            "is for hub datasets and folders whose README.md has configurations, not for data.path={path}; leave it "
            "out",
        ),
        ("revision", "v2", "is for hub datasets, not for data.path={path}; leave it out"),
        (
            "split",
            "test",
            "is for hub datasets and folders that name their splits, not for data.path={path}; leave it out",
        ),
        (
            "eval_split",
            "test",
            "is for hub datasets and folders that name their splits, not for data.path={path}; set data.eval_path "
            "instead",
        ),
    ],
)
def test_settings_of_the_hub_are_refused_for_files(path: str, field: str, value: str, cure: str) -> None:
    for name in ("a.jsonl", "rows/a.jsonl"):
        write(name, LINES)
    assert error_of(path, **{field: value}) == f"`data.{field}={value}`: {cure.format(path=path)}"


# --- written and loaded by `datasets` --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a Dataset of three shards, a filtered one, one of mixed types, and a DatasetDict."""
    from datasets import Dataset, DatasetDict, Features, Json, List, Value, disable_progress_bars

    disable_progress_bars()
    root = tmp_path_factory.mktemp("saved")
    rows = Dataset.from_list(ROWS)
    rows.save_to_disk(root / "one", num_shards=3)
    rows.select([5, 3]).save_to_disk(root / "selected")
    DatasetDict(train=rows, test_prefs=rows.select(range(4))).save_to_disk(root / "both")
    mixed = Features({"prompt": Value("string"), "tools": List(Json()), "call": {"arguments": Json()}})
    Dataset.from_list(MIXED, features=mixed).save_to_disk(root / "mixed")
    Dataset.from_list(MIXED, features=mixed).to_parquet(root / "mixed.parquet")
    return root


MIXED = [
    {"prompt": "a", "tools": [{"x": 1}, {"y": ["z"]}], "call": {"arguments": {"n": 1.5, "m": None}}},
    {"prompt": "b", "tools": None, "call": {"arguments": [1, "two"]}},
    {"prompt": "c", "tools": [], "call": {"arguments": None}},
]


def test_a_saved_dataset(saved: Path) -> None:
    source, evaluation = open_sources(SourceFields(path=str(saved / "one")), "data")
    assert evaluation is None and rows_of(source) == ROWS
    assert source.files == tuple(f"{saved}/one/data-0000{n}-of-00003.arrow" for n in range(3))
    assert source.locate(2, 1) == f"{saved}/one/data-00002-of-00003.arrow, row 1"
    assert [row for _, row in read_path(saved / "selected")] == [ROWS[5], ROWS[3]]


@pytest.mark.parametrize("name", ["mixed", "mixed.parquet"])
@pytest.mark.parametrize("size", [1, 2, 100])
def test_values_that_datasets_packs_as_json_are_unpacked(saved: Path, name: str, size: int) -> None:
    assert [row for _, row in read_path(saved / name, size)] == MIXED


def test_packed_json_that_is_broken_costs_one_row() -> None:
    column = pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"a": 1}', "{", "[" * 100_000]))
    write_arrow("a.arrow", pa.table({"x": column}))
    (_, first), (_, second), (_, third) = read_path("a.arrow")
    assert first == {"x": {"a": 1}} and {second.reason, third.reason} == {"broken JSON"}


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_saved_dict_of_splits(saved: Path, slash: str) -> None:
    path = str(saved / "both") + slash
    train, evaluation = open_sources(SourceFields(path=path, eval_split="test_prefs"), "data")
    assert rows_of(train) == ROWS and rows_of(evaluation) == ROWS[:4]
    assert train.files == (f"{saved}/both/train/data-00000-of-00001.arrow",)
    assert open_sources(SourceFields(path=path), "data")[1] is None
    assert rows_of(open_sources(SourceFields(path=path, split="test_prefs"), "data")[0]) == ROWS[:4]
    split_as_file = SourceFields(path=path, eval_path=path.rstrip("/") + "/test_prefs")
    assert rows_of(open_sources(split_as_file, "data")[1]) == ROWS[:4]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"split": "trian"}, "`data.split=trian`: no such split in {path}; did you mean `train`?"),
        (
            {"eval_split": "test_pref"},
            "`data.eval_split=test_pref`: no such split in {path}; did you mean `test_prefs`?",
        ),
        ({"eval_split": "x"}, "`data.eval_split=x`: no such split in {path}; choose from test_prefs, train"),
        (
            {"subset": "x"},
            "`data.subset=x`: is for hub datasets and folders whose README.md has configurations, not for "
            "data.path={path}; leave it out",
        ),
        (
            {"eval_path": "{path}"},
            "`data.eval_path={path}`: the folder holds several splits; name the subfolder of one of them",
        ),
    ],
)
def test_settings_that_do_not_go_with_saved_splits(saved: Path, fields: dict[str, str], problem: str) -> None:
    path = str(saved / "both")
    fields = {key: value.format(path=path) for key, value in fields.items()}
    assert error_of(path, **fields) == problem.format(path=path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"_data_files": [{}]}', '{"_data_files": 1}'])
def test_a_saved_folder_that_was_tampered_with(text: str) -> None:
    write("rows/state.json", text)
    write("rows/dataset_info.json", "{}")
    assert error_of("rows").startswith("`data.path=rows`: rows/state.json is not as `datasets` writes it; ")


def test_a_saved_folder_that_lacks_a_file() -> None:
    write("rows/state.json", '{"_data_files": [{"filename": "data-0.arrow"}]}')
    write("rows/dataset_info.json", "{}")
    assert error_of("rows") == "`data.path=rows`: rows/data-0.arrow: no such regular file"


@pytest.fixture
def hub(saved: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Replace the hub by a local folder, and return the list of recorded calls."""
    import datasets

    calls = []

    def load(path: str, subset: str | None, *, split: str, revision: str | None) -> Any:
        calls.append((path, subset, split, revision))
        both = datasets.load_from_disk(str(saved / "both"))
        if split not in both:
            raise ValueError(f'Unknown split "{split}". Should be one of {sorted(both)}.\nAnd more.')
        return both[split]

    monkeypatch.setattr(datasets, "load_dataset", load)
    return calls


@pytest.mark.parametrize("size", [1, 5, 100])
def test_a_hub_dataset(hub: list[tuple[Any, ...]], size: int) -> None:
    conf = SourceFields(path="org/prefs", subset="main", revision="v2", eval_split="test_prefs")
    train, evaluation = open_sources(conf, "data")
    assert evaluation is not None
    assert hub == [("org/prefs", "main", "train", "v2"), ("org/prefs", "main", "test_prefs", "v2")]
    assert (train.files, evaluation.files) == (("org/prefs (split train)",), ("org/prefs (split test_prefs)",))
    assert train.locate(0, 3) == "org/prefs (split train), row 3"
    assert read(train, size) == list(enumerate(ROWS, start=1)) and rows_of(evaluation) == ROWS[:4]
    assert max(len(batch.numbers) for batch in train.batches(size)) <= size
    assert train.digest() == train.dataset._fingerprint != evaluation.digest()


def test_a_hub_dataset_with_evaluation_rows_of_ones_own(hub: list[tuple[Any, ...]]) -> None:
    train, evaluation = open_sources(SourceFields(path="prefs", eval_path=write("a.jsonl", LINES)), "data")
    assert len(hub) == 1 and rows_of(train) == ROWS and rows_of(evaluation) == TRICKY


def test_an_unknown_split_of_the_hub(hub: list[tuple[Any, ...]]) -> None:
    assert error_of("org/prefs", eval_split="tset") == (
        "`data.path=org/prefs` (split tset): neither a local file nor a reachable hub dataset; "
        "Unknown split \"tset\". Should be one of ['test_prefs', 'train']."
    )


def test_a_hub_out_of_reach() -> None:
    message = error_of("no-such-org/no-such-dataset")
    assert message.startswith(
        "`data.path=no-such-org/no-such-dataset` (split train): neither a local file nor a reachable hub dataset; "
    )


def test_a_folder_here_comes_before_the_hub(hub: list[tuple[Any, ...]]) -> None:
    write("org/prefs/a.jsonl", LINES)
    assert [row for _, row in read_path("org/prefs")] == TRICKY and not hub


# --- digest, memory, imports -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz", "a.csv.zst"])
def test_the_digest_is_of_the_content_alone(name: str) -> None:
    def digest(path: str) -> str:
        return open_sources(SourceFields(path=path), "data")[0].digest()

    write(name, LINES)
    data = Path(name).read_bytes()
    Path("copies").mkdir()
    copy = Path("copies", f"other_{name}")
    copy.write_bytes(data)
    assert digest(name) == digest(str(copy)) == digest("copies")
    copy.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert digest(str(copy)) != digest(name)
    other = Path("other.tsv" + Path(name).suffix.replace(".jsonl", ""))
    other.write_bytes(data)
    assert digest(str(other)) != digest(name)  # as .tsv the same bytes are other rows


def test_the_digest_depends_on_where_files_end_and_on_their_order() -> None:
    contents = [("a", "bc"), ("ab", "c"), ("bc", "a"), ("abc",)]
    for number, texts in enumerate(contents):
        for name, text in zip("ab", texts, strict=False):
            write(f"{number}/{name}.jsonl", text)
    digests = {open_sources(SourceFields(path=str(n)), "data")[0].digest() for n in range(len(contents))}
    assert len(digests) == len(contents)


def test_importing_it_loads_no_heavy_library() -> None:
    heavy = {"torch", "transformers", "datasets", "pyarrow"}
    code = f"import sys, dpo_runner.data.rows.sources; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout == "set()\n", done.stderr

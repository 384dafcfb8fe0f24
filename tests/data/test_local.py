"""Tests of folders that name their splits: in README.md, in file names, or as `datasets` writes them."""

from pathlib import Path
from typing import Any

import pytest

from dpo_runner.config.sections.data import SourceFields
from dpo_runner.data.rows.sources import open_sources
from tests.support.common import ROWS
from tests.support.files import error_of, rows_of, to_lines, write

PREFS = ["gen", "prefs", "sft"]
SPLITS = {f"{side}_{kind}": f"data/{side}_{kind}-00000-of-00001.jsonl" for side in ("train", "test") for kind in PREFS}
USERS = "is for hub datasets and folders that name their splits, not for data.path=rows; "


def card(configs: str) -> str:
    return f"---\nlicense: mit\n{configs}---\n# Card\n\n---\nconfigs: no header\n---\n"


def one_config(files: dict[str, str], more: str = "") -> str:
    items = "".join(f"  - split: {split}\n    path: {path}\n" for split, path in files.items())
    return card(f"configs:\n- config_name: default\n{more}  data_files:\n{items}")


def make(names: list[str], readme: str | None = None) -> None:
    for name in names:
        write(f"rows/{name}", "x")
    if readme is not None:
        write("rows/README.md", readme)


def open_names(**fields: Any) -> tuple[list[str], list[str]]:
    """Return the names of the training and evaluation files in the folder `rows`, below it."""
    sides = open_sources(SourceFields(path="rows", **fields), "data")
    train, evaluation = ([str(Path(f).relative_to("rows")) for f in side.files] if side else [] for side in sides)
    return train, evaluation


AB = ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize(
    ("names", "files", "fields", "expected"),
    [
        (AB, {"train": "a.jsonl", "test": "b.jsonl"}, {}, (["a.jsonl"], ["b.jsonl"])),
        (AB, {"train": "b.jsonl"}, {}, (["b.jsonl"], [])),
        (AB, {"train": "'*.jsonl'"}, {}, (AB, [])),
        (AB, {"train": "[b.jsonl, '?.jsonl']"}, {}, (["b.jsonl", "a.jsonl"], [])),
        (AB, {"all": "a.jsonl", "validation": "b.jsonl"}, {}, (["a.jsonl"], ["b.jsonl"])),
        (AB, {"train": "a.jsonl", "test": "b.jsonl"}, {"split": "test"}, (["b.jsonl"], [])),
        (AB, {"train": "a.jsonl", "extra": "b.jsonl"}, {}, (["a.jsonl"], [])),  # as `datasets`: `train` is one of them
        (AB, {"train": "a.jsonl", "extra": "b.jsonl"}, {"eval_split": "extra"}, (["a.jsonl"], ["b.jsonl"])),
        (
            ["test/train.csv", "x/b.csv"],
            {"train": "'**/b.csv'", "dev": "test/*"},
            {},
            (["x/b.csv"], ["test/train.csv"]),
        ),
        (
            [*SPLITS.values()],
            {split: f"data/{split}-*" for split in SPLITS},
            {"split": "train_prefs", "eval_split": "test_prefs"},
            ([SPLITS["train_prefs"]], [SPLITS["test_prefs"]]),
        ),
    ],
)
def test_a_readme_names_the_files_of_the_splits(
    names: list[str], files: dict[str, str], fields: dict[str, str], expected: Any
) -> None:
    make(names, one_config(files))
    assert open_names(**fields) == expected


@pytest.mark.parametrize(
    ("configs", "subset", "expected"),
    [
        ("- config_name: one\n  data_files: a.jsonl\n", None, ["a.jsonl"]),
        ("- config_name: one\n  data_files: [b.jsonl, a.jsonl]\n", None, ["b.jsonl", "a.jsonl"]),
        ("- {config_name: x, data_files: a.jsonl}\n- {config_name: default, data_files: b.jsonl}\n", None, ["b.jsonl"]),
        (
            "- {config_name: x, data_files: a.jsonl}\n- {config_name: y, default: true, data_files: b.jsonl}\n",
            None,
            ["b.jsonl"],
        ),
        (
            "- {config_name: x, data_files: a.jsonl}\n- {config_name: y, default: true, data_files: b.jsonl}\n",
            "x",
            ["a.jsonl"],
        ),
        ("- {config_name: x, data_dir: sub}\n", None, ["sub/c.jsonl"]),
        ("- {config_name: x, data_dir: sub, data_files: '*'}\n", None, ["sub/c.jsonl"]),
        ("- {config_name: x, drop_labels: true}\n", None, ["a.jsonl", "b.jsonl", "sub/c.jsonl"]),
    ],
)
def test_a_readme_may_have_configurations(configs: str, subset: str | None, expected: list[str]) -> None:
    make([*AB, "sub/c.jsonl"], card(f"configs:\n{configs}"))
    assert open_names(subset=subset) == (expected, [])


@pytest.mark.parametrize(
    "readme", ["# no header", "---\nlicense: mit\n---\n", "---\na: b: c\n---\n", "---\nconfigs: []\n---\n", "\xff"]
)
def test_a_readme_without_configurations_says_nothing(readme: str) -> None:
    make(AB, readme)
    assert open_names() == (AB, [])


@pytest.mark.parametrize(
    ("readme", "fields", "problem"),
    [
        (one_config({"train": "c.jsonl"}), {}, "README.md gives split train the files c.jsonl, and there are none; "),
        (one_config({"test": "a.jsonl"}), {}, "the folder has evaluation splits only; choose data.split=test"),
        (
            one_config({"a": "a.jsonl", "b": "b.jsonl", "dev": "b.jsonl"}),
            {},
            "the folder has several training splits; choose data.split=a or data.split=b, and data.eval_split=dev",
        ),
        (one_config({"train": "a.jsonl"}), {"split": "trian"}, "`data.split=trian`: no such split in rows; did you"),
        (one_config({"train": "a.jsonl"}), {"eval_split": "x"}, "`data.eval_split=x`: no such split in rows; choose"),
        (one_config({"train": "a.jsonl"}), {"revision": "x"}, "`data.revision=x`: is for hub datasets, not for"),
        (one_config({"train": "a.jsonl"}), {"subset": "defualt"}, "no such configuration in rows/README.md; did you"),
        (one_config({"train": "README.md"}), {}, "rows/README.md: no such format `.md`"),
        (
            card("configs:\n- {config_name: x y, data_files: a.jsonl}\n- {config_name: z, data_files: b.jsonl}\n"),
            {},
            "several configurations and no default; choose one with 'data.subset=x y' or data.subset=z",
        ),
        (card("configs:\n- config_name: a\n  data_files: b: c\n"), {}, "rows/README.md, line 5: its header is no YAML"),
        (card("configs:\n- data_files: a.jsonl\n"), {}, "it lacks 'config_name'; correct or delete them"),
        (card("configs:\n- {config_name: a, data_files: [{split: train}]}\n"), {}, "it lacks 'path'; correct or"),
        (card("configs:\n- {config_name: a, data_files: 3}\n"), {}, "rows/README.md: its `configs` must be a list of"),
        (card("configs:\n- {config_name: a, data_files: {split: 1, path: a}}\n"), {}, " is none; correct or delete"),
        (card("configs: 3\n"), {}, "rows/README.md: its `configs` must be a list of config_name and data_files"),
    ],
)
def test_a_readme_that_cannot_be_followed_is_one_line(readme: str, fields: dict[str, str], problem: str) -> None:
    make(AB, readme)
    assert problem in error_of("rows", **fields)


def test_splits_in_the_names_of_files_are_never_mixed() -> None:
    make([*SPLITS.values()])
    assert error_of("rows") == (
        "`data.path=rows`: the folder has several training splits; choose data.split=train_gen or "
        "data.split=train_prefs or data.split=train_sft, and data.eval_split=test_gen or data.eval_split=test_prefs or "
        "data.eval_split=test_sft"
    )
    assert open_names(split="train_sft") == ([SPLITS["train_sft"]], [])
    expected = [SPLITS["train_sft"]], [SPLITS["test_sft"]]
    assert open_names(split="train_sft", eval_split="test_sft") == expected
    assert "no such split in rows; did you mean `train_prefs`?" in error_of("rows", split="train_pref")


@pytest.mark.parametrize(
    ("names", "fields", "train", "evaluation"),
    [
        (["prefs-00000-of-00002.csv", "prefs-00001-of-00002.csv"], {}, [0, 1], []),
        (["train-00000-of-00001.csv", "test-00000-of-00001.csv", "val-00000-of-00001.csv"], {}, [0], [1, 2]),
        (
            ["train-00000-of-00001.csv", "test-00000-of-00001.csv", "val-00000-of-00001.csv"],
            {"eval_split": "val"},
            [0],
            [2],
        ),
        (["train-00000-of-00001.csv", "test-00000-of-00001.csv"], {"split": "test"}, [1], []),
        (["train/x-00000-of-00001.csv", "test/x-00000-of-00001.csv"], {}, [0], [1]),  # the folders tell
        (["en/train-00000-of-00001.csv", "fr/train-00000-of-00001.csv"], {}, [0, 1], []),
        (["a-00000-of-00001.csv", "b-00000-of-00001.csv", "c.csv"], {}, [0, 1, 2], []),  # not all have one
        (["prefs.csv", "sft.csv"], {"split": "prefs"}, [0], []),
        (["prefs.csv", "sft.csv", "check.csv"], {"split": "prefs", "eval_split": "check"}, [0], [2]),
        (["en/prefs.csv", "fr/prefs.csv", "sft.csv"], {"split": "prefs"}, [0, 1], []),
    ],
)
def test_splits_in_the_names_of_files(
    names: list[str], fields: dict[str, str], train: list[int], evaluation: list[int]
) -> None:
    make(names)
    assert open_names(**fields) == ([names[n] for n in train], [names[n] for n in evaluation])


@pytest.mark.parametrize("names", [AB, ["train/x-00000-of-00001.csv", "test/x-00000-of-00001.csv"], ["train_x.csv"]])
@pytest.mark.parametrize("field", ["split", "eval_split"])
def test_a_folder_without_splits_has_none_to_choose(names: list[str], field: str) -> None:
    make(names)
    assert error_of("rows", **{field: "x"}).startswith(f"`data.{field}=x`: {USERS}")


def test_what_datasets_keeps_for_itself_is_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    files = {split: write(f"{split}.jsonl", to_lines(ROWS)) for split in ("train_prefs", "train_gen", "test_prefs")}
    rows = load_dataset("json", data_files=files, cache_dir="cached")["train_prefs"]
    rows.map(lambda row: row).shuffle(seed=1)
    folder = Path(rows.cache_files[0]["filename"]).parent
    write(f"{folder}.incomplete/json-train.jsonl", "x")
    assert len([*folder.glob("cache-*.arrow")]) == 2
    assert "choose data.split=train_gen or data.split=train_prefs" in error_of(folder)
    fields = {"split": "train_prefs", "eval_split": "test_prefs"}
    train, evaluation = open_sources(SourceFields(path=str(folder), **fields), "data")
    assert rows_of(train) == rows_of(evaluation) == ROWS
    assert [Path(name).name for name in train.files] == ["json-train_prefs.arrow"]
    assert sorted(Path(name).name for name in train.skipped) == sorted(f.name for f in folder.glob("cache-*"))
    for path in folder.glob("json-*"):
        path.unlink()
    assert "holds no file of a known format besides cache-" in error_of(folder)


def test_unfinished_folders_hold_no_rows() -> None:
    make(["a.jsonl", "x.incomplete/b.jsonl", "cache-1a2b.arrow", "cache-notes.jsonl"])
    source, _ = open_sources(SourceFields(path="rows"), "data")
    assert source.files == ("rows/a.jsonl", "rows/cache-notes.jsonl")
    assert source.skipped == ("rows/cache-1a2b.arrow", "rows/x.incomplete/b.jsonl")


def test_a_cache_of_the_hub_is_its_only_snapshot() -> None:
    for name in AB:
        write(f"hub/snapshots/4f2a/{name}", "x")
    write("hub/snapshots/4f2a/README.md", one_config({"train": "a.jsonl"}))
    Path("hub/blobs").mkdir()
    source, _ = open_sources(SourceFields(path="hub/"), "data")
    assert source.files == ("hub/snapshots/4f2a/a.jsonl",)
    write("hub/snapshots/5f2a/a.jsonl", "x")
    choice = "data.path=hub/snapshots/4f2a or data.path=hub/snapshots/5f2a"
    assert error_of("hub") == f"`data.path=hub`: holds 2 snapshots of a hub dataset; choose {choice}"

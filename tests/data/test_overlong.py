"""Tests of pairs longer than training.max_length: dropped, cut, or left to TRL, and counted."""

from pathlib import Path
from typing import Any

import pytest

from dpo_runner.data.templates.chat_template import apply_chat_template
from tests.support.data import NO_EVAL, check_account, load, write


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
    data = load(tokenizer, path, *NO_EVAL, *limit, "data.max_bad_fraction=0")  # overlong rows are not bad rows
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

"""Prompts of files without answers, and of preference pairs in any layout."""

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_runner.config.compose import load_conf
from dpo_runner.data.prompts import Prompts, read_prompts
from dpo_runner.errors import ConfigError, DataError

WHY = [{"role": "user", "content": "Why?"}]
BRIEF = {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": "So."}


def read(rows: list[Any], *overrides: str) -> Prompts:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_prompts(load_conf(["data=local_file", "data.path=rows.jsonl", *overrides]).data)


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"prompt": "Why?"}, WHY),
        ({"question": "Why?", "system": "Be brief."}, [BRIEF, *WHY]),
        ({"prompt": WHY}, WHY),
        ({"prompt": "Why?", "history": [["Who?", "Me."]]},
         [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}, *WHY]),
        ({"messages": [BRIEF, *WHY, ANSWER]}, [BRIEF, *WHY]),
        ({"conversations": [{"from": "human", "value": "Why?"}]}, WHY),
        ({"prompt": "Why?", "chosen": "So.", "rejected": "No."}, WHY),
        ({"chosen": "\n\nHuman: Why?\n\nAssistant: So.", "rejected": "\n\nHuman: Why?\n\nAssistant: No."}, WHY),
        ({"prompt": "Why?", "responses": ["So.", "No."], "scores": [1, 1]}, WHY),
        ({"prompt": "Why?", "completion": "So.", "label": True}, WHY),
    ],
)  # fmt: skip
def test_the_prompt_of_a_row(row: dict[str, Any], messages: list[dict[str, str]]) -> None:
    [prompt] = read([row]).prompts
    assert (prompt.messages, prompt.where, prompt.variables) == (messages, "rows.jsonl:1", {})


def test_what_the_template_needs_comes_along() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    [prompt] = read([{"prompt": "Why?", "tools": [tool], "chat_template_kwargs": {"thinking": False}}]).prompts
    assert prompt.variables == {"tools": [tool], "thinking": False}


def test_prompts_are_distinct_counted_and_limited() -> None:
    rows = [{"prompt": "Why?"}, {"prompt": "Who?"}, {"prompt": "Why?"}, {"prompt": "How?"}]
    found = read(rows)
    assert [prompt.where for prompt in found.prompts] == ["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:4"]
    assert (found.rows, found.repeated) == (4, 1)
    assert len({prompt.key for prompt in found.prompts}) == 3
    assert len(read(rows, "data.max_train_samples=2").prompts) == 2
    assert len(read_prompts(load_conf([]).data).prompts) == 128


def test_bad_rows_are_named_up_to_the_limit_of_the_data() -> None:
    rows = [{"prompt": "Why?"}] * 3 + [{"prompt": "  "}]
    with pytest.raises(DataError, match=r"`data`: 1 of 4 rows cannot be used.*\(1 empty prompt\).* rows.jsonl:4"):
        read(rows)
    [(where, error)] = read(rows, "data.max_bad_fraction=0.3").bad
    assert (where, error.reason) == ("rows.jsonl:4", "empty prompt")
    with pytest.raises(DataError, match=r"^rows.jsonl:4: empty prompt"):
        read(rows, "data.on_bad_row=error")


def test_rows_without_a_prompt_and_settings_of_pairs_are_refused() -> None:
    with pytest.raises(DataError, match=r"has no prompts; columns: text; needed is prompt"):
        read([{"text": "Why?"}])
    assert read([{"text": "Why?"}], "data.columns.text=prompt").prompts[0].messages == WHY
    with pytest.raises(ConfigError, match=r"`data.sources.a.weight=2.0`: is about pairs"):
        read_prompts(load_conf(["data=local_file", "data.sources.a.path=rows.jsonl", "data.sources.a.weight=2"]).data)

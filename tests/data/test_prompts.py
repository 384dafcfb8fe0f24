"""Prompts of files without answers, and of preference pairs in any layout."""

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_runner.config.compose import load_conf
from dpo_runner.config.sections.data import DataConf, SourceConf
from dpo_runner.data.prompts import Prompts, read_file_of_prompts, read_prompts, read_split_prompts, write_prompts
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


def test_prompts_are_held_out_by_rows_a_share_or_a_file(tmp_path: Path) -> None:
    def write(name: str, texts: list[str]) -> str:
        (tmp_path / name).write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        return str(tmp_path / name)

    def texts(side: Prompts) -> list[str]:
        return [prompt.messages[-1]["content"] for prompt in side.prompts]

    numbers = [f"What is {number}?" for number in range(40)]
    rows, evaluation = write("rows.jsonl", numbers), write("evaluation.jsonl", ["What is 3?", "Who?"])
    trained, held_out = read_split_prompts(DataConf(path=rows, eval_path=evaluation, max_train_samples=5))
    assert texts(held_out) == ["What is 3?", "Who?"] and texts(trained) == [numbers[at] for at in (0, 1, 2, 4, 5)]

    trained, held_out = read_split_prompts(DataConf(path=rows, eval_fraction=0.25))
    assert sorted(texts(trained) + texts(held_out)) == sorted(numbers) and 5 <= len(held_out.prompts) <= 15
    _, same = read_split_prompts(DataConf(path=write("fewer.jsonl", numbers[:30]), eval_fraction=0.25))
    assert set(texts(same)) == set(texts(held_out)) & set(numbers[:30])  # a prompt's side depends on it alone
    assert (
        texts(read_split_prompts(DataConf(path=rows, eval_fraction=0.25, max_eval_samples=2))[1]) == texts(held_out)[:2]
    )

    given = read_file_of_prompts(evaluation)
    assert texts(read_split_prompts(DataConf(path=rows), given)[0]) == [
        text for text in numbers if text != "What is 3?"
    ]
    mixed = {"a": SourceConf(path=rows, eval_path=evaluation), "b": SourceConf(path=write("b.jsonl", ["b?", "c?"]))}
    trained, held_out = read_split_prompts(DataConf(sources=mixed, eval_fraction=0.5))
    assert len(trained.prompts) == 39 + 1 and len(held_out.prompts) == 2 + 1
    with pytest.raises(DataError, match="no prompt is held out"):
        read_split_prompts(DataConf(path=rows, eval_fraction=0))

    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    row = {"prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "[1]"}], "tools": tools}
    (tmp_path / "tools.jsonl").write_text(json.dumps({**row, "chat_template_kwargs": {"k": 1}}) + "\n")
    whole = read_file_of_prompts(str(tmp_path / "tools.jsonl")).prompts
    write_prompts(tmp_path / "written.jsonl", whole)
    written = read_file_of_prompts(str(tmp_path / "written.jsonl")).prompts
    assert [one.key for one in written] == [one.key for one in whole] and written[0].variables["k"] == 1
